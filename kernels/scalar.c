/* The definition of every kernel. Written to be read: other targets are compared with this file. */
#include "kernels.h"

/* Half a unit, so that the final shift rounds. */
static const int32_t rounding = 1 << (RESIZE_WEIGHT_BITS - 1);

static uint8_t clip8(int32_t sum) {
    int32_t value = sum >> RESIZE_WEIGHT_BITS; /* arithmetic shift: towards minus infinity */
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* One row; the compiler makes one copy for each constant `channels`, with the inner loop unrolled. */
static inline void horizontal_row(const uint8_t *src, uint8_t *dst, size_t channels, const struct resize_axis *axis) {
    for (int32_t i = 0; i < axis->n_out; i++) {
        const uint8_t *pixel = src + (size_t)axis->first[i] * channels;
        const int32_t *weights = axis->weights + (size_t)i * (size_t)axis->n_taps;
        int32_t sums[4] = {rounding, rounding, rounding, rounding};
        for (int32_t t = 0; t < axis->count[i]; t++) {
            for (size_t c = 0; c < channels; c++) {
                sums[c] += weights[t] * pixel[c];
            }
            pixel += channels;
        }
        for (size_t c = 0; c < channels; c++) {
            *dst++ = clip8(sums[c]);
        }
    }
}

static void rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                 const struct resize_axis *axis, void *plan) {
    (void)plan;
    for (size_t r = 0; r < n_rows; r++) {
        switch (channels) {
        case 1: horizontal_row(src_rows[r], dst_rows[r], 1, axis); break;
        case 3: horizontal_row(src_rows[r], dst_rows[r], 3, axis); break;
        default: horizontal_row(src_rows[r], dst_rows[r], 4, axis); break;
        }
    }
}

static const struct horizontal_ops horizontal = {.rows = rows};

static void vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps, uint8_t *dst_row,
                     size_t n_bytes, int32_t *scratch) {
    (void)scratch;
    /* In blocks whose sums stay in the nearest cache, row by row inside a block: the inner loop runs along memory. */
    enum { BLOCK = 256 };
    int32_t sums[BLOCK];
    for (size_t start = 0; start < n_bytes; start += BLOCK) {
        size_t n = n_bytes - start < BLOCK ? n_bytes - start : BLOCK;
        for (size_t i = 0; i < n; i++) {
            sums[i] = rounding;
        }
        for (size_t t = 0; t < n_taps; t++) {
            const uint8_t *row = src_rows[t] + start;
            for (size_t i = 0; i < n; i++) {
                sums[i] += weights[t] * row[i];
            }
        }
        for (size_t i = 0; i < n; i++) {
            dst_row[start + i] = clip8(sums[i]);
        }
    }
}

/* One plane; the compiler makes one copy for each constant `pixel_bytes`. */
static inline void plane_u8(const uint8_t *src, uint8_t *dst, size_t n_pixels, size_t pixel_bytes) {
    for (size_t i = 0; i < n_pixels; i++) {
        dst[i] = src[pixel_bytes * i];
    }
}

static void planes_u8(const uint8_t *src, uint8_t *dst, size_t plane, size_t n_pixels, int pixel_bytes, int n_planes) {
    for (size_t c = 0; c < (size_t)n_planes; c++) {
        switch (pixel_bytes) {
        case 1: plane_u8(src + c, dst + c * plane, n_pixels, 1); break;
        case 3: plane_u8(src + c, dst + c * plane, n_pixels, 3); break;
        default: plane_u8(src + c, dst + c * plane, n_pixels, 4); break;
        }
    }
}

/* All planes at once; the compiler makes one copy for each constant pair of numbers. */
static inline void looked_up(const uint8_t *src, float *dst, size_t plane, size_t n_pixels, size_t pixel_bytes,
                             size_t n_planes, const float *lut_C256) {
    for (size_t i = 0; i < n_pixels; i++) {
        for (size_t c = 0; c < n_planes; c++) {
            dst[c * plane + i] = lut_C256[c * 256 + src[pixel_bytes * i + c]];
        }
    }
}

static void planes_f32(const uint8_t *src, float *dst, size_t plane, size_t n_pixels, int pixel_bytes, int n_planes,
                       const float *lut_C256) {
    if (pixel_bytes == 1) {
        looked_up(src, dst, plane, n_pixels, 1, 1, lut_C256);
    } else if (pixel_bytes == 3) {
        looked_up(src, dst, plane, n_pixels, 3, 3, lut_C256);
    } else if (n_planes == 3) {
        looked_up(src, dst, plane, n_pixels, 4, 3, lut_C256);
    } else {
        looked_up(src, dst, plane, n_pixels, 4, 4, lut_C256);
    }
}

const struct kernel_ops kernels_scalar = {
    .name = "scalar",
    .needs = CPU_BASELINE,
    .horizontal = &horizontal,
    .vertical = vertical,
    .planes_u8 = planes_u8,
    .planes_f32 = planes_f32,
    .yuv_row = scalar_yuv_row,
    .composite_row = scalar_composite_row,
    .sum_abs_diff = scalar_sum_abs_diff,
    .attention = &attention_scalar,
};
