/* NEON of the first 64-bit Arms (Cortex-A53, A72: Raspberry Pi 4): weights split into two signed 16-bit halves.
 *
 * A weight w is high * 2^16 + low, both in -2^15..2^15 - 1, so the sum of w * sample is
 * (sum of high * sample) * 2^16 + sum of low * sample. Modulo 2^32 only 16 bits of the first sum count: eight lanes of
 * it fit in a vector, and no carry is lost. Small weights, as the outer lobes of a filter have, need no first sum.
 */
#include "kernels.h"

#if defined(__aarch64__)
#include "lanes_neon.h"

enum { ROWS = 16, EIGHTS = ROWS / LANES_EIGHT, TAPS = 4, N_WORDS = TAPS };

/* Four low halves, then four high ones. */
static void pack_halves(const int32_t *weights, int32_t *packed) {
    int32x4_t w = vld1q_s32(weights);
    int16x4_t low = vmovn_s32(w), high = vshrn_n_s32(vsubw_s16(w, low), 16);
    vst1q_s32(packed, vreinterpretq_s32_s16(vcombine_s16(low, high)));
}

/* How many groups of an output come before the first weight with a high half, up to the last one, and after it. A
 * narrow last group of one or two taps counts as a PAIR. */
enum { BEFORE, WIDE, AFTER, PAIR, N_PARTS };

static void count_groups(const int32_t *weights, size_t count, int32_t *parts) {
    size_t n_groups = (count + TAPS - 1) / TAPS, first = 0, end = count;
    while (first < count && weights[first] == (int16_t)weights[first]) {
        first++;
    }
    while (end > first && weights[end - 1] == (int16_t)weights[end - 1]) {
        end--;
    }
    size_t before = n_groups, after = 0;
    if (first < count) {
        before = first / TAPS;
        after = n_groups - (end + TAPS - 1) / TAPS;
    }
    bool pair = count % TAPS != 0 && count % TAPS <= 2 && (after > 0 || first == count);
    parts[BEFORE] = (int32_t)before;
    parts[WIDE] = (int32_t)(n_groups - before - after);
    parts[AFTER] = (int32_t)after;
    parts[PAIR] = pair;
    parts[after > 0 ? AFTER : BEFORE] -= pair;
}

/* ---- horizontal: lanes of 16 bits, a vector for each sample of a pixel: r0R .. r7R | r0G .. r7G | r0B .. r7B ---- */

static const struct lane_format format = {.rows = ROWS, .units = EIGHTS, .taps = TAPS, .granule = 1,
                                          .channel_bytes = TAPS * sizeof(int16x8_t),
                                          .finished_bytes = EIGHTS * LANES_EIGHT_BYTES, .n_words = N_WORDS,
                                          .pack = pack_halves, .n_head = N_PARTS, .head = count_groups};

static LANES_INLINE int32x4_t low_widened(uint8x16_t bytes) {
    return vreinterpretq_s32_u16(vmovl_u8(vget_low_u8(bytes)));
}

static LANES_INLINE int32x4_t high_widened(uint8x16_t bytes) {
    return vreinterpretq_s32_u16(vmovl_high_u8(bytes));
}

/* Sixteen columns of eight rows. Their bytes keep their order: channels are told apart when they are multiplied. */
static LANES_INLINE void arrange(const uint8_t *const *rows, size_t offset, int channels, uint8_t *bytes) {
    const uint8_t *row[LANES_EIGHT];
    int32_t *out = (int32_t *)(void *)bytes;
    for (int r = 0; r < LANES_EIGHT; r++) {
        row[r] = rows[r];
    }
    for (int k = 0; k < channels; k++, offset += 16) {
        uint8x16_t pairs[2][4];
        for (int p = 0; p < 4; p++) {
            uint8x16_t a = vld1q_u8(row[2 * p] + offset), b = vld1q_u8(row[2 * p + 1] + offset);
            pairs[0][p] = vzip1q_u8(a, b);
            pairs[1][p] = vzip2q_u8(a, b);
        }
        for (int half = 0; half < 2; half++) {
            const uint8x16_t *p = pairs[half]; /* lanes of 32 bits: two rows */
            int32x4x4_t low = {{low_widened(p[0]), low_widened(p[1]), low_widened(p[2]), low_widened(p[3])}};
            int32x4x4_t high = {{high_widened(p[0]), high_widened(p[1]), high_widened(p[2]), high_widened(p[3])}};
            vst4q_s32(out, low);
            LANES_ADVANCE(out, 16)
            vst4q_s32(out, high);
            LANES_ADVANCE(out, 16)
        }
    }
}

/* The sums of eight rows. The high ones begin with half a unit, so that the final shift rounds. */
struct sums {
    int32x4_t low[4][2];
    int16x8_t high[4];
};

