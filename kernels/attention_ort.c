/* Attention in integers as an operator of ONNX Runtime: edgevlm.QkvAttention(qkv_BSE, bias_E; num_heads) -> out_BSD.
 *
 * This library is what SessionOptions.register_custom_ops_library() loads. Threads and memory are ONNX Runtime's own.
 */
#include "kernels.h"
#include "ort_abi.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { AXES = 3, INPUTS = 2 };

/* Of one node. */
struct kernel {
    ort_api api;
    const struct attention_ops *ops;
    OrtMemoryInfo *memory;
    int64_t heads;
};

static OrtStatus *refuse(ort_api api, const char *message) {
    return ORT(api, CreateStatus)(ORT_INVALID_ARGUMENT, message);
}

static void destroy(void *memory) {
    struct kernel *kernel = memory;
    if (kernel->memory) {
        ORT(kernel->api, ReleaseMemoryInfo)(kernel->memory);
    }
    free(kernel);
}

static OrtStatus *create(const struct OrtCustomOp *op, ort_api api, const OrtKernelInfo *info, void **created) {
    (void)op;
    struct kernel_ops ops;
    char message[512];
    if (kernels_select(NULL, kernels_cpu_features(), &ops, message, sizeof message) != SELECT_OK) {
        return refuse(api, message);
    }
    struct kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) {
        return ORT(api, CreateStatus)(ORT_FAIL, "QkvAttention: out of memory");
    }
    *kernel = (struct kernel){.api = api, .ops = ops.attention};
    OrtStatus *status = ORT(api, KernelInfoGetAttribute_int64)(info, "num_heads", &kernel->heads);
    if (!status && kernel->heads < 1) {
        status = refuse(api, "QkvAttention: num_heads must be at least 1");
    }
    if (!status) {
        status = ORT(api, CreateCpuMemoryInfo)(ORT_ARENA_ALLOCATOR, ORT_MEM_TYPE_DEFAULT, &kernel->memory);
    }
    if (status) {
        destroy(kernel);
        return status;
    }
    *created = kernel;
    return NULL;
}

/* Input `index`: its data, its sizes and how many axes it has. */
static OrtStatus *take_input(ort_api api, const OrtKernelContext *context, size_t index, const float **data,
                             int64_t sizes[AXES], size_t *axes) {
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *shape = NULL;
    OrtStatus *status = ORT(api, KernelContext_GetInput)(context, index, &value);
    if (!status) {
        status = ORT(api, GetTensorTypeAndShape)(value, &shape);
    }
    if (!status) {
        status = ORT(api, GetDimensionsCount)(shape, axes);
    }
    if (!status && *axes >= 1 && *axes <= AXES) {
        status = ORT(api, GetDimensions)(shape, sizes, *axes);
    }
    if (!status) {
        status = ORT(api, GetTensorMutableData)((OrtValue *)(uintptr_t)value, (void **)(uintptr_t)data);
    }
    if (shape) {
        ORT(api, ReleaseTensorTypeAndShapeInfo)(shape);
    }
    return status;
}

/* Sizes and inputs of a call. */
static OrtStatus *measure(const struct kernel *kernel, const OrtKernelContext *context, struct attention *a) {
    int64_t qkv[AXES] = {0}, bias[AXES] = {0};
    size_t qkv_axes = 0, bias_axes = 0;
    OrtStatus *status = take_input(kernel->api, context, 0, &a->qkv, qkv, &qkv_axes);
    if (!status) {
        status = take_input(kernel->api, context, 1, &a->bias, bias, &bias_axes);
    }
    if (status) {
        return status;
    }
    char message[256];
    int64_t heads = kernel->heads;
    if (qkv_axes != AXES || bias_axes != 1 || bias[0] != qkv[2] || qkv[2] % 3 != 0 || qkv[2] / 3 % heads != 0) {
        snprintf(message, sizeof message,
                 "QkvAttention: needs qkv of three axes, the last three times a multiple of %lld heads, and a bias as "
                 "long; found %zu axes, the last of %lld, and a bias of %lld",
                 (long long)heads, qkv_axes, (long long)qkv[2], (long long)bias[0]);
        return refuse(kernel->api, message);
    }
    a->batch = (size_t)qkv[0];
    a->tokens = (size_t)qkv[1];
    a->heads = (size_t)heads;
    a->width = (size_t)(qkv[2] / 3 / heads);
    return attention_init(a, message, sizeof message) ? refuse(kernel->api, message) : NULL;
}

struct round {
    struct attention call;
    const struct attention_ops *ops;
    void *scratch;
};

static void prepare_task(void *data, size_t task) {
    const struct round *round = data;
    attention_prepare(&round->call, round->ops, round->scratch, task);
}

static void rows_task(void *data, size_t task) {
    const struct round *round = data;
    attention_rows(&round->call, round->ops, round->scratch, task);
}

