/* The two passes of a resize, without a full intermediate picture, and where their rows come from and go to.
 *
 * Both passes round to uint8, so their order shows in the pixels. Pillow up to 12 goes along x first, always; Pillow 13
 * goes along y first when the height shrinks by more than twice as many pixels as the width. We follow Pillow 13.
 *
 * Pillow stores the result of the first pass as a picture. Here it is a few rows: from 4000x3000 to 384x384 a ring of
 * 49 rows, 56 KB instead of 3.5 MB, so the second pass finds its input in cache. The samples are the same. In the same
 * way rows of tiles leave while they are in cache, and a border around the source is never stored.
 */
#include "lanes.h"

#include <stdlib.h>
#include <string.h>

/* Everything that the passes share. The buffers are NULL where a job needs none. */
struct job {
    const struct kernel_ops *ops;
    const struct resize_source *source;
    const struct resize_sink *sink;
    const struct resize_axis *x_axis;
    const struct resize_axis *y_axis;
    size_t samples;           /* of a pixel on its way: ignored ones are resampled, too, and dropped at the end */
    size_t in_bytes;          /* of a source row, border included */
    size_t out_bytes;         /* of an output row */
    size_t canvas_bytes;      /* of a row of the canvas */
    void *plan;               /* of the horizontal pass */
    const uint8_t **tap_rows; /* room for the y_axis->n_taps rows that one output row looks at */
    int32_t *scratch;         /* of the vertical pass */
    uint8_t *last_row;        /* of the picture, if its last pixel may end before its ignored sample */
    uint8_t *border_row;      /* a source row of the border's colour */
    uint8_t *bordered_rows;   /* RESIZE_BATCH source rows with the border at their ends */
    uint8_t *canvas_rows;     /* RESIZE_BATCH rows of the canvas, or of packed output that drops samples */
};

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

static void fill_colour(uint8_t *row, const uint8_t *colour, size_t channels, size_t n_pixels) {
    for (size_t i = 0; i < n_pixels; i++) {
        memcpy(row + i * channels, colour, channels);
    }
}

/* ---- where rows come from ---- */

static bool has_side_borders(const struct job *job) {
    return job->source->width != job->x_axis->n_in;
}

static bool is_border_row(const struct resize_source *source, size_t y) {
    return y < (size_t)source->top || y >= (size_t)source->top + (size_t)source->height;
}

static const uint8_t *stored_row(const struct job *job, size_t y) {
    const struct resize_source *source = job->source;
    y -= (size_t)source->top;
    return job->last_row && y + 1 == (size_t)source->height ? job->last_row : source->pixels + y * source->stride;
}

/* Row `y` of the source with its border; `slot` of bordered_rows may be overwritten for it. */
static const uint8_t *source_row(const struct job *job, size_t y, size_t slot) {
    const struct resize_source *source = job->source;
    if (is_border_row(source, y)) {
        return job->border_row;
    }
    if (!has_side_borders(job)) {
        return stored_row(job, y);
    }
    uint8_t *row = job->bordered_rows + slot * job->in_bytes;
    memcpy(row + (size_t)source->left * job->samples, stored_row(job, y), (size_t)source->width * job->samples);
    return row;
}

/* ---- where rows go ---- */

static bool is_tiled(const struct job *job) {
    return job->sink->pixels == NULL;
}

static bool drops_samples(const struct job *job) {
    return job->samples != (size_t)job->source->channels;
}

static uint8_t *canvas_row(const struct job *job, size_t slot) {
    return job->canvas_rows + slot * job->canvas_bytes;
}

/* Where output row `y` is to be put; `slot` counts the rows that have not been delivered. */
static uint8_t *output_row(const struct job *job, size_t y, size_t slot) {
    if (is_tiled(job) || drops_samples(job)) {
        return canvas_row(job, slot) + job->sink->left * job->samples;
    }
    return job->sink->pixels + y * job->sink->stride;
}

