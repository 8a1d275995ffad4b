/* Attention in integers with NEON: of keys two products of bytes are summed in 16 bits, of values in 32 at once. */
#include <stdint.h>

#if defined(__aarch64__)
#define LANES_TARGET
enum { KEY_TAPS = 2, VALUE_TAPS = 1, KEY_MOVED = 0, VALUE_MOVED = 0, WEIGHTS = 64 };
typedef int8_t key;
typedef int16_t value, weight;
#define WEIGHT_OF(row, j) (row)[j]
#include "attention_lanes.h"
#include "attention_neon.h"

enum { KEYS = 8 }; /* side by side in two vectors */

/* Twice two channels of four keys: 2 * 127 * 127 fits into 16 bits. */
ATTENTION_INLINE int32x4_t add_keys(int32x4_t sums, int8x8_t k0, int8x8_t k1, int8x8_t q0, int8x8_t q1) {
    return vpadalq_s16(sums, vmlal_s8(vmull_s8(k0, q0), k1, q1));
}

/* Two channels of a query, everywhere. */
ATTENTION_INLINE int8x8_t everywhere(const key *queries) {
    int16_t two;
    memcpy(&two, queries, sizeof two);
    return vreinterpret_s8_s16(vdup_n_s16(two));
}

static void scores(const key *queries, const int32_t *query_sums, const key *keys, const float *key_scales,
                   size_t channels, size_t n_keys, float *scores_RB, float *largest) {
    (void)query_sums;
    for (size_t first = 0; first < ROWS; first += TOGETHER) {
        float32x4_t most[TOGETHER];
        for (size_t j = 0; j < n_keys; j += KEYS) {
            int32x4_t sums[TOGETHER][2];
            for (size_t r = 0; r < TOGETHER; r++) {
                sums[r][0] = sums[r][1] = vdupq_n_s32(0);
            }
            for (size_t c = 0; c < channels; c += 2 * KEY_TAPS) {
                int8x16_t k0 = vld1q_s8(keys + c * n_keys + j * KEY_TAPS);
                int8x16_t k1 = vld1q_s8(keys + (c + KEY_TAPS) * n_keys + j * KEY_TAPS);
                for (size_t r = 0; r < TOGETHER; r++) {
                    const key *q = queries + c * ROWS + (first + r) * KEY_TAPS;
                    int8x8_t q0 = everywhere(q), q1 = everywhere(q + ROWS * KEY_TAPS);
                    sums[r][0] = add_keys(sums[r][0], vget_low_s8(k0), vget_low_s8(k1), q0, q1);
                    sums[r][1] = add_keys(sums[r][1], vget_high_s8(k0), vget_high_s8(k1), q0, q1);
                }
            }
            for (size_t r = 0; r < TOGETHER; r++) {
                float *to = scores_RB + (first + r) * BLOCK;
                float32x4_t a = store_scores(sums[r][0], key_scales, to, j);
                float32x4_t b = store_scores(sums[r][1], key_scales, to, j + LANES);
                most[r] = j == 0 ? vmaxq_f32(a, b) : vmaxq_f32(most[r], vmaxq_f32(a, b));
            }
        }
        for (size_t r = 0; r < TOGETHER; r++) {
            largest[first + r] = vmaxvq_f32(most[r]);
        }
    }
}

static void weights(const float *scores_RB, const float *scales, const float *largest, size_t n_keys,
                    weight *weights_RB, int32_t *sums) {
    for (size_t r = 0; r < ROWS; r++) {
        float32x4_t scale = vdupq_n_f32(scales[r]), most = vdupq_n_f32(largest[r]);
        uint32x4_t sum = vdupq_n_u32(0);
        for (size_t j = 0; j < n_keys; j += LANES) {
            uint32x4_t w = weights_of(scores_RB + r * BLOCK + j, scale, most);
            vst1_s16(weights_RB + r * WEIGHTS + j, vreinterpret_s16_u16(vmovn_u32(w)));
            sum = vaddq_u32(sum, w);
        }
        sums[r] = (int32_t)vaddvq_u32(sum);
    }
}

static void products(const weight *weights_RB, const int32_t *sums, const value *values, size_t channels,
                     size_t n_keys, const float *kept, const float *fresh, float *totals_RC) {
    (void)sums;
    for (size_t first = 0; first < ROWS; first += TOGETHER) {
        for (size_t c = 0; c < channels; c += 2 * LANES) {
            int32x4_t parts[TOGETHER][2];
            for (size_t r = 0; r < TOGETHER; r++) {
                parts[r][0] = parts[r][1] = vdupq_n_s32(0);
            }
            for (size_t j = 0; j < n_keys; j++) {
                int16x8_t x = vld1q_s16(values + j * channels + c);
                for (size_t r = 0; r < TOGETHER; r++) {
                    int16_t w = weights_RB[(first + r) * WEIGHTS + j];
                    parts[r][0] = vmlal_n_s16(parts[r][0], vget_low_s16(x), w);
                    parts[r][1] = vmlal_high_n_s16(parts[r][1], x, w);
                }
            }
            for (size_t r = 0; r < TOGETHER; r++) {
                float *to = totals_RC + (first + r) * channels + c;
                add_products(parts[r][0], kept[first + r], fresh[first + r], to);
                add_products(parts[r][1], kept[first + r], fresh[first + r], to + LANES);
            }
        }
    }
}

const struct attention_ops attention_neon = {
    .key_bytes = sizeof(key), .value_bytes = sizeof(value), .prepare = prepare, .rows = rows};
#endif
