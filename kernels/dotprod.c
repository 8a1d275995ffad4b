/* NEON with Armv8.2's dot product (Cortex-A76: Raspberry Pi 5; Apple): weights in three signed digits of radix 256.
 *
 * A weight w is d0 + 256 * d1 + 65536 * d2 with digits of -128..127. sdot multiplies signed bytes, so samples are
 * moved by 128: the sum of w * sample is the sum of w * (sample - 128), which is three dot products, and 128 times the
 * sum of the weights. Exact modulo 2^32.
 */
#include "kernels.h"

#if defined(__aarch64__)
#define LANES_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#include "lanes_neon.h"

enum { ROWS = 8, UNITS = 2, TAPS = 4, DIGITS = 3, N_WORDS = DIGITS + 1 };

/* A word for each power of 256 with the digits of four taps, and what their moved samples lack. */
static void pack_digits(const int32_t *weights, int32_t *packed) {
    uint32_t words[N_WORDS] = {0};
    for (int t = 0; t < TAPS; t++) {
        int8_t digits[DIGITS];
        lanes_digits(weights[t], digits);
        for (int d = 0; d < DIGITS; d++) {
            words[d] |= (uint32_t)(uint8_t)digits[d] << (8 * t);
        }
        words[DIGITS] += 128u * (uint32_t)weights[t];
    }
    memcpy(packed, words, sizeof words);
}

static LANES_INLINE int8x16_t moved(uint8x16_t samples) {
    return vreinterpretq_s8_u8(veorq_u8(samples, vdupq_n_u8(0x80)));
}

/* Four lanes' samples from their sums, 16 bits each; the last narrowing, by 6 bits more, clips to 0..255. `lacking`
 * is what the samples were moved by, in all. */
static LANES_INLINE int16x4_t halfway(const int32x4_t sums[DIGITS], int32x4_t lacking) {
    int32x4_t high = vaddq_s32(vshlq_n_s32(sums[1], 8), vshlq_n_s32(sums[2], 16));
    return vshrn_n_s32(vaddq_s32(vaddq_s32(sums[0], lacking), high), 16);
}

/* ---- horizontal: lanes of 32 bits, each with four samples; two units of 4 rows ---- */

static const struct lane_format format = {.rows = ROWS, .taps = TAPS, .n_words = N_WORDS, .pack = pack_digits,
                                          .channel_bytes = UNITS * sizeof(int8x16_t)};

static size_t plan_size(const struct resize_axis *axis, int channels) {
    return lanes_plan_size(axis, channels, &format);
}

static void plan_init(const struct resize_axis *axis, int channels, void *plan) {
    (void)channels;
    lanes_plan_init(axis, &format, plan);
}

/* Sixteen samples of each of four lanes, to where their four groups begin, `group_bytes` apart. */
static LANES_INLINE void arrange_lanes(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d, uint8_t *out,
                                       size_t group_bytes) {
    /* a 4 x 4 transposition of four samples, 32 bits */
    uint32x4x2_t ac = vzipq_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(c));
    uint32x4x2_t bd = vzipq_u32(vreinterpretq_u32_u8(b), vreinterpretq_u32_u8(d));
    for (int half = 0; half < 2; half++) {
        uint32x4x2_t abcd = vzipq_u32(ac.val[half], bd.val[half]);
        for (int quarter = 0; quarter < 2; quarter++, out += group_bytes) {
            vst1q_s8((int8_t *)out, moved(vreinterpretq_u8_u32(abcd.val[quarter])));
        }
    }
}

/* Sixteen columns of eight rows, four groups. */
static LANES_INLINE void arrange(const uint8_t *const *rows, size_t offset, int channels, uint8_t *out) {
    size_t group_bytes = (size_t)(UNITS * channels) * sizeof(int8x16_t);
    for (int u = 0; u < UNITS; u++) {
        uint8x16_t lanes[LANES_UNIT_ROWS * 4];
        lanes_load_unit(rows + u * LANES_UNIT_ROWS, offset, channels, lanes);
        for (int v = 0; v < channels; v++, out += sizeof(int8x16_t)) {
            arrange_lanes(lanes[4 * v], lanes[4 * v + 1], lanes[4 * v + 2], lanes[4 * v + 3], out, group_bytes);
        }
    }
}

