/* CPython binding of the frame kernels: checks arguments, releases the GIL, calls. See module.c. */
#include "module.h"

#include <string.h>

static const char *const layout_names[YUV_LAYOUT_COUNT + 1] = {
    [YUV_YUYV] = "yuyv", [YUV_NV12] = "nv12", [YUV_I420] = "i420"};
static const char *const matrix_names[YUV_MATRIX_COUNT + 1] = {[YUV_BT601] = "bt601", [YUV_BT709] = "bt709"};

/* Index of `name` in `names`, which NULL ends; -1 with an exception set. */
static int parse_name(const char *what, const char *name, const char *const *names, const char *valid) {
    for (int i = 0; names[i]; i++) {
        if (strcmp(name, names[i]) == 0) {
            return i;
        }
    }
    PyErr_Format(PyExc_ValueError, "%s='%.64s': not known; use %s", what, name, valid);
    return -1;
}

/* Layout, size and stride of a frame as Python passed them; stride 0 means packed rows. */
static bool parse_frame(struct yuv_frame *frame, const char *layout_name, Py_ssize_t height, Py_ssize_t width,
                        Py_ssize_t stride) {
    int layout = parse_name("layout", layout_name, layout_names, "yuyv, nv12 or i420");
    if (layout < 0) {
        return false;
    }
    if (height < 1 || width < 1 || height > RESIZE_MAX_SIDE || width > RESIZE_MAX_SIDE) {
        PyErr_Format(PyExc_ValueError, "a frame of height %zd, width %zd: sides go from 1 to %d", height, width,
                     (int)RESIZE_MAX_SIDE);
        return false;
    }
    enum { MAX_STRIDE = 4 * RESIZE_MAX_SIDE }; /* so that sizes stay far below 2^64 */
    size_t row_bytes = kernels_yuv_row_bytes((enum yuv_layout)layout, (int32_t)width);
    if (stride != 0 && (stride < (Py_ssize_t)row_bytes || stride > MAX_STRIDE)) {
        PyErr_Format(PyExc_ValueError, "stride=%zd: a row of %zd pixels in %s takes %zu bytes, at most %d are accepted",
                     stride, width, layout_name, row_bytes, (int)MAX_STRIDE);
        return false;
    }
    *frame = (struct yuv_frame){.layout = (enum yuv_layout)layout,
                                .height = (int32_t)height,
                                .width = (int32_t)width,
                                .stride = stride ? (size_t)stride : row_bytes};
    return true;
}

PyDoc_STRVAR(yuv_size_doc, "yuv_size(layout, height, width, stride)\n--\n\n"
                           "Bytes of a frame; stride 0 means packed rows.");

static PyObject *py_yuv_size(PyObject *module, PyObject *arguments) {
    (void)module;
    const char *layout;
    Py_ssize_t height, width, stride;
    struct yuv_frame frame;
    if (!PyArg_ParseTuple(arguments, "snnn:yuv_size", &layout, &height, &width, &stride) ||
        !parse_frame(&frame, layout, height, width, stride)) {
        return NULL;
    }
    return PyLong_FromUnsignedLongLong(kernels_yuv_size(frame.layout, frame.height, frame.stride));
}

/* The destination gives height and width. */
static bool check_frame(struct yuv_frame *frame, const char *layout, Py_ssize_t stride, const Py_buffer *src,
                        const Py_buffer *dst) {
    if (dst->shape[2] != 3) {
        PyErr_Format(PyExc_ValueError, "destination: needs 3 channels, found %zd", dst->shape[2]);
        return false;
    }
    if (!parse_frame(frame, layout, dst->shape[0], dst->shape[1], stride)) {
        return false;
    }
    uint64_t needed = kernels_yuv_size(frame->layout, frame->height, frame->stride);
    if (!PyBuffer_IsContiguous(src, 'C') || (uint64_t)src->len != needed) {
        PyErr_Format(PyExc_ValueError, "a %s frame of %d x %d with stride %zu has %llu bytes in one block, found %zd",
                     layout, frame->width, frame->height, frame->stride, (unsigned long long)needed, src->len);
        return false;
    }
    frame->data = src->buf;
    return true;
}

PyDoc_STRVAR(yuv_to_rgb_doc, "yuv_to_rgb(src, dst_HWC, layout, matrix, full_range, stride, target)\n--\n\n"
                             "Convert the uint8 block src; stride 0 means packed rows.");

