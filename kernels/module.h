/* What the files of the CPython binding share: module.c has the module and these helpers. */
#ifndef EDGEVLM_MODULE_H
#define EDGEVLM_MODULE_H

#ifndef Py_LIMITED_API /* CMake's USE_SABI defines it, too */
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

/* The table of target `name`; NULL stands for the active one. False with an exception set, as below. */
bool select_target(PyObject *module, const char *name, struct kernel_ops *ops);

/* Take a buffer of `ndim` axes of `format` ("B" or "f"). Output must be packed; input may have spaced rows. */
bool take(PyObject *object, Py_buffer *view, const char *what, const char *format, int ndim, bool output);

/* Take a uint8 picture (H, W, C) whose pixels are packed inside each row. With `pixel_bytes` they may also be RGB with
 * one byte between them; it is set to the bytes from pixel to pixel. */
bool take_image(PyObject *object, Py_buffer *view, const char *what, bool output, int *pixel_bytes);

/* ---- module_resize.c, module_frames.c, module_attention.c ---- */

extern PyMethodDef resize_methods[], frame_methods[], attention_methods[];

#endif
