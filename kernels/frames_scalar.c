/* The definition of the frame kernels. Written to be read: other targets are compared with this file. */
#include "kernels.h"

#include <stdlib.h>

static int32_t chroma_term(const struct yuv_weights *weights, size_t c, int64_t u, int64_t v) {
    return (int32_t)((weights->u[c] * u + weights->v[c] * v + weights->bias[c]) >> YUV_WEIGHT_BITS);
}

/* C divides towards zero, not down; that differs below zero only, where it is clipped away. */
static uint8_t sample(int32_t sum) {
    int32_t value = sum / YUV_UNIT;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

void scalar_yuv_row(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst, size_t n_pixels) {
    size_t luma_step = yuv_luma_step(row->layout), chroma_step = yuv_chroma_step(row->layout);
    int32_t red = 0, green = 0, blue = 0;
    for (size_t i = 0; i < n_pixels; i++) {
        if (i % 2 == 0) {
            size_t at = i / 2 * chroma_step;
            red = chroma_term(weights, 0, row->u[at], row->v[at]);
            green = chroma_term(weights, 1, row->u[at], row->v[at]);
            blue = chroma_term(weights, 2, row->u[at], row->v[at]);
        }
        int32_t luma = weights->luma * row->y[i * luma_step];
        dst[3 * i] = sample(luma + red);
        dst[3 * i + 1] = sample(luma + green);
        dst[3 * i + 2] = sample(luma + blue);
    }
}

/* round(x / 255) for 0 <= x <= 255 * 255, as Pillow divides. 255 is odd, so there are no ties. */
static uint8_t divide_by_255(uint32_t x) {
    x += 128;
    return (uint8_t)((x + (x >> 8)) >> 8);
}

void scalar_composite_row(const uint8_t *src, const uint8_t background[3], uint8_t *dst, size_t n_pixels) {
    for (size_t i = 0; i < n_pixels; i++) {
        uint32_t alpha = src[4 * i + 3];
        for (size_t c = 0; c < 3; c++) {
            dst[3 * i + c] = divide_by_255(src[4 * i + c] * alpha + background[c] * (255 - alpha));
        }
    }
}

uint64_t scalar_sum_abs_diff(const uint8_t *a, const uint8_t *b, size_t n_bytes) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        sum += (uint64_t)abs(a[i] - b[i]);
    }
    return sum;
}
