/* What the two Arm targets share: outputs of eight rows back into rows. */
#ifndef EDGEVLM_LANES_NEON_H
#define EDGEVLM_LANES_NEON_H

#include "lanes.h"

#include <arm_neon.h>

#define LANES_NOINLINE LANES_TARGET __attribute__((noinline))

/* Let a load move its pointer: GCC would rather add to copies of it, unless it cannot see where it points. */
#define LANES_ADVANCE(pointer, n) \
    (pointer) += (n);             \
    __asm__("" : "+r"(pointer));

/* Outputs are finished as bytes of eight rows, channel by channel, and turned into rows this many at a time. */
enum { LANES_EIGHT = 8, LANES_CHUNK = 16, LANES_EIGHT_BYTES = LANES_CHUNK * LANES_EIGHT };

/* The rows of the last group of four that the vertical pass multiplies. */
static inline void lanes_last_rows(const uint8_t *const *src_rows, size_t n_taps, const uint8_t *last[4]) {
    for (size_t k = 0; k < 4; k++) { /* past the end the last row again; its weights are 0 */
        size_t tap = (n_taps - 1) / 4 * 4 + k;
        last[k] = src_rows[tap < n_taps ? tap : n_taps - 1];
    }
}

/* Where output `i` of the eights of a batch is to be put. */
static LANES_INLINE uint8_t *lanes_finished(const struct lane_plan *plan, size_t i, size_t channels, size_t eight) {
    return plan->finished + (eight * LANES_EIGHT_BYTES + i % LANES_CHUNK * LANES_EIGHT) * channels;
}

/* Upper halves of eight sums, and by 6 bits more: saturating, which is the clip to 0..255. */
static LANES_INLINE int16x8_t lanes_upper(int32x4_t low, int32x4_t high) {
    return vuzp2q_s16(vreinterpretq_s16_s32(low), vreinterpretq_s16_s32(high));
}

static LANES_INLINE uint8x8_t lanes_clipped(int16x8_t upper) {
    return vqshrun_n_s16(upper, RESIZE_WEIGHT_BITS - 16);
}

/* Sixteen samples of each of eight rows, which stand in columns of eight: a transposition. */
static LANES_INLINE void lanes_to_rows(const uint8_t *columns, uint8x16_t rows[LANES_EIGHT]) {
    uint8x16x4_t a = vld4q_u8(columns), b = vld4q_u8(columns + LANES_EIGHT_BYTES / 2);
    for (int r = 0; r < 4; r++) { /* rows r and r + 4 alternate */
        rows[r] = vuzp1q_u8(a.val[r], b.val[r]);
        rows[r + 4] = vuzp2q_u8(a.val[r], b.val[r]);
    }
}

/* Put the chunk whose last output is `end` - 1 into its rows. */
static LANES_NOINLINE void lanes_deliver(const struct lane_plan *plan, size_t end, uint8_t *const *dst, size_t n_rows,
                                         size_t channels) {
    uint8_t cut[4 * LANES_CHUNK];
    size_t n = (end - 1) % LANES_CHUNK + 1, n_bytes = n * channels, offset = (end - n) * channels;
    for (size_t first = 0; first < n_rows; first += LANES_EIGHT) {
        const uint8_t *columns = lanes_finished(plan, 0, channels, first / LANES_EIGHT);
        for (size_t at = 0; at < n_bytes; at += LANES_CHUNK, columns += LANES_EIGHT_BYTES) {
            uint8x16_t rows[LANES_EIGHT];
            lanes_to_rows(columns, rows);
            for (size_t r = 0; r < LANES_EIGHT; r++) {
                uint8_t *row = dst[first + r] + offset + at;
                if (at + LANES_CHUNK <= n_bytes) {
                    vst1q_u8(row, rows[r]);
                } else {
                    vst1q_u8(cut, rows[r]);
                    memcpy(row, cut, n_bytes - at);
                }
            }
        }
    }
}

/* Compute the outputs [from, to), of one chunk, of all rows of a batch. */
typedef void lanes_finish(const struct lane_plan *plan, size_t from, size_t to);

/* All outputs of one batch of rows. */
static LANES_INLINE void lanes_neon_batch(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows,
                                          int channels, const struct resize_axis *axis, const struct lane_plan *plan,
                                          const struct lane_format *format, lanes_arrange *arrange,
                                          lanes_finish *finish) {
    struct lane_feed feed;
    uint8_t *dst[RESIZE_BATCH];
    size_t n_channels = (size_t)channels, n_out = (size_t)axis->n_out;
    size_t step_size = LANES_STEP / format->taps * format->channel_bytes * n_channels;
    lanes_feed_init(&feed, plan, src_rows, n_rows, format->rows, n_channels, LANES_STEP, LANES_STEP * n_channels);
    for (size_t r = 0; r < format->rows; r++) {
        dst[r] = dst_rows[r < n_rows ? r : n_rows - 1];
    }
    for (size_t from = 0, to; from < n_out; from = to) {
        lanes_feed_until(&feed, plan, from, format, channels, step_size, arrange);
        for (to = from + 1; to < n_out && to % LANES_CHUNK != 0; to++) {
            if (lanes_wanted(plan, to, format, channels) > feed.next) {
                break;
            }
        }
        finish(plan, from, to);
        if (to == n_out || to % LANES_CHUNK == 0) {
            lanes_deliver(plan, to, dst, format->rows, n_channels);
        }
    }
}

/* The horizontal pass; compiled once for each number of channels. */
static LANES_INLINE void lanes_neon_rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows,
                                         int channels, const struct resize_axis *axis, const struct lane_plan *plan,
                                         const struct lane_format *format, lanes_arrange *arrange,
                                         lanes_finish *grey, lanes_finish *rgb, lanes_finish *rgba) {
    for (size_t r = 0; r < n_rows; r += format->rows) {
        const uint8_t *const *src = src_rows + r;
        uint8_t *const *dst = dst_rows + r;
        size_t n = n_rows - r;
        switch (channels) {
        case 1: lanes_neon_batch(src, dst, n, 1, axis, plan, format, arrange, grey); break;
        case 3: lanes_neon_batch(src, dst, n, 3, axis, plan, format, arrange, rgb); break;
        default: lanes_neon_batch(src, dst, n, 4, axis, plan, format, arrange, rgba); break;
        }
    }
}

#endif