static PyObject *py_yuv_to_rgb(PyObject *module, PyObject *arguments) {
    PyObject *src_object, *dst_object;
    const char *layout, *matrix_name, *target;
    int full_range;
    Py_ssize_t stride;
    struct kernel_ops ops;
    Py_buffer src, dst;
    if (!PyArg_ParseTuple(arguments, "OOsspnz:yuv_to_rgb", &src_object, &dst_object, &layout, &matrix_name, &full_range,
                          &stride, &target)) {
        return NULL;
    }
    int matrix = parse_name("matrix", matrix_name, matrix_names, "bt601 or bt709");
    if (matrix < 0 || !select_target(module, target, &ops) || !take(src_object, &src, "frame", "B", 1, false)) {
        return NULL;
    }
    if (!take_image(dst_object, &dst, "destination", true, NULL)) {
        PyBuffer_Release(&src);
        return NULL;
    }
    PyObject *result = NULL;
    struct yuv_frame frame;
    if (check_frame(&frame, layout, stride, &src, &dst)) {
        struct yuv_weights weights = kernels_yuv_weights((enum yuv_matrix)matrix, full_range);
        Py_BEGIN_ALLOW_THREADS
        kernels_yuv_to_rgb(&ops, &frame, &weights, dst.buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return result;
}

static bool check_composite(const Py_buffer *src, const Py_buffer *dst) {
    if (src->shape[2] != 4 || dst->shape[2] != 3 || src->shape[0] != dst->shape[0] || src->shape[1] != dst->shape[1]) {
        PyErr_Format(PyExc_ValueError, "composite (%zd, %zd, %zd) into (%zd, %zd, %zd): needs RGBA and RGB of one size",
                     src->shape[0], src->shape[1], src->shape[2], dst->shape[0], dst->shape[1], dst->shape[2]);
        return false;
    }
    return true;
}

PyDoc_STRVAR(composite_doc, "composite(src_HWC, dst_HWC, (red, green, blue), target)\n--\n\n"
                            "Store RGBA src_HWC over a colour in RGB dst_HWC.");

static PyObject *py_composite(PyObject *module, PyObject *arguments) {
    PyObject *src_object, *dst_object;
    uint8_t background[3]; /* "b" refuses what is not in 0..255 */
    const char *target;
    struct kernel_ops ops;
    Py_buffer src, dst;
    if (!PyArg_ParseTuple(arguments, "OO(bbb)z:composite", &src_object, &dst_object, &background[0], &background[1],
                          &background[2], &target) ||
        !select_target(module, target, &ops) || !take_image(src_object, &src, "source", false, NULL)) {
        return NULL;
    }
    if (!take_image(dst_object, &dst, "destination", true, NULL)) {
        PyBuffer_Release(&src);
        return NULL;
    }
    PyObject *result = NULL;
    if (check_composite(&src, &dst)) {
        Py_BEGIN_ALLOW_THREADS
        kernels_composite(&ops, src.buf, (size_t)src.strides[0], (size_t)src.shape[0], (size_t)src.shape[1], background,
                          dst.buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return result;
}

PyDoc_STRVAR(sum_abs_diff_doc, "sum_abs_diff(a_HWC, b_HWC, target)\n--\n\nSum of |a - b| over all samples.");

static PyObject *py_sum_abs_diff(PyObject *module, PyObject *arguments) {
    PyObject *a_object, *b_object;
    const char *target;
    struct kernel_ops ops;
    Py_buffer a, b;
    if (!PyArg_ParseTuple(arguments, "OOz:sum_abs_diff", &a_object, &b_object, &target) ||
        !select_target(module, target, &ops) || !take_image(a_object, &a, "first frame", false, NULL)) {
        return NULL;
    }
    if (!take_image(b_object, &b, "second frame", false, NULL)) {
        PyBuffer_Release(&a);
        return NULL;
    }
    PyObject *result = NULL;
    if (a.shape[0] != b.shape[0] || a.shape[1] != b.shape[1] || a.shape[2] != b.shape[2]) {
        PyErr_Format(PyExc_ValueError, "the frames differ in shape: (%zd, %zd, %zd) and (%zd, %zd, %zd)", a.shape[0],
                     a.shape[1], a.shape[2], b.shape[0], b.shape[1], b.shape[2]);
    } else {
        uint64_t sum;
        Py_BEGIN_ALLOW_THREADS
        sum = kernels_sum_abs_diff(&ops, a.buf, (size_t)a.strides[0], b.buf, (size_t)b.strides[0], (size_t)a.shape[0],
                                   (size_t)(a.shape[1] * a.shape[2]));
        Py_END_ALLOW_THREADS
        result = PyLong_FromUnsignedLongLong(sum);
    }
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    return result;
}

PyMethodDef frame_methods[] = {
    {"yuv_size", py_yuv_size, METH_VARARGS, yuv_size_doc},
    {"yuv_to_rgb", py_yuv_to_rgb, METH_VARARGS, yuv_to_rgb_doc},
    {"composite", py_composite, METH_VARARGS, composite_doc},
    {"sum_abs_diff", py_sum_abs_diff, METH_VARARGS, sum_abs_diff_doc},
    {NULL, NULL, 0, NULL},
};