/* Cut row `y` of the canvas into its tiles. */
static void deliver_canvas_row(const struct job *job, const uint8_t *row, size_t y) {
    const struct resize_sink *sink = job->sink;
    size_t channels = (size_t)job->source->channels, plane = sink->tile_height * sink->tile_width;
    int samples = (int)job->samples;
    size_t n_across = sink->width / sink->tile_width;
    for (size_t column = 0; column < n_across; column++) {
        size_t tile = y / sink->tile_height * n_across + column;
        size_t at = tile * channels * plane + y % sink->tile_height * sink->tile_width;
        const uint8_t *pixels = row + column * sink->tile_width * job->samples;
        if (sink->tiles_f32) {
            job->ops->planes_f32(pixels, sink->tiles_f32 + at, plane, sink->tile_width, samples, (int)channels,
                                 sink->lut_C256);
        } else {
            job->ops->planes_u8(pixels, sink->tiles_u8 + at, plane, sink->tile_width, samples, (int)channels);
        }
    }
}

/* A packed row without the samples that are dropped. */
static void deliver_packed_row(const struct job *job, const uint8_t *row, uint8_t *dst) {
    size_t channels = (size_t)job->source->channels;
    for (size_t i = 0; i < (size_t)job->x_axis->n_out; i++) {
        memcpy(dst + i * channels, row + i * job->samples, channels);
    }
}

/* Output rows [start, start + n) are complete; they stand in the slots 0 to n - 1. */
static void deliver(const struct job *job, size_t start, size_t n) {
    for (size_t r = 0; r < n; r++) {
        if (is_tiled(job)) {
            deliver_canvas_row(job, canvas_row(job, r), job->sink->top + start + r);
        } else if (drops_samples(job)) {
            deliver_packed_row(job, canvas_row(job, r), job->sink->pixels + (start + r) * job->sink->stride);
        }
    }
}

/* The rows of the canvas above and below the picture. */
static void deliver_margins(const struct job *job) {
    const struct resize_sink *sink = job->sink;
    size_t end = sink->top + (size_t)job->y_axis->n_out;
    if (!is_tiled(job) || (sink->top == sink->first_row && end == sink->end_row)) {
        return;
    }
    fill_colour(job->canvas_rows, sink->colour, job->samples, sink->width);
    for (size_t y = sink->first_row; y < sink->end_row; y++) {
        if (y < sink->top || y >= end) {
            deliver_canvas_row(job, job->canvas_rows, y);
        }
    }
}

/* ---- the passes ---- */

/* Along x only; the rows of the output are rows of the source. */
static void resize_x(const struct job *job) {
    size_t n_rows = (size_t)job->y_axis->n_out;
    for (size_t start = 0; start < n_rows; start += RESIZE_BATCH) {
        const uint8_t *src_rows[RESIZE_BATCH];
        uint8_t *dst_rows[RESIZE_BATCH];
        size_t n = min_size(RESIZE_BATCH, n_rows - start);
        for (size_t r = 0; r < n; r++) {
            src_rows[r] = source_row(job, (size_t)job->y_axis->first[start + r], r);
            dst_rows[r] = output_row(job, start + r, r);
        }
        job->ops->horizontal->rows(src_rows, dst_rows, n, (int)job->samples, job->x_axis, job->plan);
        deliver(job, start, n);
    }
}

/* Bytes [from, to) of output row `y` along y from the source itself. */
static void vertical_row(const struct job *job, size_t y, size_t from, size_t to, uint8_t *dst) {
    const struct resize_axis *axis = job->y_axis;
    const struct resize_source *source = job->source;
    size_t samples = job->samples, count = (size_t)axis->count[y], first = (size_t)axis->first[y];
    const int32_t *weights = axis->weights + y * (size_t)axis->n_taps;
    /* The columns [begin, end) are stored; left and right of them all samples are the border's. */
    size_t stored = (size_t)source->left * samples, stored_end = stored + (size_t)source->width * samples;
    size_t begin = min_size(max_size(from, stored), to), end = max_size(min_size(to, stored_end), begin);
    if (begin < end) {
        for (size_t t = 0; t < count; t++) {
            job->tap_rows[t] = is_border_row(source, first + t) ? job->border_row + begin
                                                                : stored_row(job, first + t) + (begin - stored);
        }
        job->ops->vertical(job->tap_rows, weights, count, dst + (begin - from), end - begin, job->scratch);
    }
    if (from < begin || end < to) {
        uint8_t colour[4];
        for (size_t t = 0; t < count; t++) {
            job->tap_rows[t] = source->colour;
        }
        job->ops->vertical(job->tap_rows, weights, count, colour, samples, job->scratch);
        fill_colour(dst, colour, samples, (begin - from) / samples);
        fill_colour(dst + (end - from), colour, samples, (to - end) / samples);
    }
}

