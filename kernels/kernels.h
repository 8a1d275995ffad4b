/* The image kernels of edgevlm: what each function promises, and the table through which a SIMD target replaces it.
 *
 * The layers, from the outside in:
 *   module*.c   CPython binding: argument checks, GIL. No arithmetic.
 *   dispatch.c  which targets exist, which of them this CPU runs, which one was asked for.
 *   resize.c    drives the two passes of a resize and owns the intermediate rows.
 *   coeffs.c    the weights of a resize in fixed point. Shared by all targets, so they agree by construction.
 *   scalar.c    the definition of every kernel. Any other target must equal it bit for bit:
 *   avx2.c, avx512.c, neon.c, dotprod.c  with lanes.h, lanes_x86.h and lanes_neon.h, which they share.
 *   frames*.[ch]  the same layers for frames of a camera, in files of their own.
 *   attention*.[ch]  and for attention in integers, which ONNX Runtime calls (attention_ort.c) and not Python.
 *
 * Rows hold interleaved uint8 samples (HWC); `channels` is 1, 3 or 4 and all channels are treated alike.
 */
#ifndef EDGEVLM_KERNELS_H
#define EDGEVLM_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "attention.h"
#include "frames.h"

/* Who compiled them, for benchmarks. */
#ifdef __clang__
#define KERNELS_COMPILER __VERSION__ /* begins with "Clang" or "Apple LLVM" */
#else
#define KERNELS_COMPILER "GCC " __VERSION__
#endif

/* Weights are integers in units of 2^-22. Of 32 bits, 8 hold the sample, and 2 are left for the sign and for filters
 * that overshoot: (sum of |w|) * 255 < 2^31 as long as the |w| add up to less than 2, and the worst filter here
 * (Lanczos cut at a border) stays below 1.6. Pillow calls this PRECISION_BITS. */
enum { RESIZE_WEIGHT_BITS = 32 - 8 - 2 };

/* Sides are limited to integers that float32 holds exactly, because boxes are float32, as in Pillow. */
enum { RESIZE_MAX_SIDE = 1 << 24 };

enum resize_filter { FILTER_BOX, FILTER_BILINEAR, FILTER_HAMMING, FILTER_BICUBIC, FILTER_LANCZOS, FILTER_COUNT };

/* How one axis is resampled: output i of `n_out` is the sum over t < count[i] of
 *     weights[i * n_taps + t] * input[first[i] + t].
 * `first` and `first + count` never decrease, 0 <= first[i], first[i] + count[i] <= n_in, count[i] <= n_taps.
 * Weights past count[i] are 0 and need not be read. */
struct resize_axis {
    int32_t n_in;
    int32_t n_total; /* outputs of the whole axis, of which a window of n_out is computed */
    int32_t n_out;
    int32_t n_taps;
    bool identity; /* output i is input first[i], unchanged; there are no weights */
    int32_t *first;
    int32_t *count;
    int32_t *weights;
};

/* The horizontal pass of a resize. Targets that lay weights and pixels out as their instructions want them have a plan:
 * memory that belongs to one axis, one number of channels and one thread (lanes.h).
 *
 * `rows` resamples `n_rows` rows (at most RESIZE_BATCH): dst_rows[r] gets axis->n_out pixels from the axis->n_in pixels
 * of src_rows[r]. Each sample is clip8((2^21 + sum(w * sample)) >> 22), the sum taken modulo 2^32. It reads only the
 * pixels of the rows and writes only n_out * channels bytes of each; no row overlaps another. */
struct horizontal_ops {
    const struct lane_format *format; /* of the plan; NULL if none is needed */
    void (*rows)(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                 const struct resize_axis *axis, void *plan);
};

/* Rows handed to the horizontal pass at once: they share the weights. */
enum { RESIZE_BATCH = 16 };

/* One CPU target. A NULL member means: keep the slower target's version. */
struct kernel_ops {
    const char *name; /* "scalar", ...: also the value that EDGEVLM_KERNELS accepts */
    uint32_t needs;   /* enum cpu_feature bits; all must be offered by the CPU and saved by the OS */

    const struct horizontal_ops *horizontal;

    /* One output row: the same sum down `n_taps` rows, for each of `n_bytes` byte columns; n_taps may be 0.
     * `scratch` has room for n_taps + 8 numbers. */
    void (*vertical)(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps, uint8_t *dst_row,
                     size_t n_bytes, int32_t *scratch);

    /* Interleaved samples into planes: dst[c * plane + i] = src[pixel_bytes * i + c] for `n_pixels` pixels and the
     * first `n_planes` of their `pixel_bytes` samples, all of which may be read; */
    void (*planes_u8)(const uint8_t *src, uint8_t *dst, size_t plane, size_t n_pixels, int pixel_bytes, int n_planes);

    /* and the same through a table: dst[c * plane + i] = lut_C256[c * 256 + src[pixel_bytes * i + c]].
     * A table and not a multiply-add: it reproduces any reference's order of operations, on every target. */
    void (*planes_f32)(const uint8_t *src, float *dst, size_t plane, size_t n_pixels, int pixel_bytes, int n_planes,
                       const float *lut_C256);