/* Add vector `n` of a group, which is a sample of tap n / channels. The lane has to be a constant in the source. */
#define ADD(n, channels, x)                                                                      \
    {                                                                                            \
        enum { TAP = (n) / (channels), CHANNEL = (n) % (channels) };                             \
        s->low[CHANNEL][0] = vmlal_laneq_s16(s->low[CHANNEL][0], vget_low_s16(x), w, TAP);       \
        s->low[CHANNEL][1] = vmlal_high_laneq_s16(s->low[CHANNEL][1], x, w, TAP);                \
        s->high[CHANNEL] = wide ? vmlaq_laneq_s16(s->high[CHANNEL], x, w, TAPS + TAP) : s->high[CHANNEL]; \
    }
#define ADD_TWO(n, channels)                               \
    {                                                      \
        int16x8x2_t two = vld1q_s16_x2(*samples);          \
        LANES_ADVANCE(*samples, 2 * LANES_EIGHT)           \
        ADD(n, channels, two.val[0])                       \
        ADD((n) + 1, channels, two.val[1])                 \
    }
#define ADD_FOUR(n, channels)                              \
    {                                                      \
        int16x8x4_t four = vld1q_s16_x4(*samples);         \
        LANES_ADVANCE(*samples, 4 * LANES_EIGHT)           \
        ADD(n, channels, four.val[0])                      \
        ADD((n) + 1, channels, four.val[1])                \
        ADD((n) + 2, channels, four.val[2])                \
        ADD((n) + 3, channels, four.val[3])                \
    }

/* Two taps of eight rows. */
static LANES_INLINE void add_pair(struct sums *s, const int16_t **samples, int16x8_t w, int channels, bool wide) {
    switch (channels) {
    case 1: ADD_TWO(0, 1) break;
    case 3: ADD_FOUR(0, 3) ADD_TWO(4, 3) break;
    default: ADD_FOUR(0, 4) ADD_FOUR(4, 4) break;
    }
}

/* Four taps of eight rows. */
static LANES_INLINE void add_group(struct sums *s, const int16_t **samples, int16x8_t w, int channels, bool wide) {
    switch (channels) {
    case 1: ADD_FOUR(0, 1) break;
    case 3: ADD_FOUR(0, 3) ADD_FOUR(4, 3) ADD_FOUR(8, 3) break;
    default: ADD_FOUR(0, 4) ADD_FOUR(4, 4) ADD_FOUR(8, 4) ADD_FOUR(12, 4) break;
    }
}

static LANES_INLINE void begin_sums(struct sums *s, int channels) {
    for (int c = 0; c < channels; c++) {
        s->low[c][0] = s->low[c][1] = vdupq_n_s32(0);
        s->high[c] = vdupq_n_s16(1 << (RESIZE_WEIGHT_BITS - 1 - 16));
    }
}

static LANES_INLINE void end_sums(const struct sums *s, uint8_t *out, int channels) {
    for (int c = 0; c < channels; c++) {
        int16x8_t upper = vaddq_s16(s->high[c], lanes_upper(s->low[c][0], s->low[c][1]));
        vst1_u8(out + LANES_EIGHT * c, lanes_clipped(upper));
    }
}

#define ADD_PART(part, add, wide)                                           \
    for (int32_t g = parts[part]; g > 0; g--, words += N_WORDS) {           \
        int16x8_t w = vreinterpretq_s16_s32(vld1q_s32(words));              \
        add(&sums_a, &a, w, channels, wide);                                \
        add(&sums_b, &b, w, channels, wide);                                \
    }

/* See lanes_finish. */
static LANES_INLINE void finish(const struct lane_plan *plan, size_t from, size_t to, int channels) {
    uint8_t *out_a = lanes_finished(plan, from, (size_t)channels, 0);
    uint8_t *out_b = lanes_finished(plan, from, (size_t)channels, 1);
    for (size_t i = from; i < to; i++, out_a += LANES_EIGHT * channels, out_b += LANES_EIGHT * channels) {
        const int32_t *parts = plan->weights + i * plan->n_weights, *words = parts + N_PARTS;
        const int16_t *a = (const int16_t *)(const void *)plan->arranged + plan->start[i] * channels * LANES_EIGHT;
        const int16_t *b = (const int16_t *)(const void *)((const uint8_t *)a + plan->unit_bytes);
        struct sums sums_a, sums_b;
        begin_sums(&sums_a, channels);
        begin_sums(&sums_b, channels);
        ADD_PART(BEFORE, add_group, false)
        ADD_PART(WIDE, add_group, true)
        ADD_PART(AFTER, add_group, false)
        ADD_PART(PAIR, add_pair, false)
        end_sums(&sums_a, out_a, channels);
        end_sums(&sums_b, out_b, channels);
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

static void rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                 const struct resize_axis *axis, void *plan) {
    lanes_neon_rows(src_rows, dst_rows, n_rows, channels, axis, plan, &format, arrange, finish_grey, finish_rgb,
                    finish_rgba);
}

static const struct horizontal_ops horizontal = {.format = &format, .rows = rows};

/* ---- vertical: 48 columns at a time, then 16 ---- */

/* Add tap `t` of 16 columns, which stand in `bytes`. */
#define ADD_COLUMNS(v, t, wide, bytes)                                                           \
    {                                                                                            \
        int16x8_t left = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));                    \
        int16x8_t right = vreinterpretq_s16_u16(vmovl_high_u8(bytes));                           \
        low[v][0] = vmlal_laneq_s16(low[v][0], vget_low_s16(left), w, t);                        \
        low[v][1] = vmlal_high_laneq_s16(low[v][1], left, w, t);                                 \
        low[v][2] = vmlal_laneq_s16(low[v][2], vget_low_s16(right), w, t);                       \
        low[v][3] = vmlal_high_laneq_s16(low[v][3], right, w, t);                                \
        high[v][0] = (wide) ? vmlaq_laneq_s16(high[v][0], left, w, TAPS + (t)) : high[v][0];     \
        high[v][1] = (wide) ? vmlaq_laneq_s16(high[v][1], right, w, TAPS + (t)) : high[v][1];    \
    }
