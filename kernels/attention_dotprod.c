/* Attention in integers with Armv8.2's dot product: four products of bytes in a lane, weights in two bytes.
 *
 * A weight is 256 times its upper byte and its lower byte. udot multiplies unsigned bytes, so values are moved by 128,
 * for which the sum of the weights makes up.
 */
#include "kernels.h"

#ifdef KERNELS_DOTPROD
#ifdef __ARM_FEATURE_DOTPROD
#define LANES_TARGET
#else
#define LANES_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
enum { KEY_TAPS = 4, VALUE_TAPS = 4, KEY_MOVED = 0, VALUE_MOVED = 128, WEIGHTS = 128, UPPER = 64 };
typedef int8_t key;
typedef uint8_t value, weight;
#define WEIGHT_OF(row, j) ((row)[j] + 256 * (row)[UPPER + (j)])
#include "attention_lanes.h"
#include "attention_neon.h"

/* Four bytes, everywhere. */
ATTENTION_INLINE uint8x16_t everywhere(const void *bytes) {
    uint32_t four;
    memcpy(&four, bytes, sizeof four);
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
}

static LANES_TARGET void scores(const key *queries, const int32_t *query_sums, const key *keys, const float *key_scales,
                                size_t channels, size_t n_keys, float *scores_RB, float *largest) {
    (void)query_sums;
    for (size_t first = 0; first < ROWS; first += TOGETHER) {
        float32x4_t most[TOGETHER];
        for (size_t j = 0; j < n_keys; j += 4 * LANES) {
            int32x4_t sums[TOGETHER][4];
            for (size_t r = 0; r < TOGETHER; r++) {
                for (size_t v = 0; v < 4; v++) {
                    sums[r][v] = vdupq_n_s32(0);
                }
            }
            for (size_t c = 0; c < channels; c += KEY_TAPS) {
                const key *k = keys + c * n_keys + j * KEY_TAPS;
                int8x16_t x[4] = {vld1q_s8(k), vld1q_s8(k + 16), vld1q_s8(k + 32), vld1q_s8(k + 48)};
                for (size_t r = 0; r < TOGETHER; r++) {
                    int8x16_t q = vreinterpretq_s8_u8(everywhere(queries + c * ROWS + (first + r) * KEY_TAPS));
                    for (size_t v = 0; v < 4; v++) {
                        sums[r][v] = vdotq_s32(sums[r][v], x[v], q);
                    }
                }
            }
            for (size_t r = 0; r < TOGETHER; r++) {
                for (size_t v = 0; v < 4; v++) {
                    float *to = scores_RB + (first + r) * BLOCK;
                    float32x4_t score = store_scores(sums[r][v], key_scales, to, j + v * LANES);
                    most[r] = j + v == 0 ? score : vmaxq_f32(most[r], score);
                }
            }
        }
        for (size_t r = 0; r < TOGETHER; r++) {
            largest[first + r] = vmaxvq_f32(most[r]);
        }
    }
}

static LANES_TARGET void weights(const float *scores_RB, const float *scales, const float *largest, size_t n_keys,
                                 weight *weights_RB, int32_t *sums) {
    for (size_t r = 0; r < ROWS; r++) {
        float32x4_t scale = vdupq_n_f32(scales[r]), most = vdupq_n_f32(largest[r]);
        uint32x4_t sum = vdupq_n_u32(0);
        for (size_t j = 0; j < n_keys; j += 2 * LANES) {
            const float *from = scores_RB + r * BLOCK + j;
            uint32x4_t a = weights_of(from, scale, most), b = weights_of(from + LANES, scale, most);
            uint16x8_t both = vcombine_u16(vmovn_u32(a), vmovn_u32(b));
            vst1_u8(weights_RB + r * WEIGHTS + j, vmovn_u16(both));
            vst1_u8(weights_RB + r * WEIGHTS + UPPER + j, vshrn_n_u16(both, 8));
            sum = vaddq_u32(sum, vaddq_u32(a, b));
        }
        sums[r] = (int32_t)vaddvq_u32(sum);
    }
}

static LANES_TARGET void products(const weight *weights_RB, const int32_t *sums, const value *values, size_t channels,
                                  size_t n_keys, const float *kept, const float *fresh, float *totals_RC) {
    for (size_t first = 0; first < ROWS; first += TOGETHER) {
        for (size_t c = 0; c < channels; c += 2 * LANES) {
            uint32x4_t low[TOGETHER][2], high[TOGETHER][2];
            for (size_t r = 0; r < TOGETHER; r++) {
                low[r][0] = low[r][1] = high[r][0] = high[r][1] = vdupq_n_u32(0);
            }
            for (size_t j = 0; j < n_keys; j += VALUE_TAPS) {
                const value *x = values + j * channels + c * VALUE_TAPS;
                uint8x16_t x0 = vld1q_u8(x), x1 = vld1q_u8(x + 16);
                for (size_t r = 0; r < TOGETHER; r++) {
                    const weight *w = weights_RB + (first + r) * WEIGHTS + j;
                    uint8x16_t lower = everywhere(w), upper = everywhere(w + UPPER);
                    low[r][0] = vdotq_u32(low[r][0], x0, lower);
                    low[r][1] = vdotq_u32(low[r][1], x1, lower);
                    high[r][0] = vdotq_u32(high[r][0], x0, upper);
                    high[r][1] = vdotq_u32(high[r][1], x1, upper);
                }
            }
            for (size_t r = 0; r < TOGETHER; r++) {
                int32x4_t moved = vdupq_n_s32(VALUE_MOVED * sums[first + r]);
                for (size_t v = 0; v < 2; v++) {
                    int32x4_t sum = vreinterpretq_s32_u32(vaddq_u32(low[r][v], vshlq_n_u32(high[r][v], 8)));
                    add_products(vsubq_s32(sum, moved), kept[first + r], fresh[first + r],
                                 totals_RC + (first + r) * channels + c + v * LANES);
                }
            }
        }
    }
}

const struct attention_ops attention_dotprod = {
    .key_bytes = sizeof(key), .value_bytes = sizeof(value), .prepare = prepare, .rows = rows};
#endif