    /* `n_pixels` >= 1 pixels of YUV to packed RGB; frames.h defines the numbers. May read only the samples of these
     * pixels (of YUYV the unused second luma of an odd row, too) and may write only 3 * n_pixels bytes. */
    void (*yuv_row)(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst, size_t n_pixels);

    /* RGBA over a colour: dst[3 * i + c] = round((src[4 * i + c] * alpha + background[c] * (255 - alpha)) / 255). */
    void (*composite_row)(const uint8_t *src, const uint8_t background[3], uint8_t *dst, size_t n_pixels);

    /* Sum of |a[i] - b[i]| over n_bytes bytes. */
    uint64_t (*sum_abs_diff)(const uint8_t *a, const uint8_t *b, size_t n_bytes);

    /* attention.h defines the numbers. */
    const struct attention_ops *attention;
};

extern const struct kernel_ops kernels_scalar;
#if defined(__x86_64__)
extern const struct kernel_ops kernels_avx2, kernels_avx512;
#elif defined(__aarch64__)
extern const struct kernel_ops kernels_neon;
#if defined(__ARM_FEATURE_DOTPROD) || !defined(__clang__) || __clang_major__ >= 16
#define KERNELS_DOTPROD /* older clangs cannot compile single functions for more than the baseline of arm64 */
extern const struct kernel_ops kernels_dotprod;
#endif
#endif

/* ---- dispatch.c ---- */

/* One bit for each *level* of instructions that some target needs, not for each CPUID bit. */
enum cpu_feature {
    CPU_BASELINE = 0,
    CPU_AVX2 = 1 << 0,    /* and FMA, which every CPU with AVX2 has */
    CPU_AVX512 = 1 << 1,  /* F, BW, DQ, VL and VNNI: Cascade Lake, Zen 4 and later */
    CPU_NEON = 1 << 2,    /* every 64-bit Arm: Raspberry Pi 4 */
    CPU_DOTPROD = 1 << 3, /* Armv8.2's sdot: Raspberry Pi 5, Apple */
};

enum select_status { SELECT_OK, SELECT_UNKNOWN, SELECT_UNSUPPORTED };

/* Levels that this CPU offers and this OS saves. */
uint32_t kernels_cpu_features(void);

/* Targets built into this library, slowest first; NULL at the end. */
const struct kernel_ops *const *kernels_targets(void);

/* Build the table for target `name` on a CPU with `features`: scalar, overlaid by each later target up to `name` whose
 * needs are met. NULL means the value of EDGEVLM_KERNELS or, without it, the fastest target that runs. On failure
 * `message` (of `size` bytes) says what was asked, what exists and what to do. */
enum select_status kernels_select(const char *name, uint32_t features, struct kernel_ops *ops, char *message,
                                  size_t size);

/* ---- coeffs.c ---- */

/* Weights for the outputs [origin, origin + n_window) of an axis that maps the inputs [in0, in1) to `n_out` outputs.
 * Needs 0 <= in0 <= in1 <= n_in. False if memory ran out; on true, free with resize_axis_free(). */
bool resize_axis_init(struct resize_axis *axis, enum resize_filter filter, int32_t n_in, float in0, float in1,
                      int32_t n_out, int32_t origin, int32_t n_window);
void resize_axis_free(struct resize_axis *axis);

/* ---- resize.c ---- */

/* A picture, which may lie inside a larger one of a single colour that exists nowhere in memory. */
struct resize_source {
    const uint8_t *pixels;
    size_t stride;   /* bytes from row to row */
    int channels;    /* 1, 3 or 4 */
    int pixel_bytes; /* as many as channels; or 4 for 3 of them, as decoders like to store RGB: the fourth is ignored */
    int32_t height, width;
    int32_t top, left; /* its place in the larger picture, whose size is that of the axes' inputs */
    uint8_t colour[4];
};

/* Where the output goes: packed rows, or tiles. */
struct resize_sink {
    /* uint8 HWC, rows `stride` bytes apart; NULL for tiles. */
    uint8_t *pixels;
    size_t stride;

    /* Or a canvas of `height` x `width`, of one colour where the picture, at (top, left), does not cover it, and cut
     * into tiles of tile_height x tile_width, whole numbers of which make the canvas. The tiles follow each other row
     * by row, each with its channels in planes (CHW): uint8, or float32 through a table. */
    uint8_t *tiles_u8;
    float *tiles_f32;
    const float *lut_C256;
    size_t height, width, top, left, tile_height, tile_width;
    size_t first_row, end_row; /* of the canvas: only these are stored; all of the picture's are among them */
    uint8_t colour[4];
};

/* Resample through both axes, with a uint8 intermediate and in Pillow's order of passes, in one pass over the source.
 * False if memory ran out. Touches no Python state. */
bool kernels_resize(const struct kernel_ops *ops, const struct resize_source *source, const struct resize_sink *sink,
                    const struct resize_axis *x_axis, const struct resize_axis *y_axis);

#endif