#define ADD_ROW(t, wide)                                       \
    if (n_vectors == 3) {                                      \
        uint8x16x3_t three = vld1q_u8_x3(rows[t] + start);     \
        ADD_COLUMNS(0, t, wide, three.val[0])                  \
        ADD_COLUMNS(1, t, wide, three.val[1])                  \
        ADD_COLUMNS(2, t, wide, three.val[2])                  \
    } else {                                                   \
        uint8x16_t one = vld1q_u8(rows[t] + start);            \
        ADD_COLUMNS(0, t, wide, one)                           \
    }

/* Columns [start, start + 16 * n_vectors). `tail` are the rows of the last group. */
static LANES_INLINE void columns(const uint8_t *const *src_rows, const uint8_t *const *tail, const int32_t *parts,
                                 size_t n_taps, uint8_t *dst_row, size_t start, int n_vectors) {
    const int32_t *words = parts + N_PARTS;
    const uint8_t *const *last = src_rows + (n_taps - 1) / TAPS * TAPS;
    int32x4_t low[3][4];
    int16x8_t high[3][2];
    for (int v = 0; v < n_vectors; v++) {
        low[v][0] = low[v][1] = low[v][2] = low[v][3] = vdupq_n_s32(0);
        high[v][0] = high[v][1] = vdupq_n_s16(1 << (RESIZE_WEIGHT_BITS - 1 - 16));
    }
#define ADD_GROUPS(part)                                                                 \
    for (int32_t g = parts[part]; g > 0; g--, words += N_WORDS, src_rows += TAPS) {      \
        int16x8_t w = vreinterpretq_s16_s32(vld1q_s32(words));                           \
        const uint8_t *const *rows = src_rows == last ? tail : src_rows;                 \
        ADD_ROW(0, part == WIDE)                                                         \
        ADD_ROW(1, part == WIDE)                                                         \
        if (part != PAIR) {                                                              \
            ADD_ROW(2, part == WIDE)                                                     \
            ADD_ROW(3, part == WIDE)                                                     \
        }                                                                                \
    }
    ADD_GROUPS(BEFORE)
    ADD_GROUPS(WIDE)
    ADD_GROUPS(AFTER)
    ADD_GROUPS(PAIR)
    for (int v = 0; v < n_vectors; v++) {
        int16x8_t left = vaddq_s16(high[v][0], lanes_upper(low[v][0], low[v][1]));
        int16x8_t right = vaddq_s16(high[v][1], lanes_upper(low[v][2], low[v][3]));
        vst1q_u8(dst_row + start + 16 * v, vqshrun_high_n_s16(lanes_clipped(left), right, RESIZE_WEIGHT_BITS - 16));
    }
}

static void vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps, uint8_t *dst_row,
                     size_t n_bytes, int32_t *scratch) {
    if (n_bytes < 16 || n_taps == 0) {
        kernels_scalar.vertical(src_rows, weights, n_taps, dst_row, n_bytes, scratch);
        return;
    }
    const uint8_t *tail[TAPS];
    lanes_last_rows(src_rows, n_taps, tail);
    lanes_pack(&format, weights, n_taps, 0, scratch);
    size_t start = 0;
    for (; start + 48 <= n_bytes; start += 48) {
        columns(src_rows, tail, scratch, n_taps, dst_row, start, 3);
    }
    if (start < n_bytes && n_bytes >= 48) { /* overlaps the one before it */
        columns(src_rows, tail, scratch, n_taps, dst_row, n_bytes - 48, 3);
        return;
    }
    for (; start < n_bytes; start += 16) {
        columns(src_rows, tail, scratch, n_taps, dst_row, start + 16 <= n_bytes ? start : n_bytes - 16, 1);
    }
}

const struct kernel_ops kernels_neon = {
    .name = "neon",
    .needs = CPU_NEON,
    .horizontal = &horizontal,
    .vertical = vertical,
    .yuv_row = neon_yuv_row,
    .composite_row = neon_composite_row,
    .sum_abs_diff = neon_sum_abs_diff,
    .attention = &attention_neon,
};
#endif
