/* The part of ONNX Runtime's C interface that attention_ort.c uses, written out, because its packages have no headers.
 *
 * After include/onnxruntime/core/session/onnxruntime_c_api.h of https://github.com/microsoft/onnxruntime (MIT licence).
 * The interface is a table of function pointers that only ever grows at its end: a function keeps its index for good,
 * which onnxruntime/core/session/onnxruntime_c_api.cc asserts for the last one of each version (ReleaseCustomOpDomain,
 * the last of version 1, is 101; ReleaseKernelInfo, of version 12, is 218; of version 17, 275 follows ParallelFor). So is
 * struct OrtCustomOp, whose `version` says how much of it there is.
 */
#ifndef EDGEVLM_ORT_ABI_H
#define EDGEVLM_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus; /* NULL: success */
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtShapeInferContext OrtShapeInferContext;

/* The first version with ParallelFor: ONNX Runtime 1.17. */
enum { ORT_VERSION_NEEDED = 17, ORT_VERSION_OF_CREATE_STATUS = 1 };

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };           /* OrtErrorCode */
enum { ORT_FLOAT = 1 };                                    /* ONNXTensorElementDataType */
enum { ORT_REQUIRED = 0 };                                 /* OrtCustomOpInputOutputCharacteristic */
enum { ORT_ARENA_ALLOCATOR = 1, ORT_MEM_TYPE_DEFAULT = 0 }; /* OrtAllocatorType, OrtMemType */

typedef void (*ort_function)(void);

/* const OrtApi * */
typedef const ort_function *ort_api;

typedef struct OrtApiBase {
    ort_api (*get_api)(uint32_t version); /* NULL: this ONNX Runtime is older */
    const char *(*get_version_string)(void);
} OrtApiBase;

/* X(index, name, result, arguments) */
#define ORT_FUNCTIONS(X)                                                                                              \
    X(0, CreateStatus, OrtStatus *, (int code, const char *message))                                                  \
    X(26, CreateCustomOpDomain, OrtStatus *, (const char *name, OrtCustomOpDomain **domain))                          \
    X(27, CustomOpDomain_Add, OrtStatus *, (OrtCustomOpDomain *, const struct OrtCustomOp *))                         \
    X(28, AddCustomOpDomain, OrtStatus *, (OrtSessionOptions *, OrtCustomOpDomain *))                                 \
    X(51, GetTensorMutableData, OrtStatus *, (OrtValue *, void **data))                                               \
    X(61, GetDimensionsCount, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, size_t *))                             \
    X(62, GetDimensions, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, int64_t *sizes, size_t n))                  \
    X(65, GetTensorTypeAndShape, OrtStatus *, (const OrtValue *, OrtTensorTypeAndShapeInfo **))                       \
    X(69, CreateCpuMemoryInfo, OrtStatus *, (int allocator_type, int mem_type, OrtMemoryInfo **))                     \
    X(75, AllocatorAlloc, OrtStatus *, (OrtAllocator *, size_t, void **))                                             \
    X(76, AllocatorFree, OrtStatus *, (OrtAllocator *, void *))                                                       \
    X(86, KernelInfoGetAttribute_int64, OrtStatus *, (const OrtKernelInfo *, const char *name, int64_t *))            \
    X(90, KernelContext_GetInput, OrtStatus *, (const OrtKernelContext *, size_t index, const OrtValue **))           \
    X(91, KernelContext_GetOutput, OrtStatus *,                                                                       \
      (OrtKernelContext *, size_t index, const int64_t *sizes, size_t n, OrtValue **))                                \
    X(94, ReleaseMemoryInfo, void, (OrtMemoryInfo *))                                                                 \
    X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo *))                                         \
    X(132, ReleaseAllocator, void, (OrtAllocator *))                                                                  \
    X(253, KernelContext_GetAllocator, OrtStatus *,                                                                   \
      (const OrtKernelContext *, const OrtMemoryInfo *, OrtAllocator **))                                             \
    X(274, KernelContext_ParallelFor, OrtStatus *,                                                                    \
      (const OrtKernelContext *, void (*task)(void *data, size_t index), size_t n, size_t batches, void *data))

struct OrtCustomOp;

/* ORT_CreateStatus(api, ...), and so on */
#define ORT_INDEX(index, name, result, arguments) ORT_INDEX_##name = (index),
enum { ORT_FUNCTIONS(ORT_INDEX) };
#define ORT_TYPE(index, name, result, arguments) typedef result(*ort_##name) arguments;
ORT_FUNCTIONS(ORT_TYPE)
#define ORT(api, name) ((ort_##name)(api)[ORT_INDEX_##name])

/* An operator: its schema and its kernel. */
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const struct OrtCustomOp *, ort_api, const OrtKernelInfo *);
    const char *(*GetName)(const struct OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const struct OrtCustomOp *); /* NULL: the CPU's */
    int (*GetInputType)(const struct OrtCustomOp *, size_t index);
    size_t (*GetInputTypeCount)(const struct OrtCustomOp *);
    int (*GetOutputType)(const struct OrtCustomOp *, size_t index);
    size_t (*GetOutputTypeCount)(const struct OrtCustomOp *);
    void (*KernelCompute)(void *kernel, OrtKernelContext *);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const struct OrtCustomOp *, size_t index);
    int (*GetOutputCharacteristic)(const struct OrtCustomOp *, size_t index);
    int (*GetInputMemoryType)(const struct OrtCustomOp *, size_t index);
    int (*GetVariadicInputMinArity)(const struct OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const struct OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const struct OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const struct OrtCustomOp *);
    /* from version 16 on, in the place of CreateKernel and KernelCompute: they may fail */
    OrtStatus *(*CreateKernelV2)(const struct OrtCustomOp *, ort_api, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
    /* from version 17 on */
    OrtStatus *(*InferOutputShapeFn)(const struct OrtCustomOp *, OrtShapeInferContext *);
    int (*GetStartVersion)(const struct OrtCustomOp *);
    int (*GetEndVersion)(const struct OrtCustomOp *);
};

#endif
