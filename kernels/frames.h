/* Kernels for frames of a camera: YUV to RGB, RGBA over a colour, the difference of two frames. Part of kernels.h.
 *
 *   frames.c           drives them row by row: strides, chroma rows, odd sizes; derives the weights of YUV.
 *   frames_scalar.c    the definition.
 *   frames_<target>.c  the same bits, faster.
 */
#ifndef EDGEVLM_FRAMES_H
#define EDGEVLM_FRAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct kernel_ops;

/* How the samples of 4:2:2 (YUYV) and 4:2:0 frames lie in memory; docs/camera.md draws them. */
enum yuv_layout { YUV_YUYV, YUV_NV12, YUV_I420, YUV_LAYOUT_COUNT };
enum yuv_matrix { YUV_BT601, YUV_BT709, YUV_MATRIX_COUNT };

/* One row of pixels. Pixels 2i and 2i + 1 share chroma sample i; the last pixel of an odd row has one for itself. */
struct yuv_row {
    enum yuv_layout layout;
    const uint8_t *y; /* every byte; every second one of YUYV */
    const uint8_t *u; /* every byte of I420, every second one of NV12 (v == u + 1), every fourth of YUYV (u == y + 1) */
    const uint8_t *v; /* as u; in YUYV v == y + 3 */
};

/* Distance in bytes from one sample of a row to the next. */
static inline size_t yuv_luma_step(enum yuv_layout layout) {
    return layout == YUV_YUYV ? 2 : 1;
}
static inline size_t yuv_chroma_step(enum yuv_layout layout) {
    return layout == YUV_YUYV ? 4 : layout == YUV_NV12 ? 2 : 1;
}

/* The part of `row` from pixel `i` on; `i` is even. */
static inline struct yuv_row yuv_row_at(const struct yuv_row *row, size_t i) {
    size_t luma = i * yuv_luma_step(row->layout), chroma = i / 2 * yuv_chroma_step(row->layout);
    return (struct yuv_row){row->layout, row->y + luma, row->u + chroma, row->v + chroma};
}

/* Sample c of a pixel (Y, U, V) is clip8(floor((luma * Y + term) / YUV_UNIT)) with the chroma term
 *     term = floor((u[c] * U + v[c] * V + bias[c]) / 2^YUV_WEIGHT_BITS),   |luma * Y|, |term| < 2^15.
 * That is the real-valued formula rounded to nearest, without error, for every triple; frames.c says why. */
enum { YUV_UNIT = 73, YUV_WEIGHT_BITS = 22 };

struct yuv_weights {
    int32_t luma;
    int32_t u[3], v[3];
    int64_t bias[3];
};

/* A frame in one block of kernels_yuv_size() bytes. `stride`: bytes from one luma row to the next. */
struct yuv_frame {
    enum yuv_layout layout;
    int32_t height, width;
    size_t stride;
    const uint8_t *data;
};

/* Smallest stride of a row of `width` pixels. */
size_t kernels_yuv_row_bytes(enum yuv_layout layout, int32_t width);

/* Bytes of a whole frame, the padding of its last row included. */
uint64_t kernels_yuv_size(enum yuv_layout layout, int32_t height, size_t stride);

struct yuv_weights kernels_yuv_weights(enum yuv_matrix matrix, bool full_range);

/* `dst`: height * width * 3 bytes, packed. */
void kernels_yuv_to_rgb(const struct kernel_ops *ops, const struct yuv_frame *frame, const struct yuv_weights *weights,
                        uint8_t *dst);

/* RGBA rows, `src_stride` bytes apart, over `background` into `dst` (packed RGB rows). */
void kernels_composite(const struct kernel_ops *ops, const uint8_t *src, size_t src_stride, size_t height, size_t width,
                       const uint8_t background[3], uint8_t *dst);

/* Sum of |a - b| over `height` rows of `row_bytes` bytes each. */
uint64_t kernels_sum_abs_diff(const struct kernel_ops *ops, const uint8_t *a, size_t a_stride, const uint8_t *b,
                              size_t b_stride, size_t height, size_t row_bytes);

/* The end of a row, padded to whole blocks of lanes, so that targets need no second version for what is left over. */
struct yuv_tail {
    struct yuv_row row;
    uint8_t samples[2 * 64];
    uint8_t rgb[3 * 64];
};

/* Copy the first `n_pixels` <= 64 pixels of `row` into `tail`; what follows them is 0. */
void kernels_yuv_tail(struct yuv_tail *tail, const struct yuv_row *row, size_t n_pixels);

/* ---- The functions of each target; kernels.h has their contracts. ---- */

#define DECLARE_ROWS(target)                                                                                          \
    void target##_yuv_row(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst,                  \
                          size_t n_pixels);                                                                           \
    void target##_composite_row(const uint8_t *src, const uint8_t background[3], uint8_t *dst, size_t n_pixels);
#define DECLARE_SUM(target) uint64_t target##_sum_abs_diff(const uint8_t *a, const uint8_t *b, size_t n_bytes);

DECLARE_ROWS(scalar)
DECLARE_SUM(scalar)
#if defined(__x86_64__)
DECLARE_ROWS(avx2)
DECLARE_SUM(avx2)
DECLARE_ROWS(avx512)
#elif defined(__aarch64__)
DECLARE_ROWS(neon)
DECLARE_SUM(neon)
#endif
#undef DECLARE_ROWS
#undef DECLARE_SUM

#endif
