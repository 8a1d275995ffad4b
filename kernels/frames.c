/* Drives the frame kernels: strides, chroma rows, odd sizes, and the weights of YUV.
 *
 * The equations (ITU-R BT.601-7 and BT.709-6; H.273 states them for both). With luma Kr, Kg = 1 - Kr - Kb, Kb and
 *     y = (Y - 16) / 219, pb = (U - 128) / 224, pr = (V - 128) / 224          (video range)
 *     y = Y / 255,        pb = (U - 128) / 255, pr = (V - 128) / 255          (full range)
 * the samples are
 *     R = 255 (y + 2 (1 - Kr) pr)
 *     B = 255 (y + 2 (1 - Kb) pb)
 *     G = 255 (y - 2 (1 - Kb) Kb / Kg pb - 2 (1 - Kr) Kr / Kg pr)
 * rounded to the nearest integer, ties up, and clipped to 0..255.
 *
 * Why this can be exact in 16 bits for each pixel. In video range 255 / 219 = 85 / 73: count in 73rds. With the chroma
 * part c (a real number) the rounded sample is
 *     floor((85 (Y - 16) + 73 (c + 1/2)) / 73) = floor((85 (Y - 16) + floor(73 (c + 1/2))) / 73),
 * because taking the floor of one summand changes nothing as long as the other one is an integer. So all rounding is in
 * one small integer for each chroma sample. In full range the same holds with 73 Y in place of 85 (Y - 16).
 *
 * What is left is to find floor(73 (c + 1/2)) for 2^16 pairs (U, V). Weights in units of 2^-22 do: the tests compare
 * each pair with exact integers. One thing is added: where 73 (c + 1/2) is an integer (BT.601, full range: ties) a
 * weight rounded down would fall below it, so the bias is lifted by 2^-17. The next number that must not be lifted over
 * an integer lies below it by 7.5e-6 or more, before weights are rounded; 28 to 49 units of 2^-22 work, 2^-17 is 32.
 */
#include "kernels.h"

#include <string.h>

size_t kernels_yuv_row_bytes(enum yuv_layout layout, int32_t width) {
    size_t n_chroma = ((size_t)width + 1) / 2;
    return layout == YUV_YUYV ? 4 * n_chroma : (size_t)width;
}

/* Bytes from one chroma row to the next: those of a luma row in NV12, half of that in I420, both rounded up. */
static size_t chroma_stride(enum yuv_layout layout, size_t stride) {
    size_t half = (stride + 1) / 2;
    return layout == YUV_NV12 ? 2 * half : half;
}

uint64_t kernels_yuv_size(enum yuv_layout layout, int32_t height, size_t stride) {
    uint64_t n_luma_rows = (uint64_t)height, n_chroma_rows = (n_luma_rows + 1) / 2;
    uint64_t luma = n_luma_rows * stride;
    switch (layout) {
    case YUV_NV12: return luma + n_chroma_rows * chroma_stride(layout, stride);
    case YUV_I420: return luma + 2 * n_chroma_rows * chroma_stride(layout, stride);
    default: return luma;
    }
}

/* numerator / denominator in units of 2^-YUV_WEIGHT_BITS, rounded to nearest. */
static int32_t weight(int64_t numerator, int64_t denominator) {
    int64_t scaled = numerator * ((int64_t)1 << YUV_WEIGHT_BITS); /* at most 2.7e18 < 2^63 */
    int64_t half = numerator < 0 ? -denominator / 2 : denominator / 2;
    return (int32_t)((scaled + half) / denominator);
}

struct yuv_weights kernels_yuv_weights(enum yuv_matrix matrix, bool full_range) {
    enum { ONE = 10000 }; /* Kr and Kb have four decimals */
    const int64_t Kr = matrix == YUV_BT601 ? 2990 : 2126;
    const int64_t Kb = matrix == YUV_BT601 ? 1140 : 722;
    const int64_t Kg = ONE - Kr - Kb;
    const int64_t chroma_steps = full_range ? 255 : 224, luma_steps = full_range ? 255 : 219;
    const int64_t black = full_range ? 0 : 16;
    const int64_t white = YUV_UNIT * 255; /* in our unit, for each sample */

