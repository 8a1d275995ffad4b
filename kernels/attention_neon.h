/* What the two Arm targets of attention share: scores become weights. Behind attention_lanes.h. */
#ifndef EDGEVLM_ATTENTION_NEON_H
#define EDGEVLM_ATTENTION_NEON_H

#include <arm_neon.h>

enum { TOGETHER = 4, LANES = 4 }; /* rows whose sums are in registers; numbers in a vector */

/* Four sums become scores of the keys from `j` on. */
ATTENTION_INLINE float32x4_t store_scores(int32x4_t sums, const float *key_scales, float *scores, size_t j) {
    float32x4_t score = vmulq_f32(vcvtq_f32_s32(sums), vld1q_f32(key_scales + j));
    vst1q_f32(scores + j, score);
    return score;
}

ATTENTION_INLINE uint32x4_t weights_of(const float *scores, float32x4_t scale, float32x4_t largest) {
    float32x4_t x = vmulq_f32(vsubq_f32(vld1q_f32(scores), largest), scale);
    x = vmaxq_f32(x, vdupq_n_f32(-24.0f)); /* and all below rounds to nothing */
    float32x4_t whole = vrndmq_f32(x), f = vsubq_f32(x, whole), y = vdupq_n_f32(WEIGHT_3);
    y = vfmaq_f32(vdupq_n_f32(WEIGHT_2), y, f);
    y = vfmaq_f32(vdupq_n_f32(WEIGHT_1), y, f);
    y = vfmaq_f32(vdupq_n_f32(WEIGHT_0), y, f);
    int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(whole), 23);
    return vcvtnq_u32_f32(vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), exponent)));
}

/* totals = fma(float(sums), fresh, totals * kept) for four channels. */
ATTENTION_INLINE void add_products(int32x4_t sums, float kept, float fresh, float *totals) {
    float32x4_t before = vmulq_n_f32(vld1q_f32(totals), kept);
    vst1q_f32(totals, vfmaq_n_f32(before, vcvtq_f32_s32(sums), fresh));
}

#endif
