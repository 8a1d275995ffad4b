/* CPython binding of the kernels: `edgevlm._kernels`. Private; `edgevlm/kernels.py` is the interface.
 *
 * Checks arguments, releases the GIL, and calls. No arithmetic on pixels. It speaks the buffer protocol only, so it
 * builds without numpy and, with the limited API, once for all Python versions from 3.11 on.
 */
#ifndef Py_LIMITED_API /* CMake's USE_SABI defines it, too */
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#include <string.h>

struct module_state {
    PyObject *unknown_target;
    PyObject *unsupported_target;
    struct kernel_ops active; /* valid once `active.name` is set: the target is chosen at the first use, and once */
};

static struct module_state *state_of(PyObject *module) {
    return PyModule_GetState(module);
}

/* The table of target `name`; NULL stands for the active one. False with an exception set. */
static bool select_target(PyObject *module, const char *name, struct kernel_ops *ops) {
    struct module_state *state = state_of(module);
    if (!name && state->active.name) {
        *ops = state->active;
        return true;
    }
    char message[512];
    switch (kernels_select(name, kernels_cpu_features(), ops, message, sizeof message)) {
    case SELECT_UNKNOWN: PyErr_SetString(state->unknown_target, message); return false;
    case SELECT_UNSUPPORTED: PyErr_SetString(state->unsupported_target, message); return false;
    case SELECT_OK: break;
    }
    if (!name) {
        state->active = *ops;
    }
    return true;
}

/* Take a buffer of `ndim` axes of `format` ("B" or "f"). Output must be packed; input may have spaced rows. */
static bool take(PyObject *object, Py_buffer *view, const char *what, const char *format, int ndim, bool output) {
    int flags = output ? PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE : PyBUF_STRIDES;
    if (PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT) < 0) {
        return false;
    }
    if (view->ndim != ndim || !view->format || strcmp(view->format, format) != 0) {
        PyErr_Format(PyExc_TypeError, "%s: needs %d axes of format '%s', found %d of '%s'", what, ndim, format,
                     view->ndim, view->format ? view->format : "?");
        PyBuffer_Release(view);
        return false;
    }
    return true;
}

/* Take a uint8 picture (H, W, C) whose pixels are packed inside each row. */
static bool take_image(PyObject *object, Py_buffer *view, const char *what, bool output) {
    if (!take(object, view, what, "B", 3, output)) {
        return false;
    }
    Py_ssize_t height = view->shape[0], width = view->shape[1], channels = view->shape[2];
    bool known = channels == 1 || channels == 3 || channels == 4;
    bool fits = height >= 1 && width >= 1 && height <= RESIZE_MAX_SIDE && width <= RESIZE_MAX_SIDE;
    if (!known || !fits) {
        PyErr_Format(PyExc_ValueError, "%s: needs sides of 1 to %d and 1, 3 or 4 channels, found (%zd, %zd, %zd)", what,
                     (int)RESIZE_MAX_SIDE, height, width, channels);
    } else if ((channels > 1 && view->strides[2] != 1) || (width > 1 && view->strides[1] != channels) ||
               (height > 1 && view->strides[0] < width * channels)) {
        PyErr_Format(PyExc_ValueError, "%s: pixels are not packed inside the rows", what);
    } else {
        return true;
    }
    PyBuffer_Release(view);
    return false;
}

static const char *const filter_names[FILTER_COUNT] = {
    [FILTER_BOX] = "box",         [FILTER_BILINEAR] = "bilinear", [FILTER_HAMMING] = "hamming",
    [FILTER_BICUBIC] = "bicubic", [FILTER_LANCZOS] = "lanczos",
};

/* Arguments of resize() besides the pictures, as Python passed them. */
struct resize_args {
    int height, width; /* of the whole output */
    int top, left;     /* of the window that is computed; its size is the destination's */
    float x0, y0, x1, y1;
    enum resize_filter filter;
    const char *target;
};

static bool parse_filter(const char *name, enum resize_filter *filter) {
    for (int i = 0; i < FILTER_COUNT; i++) {
        if (strcmp(name, filter_names[i]) == 0) {
            *filter = (enum resize_filter)i;
            return true;
        }
    }
    PyErr_Format(PyExc_ValueError,
                 "resample='%.64s': no filter has that name; use box, bilinear, hamming, bicubic or lanczos", name);
    return false;
}