/* Along y only; the columns of the output are columns of the source. */
static void resize_y(const struct job *job) {
    size_t from = (size_t)job->x_axis->first[0] * job->samples;
    for (size_t y = 0; y < (size_t)job->y_axis->n_out; y++) {
        vertical_row(job, y, from, from + job->out_bytes, output_row(job, y, 0));
        deliver(job, y, 1);
    }
}

/* Along y, then along x: a batch of rows at a time, only the columns that some output looks at. */
static bool resize_y_then_x(const struct job *job) {
    const struct resize_axis *axis = job->x_axis;
    size_t last = (size_t)axis->n_out - 1;
    size_t from = (size_t)axis->first[0] * job->samples;
    size_t to = (size_t)(axis->first[last] + axis->count[last]) * job->samples;
    uint8_t *rows = malloc(RESIZE_BATCH * job->in_bytes); /* at most 16 * 4 * 2^24 bytes: no overflow */
    if (!rows) {
        return false;
    }
    size_t n_rows = (size_t)job->y_axis->n_out;
    for (size_t start = 0; start < n_rows; start += RESIZE_BATCH) {
        const uint8_t *src_rows[RESIZE_BATCH];
        uint8_t *dst_rows[RESIZE_BATCH];
        size_t n = min_size(RESIZE_BATCH, n_rows - start);
        for (size_t r = 0; r < n; r++) {
            vertical_row(job, start + r, from, to, rows + r * job->in_bytes + from);
            src_rows[r] = rows + r * job->in_bytes;
            dst_rows[r] = output_row(job, start + r, r);
        }
        job->ops->horizontal->rows(src_rows, dst_rows, n, (int)job->samples, axis, job->plan);
        deliver(job, start, n);
    }
    free(rows);
    return true;
}

/* Resample source rows from `first` on, at most a batch and none from `end` on, along x into the ring, where row y
 * lives in slot y % n_slots. Returns the row after the last. */
static size_t fill_ring(const struct job *job, uint8_t *ring, size_t n_slots, size_t first, size_t end) {
    const uint8_t *src_rows[RESIZE_BATCH];
    uint8_t *dst_rows[RESIZE_BATCH];
    size_t n = min_size(RESIZE_BATCH, end - first);
    for (size_t r = 0; r < n; r++) {
        src_rows[r] = source_row(job, first + r, r);
        dst_rows[r] = ring + (first + r) % n_slots * job->out_bytes;
    }
    job->ops->horizontal->rows(src_rows, dst_rows, n, (int)job->samples, job->x_axis, job->plan);
    return first + n;
}

/* Along x, then along y. The ring holds the rows that one output row looks at and a batch ahead of them; each source
 * row enters it once. */
