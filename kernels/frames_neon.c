/* Frame kernels with NEON, of which every 64-bit ARM has all that is used here.
 *
 * No version with dot products: `udot` could add up absolute differences, but two instructions for 16 bytes are two
 * instructions with `uadalp`, too, and both wait for memory.
 */
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

/* ---- YUV: 16 pixels, 8 pairs of chroma at a time ---- */
enum { PIXELS = 16 };

struct block {
    int16x8_t y_low, y_high;
    int16x8_t u, v;
};

static inline int16x8_t widen(uint8x8_t samples) {
    return vreinterpretq_s16_u16(vmovl_u8(samples));
}

/* `layout` is a constant after inlining. */
__attribute__((always_inline)) static inline struct block load(const struct yuv_row *row, enum yuv_layout layout,
                                                               size_t i) {
    if (layout == YUV_YUYV) { /* Y0 U0 Y1 V0 ...: even lumas, U, odd lumas, V */
        const uint8x8x4_t yuyv = vld4_u8(row->y + 2 * i);
        return (struct block){widen(vzip1_u8(yuyv.val[0], yuyv.val[2])), widen(vzip2_u8(yuyv.val[0], yuyv.val[2])),
                              widen(yuyv.val[1]), widen(yuyv.val[3])};
    }
    const uint8x16_t y = vld1q_u8(row->y + i);
    uint8x8x2_t uv;
    if (layout == YUV_NV12) {
        uv = vld2_u8(row->u + i);
    } else {
        uv.val[0] = vld1_u8(row->u + i / 2);
        uv.val[1] = vld1_u8(row->v + i / 2);
    }
    return (struct block){widen(vget_low_u8(y)), widen(vget_high_u8(y)), widen(uv.val[0]), widen(uv.val[1])};
}

/* Weights of one sample, split for 16-bit multiplication: w = high * 2^15 + low with 0 <= low < 2^15. Then
 * floor((high * 2^15 + low) / 2^22) = (high + (low >> 15)) >> 7, in 32 bits and without error. */
struct split {
    int16_t u_high, u_low, v_high, v_low;
    int32_t bias_high, bias_low;
};

static inline struct split split(const struct yuv_weights *weights, int c) {
    return (struct split){
        .u_high = (int16_t)(weights->u[c] >> 15),
        .u_low = (int16_t)(weights->u[c] & 0x7fff),
        .v_high = (int16_t)(weights->v[c] >> 15),
        .v_low = (int16_t)(weights->v[c] & 0x7fff),
        .bias_high = (int32_t)(weights->bias[c] >> 15),
        .bias_low = (int32_t)(weights->bias[c] & 0x7fff),
    };
}

/* Red has no weight of U, blue none of V: `has_u` and `has_v` are constants after inlining. */
__attribute__((always_inline)) static inline int16x4_t chroma_term(int16x4_t u, int16x4_t v, const struct split *w,
                                                                   bool has_u, bool has_v) {
    int32x4_t high = vdupq_n_s32(w->bias_high), low = vdupq_n_s32(w->bias_low);
    if (has_u) {
        high = vmlal_n_s16(high, u, w->u_high);
        low = vmlal_n_s16(low, u, w->u_low);
    }
    if (has_v) {
        high = vmlal_n_s16(high, v, w->v_high);
        low = vmlal_n_s16(low, v, w->v_low);
    }
    return vshrn_n_s32(vsraq_n_s32(high, low, 15), 7);
}

/* clip8(floor(sum / 73)) of a saturated sum; exact for 0 <= sum < 32263, and clipped beyond: 2^21 / 73 = 28728.1, so
 * the multiplier 28729 is too large by 65 / 73, and the error stays below 1 / 73. */
static inline uint8x8_t divide_by_unit(int16x8_t sum) {
    return vqshrun_n_s16(vqdmulhq_n_s16(sum, 28729), 6);
}

/* One sample of all pixels. `luma_*` are in our unit; each chroma term serves two pixels. */
__attribute__((always_inline)) static inline uint8x16_t samples(const struct block *block, int16x8_t luma_low,
                                                                int16x8_t luma_high, const struct split *w, bool has_u,
                                                                bool has_v) {
    const int16x8_t terms =
        vcombine_s16(chroma_term(vget_low_s16(block->u), vget_low_s16(block->v), w, has_u, has_v),
                     chroma_term(vget_high_s16(block->u), vget_high_s16(block->v), w, has_u, has_v));
    return vcombine_u8(divide_by_unit(vqaddq_s16(luma_low, vzip1q_s16(terms, terms))),
                       divide_by_unit(vqaddq_s16(luma_high, vzip2q_s16(terms, terms))));
}

