/* The two passes of a resize, without a full intermediate picture.
 *
 * Both passes round to uint8, so their order shows in the pixels. Pillow up to 12 goes along x first, always; Pillow 13
 * goes along y first when the height shrinks by more than twice as many pixels as the width. We follow Pillow 13.
 *
 * Pillow stores the result of the first pass as a picture. Here it is a few rows: from 4000x3000 to 384x384 a ring of
 * 33 rows, 38 KB instead of 3.5 MB, so the second pass finds its input in cache. The samples are the same.
 */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

/* Rows handed to the horizontal kernel at once: room for a target to share weights between rows. */
enum { BATCH = 16 };

/* Everything that the passes share. */
struct job {
    const struct kernel_ops *ops;
    const uint8_t *src;
    size_t src_stride;
    uint8_t *dst;
    size_t dst_stride; /* bytes of an output row, packed */
    int channels;
    const struct resize_axis *x_axis;
    const struct resize_axis *y_axis;
    const uint8_t **tap_rows; /* room for the y_axis->n_taps rows that one output row looks at */
};

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Byte of a source row at which pixel `x` starts. */
static size_t offset(const struct job *job, int32_t x) {
    return (size_t)x * (size_t)job->channels;
}

/* Along x only; the rows of the output are rows of the source. */
static void resize_x(const struct job *job) {
    size_t n_rows = (size_t)job->y_axis->n_out;
    for (size_t start = 0; start < n_rows; start += BATCH) {
        const uint8_t *src_rows[BATCH];
        uint8_t *dst_rows[BATCH];
        size_t n = min_size(BATCH, n_rows - start);
        for (size_t r = 0; r < n; r++) {
            src_rows[r] = job->src + (size_t)job->y_axis->first[start + r] * job->src_stride;
            dst_rows[r] = job->dst + (start + r) * job->dst_stride;
        }
        job->ops->resize_horizontal(src_rows, dst_rows, n, job->channels, job->x_axis);
    }
}

/* Output row `y` along y from the source itself, for `n_bytes` bytes from byte `from` of the rows on. */
static void vertical_row(const struct job *job, size_t y, size_t from, uint8_t *dst_row, size_t n_bytes) {
    const struct resize_axis *axis = job->y_axis;
    size_t count = (size_t)axis->count[y];
    for (size_t t = 0; t < count; t++) {
        job->tap_rows[t] = job->src + ((size_t)axis->first[y] + t) * job->src_stride + from;
    }
    const int32_t *weights = axis->weights + y * (size_t)axis->n_taps;
    job->ops->resize_vertical(job->tap_rows, weights, count, dst_row, n_bytes);
}

/* Along y only; the columns of the output are columns of the source. */
static void resize_y(const struct job *job) {
    size_t from = offset(job, job->x_axis->first[0]);
    for (size_t y = 0; y < (size_t)job->y_axis->n_out; y++) {
        vertical_row(job, y, from, job->dst + y * job->dst_stride, job->dst_stride);
    }
}

/* Along y, then along x: BATCH rows at a time, only the columns that some output looks at. */
static bool resize_y_then_x(const struct job *job) {
    const struct resize_axis *axis = job->x_axis;
    size_t from = offset(job, axis->first[0]);
    size_t to = offset(job, axis->first[axis->n_out - 1] + axis->count[axis->n_out - 1]);
    size_t row_bytes = offset(job, axis->n_in);
    uint8_t *rows = malloc(BATCH * row_bytes); /* at most 16 * 4 * 2^24 bytes: no overflow */
    if (!rows) {
        return false;
    }
    size_t n_rows = (size_t)job->y_axis->n_out;
    for (size_t start = 0; start < n_rows; start += BATCH) {
        const uint8_t *src_rows[BATCH];
        uint8_t *dst_rows[BATCH];
        size_t n = min_size(BATCH, n_rows - start);
        for (size_t r = 0; r < n; r++) {
            vertical_row(job, start + r, from, rows + r * row_bytes + from, to - from);
            src_rows[r] = rows + r * row_bytes;
            dst_rows[r] = job->dst + (start + r) * job->dst_stride;
        }
        job->ops->resize_horizontal(src_rows, dst_rows, n, job->channels, axis);
    }
    free(rows);
    return true;
}

