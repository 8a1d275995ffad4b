/* CPython binding of the resize: `edgevlm._kernels.resize` and `resize_tiles`. */
#include "module.h"

#include <string.h>

static const char *const filter_names[FILTER_COUNT] = {
    [FILTER_BOX] = "box",         [FILTER_BILINEAR] = "bilinear", [FILTER_HAMMING] = "hamming",
    [FILTER_BICUBIC] = "bicubic", [FILTER_LANCZOS] = "lanczos",
};

/* What both functions say about a resize, as Python passed it. */
struct resize_args {
    enum resize_filter filter;
    int height, width;                    /* of the whole output */
    float x0, y0, x1, y1;                 /* the box, in pixels of the source with its border */
    int top, left, rows, columns;         /* the window of the output that is computed */
    int border_top, border_left;          /* place of the source inside its border, */
    int bordered_height, bordered_width;  /* and the size of the two */
    int pixel_bytes;                      /* of the source */
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

/* Whether `n` from `start` on lie inside `size`. All may be any int. */
static bool inside(int start, int n, int size) {
    return start >= 0 && n >= 1 && start <= size && n <= size - start;
}

/* Ranges that the kernels rely on. Comparisons are written so that a NaN fails them. */
static bool check_ranges(const struct resize_args *a, const Py_buffer *src) {
    int n_max = RESIZE_MAX_SIDE;
    if (a->height < 1 || a->width < 1 || a->height > n_max || a->width > n_max) {
        PyErr_Format(PyExc_ValueError, "resize to height %d, width %d: sides go from 1 to %d", a->height, a->width,
                     n_max);
    } else if (!inside(a->top, a->rows, a->height) || !inside(a->left, a->columns, a->width)) {
        PyErr_Format(PyExc_ValueError, "window (%d, %d, %d, %d) is not inside the output of %d x %d", a->top, a->left,
                     a->rows, a->columns, a->height, a->width);
    } else if (a->bordered_height > n_max || a->bordered_width > n_max ||
               !inside(a->border_top, (int)src->shape[0], a->bordered_height) ||
               !inside(a->border_left, (int)src->shape[1], a->bordered_width)) {
        PyErr_Format(PyExc_ValueError, "border (%d, %d, %d, %d) does not hold the picture of height %zd, width %zd",
                     a->border_top, a->border_left, a->bordered_height, a->bordered_width, src->shape[0],
                     src->shape[1]);
    } else if (!(a->x0 >= 0 && a->y0 >= 0 && a->x0 <= a->x1 && a->y0 <= a->y1 && a->x1 <= (float)a->bordered_width &&
                 a->y1 <= (float)a->bordered_height)) {
        PyErr_Format(PyExc_ValueError,
                     "box is not inside the picture of height %d, width %d; pass (left, top, right, bottom) in pixels",
                     a->bordered_height, a->bordered_width);
    } else {
        return true;
    }
    return false;
}

/* Resize, when all is checked. Releases the GIL. None, or NULL with an exception set. */
static PyObject *run_resize(const struct kernel_ops *ops, const struct resize_args *a, const Py_buffer *src,
                            const uint8_t *colour, const struct resize_sink *sink) {
    struct resize_source source = {
        .pixels = src->buf,
        .stride = (size_t)src->strides[0],
        .channels = (int)src->shape[2],
        .pixel_bytes = a->pixel_bytes,
        .height = (int32_t)src->shape[0],
        .width = (int32_t)src->shape[1],
        .top = a->border_top,
        .left = a->border_left,
    };
    memcpy(source.colour, colour, (size_t)source.channels);
    bool ok;
    Py_BEGIN_ALLOW_THREADS
    struct resize_axis x_axis, y_axis;
    ok = resize_axis_init(&x_axis, a->filter, a->bordered_width, a->x0, a->x1, a->width, a->left, a->columns);
    if (ok) {
        ok = resize_axis_init(&y_axis, a->filter, a->bordered_height, a->y0, a->y1, a->height, a->top, a->rows);
        if (ok) {
            ok = kernels_resize(ops, &source, sink, &x_axis, &y_axis);
            resize_axis_free(&y_axis);
        }
        resize_axis_free(&x_axis);
    }
    Py_END_ALLOW_THREADS
    return ok ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

PyDoc_STRVAR(resize_doc, "resize(src_HWC, dst_HWC, resample, (height, width), (left, top, right, bottom), "
                         "(window_top, window_left), target)\n--\n\n"
                         "Resample uint8 src_HWC to height x width and store the window in dst_HWC.");

static PyObject *py_resize(PyObject *module, PyObject *arguments) {
    PyObject *src_object, *dst_object;
    const char *resample, *target;
    struct resize_args args = {0};
    if (!PyArg_ParseTuple(arguments, "OOs(ii)(ffff)(ii)z:resize", &src_object, &dst_object, &resample, &args.height,
                          &args.width, &args.x0, &args.y0, &args.x1, &args.y1, &args.top, &args.left, &target)) {
        return NULL;
    }
    struct kernel_ops ops;
    Py_buffer src, dst;
    if (!parse_filter(resample, &args.filter) || !select_target(module, target, &ops) ||
        !take_image(src_object, &src, "source", false, &args.pixel_bytes)) {
        return NULL;
    }
    if (!take_image(dst_object, &dst, "destination", true, NULL)) {
        PyBuffer_Release(&src);
        return NULL;
    }
    args.rows = (int)dst.shape[0];
    args.columns = (int)dst.shape[1];
    args.bordered_height = (int)src.shape[0];
    args.bordered_width = (int)src.shape[1];
    PyObject *result = NULL;
    if (src.shape[2] != dst.shape[2]) {
        PyErr_Format(PyExc_ValueError, "source and destination have %zd and %zd channels", src.shape[2], dst.shape[2]);
    } else if (check_ranges(&args, &src)) {
        static const uint8_t no_colour[4];
        struct resize_sink sink = {.pixels = dst.buf, .stride = (size_t)(args.columns * src.shape[2])};
        result = run_resize(&ops, &args, &src, no_colour, &sink);
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return result;
}

/* The tiles must be a packed (T, C, H, W), make up the canvas, and the window must lie in it. */
static bool check_tiles(const struct resize_args *a, const int canvas[6], const Py_buffer *src, const Py_buffer *dst) {
    const Py_ssize_t *shape = dst->shape; /* T, C, H, W */
    bool tiled = shape[2] >= 1 && shape[3] >= 1 && canvas[0] % shape[2] == 0 && canvas[1] % shape[3] == 0 &&
                 shape[0] == (canvas[0] / shape[2]) * (canvas[1] / shape[3]);
    bool fits = canvas[0] <= RESIZE_MAX_SIDE && canvas[1] <= RESIZE_MAX_SIDE;
    if (!fits || !inside(canvas[2], a->rows, canvas[0]) || !inside(canvas[3], a->columns, canvas[1])) {
        PyErr_Format(PyExc_ValueError, "%d x %d pixels at (%d, %d) are not inside the canvas of %d x %d", a->rows,
                     a->columns, canvas[2], canvas[3], canvas[0], canvas[1]);
    } else if (canvas[4] < 0 || canvas[4] > canvas[2] || canvas[5] < canvas[2] + a->rows || canvas[5] > canvas[0]) {
        PyErr_Format(PyExc_ValueError, "the rows %d to %d of the canvas do not hold the window", canvas[4], canvas[5]);
    } else if (!tiled || shape[1] != src->shape[2]) {
        PyErr_Format(PyExc_ValueError,
                     "tiles (%zd, %zd, %zd, %zd) do not make up the canvas of %d x %d and %zd channels", shape[0],
                     shape[1], shape[2], shape[3], canvas[0], canvas[1], src->shape[2]);
    } else {
        return true;
    }
    return false;
}

struct colours {
    const uint8_t *border, *canvas;
    Py_ssize_t n_border, n_canvas;
};

/* resize_tiles() once all of its buffers are taken; `lut` is NULL for uint8. */
static PyObject *tiles_of_views(const struct kernel_ops *ops, const struct resize_args *args, const int canvas[6],
                                const Py_buffer *src, const Py_buffer *dst, const Py_buffer *lut,
                                const struct colours *colours) {
    if (colours->n_border != src->shape[2] || colours->n_canvas != src->shape[2]) {
        PyErr_Format(PyExc_ValueError, "the colours have %zd and %zd channels, the picture %zd", colours->n_border,
                     colours->n_canvas, src->shape[2]);
        return NULL;
    }
    if (lut && (lut->shape[0] != src->shape[2] || lut->shape[1] != 256 || !PyBuffer_IsContiguous(lut, 'C'))) {
        PyErr_Format(PyExc_ValueError, "the lookup table must be a packed (%zd, 256)", src->shape[2]);
        return NULL;
    }
    if (!check_ranges(args, src) || !check_tiles(args, canvas, src, dst)) {
        return NULL;
    }
    struct resize_sink sink = {
        .tiles_u8 = lut ? NULL : dst->buf,
        .tiles_f32 = lut ? dst->buf : NULL,
        .lut_C256 = lut ? lut->buf : NULL,
        .height = (size_t)canvas[0],
        .width = (size_t)canvas[1],
        .top = (size_t)canvas[2],
        .left = (size_t)canvas[3],
        .first_row = (size_t)canvas[4],
        .end_row = (size_t)canvas[5],
        .tile_height = (size_t)dst->shape[2],
        .tile_width = (size_t)dst->shape[3],
    };
    memcpy(sink.colour, colours->canvas, (size_t)colours->n_canvas);
    return run_resize(ops, args, src, colours->border, &sink);
}

PyDoc_STRVAR(resize_tiles_doc,
             "resize_tiles(src_HWC, dst_TCHW, lut_C256, resample, (height, width), (left, top, right, bottom), "
             "(window_top, window_left, rows, columns), (border_top, border_left, height, width), border_colour, "
             "(canvas_height, canvas_width, top, left, first_row, end_row), canvas_colour, target)\n--\n\n"
             "Resample src_HWC in its border to height x width, put the window on the canvas, and store that as tiles: "
             "float32 through lut_C256, or uint8 if that is None. Of the canvas, the rows [first_row, end_row) are "
             "stored.");

static PyObject *py_resize_tiles(PyObject *module, PyObject *arguments) {
    PyObject *src_object, *dst_object, *lut_object;
    const char *resample, *target, *border, *canvas_colour;
    struct colours colours;
    struct resize_args a = {0};
    int canvas[6]; /* height, width, top, left, first row, end row */
    if (!PyArg_ParseTuple(arguments, "OOOs(ii)(ffff)(iiii)(iiii)y#(iiiiii)y#z:resize_tiles", &src_object, &dst_object,
                          &lut_object, &resample, &a.height, &a.width, &a.x0, &a.y0, &a.x1, &a.y1, &a.top, &a.left,
                          &a.rows, &a.columns, &a.border_top, &a.border_left, &a.bordered_height, &a.bordered_width,
                          &border, &colours.n_border, &canvas[0], &canvas[1], &canvas[2], &canvas[3], &canvas[4],
                          &canvas[5], &canvas_colour, &colours.n_canvas, &target)) {
        return NULL;
    }
    colours.border = (const uint8_t *)border;
    colours.canvas = (const uint8_t *)canvas_colour;
    struct kernel_ops ops;
    Py_buffer src, dst, lut;
    bool is_float = lut_object != Py_None;
    if (!parse_filter(resample, &a.filter) || !select_target(module, target, &ops) ||
        !take_image(src_object, &src, "source", false, &a.pixel_bytes)) {
        return NULL;
    }
    if (!take(dst_object, &dst, "tiles", is_float ? "f" : "B", 4, true)) {
        PyBuffer_Release(&src);
        return NULL;
    }
    if (is_float && !take(lut_object, &lut, "lookup table", "f", 2, false)) {
        PyBuffer_Release(&src);
        PyBuffer_Release(&dst);
        return NULL;
    }
    PyObject *result = tiles_of_views(&ops, &a, canvas, &src, &dst, is_float ? &lut : NULL, &colours);
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    if (is_float) {
        PyBuffer_Release(&lut);
    }
    return result;
}

PyMethodDef resize_methods[] = {
    {"resize", py_resize, METH_VARARGS, resize_doc},
    {"resize_tiles", py_resize_tiles, METH_VARARGS, resize_tiles_doc},
    {NULL, NULL, 0, NULL},
};
