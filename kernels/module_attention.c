/* CPython binding of attention in integers, for tests: ONNX Runtime calls it through attention_ort.c. See module.c. */
#include "module.h"

#include <stdlib.h>

PyDoc_STRVAR(attention_doc, "attention(qkv_BSE, bias_E, out_BSD, heads, target)\n--\n\n"
                            "Attention of queries, keys and values that lie behind each other in E = 3 D.");

/* Sizes from the buffers; false with an exception set. */
static bool measure(struct attention *a, const Py_buffer *qkv, const Py_buffer *bias, const Py_buffer *out,
                    Py_ssize_t heads) {
    Py_ssize_t all = qkv->shape[2];
    if (heads < 1 || all % 3 != 0 || all / 3 % heads != 0 || bias->shape[0] != all ||
        out->shape[0] != qkv->shape[0] || out->shape[1] != qkv->shape[1] || out->shape[2] != all / 3 ||
        !PyBuffer_IsContiguous(qkv, 'C') || !PyBuffer_IsContiguous(bias, 'C')) {
        PyErr_Format(PyExc_ValueError, "attention of (%zd, %zd, %zd) with %zd heads, bias (%zd,), into (%zd, %zd, %zd)",
                     qkv->shape[0], qkv->shape[1], all, heads, bias->shape[0], out->shape[0], out->shape[1],
                     out->shape[2]);
        return false;
    }
    *a = (struct attention){.batch = (size_t)qkv->shape[0], .tokens = (size_t)qkv->shape[1], .heads = (size_t)heads,
                            .width = (size_t)(all / 3 / heads), .qkv = qkv->buf, .bias = bias->buf, .out = out->buf};
    char message[256];
    if (attention_init(a, message, sizeof message)) {
        PyErr_SetString(PyExc_ValueError, message);
        return false;
    }
    return true;
}

static void compute(const struct attention *a, const struct attention_ops *ops, void *scratch) {
    for (size_t task = 0; task < attention_prepare_tasks(a); task++) {
        attention_prepare(a, ops, scratch, task);
    }
    for (size_t task = 0; task < attention_row_tasks(a); task++) {
        attention_rows(a, ops, scratch, task);
    }
}

static PyObject *py_attention(PyObject *module, PyObject *arguments) {
    PyObject *objects[3];
    Py_buffer views[3];
    static const char *const names[] = {"qkv", "bias", "out"};
    static const int axes[] = {3, 1, 3};
    Py_ssize_t heads;
    const char *target;
    struct kernel_ops ops;
    struct attention a;
    if (!PyArg_ParseTuple(arguments, "OOOnz:attention", &objects[0], &objects[1], &objects[2], &heads, &target) ||
        !select_target(module, target, &ops)) {
        return NULL;
    }
    PyObject *result = NULL;
    int taken = 0;
    while (taken < 3 && take(objects[taken], &views[taken], names[taken], "f", axes[taken], taken == 2)) {
        taken++;
    }
    if (taken == 3 && measure(&a, &views[0], &views[1], &views[2], heads)) {
        void *scratch = aligned_alloc(ATTENTION_ALIGNMENT, attention_scratch(&a, ops.attention) + ATTENTION_ALIGNMENT);
        if (scratch) {
            Py_BEGIN_ALLOW_THREADS
            compute(&a, ops.attention, scratch);
            Py_END_ALLOW_THREADS
            result = Py_NewRef(Py_None);
        } else {
            PyErr_NoMemory();
        }
        free(scratch);
    }
    while (taken > 0) {
        PyBuffer_Release(&views[--taken]);
    }
    return result;
}

PyMethodDef attention_methods[] = {
    {"attention", py_attention, METH_VARARGS, attention_doc},
    {NULL, NULL, 0, NULL},
};
