/* What the two x86 targets share: the loops around their instructions, and outputs on their way into rows. */
#ifndef EDGEVLM_LANES_X86_H
#define EDGEVLM_LANES_X86_H

#include "lanes.h"

#include <immintrin.h>

/* Four bytes of no interest, as indices of a shuffle. */
#define LANES_NONE -1, -1, -1, -1

/* 16 bytes of row k in the low half, of row k + 4 in the high half. Loading two rows into one register takes no
 * shuffle, which is what these targets are short of. */
static LANES_INLINE __m256i lanes_load_rows(const uint8_t *const *rows, int k, size_t offset) {
    __m128i low = _mm_loadu_si128((const void *)(rows[k] + offset));
    __m128i high = _mm_loadu_si128((const void *)(rows[k + 4] + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

static LANES_INLINE __m256i lanes_both_halves(const int8_t *bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)bytes));
}

/* Compute output `i` of all rows of a batch. */
typedef void lanes_output(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels, bool last);

/* All outputs of one batch of rows. A step arranges `step_columns` and reads `load_bytes` of each row. */
static LANES_INLINE void lanes_batch(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows,
                                     int channels, const struct resize_axis *axis, const struct lane_plan *plan,
                                     const struct lane_format *format, size_t step_columns, size_t load_bytes,
                                     lanes_arrange *arrange, lanes_output *output) {
    struct lane_feed feed;
    uint8_t *dst[RESIZE_BATCH];
    size_t last = (size_t)axis->n_out - 1;
    size_t step_size = step_columns / format->taps * format->channel_bytes * (size_t)channels;
    lanes_feed_init(&feed, plan, src_rows, n_rows, format->rows, (size_t)channels, step_columns, load_bytes);
    for (size_t r = 0; r < format->rows; r++) {
        dst[r] = dst_rows[r < n_rows ? r : n_rows - 1];
    }
    for (size_t i = 0; i < last; i++) {
        lanes_feed_until(&feed, plan, i, format, channels, step_size, arrange);
        output(plan, i, dst, channels, false);
    }
    lanes_feed_until(&feed, plan, last, format, channels, step_size, arrange);
    output(plan, last, dst, channels, true);
}

/* The horizontal pass; compiled once for each number of channels. */
static LANES_INLINE void lanes_rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows,
                                    int channels, const struct resize_axis *axis, const struct lane_plan *plan,
                                    const struct lane_format *format, lanes_arrange *arrange, lanes_output *output) {
    size_t load = format->load_bytes, step = load ? load / (size_t)channels / 4 * 4 : LANES_STEP;
    load = load ? load : LANES_STEP * (size_t)channels;
    for (size_t r = 0; r < n_rows; r += format->rows) {
        const uint8_t *const *src = src_rows + r;
        uint8_t *const *dst = dst_rows + r;
        size_t n = n_rows - r;
        switch (channels) {
        case 1: lanes_batch(src, dst, n, 1, axis, plan, format, step, load, arrange, output); break;
        case 3: lanes_batch(src, dst, n, 3, axis, plan, format, step, load, arrange, output); break;
        default: lanes_batch(src, dst, n, 4, axis, plan, format, step, load, arrange, output); break;
        }
    }
}

/* Compute the columns from `start` on of one output row; `words` are the packed weights of its taps. */
typedef void lanes_block(const uint8_t *const *src_rows, const int32_t *words, size_t n_taps, uint8_t *dst_row,
                         size_t start);

/* The vertical pass in blocks of columns. A row that is narrower than one goes to the slower target. */
static LANES_INLINE void lanes_vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps,
                                        uint8_t *dst_row, size_t n_bytes, int32_t *scratch,
                                        const struct lane_format *format, size_t block, lanes_block *columns,
                                        const struct kernel_ops *slower) {
    if (n_bytes < block) {
        slower->vertical(src_rows, weights, n_taps, dst_row, n_bytes, scratch);
        return;
    }
    lanes_pack(format, weights, n_taps, 0, scratch);
    for (size_t start = 0; start + block <= n_bytes; start += block) {
        columns(src_rows, scratch, n_taps, dst_row, start);
    }
    if (n_bytes % block) { /* the last block overlaps the one before it */
        columns(src_rows, scratch, n_taps, dst_row, n_bytes - block);
    }
}

/* Up to four outputs, of which `i` is the last, into their rows. Row 4 * q + k has them in the bytes from 16 * q on of
 * vector k; of a single channel, in the k-th four of these bytes of the only vector. Each row gets 16 bytes, as long as
 * what is behind its four RGB pixels is to be written later. */
static LANES_INLINE void lanes_deliver_four(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels,
                                            const uint8_t *vectors, size_t vector_bytes, size_t n_rows) {
    size_t n = i % 4 + 1, offset = (i + 1 - n) * (size_t)channels, step = channels == 1 ? 4 : vector_bytes;
    bool whole = n == 4 && (channels != 3 || i + 2 < plan->n_out);
    for (size_t r = 0; r < n_rows; r++) {
        const uint8_t *pixels = vectors + r / 4 * 16 + r % 4 * step;
        if (whole) {
            memcpy(dst[r] + offset, pixels, channels == 1 ? 4 : 16);
        } else {
            memcpy(dst[r] + offset, pixels, n * (size_t)channels);
        }
    }
}

#endif