/* Resample the source rows [first, end) along x into the ring, where row y lives in slot y % n_slots. */
static void fill_ring(const struct job *job, uint8_t *ring, size_t n_slots, size_t first, size_t end) {
    for (size_t start = first; start < end; start += BATCH) {
        const uint8_t *src_rows[BATCH];
        uint8_t *dst_rows[BATCH];
        size_t n = min_size(BATCH, end - start);
        for (size_t r = 0; r < n; r++) {
            src_rows[r] = job->src + (start + r) * job->src_stride;
            dst_rows[r] = ring + (start + r) % n_slots * job->dst_stride;
        }
        job->ops->resize_horizontal(src_rows, dst_rows, n, job->channels, job->x_axis);
    }
}

/* Along x, then along y. The ring holds the rows that one output row looks at; each source row enters it once. */
static bool resize_x_then_y(const struct job *job) {
    const struct resize_axis *axis = job->y_axis;
    size_t n_slots = (size_t)axis->n_taps;
    uint8_t *ring = job->dst_stride > SIZE_MAX / n_slots ? NULL : malloc(n_slots * job->dst_stride);
    if (!ring) {
        return false;
    }
    size_t filled = 0; /* source rows before this one have been in the ring */
    for (size_t y = 0; y < (size_t)axis->n_out; y++) {
        size_t first = (size_t)axis->first[y], count = (size_t)axis->count[y];
        fill_ring(job, ring, n_slots, filled > first ? filled : first, first + count);
        filled = first + count;
        for (size_t t = 0; t < count; t++) {
            job->tap_rows[t] = ring + (first + t) % n_slots * job->dst_stride;
        }
        job->ops->resize_vertical(job->tap_rows, axis->weights + y * n_slots, count, job->dst + y * job->dst_stride,
                                  job->dst_stride);
    }
    free(ring);
    return true;
}

/* Pillow 13's rule, in pixels of the whole picture and the whole output: it looks neither at the box nor at the
 * window. */
static bool vertical_first(const struct resize_axis *x_axis, const struct resize_axis *y_axis) {
    int32_t lost_rows = y_axis->n_in - y_axis->n_total;
    int32_t lost_columns = x_axis->n_in - x_axis->n_total;
    return lost_rows > 0 && lost_rows > 2 * lost_columns;
}

static void copy_window(const struct job *job) {
    size_t from = offset(job, job->x_axis->first[0]);
    for (size_t y = 0; y < (size_t)job->y_axis->n_out; y++) {
        const uint8_t *row = job->src + (size_t)job->y_axis->first[y] * job->src_stride;
        memcpy(job->dst + y * job->dst_stride, row + from, job->dst_stride);
    }
}

bool kernels_resize(const struct kernel_ops *ops, const uint8_t *src, size_t src_stride, uint8_t *dst, int channels,
                    const struct resize_axis *x_axis, const struct resize_axis *y_axis) {
    struct job job = {
        .ops = ops,
        .src = src,
        .src_stride = src_stride,
        .dst = dst,
        .dst_stride = (size_t)x_axis->n_out * (size_t)channels,
        .channels = channels,
        .x_axis = x_axis,
        .y_axis = y_axis,
        .tap_rows = malloc((size_t)y_axis->n_taps * sizeof(uint8_t *)), /* n_taps <= 2^24 */
    };
    bool ok = job.tap_rows != NULL;
    if (ok && x_axis->identity && y_axis->identity) {
        copy_window(&job);
    } else if (ok && y_axis->identity) {
        resize_x(&job);
    } else if (ok && x_axis->identity) {
        resize_y(&job);
    } else if (ok && vertical_first(x_axis, y_axis)) {
        ok = resize_y_then_x(&job);
    } else if (ok) {
        ok = resize_x_then_y(&job);
    }
    free(job.tap_rows);
    return ok;
}
