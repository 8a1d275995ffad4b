/* NEON with Armv8.2's dot product (Cortex-A76: Raspberry Pi 5; Apple): weights in three signed digits of radix 256.
 *
 * A weight w is d0 + 256 * d1 + 65536 * d2 with digits of -128..127. sdot multiplies signed bytes, so samples are
 * moved by 128: the sum of w * sample is the sum of w * (sample - 128), which is three dot products, and 128 times the
 * sum of the weights. Exact modulo 2^32.
 */
#include "kernels.h"

#ifdef KERNELS_DOTPROD
#ifndef __ARM_FEATURE_DOTPROD
#define LANES_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#include "lanes_neon.h"

enum { ROWS = LANES_EIGHT, FOURS = ROWS / 4, TAPS = 4, DIGITS = 3, N_WORDS = 4, N_HEAD = 1 };

/* A word for each power of 256 with the digits of four taps, and one that fills the vector. A digit is the weight's
 * lowest byte, signed; the rest, (w - digit) / 256, is the weight for the next one. */
static void pack_digits(const int32_t *weights, int32_t *packed) {
    int32x4_t w = vld1q_s32(weights), w1 = vrshrq_n_s32(w, 8), w2 = vrshrq_n_s32(w1, 8);
    int8x8_t low = vmovn_s16(vcombine_s16(vmovn_s32(w), vmovn_s32(w1)));
    int8x8_t high = vmovn_s16(vcombine_s16(vmovn_s32(w2), vdup_n_s16(0)));
    vst1q_s32(packed, vreinterpretq_s32_s8(vcombine_s8(low, high)));
}

/* What a sum begins with: half a unit, so that the final shift rounds, and what moved samples lack. */
static void sum_lacking(const int32_t *weights, size_t count, int32_t *packed) {
    uint32_t sum = 1u << (RESIZE_WEIGHT_BITS - 1);
    for (size_t t = 0; t < count; t++) {
        sum += 128u * (uint32_t)weights[t];
    }
    memcpy(packed, &sum, sizeof sum);
}

static LANES_INLINE int8x16_t moved(uint8x16_t samples) {
    return vreinterpretq_s8_u8(veorq_u8(samples, vdupq_n_u8(0x80)));
}

/* The sums that belong to the digits of four lanes. */
struct sums {
    int32x4_t digit[DIGITS];
};

static LANES_INLINE void begin(struct sums *s, int32x4_t first) {
    s->digit[0] = first;
    s->digit[1] = s->digit[2] = vdupq_n_s32(0);
}

static LANES_INLINE void add(struct sums *s, int8x16_t x, int8x16_t w) {
    s->digit[0] = vdotq_laneq_s32(s->digit[0], x, w, 0);
    s->digit[1] = vdotq_laneq_s32(s->digit[1], x, w, 1);
    s->digit[2] = vdotq_laneq_s32(s->digit[2], x, w, 2);
}

static LANES_INLINE int32x4_t total(const struct sums *s) {
    int32x4_t sum = vmlaq_n_s32(s->digit[0], s->digit[1], 1 << 8);
    return vmlaq_n_s32(sum, s->digit[2], 1 << 16);
}

/* ---- horizontal: lanes of 32 bits, each with four samples; a vector has four rows of a channel ---- */

static const struct lane_format format = {.rows = ROWS, .units = FOURS, .taps = TAPS,
                                          .channel_bytes = sizeof(int8x16_t),
                                          .finished_bytes = LANES_EIGHT_BYTES, .n_words = N_WORDS,
                                          .pack = pack_digits, .n_head = N_HEAD, .head = sum_lacking};

/* Channel c of four pixels. */
#define FOUR(c, step) (c), (c) + (step), (c) + 2 * (step), (c) + 3 * (step)

