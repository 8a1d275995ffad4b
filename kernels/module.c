/* CPython binding of the kernels: `edgevlm._kernels`. Private; `edgevlm/kernels.py` is the interface.
 *
 * Checks arguments, releases the GIL, and calls. No arithmetic on pixels. It speaks the buffer protocol only, so it
 * builds without numpy and, with the limited API, once for all Python versions from 3.11 on.
 */
#include "module.h"

#include <string.h>

struct module_state {
    PyObject *unknown_target;
    PyObject *unsupported_target;
    struct kernel_ops active; /* valid once `active.name` is set: the target is chosen at the first use, and once */
};

static struct module_state *state_of(PyObject *module) {
    return PyModule_GetState(module);
}

bool select_target(PyObject *module, const char *name, struct kernel_ops *ops) {
    struct module_state *state = state_of(module);
    if (!name && state->active.name) {
        *ops = state->active;
        return true;
    }
    char message[512];
    switch (kernels_select(name, kernels_cpu_features(), ops, message, sizeof message)) {
    /* PyErr_Format decodes leniently: a name may be no UTF-8, or be cut inside a character. */
    case SELECT_UNKNOWN: PyErr_Format(state->unknown_target, "%s", message); return false;
    case SELECT_UNSUPPORTED: PyErr_Format(state->unsupported_target, "%s", message); return false;
    case SELECT_OK: break;
    }
    if (!name) {
        state->active = *ops;
    }
    return true;
}

bool take(PyObject *object, Py_buffer *view, const char *what, const char *format, int ndim, bool output) {
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
    if ((uintptr_t)view->buf % (size_t)view->itemsize != 0) {
        PyErr_Format(PyExc_ValueError, "%s: not aligned to its items of %zd bytes", what, view->itemsize);
        PyBuffer_Release(view);
        return false;
    }
    return true;
}

/* Whether samples are adjacent, pixels `pixel_bytes` apart and rows no closer than they are long. */
static bool is_packed(const Py_buffer *view, Py_ssize_t pixel_bytes) {
    Py_ssize_t height = view->shape[0], width = view->shape[1], channels = view->shape[2];
    /* Python sets no stride of an axis with one element to any particular value. */
    return (channels == 1 || view->strides[2] == 1) && (width == 1 || view->strides[1] == pixel_bytes) &&
           (height == 1 || view->strides[0] >= width * pixel_bytes);
}

bool take_image(PyObject *object, Py_buffer *view, const char *what, bool output, int *pixel_bytes) {
    if (!take(object, view, what, "B", 3, output)) {
        return false;
    }
    Py_ssize_t height = view->shape[0], width = view->shape[1], channels = view->shape[2];
    bool known = channels == 1 || channels == 3 || channels == 4;
    bool fits = height >= 1 && width >= 1 && height <= RESIZE_MAX_SIDE && width <= RESIZE_MAX_SIDE;
    bool packed = fits && is_packed(view, channels);
    bool spaced = fits && pixel_bytes && channels == 3 && is_packed(view, 4);
    if (!known || !fits) {
        PyErr_Format(PyExc_ValueError, "%s: needs sides of 1 to %d and 1, 3 or 4 channels, found (%zd, %zd, %zd)", what,
                     (int)RESIZE_MAX_SIDE, height, width, channels);
    } else if (!packed && !spaced) {
        PyErr_Format(PyExc_ValueError, "%s: pixels are not packed inside the rows", what);
    } else {
        if (pixel_bytes) {
            *pixel_bytes = packed ? (int)channels : 4;
        }
        return true;
    }
    PyBuffer_Release(view);
    return false;
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
    if (PyModule_AddFunctions(module, resize_methods) < 0 || PyModule_AddFunctions(module, frame_methods) < 0 ||
        PyModule_AddFunctions(module, attention_methods) < 0 ||
        PyModule_AddStringConstant(module, "COMPILER", KERNELS_COMPILER) < 0 ||
        PyModule_AddIntConstant(module, "MAX_SIDE", RESIZE_MAX_SIDE) < 0 ||
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