/* Ranges that the kernels rely on. Comparisons are written so that a NaN fails them. */
static bool check_ranges(const struct resize_args *args, const Py_buffer *src, const Py_buffer *dst) {
    int n_max = RESIZE_MAX_SIDE;
    if (args->height < 1 || args->width < 1 || args->height > n_max || args->width > n_max) {
        PyErr_Format(PyExc_ValueError, "resize to height %d, width %d: sides go from 1 to %d", args->height,
                     args->width, n_max);
    } else if (src->shape[2] != dst->shape[2]) {
        PyErr_Format(PyExc_ValueError, "source and destination have %zd and %zd channels", src->shape[2],
                     dst->shape[2]);
    } else if (args->top < 0 || args->left < 0 || dst->shape[0] > args->height - args->top ||
               dst->shape[1] > args->width - args->left) {
        PyErr_Format(PyExc_ValueError, "window (%d, %d, %zd, %zd) is not inside the output of %d x %d", args->top,
                     args->left, dst->shape[0], dst->shape[1], args->height, args->width);
    } else if (!(args->x0 >= 0 && args->y0 >= 0 && args->x0 <= args->x1 && args->y0 <= args->y1 &&
                 args->x1 <= (float)src->shape[1] && args->y1 <= (float)src->shape[0])) {
        PyErr_Format(PyExc_ValueError,
                     "box is not inside the picture of height %zd, width %zd; pass (left, top, right, bottom) in pixels",
                     src->shape[0], src->shape[1]);
    } else {
        return true;
    }
    return false;
}

/* Everything after the checks; runs without the GIL. */
static bool resize_views(const struct kernel_ops *ops, const struct resize_args *args, const Py_buffer *src,
                         const Py_buffer *dst) {
    struct resize_axis x_axis, y_axis;
    if (!resize_axis_init(&x_axis, args->filter, (int32_t)src->shape[1], args->x0, args->x1, args->width, args->left,
                          (int32_t)dst->shape[1])) {
        return false;
    }
    bool ok = resize_axis_init(&y_axis, args->filter, (int32_t)src->shape[0], args->y0, args->y1, args->height,
                               args->top, (int32_t)dst->shape[0]);
    if (ok) {
        ok = kernels_resize(ops, src->buf, (size_t)src->strides[0], dst->buf, (int)src->shape[2], &x_axis, &y_axis);
        resize_axis_free(&y_axis);
    }
    resize_axis_free(&x_axis);
    return ok;
}

PyDoc_STRVAR(resize_doc, "resize(src_HWC, dst_HWC, resample, (height, width), (left, top, right, bottom), "
                         "(window_top, window_left), target)\n--\n\n"
                         "Resample uint8 src_HWC to height x width and store the window in dst_HWC.");