__attribute__((always_inline)) static inline size_t whole_blocks(const struct yuv_row *row, enum yuv_layout layout,
                                                                 const struct yuv_weights *weights, uint8_t *dst,
                                                                 size_t n_pixels) {
    const struct split red = split(weights, 0), green = split(weights, 1), blue = split(weights, 2);
    const int16_t luma = (int16_t)weights->luma;
    size_t i = 0;
    for (; i + PIXELS <= n_pixels; i += PIXELS) {
        const struct block block = load(row, layout, i);
        const int16x8_t low = vmulq_n_s16(block.y_low, luma), high = vmulq_n_s16(block.y_high, luma);
        uint8x16x3_t rgb;
        rgb.val[0] = samples(&block, low, high, &red, false, true);
        rgb.val[1] = samples(&block, low, high, &green, true, true);
        rgb.val[2] = samples(&block, low, high, &blue, true, false);
        vst3q_u8(dst + 3 * i, rgb);
    }
    return i;
}

static size_t yuv_blocks(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst, size_t n_pixels) {
    switch (row->layout) {
    case YUV_NV12: return whole_blocks(row, YUV_NV12, weights, dst, n_pixels);
    case YUV_I420: return whole_blocks(row, YUV_I420, weights, dst, n_pixels);
    default: return whole_blocks(row, YUV_YUYV, weights, dst, n_pixels);
    }
}

void neon_yuv_row(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst, size_t n_pixels) {
    size_t done = yuv_blocks(row, weights, dst, n_pixels);
    if (done < n_pixels) {
        struct yuv_tail tail;
        struct yuv_row rest = yuv_row_at(row, done);
        kernels_yuv_tail(&tail, &rest, n_pixels - done);
        yuv_blocks(&tail.row, weights, tail.rgb, PIXELS);
        memcpy(dst + 3 * done, tail.rgb, 3 * (n_pixels - done));
    }
}

/* ---- RGBA over a colour: 16 pixels at a time ---- */

/* (x + 128 + ((x + 128) >> 8)) >> 8, Pillow's division by 255; both additions of 128 are in rounding instructions. */
static inline uint8x8_t divide_by_255(uint16x8_t x) {
    return vraddhn_u16(x, vrshrq_n_u16(x, 8));
}

static inline uint8x16_t blend(uint8x16_t colour, uint8x16_t alpha, uint8_t background) {
    const uint8x8_t ground = vdup_n_u8(background);
    const uint8x16_t rest = vmvnq_u8(alpha); /* 255 - alpha */
    const uint16x8_t low = vmull_u8(vget_low_u8(colour), vget_low_u8(alpha));
    const uint16x8_t high = vmull_u8(vget_high_u8(colour), vget_high_u8(alpha));
    return vcombine_u8(divide_by_255(vmlal_u8(low, vget_low_u8(rest), ground)),
                       divide_by_255(vmlal_u8(high, vget_high_u8(rest), ground)));
}

static inline void composite_16(const uint8_t *src, const uint8_t background[3], uint8_t *dst) {
    const uint8x16x4_t rgba = vld4q_u8(src);
    uint8x16x3_t rgb;
    for (int c = 0; c < 3; c++) {
        rgb.val[c] = blend(rgba.val[c], rgba.val[3], background[c]);
    }
    vst3q_u8(dst, rgb);
}

void neon_composite_row(const uint8_t *src, const uint8_t background[3], uint8_t *dst, size_t n_pixels) {
    size_t i = 0;
    for (; i + 16 <= n_pixels; i += 16) {
        composite_16(src + 4 * i, background, dst + 3 * i);
    }
    if (i < n_pixels) {
        uint8_t in[4 * 16] = {0}, out[3 * 16];
        memcpy(in, src + 4 * i, 4 * (n_pixels - i));
        composite_16(in, background, out);
        memcpy(dst + 3 * i, out, 3 * (n_pixels - i));
    }
}

/* ---- Sum of absolute differences ---- */

static inline uint16x8_t add_abs_diff(uint16x8_t sums, const uint8_t *a, const uint8_t *b) {
    return vpadalq_u8(sums, vabdq_u8(vld1q_u8(a), vld1q_u8(b)));
}

uint64_t neon_sum_abs_diff(const uint8_t *a, const uint8_t *b, size_t n_bytes) {
    enum { STEP = 32, STEPS = 128 }; /* 16-bit lanes take two bytes at each step: 128 * 2 * 255 < 2^16 */
    uint64_t sum = 0;
    size_t i = 0;
    while (i + STEP <= n_bytes) {
        uint16x8_t even = vdupq_n_u16(0), odd = even;
        for (size_t step = 0; step < STEPS && i + STEP <= n_bytes; step++, i += STEP) {
            even = add_abs_diff(even, a + i, b + i);
            odd = add_abs_diff(odd, a + i + 16, b + i + 16);
        }
        sum += (uint64_t)vaddlvq_u16(even) + vaddlvq_u16(odd);
    }
    return sum + scalar_sum_abs_diff(a + i, b + i, n_bytes - i);
}

#endif