static OrtStatus *run(const struct kernel *kernel, const OrtKernelContext *context, struct round *round,
                      OrtAllocator *allocator) {
    ort_api api = kernel->api;
    void *memory = NULL;
    size_t bytes = attention_scratch(&round->call, kernel->ops) + ATTENTION_ALIGNMENT;
    OrtStatus *status = ORT(api, AllocatorAlloc)(allocator, bytes, &memory);
    if (status) {
        return status;
    }
    round->scratch = (void *)attention_padded((uintptr_t)memory, ATTENTION_ALIGNMENT);
    size_t heads = attention_prepare_tasks(&round->call), rows = attention_row_tasks(&round->call);
    status = ORT(api, KernelContext_ParallelFor)(context, prepare_task, heads, 0, round);
    if (!status) {
        status = ORT(api, KernelContext_ParallelFor)(context, rows_task, rows, 0, round);
    }
    OrtStatus *freed = ORT(api, AllocatorFree)(allocator, memory);
    return status ? status : freed;
}

static OrtStatus *compute(void *memory, OrtKernelContext *context) {
    const struct kernel *kernel = memory;
    ort_api api = kernel->api;
    struct round round = {.ops = kernel->ops};
    OrtValue *out = NULL;
    OrtAllocator *allocator = NULL;
    OrtStatus *status = measure(kernel, context, &round.call);
    if (!status) {
        const struct attention *a = &round.call;
        int64_t sizes[AXES] = {(int64_t)a->batch, (int64_t)a->tokens, (int64_t)(a->heads * a->width)};
        status = ORT(api, KernelContext_GetOutput)(context, 0, sizes, AXES, &out);
    }
    if (!status) {
        status = ORT(api, GetTensorMutableData)(out, (void **)(uintptr_t)&round.call.out);
    }
    if (!status && round.call.batch > 0) {
        status = ORT(api, KernelContext_GetAllocator)(context, kernel->memory, &allocator);
        if (!status) {
            status = run(kernel, context, &round, allocator);
            ORT(api, ReleaseAllocator)(allocator);
        }
    }
    return status;
}

/* ---- the schema ---- */

static const char *name(const struct OrtCustomOp *op) {
    (void)op;
    return "QkvAttention";
}

static const char *on_the_cpu(const struct OrtCustomOp *op) {
    (void)op;
    return NULL;
}

static int type_float(const struct OrtCustomOp *op, size_t index) {
    (void)op;
    (void)index;
    return ORT_FLOAT;
}

static size_t two(const struct OrtCustomOp *op) {
    (void)op;
    return INPUTS;
}

static size_t one(const struct OrtCustomOp *op) {
    (void)op;
    return 1;
}

static int required(const struct OrtCustomOp *op, size_t index) {
    (void)op;
    (void)index;
    return ORT_REQUIRED;
}

static int memory_default(const struct OrtCustomOp *op, size_t index) {
    (void)op;
    (void)index;
    return ORT_MEM_TYPE_DEFAULT;
}

static int first_version(const struct OrtCustomOp *op) {
    (void)op;
    return 1;
}

static int last_version(const struct OrtCustomOp *op) {
    (void)op;
    return INT_MAX;
}

static const struct OrtCustomOp qkv_attention = {
    .version = ORT_VERSION_NEEDED,
    .GetName = name,
    .GetExecutionProviderType = on_the_cpu,
    .GetInputType = type_float,
    .GetInputTypeCount = two,
    .GetOutputType = type_float,
    .GetOutputTypeCount = one,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = required,
    .GetOutputCharacteristic = required,
    .GetInputMemoryType = memory_default,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = first_version,
    .GetEndVersion = last_version,
};

/* Called by ONNX Runtime. The domain lives as long as the process: sessions refer to it until their end. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static _Atomic(OrtCustomOpDomain *) shared;
    ort_api api = base->get_api(ORT_VERSION_NEEDED);
    if (!api) {
        char message[160];
        snprintf(message, sizeof message, "edgevlm's operators need ONNX Runtime 1.%d or later, this is %.32s",
                 (int)ORT_VERSION_NEEDED, base->get_version_string());
        api = base->get_api(ORT_VERSION_OF_CREATE_STATUS);
        return ORT(api, CreateStatus)(ORT_FAIL, message);
    }
    OrtCustomOpDomain *domain = atomic_load(&shared);
    if (!domain) {
        OrtStatus *status = ORT(api, CreateCustomOpDomain)("edgevlm", &domain);
        if (!status) {
            status = ORT(api, CustomOpDomain_Add)(domain, &qkv_attention);
        }
        if (status) {
            return status;
        }
        OrtCustomOpDomain *none = NULL;
        if (!atomic_compare_exchange_strong(&shared, &none, domain)) {
            domain = none; /* another thread was first; a few bytes are lost, once */
        }
    }
    return ORT(api, AddCustomOpDomain)(options, domain);
}