static bool resize_x_then_y(const struct job *job) {
    const struct resize_axis *axis = job->y_axis;
    size_t n_slots = (size_t)axis->n_taps + RESIZE_BATCH, n_rows = (size_t)axis->n_out;
    uint8_t *ring = job->out_bytes > SIZE_MAX / n_slots ? NULL : malloc(n_slots * job->out_bytes);
    if (!ring) {
        return false;
    }
    size_t end = (size_t)axis->first[n_rows - 1] + (size_t)axis->count[n_rows - 1];
    size_t filled = 0; /* source rows before this one have been in the ring */
    for (size_t y = 0; y < n_rows; y++) {
        size_t first = (size_t)axis->first[y], count = (size_t)axis->count[y];
        for (filled = max_size(filled, first); filled < first + count;) {
            filled = fill_ring(job, ring, n_slots, filled, end);
        }
        for (size_t t = 0; t < count; t++) {
            job->tap_rows[t] = ring + (first + t) % n_slots * job->out_bytes;
        }
        const int32_t *weights = axis->weights + y * (size_t)axis->n_taps;
        job->ops->vertical(job->tap_rows, weights, count, output_row(job, y, 0), job->out_bytes, job->scratch);
        deliver(job, y, 1);
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
    size_t from = (size_t)job->x_axis->first[0] * job->samples;
    for (size_t y = 0; y < (size_t)job->y_axis->n_out; y++) {
        const uint8_t *row = source_row(job, (size_t)job->y_axis->first[y], 0);
        memcpy(output_row(job, y, 0), row + from, job->out_bytes);
        deliver(job, y, 1);
    }
}

/* ---- the buffers ---- */

/* `n` rows of `n_bytes`, at most 2^26, in one colour. NULL if memory ran out. */
static uint8_t *coloured_rows(const struct job *job, const uint8_t *colour, size_t n, size_t n_bytes) {
    uint8_t *rows = malloc(n * n_bytes);
    if (rows) {
        fill_colour(rows, colour, job->samples, n * n_bytes / job->samples);
    }
    return rows;
}

/* A copy of the picture's last row in which its last pixel is whole. NULL if memory ran out. */
static uint8_t *completed_last_row(const struct job *job) {
    const struct resize_source *source = job->source;
    size_t n_bytes = (size_t)source->width * job->samples;
    uint8_t *row = malloc(n_bytes);
    if (row) {
        memcpy(row, source->pixels + ((size_t)source->height - 1) * source->stride, n_bytes - 1);
        row[n_bytes - 1] = 0;
    }
    return row;
}

static bool allocate(struct job *job) {
    const uint8_t *colour = job->source->colour;
    size_t n_taps = (size_t)job->y_axis->n_taps; /* at most 2^24 */
    int samples = (int)job->samples;
    job->tap_rows = malloc(n_taps * sizeof *job->tap_rows);
    job->scratch = malloc((n_taps + 8) * sizeof *job->scratch);
    bool ok = job->tap_rows && job->scratch;
    const struct lane_format *format = job->ops->horizontal->format;
    if (ok && format && !job->x_axis->identity) {
        job->plan = malloc(lanes_plan_size(job->x_axis, samples, format));
        ok = job->plan != NULL;
        if (ok) {
            lanes_plan_init(job->x_axis, samples, format, job->plan);
        }
    }
    if (ok && drops_samples(job)) {
        job->last_row = completed_last_row(job);
        ok = job->last_row != NULL;
    }
    if (ok && job->source->height != job->y_axis->n_in) {
        job->border_row = coloured_rows(job, colour, 1, job->in_bytes);
        ok = job->border_row != NULL;
    }
    if (ok && has_side_borders(job)) {
        job->bordered_rows = coloured_rows(job, colour, RESIZE_BATCH, job->in_bytes);
        ok = job->bordered_rows != NULL;
    }
    if (ok && (is_tiled(job) || drops_samples(job))) {
        job->canvas_rows = coloured_rows(job, job->sink->colour, RESIZE_BATCH, job->canvas_bytes);
        ok = job->canvas_rows != NULL;
    }
    return ok;
}

static void release(struct job *job) {
    free(job->plan);
    free(job->tap_rows);
    free(job->scratch);
    free(job->last_row);
    free(job->border_row);
    free(job->bordered_rows);
    free(job->canvas_rows);
}

bool kernels_resize(const struct kernel_ops *ops, const struct resize_source *source, const struct resize_sink *sink,
                    const struct resize_axis *x_axis, const struct resize_axis *y_axis) {
    size_t samples = (size_t)source->pixel_bytes;
    struct job job = {
        .ops = ops,
        .source = source,
        .sink = sink,
        .x_axis = x_axis,
        .y_axis = y_axis,
        .samples = samples,
        .in_bytes = (size_t)x_axis->n_in * samples,
        .out_bytes = (size_t)x_axis->n_out * samples,
        .canvas_bytes = (sink->pixels ? (size_t)x_axis->n_out : sink->width) * samples,
    };
    bool ok = allocate(&job);
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
    if (ok) {
        deliver_margins(&job);
    }
    release(&job);
    return ok;
}