static PyObject *py_resize(PyObject *module, PyObject *arguments) {
    PyObject *src_object, *dst_object;
    const char *resample;
    struct resize_args args;
    if (!PyArg_ParseTuple(arguments, "OOs(ii)(ffff)(ii)z:resize", &src_object, &dst_object, &resample, &args.height,
                          &args.width, &args.x0, &args.y0, &args.x1, &args.y1, &args.top, &args.left, &args.target)) {
        return NULL;
    }
    struct kernel_ops ops;
    Py_buffer src, dst;
    if (!parse_filter(resample, &args.filter) || !select_target(module, args.target, &ops) ||
        !take_image(src_object, &src, "source", false)) {
        return NULL;
    }
    if (!take_image(dst_object, &dst, "destination", true)) {
        PyBuffer_Release(&src);
        return NULL;
    }
    PyObject *result = NULL;
    if (check_ranges(&args, &src, &dst)) {
        bool ok;
        Py_BEGIN_ALLOW_THREADS
        ok = resize_views(&ops, &args, &src, &dst);
        Py_END_ALLOW_THREADS
        result = ok ? Py_NewRef(Py_None) : PyErr_NoMemory();
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return result;
}

static bool check_normalize(const Py_buffer *src, const Py_buffer *lut, const Py_buffer *dst) {
    if (src->shape[2] != 3 || dst->shape[0] != 3 || dst->shape[1] != src->shape[0] || dst->shape[2] != src->shape[1]) {
        PyErr_Format(PyExc_ValueError, "normalize (%zd, %zd, %zd) into (%zd, %zd, %zd): needs HWC and CHW with 3 channels",
                     src->shape[0], src->shape[1], src->shape[2], dst->shape[0], dst->shape[1], dst->shape[2]);
        return false;
    }
    if (lut->shape[0] != 3 || lut->shape[1] != 256 || !PyBuffer_IsContiguous(lut, 'C')) {
        PyErr_SetString(PyExc_ValueError, "the lookup table must be a packed (3, 256)");
        return false;
    }
    return true;
}

PyDoc_STRVAR(normalize_doc, "normalize(src_HWC, lut_C256, dst_CHW, target)\n--\n\n"
                            "Store lut_C256[c, src_HWC[y, x, c]] in dst_CHW[c, y, x].");

static PyObject *py_normalize(PyObject *module, PyObject *arguments) {
    PyObject *src_object, *lut_object, *dst_object;
    const char *target;
    struct kernel_ops ops;
    Py_buffer src, lut, dst;
    if (!PyArg_ParseTuple(arguments, "OOOz:normalize", &src_object, &lut_object, &dst_object, &target) ||
        !select_target(module, target, &ops) || !take_image(src_object, &src, "source", false)) {
        return NULL;
    }
    if (!take(lut_object, &lut, "lookup table", "f", 2, false)) {
        PyBuffer_Release(&src);
        return NULL;
    }
    if (!take(dst_object, &dst, "destination", "f", 3, true)) {
        PyBuffer_Release(&src);
        PyBuffer_Release(&lut);
        return NULL;
    }
    PyObject *result = NULL;
    if (check_normalize(&src, &lut, &dst)) {
        size_t height = (size_t)src.shape[0], width = (size_t)src.shape[1];
        Py_BEGIN_ALLOW_THREADS
        for (size_t y = 0; y < height; y++) {
            const uint8_t *row = (const uint8_t *)src.buf + y * (size_t)src.strides[0];
            ops.normalize(row, (float *)dst.buf + y * width, height * width, width, lut.buf);
        }
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&lut);
    PyBuffer_Release(&dst);
    return result;
}

PyDoc_STRVAR(targets_doc, "targets()\n--\n\nNames of the targets that this CPU runs, slowest first.");

static PyObject *py_targets(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    PyObject *names = PyList_New(0);
    uint32_t features = kernels_cpu_features();
    for (const struct kernel_ops *const *target = kernels_targets(); names && *target; target++) {
        if (((*target)->needs & features) != (*target)->needs) {
            continue;
        }
        PyObject *name = PyUnicode_FromString((*target)->name);
        if (!name || PyList_Append(names, name) < 0) {
            Py_CLEAR(names);
        }
        Py_XDECREF(name);
    }
    return names;
}

PyDoc_STRVAR(active_doc, "active()\n--\n\nName of the target that is used when none is asked for.");

static PyObject *py_active(PyObject *module, PyObject *unused) {
    (void)unused;
    struct kernel_ops ops;
    return select_target(module, NULL, &ops) ? PyUnicode_FromString(ops.name) : NULL;
}

static PyMethodDef methods[] = {
    {"resize", py_resize, METH_VARARGS, resize_doc},
    {"normalize", py_normalize, METH_VARARGS, normalize_doc},
    {"targets", py_targets, METH_NOARGS, targets_doc},
    {"active", py_active, METH_NOARGS, active_doc},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    struct module_state *state = state_of(module);
    state->unknown_target = PyErr_NewException("edgevlm._kernels.UnknownTarget", PyExc_ValueError, NULL);
    state->unsupported_target = PyErr_NewException("edgevlm._kernels.UnsupportedTarget", PyExc_ValueError, NULL);
    if (!state->unknown_target || !state->unsupported_target) {
        return -1;
    }
    if (PyModule_AddIntConstant(module, "MAX_SIDE", RESIZE_MAX_SIDE) < 0 ||
        PyModule_AddObjectRef(module, "UnknownTarget", state->unknown_target) < 0 ||
        PyModule_AddObjectRef(module, "UnsupportedTarget", state->unsupported_target) < 0) {
        return -1;
    }
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    struct module_state *state = state_of(module);
    if (state) {
        Py_VISIT(state->unknown_target);
        Py_VISIT(state->unsupported_target);
    }
    return 0;
}

static int module_clear(PyObject *module) {
    struct module_state *state = state_of(module);
    if (state) {
        Py_CLEAR(state->unknown_target);
        Py_CLEAR(state->unsupported_target);
    }
    return 0;
}

static void module_free(void *module) {
    module_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)(uintptr_t)module_exec}, /* by way of an integer: ISO C has no direct cast */
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "edgevlm._kernels",
    .m_doc = "Image kernels in C; see edgevlm.kernels.",
    .m_size = sizeof(struct module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    return PyModuleDef_Init(&definition);
}