/* Output `i` of 8 rows. */
static LANES_INLINE void output(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels, bool last) {
    size_t group_bytes = (size_t)(UNITS * channels) * sizeof(int8x16_t);
    const int8_t *samples = (const int8_t *)plan->arranged + (size_t)plan->start[i] * group_bytes;
    const int32_t *weights = plan->weights + i * plan->n_weights;
    int32x4_t sums[UNITS * 4][DIGITS], words = vdupq_n_s32(0);
    for (int v = 0; v < UNITS * channels; v++) {
        sums[v][0] = vdupq_n_s32(1 << (RESIZE_WEIGHT_BITS - 1));
        sums[v][1] = sums[v][2] = vdupq_n_s32(0);
    }
    for (int32_t g = 0; g < plan->n_groups[i]; g++, weights += N_WORDS, samples += group_bytes) {
        int32x4_t word = vld1q_s32(weights);
        int8x16_t w = vreinterpretq_s8_s32(word);
        words = vaddq_s32(words, word); /* only for its last lane */
        for (int v = 0; v < UNITS * channels; v++) {
            int8x16_t x = vld1q_s8(samples + 16 * v);
            sums[v][0] = vdotq_laneq_s32(sums[v][0], x, w, 0);
            sums[v][1] = vdotq_laneq_s32(sums[v][1], x, w, 1);
            sums[v][2] = vdotq_laneq_s32(sums[v][2], x, w, 2);
        }
    }
    int32x4_t lacking = vdupq_laneq_s32(words, DIGITS);
    for (int u = 0; u < UNITS; u++) {
        int16x4_t quads[4];
        for (int v = 0; v < 4; v++) {
            quads[v] = halfway(sums[u * channels + (v < channels ? v : channels - 1)], lacking);
        }
        lanes_store_narrowed(vcombine_s16(quads[0], quads[1]), vcombine_s16(quads[2], quads[3]), dst + 4 * u,
                             i * (size_t)channels, channels, last);
    }
}

static LANES_TARGET void rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                              const struct resize_axis *axis, void *plan) {
    lanes_rows(src_rows, dst_rows, n_rows, channels, axis, plan, &format, arrange, output);
}

static const struct horizontal_ops horizontal = {.plan_size = plan_size, .plan_init = plan_init, .rows = rows};

/* ---- vertical: 16 columns at a time, four rows interleaved ---- */

/* Columns [start, start + 16). `words` holds N_WORDS for each four taps. */
static LANES_INLINE void columns(const uint8_t *const *src_rows, const int32_t *words, size_t n_taps, uint8_t *dst_row,
                                 size_t start) {
    int32x4_t sums[4][DIGITS], total = vdupq_n_s32(0);
    for (int v = 0; v < 4; v++) {
        sums[v][0] = vdupq_n_s32(1 << (RESIZE_WEIGHT_BITS - 1));
        sums[v][1] = sums[v][2] = vdupq_n_s32(0);
    }
    for (size_t t = 0; t < n_taps; t += TAPS, words += N_WORDS) {
        uint8x16_t row[TAPS];
        for (size_t k = 0; k < TAPS; k++) { /* past the end the last row again; its weights are 0 */
            row[k] = vld1q_u8(src_rows[t + k < n_taps ? t + k : n_taps - 1] + start);
        }
        uint8x16x2_t ac = vzipq_u8(row[0], row[2]), bd = vzipq_u8(row[1], row[3]);
        uint8x16x2_t x01 = vzipq_u8(ac.val[0], bd.val[0]), x23 = vzipq_u8(ac.val[1], bd.val[1]);
        int8x16_t x[4] = {moved(x01.val[0]), moved(x01.val[1]), moved(x23.val[0]), moved(x23.val[1])};
        int32x4_t word = vld1q_s32(words);
        int8x16_t w = vreinterpretq_s8_s32(word);
        total = vaddq_s32(total, word); /* only for its last lane */
        for (int v = 0; v < 4; v++) {
            sums[v][0] = vdotq_laneq_s32(sums[v][0], x[v], w, 0);
            sums[v][1] = vdotq_laneq_s32(sums[v][1], x[v], w, 1);
            sums[v][2] = vdotq_laneq_s32(sums[v][2], x[v], w, 2);
        }
    }
    int32x4_t lacking = vdupq_laneq_s32(total, DIGITS);
    int16x8_t low = vcombine_s16(halfway(sums[0], lacking), halfway(sums[1], lacking));
    int16x8_t high = vcombine_s16(halfway(sums[2], lacking), halfway(sums[3], lacking));
    vst1q_u8(dst_row + start, lanes_narrowed(low, high));
}

static LANES_TARGET void vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps,
                                  uint8_t *dst_row, size_t n_bytes, int32_t *scratch) {
    lanes_vertical(src_rows, weights, n_taps, dst_row, n_bytes, scratch, &format, 16, columns, &kernels_scalar);
}

const struct kernel_ops kernels_dotprod = {
    .name = "dotprod",
    .needs = CPU_NEON | CPU_DOTPROD,
    .horizontal = &horizontal,
    .vertical = vertical,
};
#endif