/* Sixteen columns of a row in `channels` vectors, four columns of a channel in 32 bits. */
static LANES_INLINE void load_fours(const uint8_t *row, int channels, int32x4_t fours[4]) {
    static const uint8_t rgb[3][16] = {
        {FOUR(0, 3), FOUR(1, 3), FOUR(2, 3), FOUR(12, 3)},
        {FOUR(13, 3), FOUR(14, 3), FOUR(24, 3), FOUR(25, 3)},
        {FOUR(26, 3), FOUR(36, 3), FOUR(37, 3), FOUR(38, 3)},
    };
    static const uint8_t rgba[16] = {FOUR(0, 4), FOUR(1, 4), FOUR(2, 4), FOUR(3, 4)};
    if (channels == 3) {
        uint8x16x3_t x = vld1q_u8_x3(row);
        for (int k = 0; k < 3; k++) {
            fours[k] = vreinterpretq_s32_s8(moved(vqtbl3q_u8(x, vld1q_u8(rgb[k]))));
        }
        return;
    }
    for (int c = 0; c < channels; c++) {
        uint8x16_t x = vld1q_u8(row + 16 * c);
        fours[c] = vreinterpretq_s32_s8(moved(channels == 4 ? vqtbl1q_u8(x, vld1q_u8(rgba)) : x));
    }
}

/* Sixteen columns of four rows. */
static LANES_INLINE void arrange(const uint8_t *const *rows, size_t offset, int channels, uint8_t *bytes) {
    int32_t *out = (int32_t *)(void *)bytes;
    int32x4_t x[4][4];
    load_fours(rows[0] + offset, channels, x[0]);
    load_fours(rows[1] + offset, channels, x[1]);
    load_fours(rows[2] + offset, channels, x[2]);
    load_fours(rows[3] + offset, channels, x[3]);
    for (int k = 0; k < channels; k++) {
        int32x4x4_t lanes = {{x[0][k], x[1][k], x[2][k], x[3][k]}};
        vst4q_s32(out, lanes);
        LANES_ADVANCE(out, 16)
    }
}

/* Add a group of four rows. */
static LANES_INLINE void add_group(struct sums s[4], const int8_t **samples, int8x16_t w, int channels) {
    if (channels == 3) {
        int8x16x3_t x = vld1q_s8_x3(*samples);
        add(&s[0], x.val[0], w);
        add(&s[1], x.val[1], w);
        add(&s[2], x.val[2], w);
    } else if (channels == 4) {
        int8x16x4_t x = vld1q_s8_x4(*samples);
        add(&s[0], x.val[0], w);
        add(&s[1], x.val[1], w);
        add(&s[2], x.val[2], w);
        add(&s[3], x.val[3], w);
    } else {
        add(&s[0], vld1q_s8(*samples), w);
    }
    LANES_ADVANCE(*samples, 16 * channels)
}

/* See lanes_finish. */
static LANES_INLINE void finish(const struct lane_plan *plan, size_t from, size_t to, int channels) {
    uint8_t *out = lanes_finished(plan, from, (size_t)channels, 0);
    for (size_t i = from; i < to; i++, out += LANES_EIGHT * channels) {
        const int32_t *head = plan->weights + i * plan->n_weights, *words = head + N_HEAD;
        const int8_t *a = (const int8_t *)plan->arranged + plan->start[i] * channels * 16, *b = a + plan->unit_bytes;
        struct sums sums_a[4], sums_b[4];
        for (int c = 0; c < channels; c++) {
            begin(&sums_a[c], vdupq_n_s32(head[0]));
            begin(&sums_b[c], vdupq_n_s32(head[0]));
        }
        for (int32_t g = plan->n_groups[i]; g > 0; g--, words += N_WORDS) {
            int8x16_t w = vreinterpretq_s8_s32(vld1q_s32(words));
            add_group(sums_a, &a, w, channels);
            add_group(sums_b, &b, w, channels);
        }
        for (int c = 0; c < channels; c++) {
            vst1_u8(out + LANES_EIGHT * c, lanes_clipped(lanes_upper(total(&sums_a[c]), total(&sums_b[c]))));
        }
    }
}

/* Functions of their own: GCC 12 keeps all sums in registers only where it has nothing else to do. */
static LANES_NOINLINE void finish_grey(const struct lane_plan *plan, size_t from, size_t to) {
    finish(plan, from, to, 1);
}