    struct yuv_weights weights = {
        .luma = (int32_t)(white / luma_steps), /* without remainder: 73 or 85 */
        .v[0] = weight(white * 2 * (ONE - Kr), ONE * chroma_steps),
        .u[1] = weight(-white * 2 * (ONE - Kb) * Kb, ONE * Kg * chroma_steps),
        .v[1] = weight(-white * 2 * (ONE - Kr) * Kr, ONE * Kg * chroma_steps),
        .u[2] = weight(white * 2 * (ONE - Kb), ONE * chroma_steps),
    };
    const int64_t one = (int64_t)1 << YUV_WEIGHT_BITS;
    for (size_t c = 0; c < 3; c++) {
        int64_t neutral = 128 * ((int64_t)weights.u[c] + weights.v[c]);
        int64_t half_and_lift = YUV_UNIT * one / 2 + one / (1 << 17);
        weights.bias[c] = half_and_lift - weights.luma * black * one - neutral;
    }
    return weights;
}

void kernels_yuv_to_rgb(const struct kernel_ops *ops, const struct yuv_frame *frame, const struct yuv_weights *weights,
                        uint8_t *dst) {
    size_t height = (size_t)frame->height, width = (size_t)frame->width;
    size_t chroma = chroma_stride(frame->layout, frame->stride);
    const uint8_t *chroma_plane = frame->data + height * frame->stride;
    for (size_t y = 0; y < height; y++) {
        const uint8_t *luma_row = frame->data + y * frame->stride;
        struct yuv_row row = {.layout = frame->layout, .y = luma_row};
        switch (frame->layout) {
        case YUV_NV12:
            row.u = chroma_plane + y / 2 * chroma;
            row.v = row.u + 1;
            break;
        case YUV_I420:
            row.u = chroma_plane + y / 2 * chroma;
            row.v = row.u + (height + 1) / 2 * chroma;
            break;
        default:
            row.u = luma_row + 1;
            row.v = luma_row + 3;
        }
        ops->yuv_row(&row, weights, dst + y * width * 3, width);
    }
}

void kernels_composite(const struct kernel_ops *ops, const uint8_t *src, size_t src_stride, size_t height, size_t width,
                       const uint8_t background[3], uint8_t *dst) {
    for (size_t y = 0; y < height; y++) {
        ops->composite_row(src + y * src_stride, background, dst + y * width * 3, width);
    }
}

uint64_t kernels_sum_abs_diff(const struct kernel_ops *ops, const uint8_t *a, size_t a_stride, const uint8_t *b,
                              size_t b_stride, size_t height, size_t row_bytes) {
    uint64_t sum = 0;
    for (size_t y = 0; y < height; y++) {
        sum += ops->sum_abs_diff(a + y * a_stride, b + y * b_stride, row_bytes);
    }
    return sum;
}

void kernels_yuv_tail(struct yuv_tail *tail, const struct yuv_row *row, size_t n_pixels) {
    size_t n_chroma = (n_pixels + 1) / 2;
    uint8_t *samples = tail->samples;
    memset(samples, 0, sizeof tail->samples);
    switch (row->layout) {
    case YUV_NV12:
        memcpy(samples, row->y, n_pixels);
        memcpy(samples + 64, row->u, 2 * n_chroma);
        tail->row = (struct yuv_row){YUV_NV12, samples, samples + 64, samples + 65};
        break;
    case YUV_I420:
        memcpy(samples, row->y, n_pixels);
        memcpy(samples + 64, row->u, n_chroma);
        memcpy(samples + 96, row->v, n_chroma);
        tail->row = (struct yuv_row){YUV_I420, samples, samples + 64, samples + 96};
        break;
    default:
        memcpy(samples, row->y, 4 * n_chroma);
        tail->row = (struct yuv_row){YUV_YUYV, samples, samples + 1, samples + 3};
    }
}