static LANES_NOINLINE void finish_rgb(const struct lane_plan *plan, size_t from, size_t to) {
    finish(plan, from, to, 3);
}

static LANES_NOINLINE void finish_rgba(const struct lane_plan *plan, size_t from, size_t to) {
    finish(plan, from, to, 4);
}

static LANES_TARGET void rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                              const struct resize_axis *axis, void *plan) {
    lanes_neon_rows(src_rows, dst_rows, n_rows, channels, axis, plan, &format, arrange, finish_grey, finish_rgb,
                    finish_rgba);
}

static const struct horizontal_ops horizontal = {.format = &format, .rows = rows};

/* ---- vertical: 32 columns at a time, then 16; four rows interleaved ---- */

/* Columns [start, start + 16 * n_vectors). `tail` are the rows of the last group. */
static LANES_INLINE void columns(const uint8_t *const *src_rows, const uint8_t *const *tail, const int32_t *head,
                                 size_t n_taps, uint8_t *dst_row, size_t start, int n_vectors) {
    const int32_t *words = head + N_HEAD;
    struct sums sums[2][4];
    for (int v = 0; v < n_vectors; v++) {
        for (int k = 0; k < 4; k++) {
            begin(&sums[v][k], vdupq_n_s32(head[0]));
        }
    }
    for (size_t tap = 0; tap < n_taps; tap += TAPS, words += N_WORDS) {
        const uint8_t *const *rows = tap + TAPS <= n_taps ? src_rows + tap : tail;
        const uint8_t *row[TAPS] = {rows[0] + start, rows[1] + start, rows[2] + start, rows[3] + start};
        int8x16_t w = vreinterpretq_s8_s32(vld1q_s32(words));
        for (int v = 0; v < n_vectors; v++) {
            int8x16_t a = moved(vld1q_u8(row[0] + 16 * v)), b = moved(vld1q_u8(row[1] + 16 * v));
            int8x16_t c = moved(vld1q_u8(row[2] + 16 * v)), d = moved(vld1q_u8(row[3] + 16 * v));
            int8x16_t ac = vzip1q_s8(a, c), bd = vzip1q_s8(b, d);
            add(&sums[v][0], vzip1q_s8(ac, bd), w);
            add(&sums[v][1], vzip2q_s8(ac, bd), w);
            ac = vzip2q_s8(a, c), bd = vzip2q_s8(b, d);
            add(&sums[v][2], vzip1q_s8(ac, bd), w);
            add(&sums[v][3], vzip2q_s8(ac, bd), w);
        }
    }
    for (int v = 0; v < n_vectors; v++) {
        uint8x8_t low = lanes_clipped(lanes_upper(total(&sums[v][0]), total(&sums[v][1])));
        int16x8_t high = lanes_upper(total(&sums[v][2]), total(&sums[v][3]));
        vst1q_u8(dst_row + start + 16 * v, vqshrun_high_n_s16(low, high, RESIZE_WEIGHT_BITS - 16));
    }
}

static LANES_TARGET void vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps,
                                  uint8_t *dst_row, size_t n_bytes, int32_t *scratch) {
    if (n_bytes < 16 || n_taps == 0) {
        kernels_scalar.vertical(src_rows, weights, n_taps, dst_row, n_bytes, scratch);
        return;
    }
    const uint8_t *tail[TAPS];
    lanes_last_rows(src_rows, n_taps, tail);
    lanes_pack(&format, weights, n_taps, 0, scratch);
    size_t start = 0;
    for (; start + 32 <= n_bytes; start += 32) {
        columns(src_rows, tail, scratch, n_taps, dst_row, start, 2);
    }
    for (; start < n_bytes; start += 16) { /* the last may overlap the one before it */
        columns(src_rows, tail, scratch, n_taps, dst_row, start + 16 <= n_bytes ? start : n_bytes - 16, 1);
    }
}

const struct kernel_ops kernels_dotprod = {
    .name = "dotprod",
    .needs = CPU_NEON | CPU_DOTPROD,
    .horizontal = &horizontal,
    .vertical = vertical,
    .attention = &attention_dotprod,
};
#endif
