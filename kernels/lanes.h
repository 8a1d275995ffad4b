/* What the SIMD targets share of the horizontal pass: samples arranged into lanes.
 *
 * A batch of rows has rows * channels independent streams of samples, and the same weights apply to all of them. So a
 * stream gets a lane of a vector, and the sums of all lanes grow side by side: no weight is ever permuted, and no sum
 * is ever taken across a vector. First the rows are arranged: `taps` successive columns, of all lanes, form a group, as
 * the target's instructions want them. Where these multiply and add several samples for a lane, those lie together:
 *
 *     x86, four RGB rows, 12 lanes = 3 vectors of 4, two or four samples in each lane:
 *     r0R r0G r0B r1R | r1G r1B r2R r2G | r2B r3R r3G r3B
 *     dotprod: four samples of a row and channel in each lane, vectors of four rows
 *     neon:    one sample in each lane, vectors of eight rows
 *
 * Groups begin at every `granule` columns and outputs anywhere, so the weights of an output are shifted to the start of
 * its first group, with zeros before and after them. With granules of one column nothing is shifted.
 */
#ifndef EDGEVLM_LANES_H
#define EDGEVLM_LANES_H

#include "kernels.h"

#include <string.h>

/* A file defines the instructions that it may use, as an attribute of functions: unlike an option of the compiler's,
 * it leaves a build for several architectures at once alone. Nothing: those that every CPU of the architecture has. */
#ifndef LANES_TARGET
#define LANES_TARGET
#endif

/* The targets' loops are written once for any number of channels and compiled for each. */
#define LANES_INLINE inline __attribute__((always_inline)) LANES_TARGET

enum { LANES_ALIGNMENT = 64 };

/* Columns are arranged this many at a time, or a divisor of it. */
enum { LANES_STEP = 16 };

struct lane_plan {
    size_t origin;           /* input column where group 0 begins */
    size_t n_columns;        /* from there on, all that some output looks at */
    size_t n_out;
    size_t n_weights;        /* packed words of one output */
    const int32_t *start;    /* per output: its first group, in granules, */
    const int32_t *n_groups; /* and how many it has */
    const int32_t *weights;  /* per output: its head, then the packed weights of its groups */
    uint8_t *arranged;       /* LANES_ALIGNMENT aligned; one unit after the other, */
    size_t unit_bytes;       /* of this size */
    uint8_t *finished;       /* room for outputs of all lanes on their way into rows */
};

/* How a target arranges. */
struct lane_format {
    size_t rows;           /* of a batch: their lanes fill `channels` vectors, or units of vectors */
    size_t units;          /* that are arranged each for itself; 0: one */
    size_t load_bytes;     /* that a step reads of each row, for as many fours of columns as they hold; 0: LANES_STEP */
    size_t taps;           /* columns of a group */
    size_t granule;        /* columns from one place where groups may begin to the next; 0: as many as a group has */
    size_t channel_bytes;  /* the arranged samples of a group, for each channel of a unit */
    size_t finished_bytes; /* of a plan, for each channel */
    size_t n_words;        /* packed weights of a group */
    void (*pack)(const int32_t *weights, int32_t *words); /* those of `taps` weights, which are in 2^-22 */
    size_t n_head;         /* words before the weights of an output, */
    void (*head)(const int32_t *weights, size_t count, int32_t *words); /* made from them all */
};

static inline size_t lanes_aligned(size_t n) {
    return (n + LANES_ALIGNMENT - 1) / LANES_ALIGNMENT * LANES_ALIGNMENT;
}

/* Most groups that one output can have: its taps, and up to taps - 1 columns before the first of them. */
static inline size_t lanes_most_groups(const struct resize_axis *axis, size_t taps) {
    return ((size_t)axis->n_taps + 2 * taps - 2) / taps;
}

static inline size_t lanes_columns(const struct resize_axis *axis) {
    int32_t last = axis->n_out - 1;
    return (size_t)(axis->first[last] + axis->count[last] - axis->first[0]);
}

static inline size_t lanes_granule(const struct lane_format *format) {
    return format->granule ? format->granule : format->taps;
}

static inline size_t lanes_units(const struct lane_format *format) {
    return format->units ? format->units : 1;
}

static inline size_t lanes_n_weights(const struct resize_axis *axis, const struct lane_format *format) {
    return format->n_head + lanes_most_groups(axis, format->taps) * format->n_words;
}

/* The last group of an output may end up to taps - granule columns behind the last one that is arranged. */
static inline size_t lanes_unit_bytes(const struct resize_axis *axis, int channels, const struct lane_format *format) {
    size_t group_bytes = format->channel_bytes * (size_t)channels, n_steps = lanes_columns(axis) / LANES_STEP + 1;
    return n_steps * (LANES_STEP / format->taps) * group_bytes +
           (format->taps - lanes_granule(format)) * group_bytes / format->taps;
}

/* Bytes of a plan with everything it points to. Sides of at most 2^24 keep this far below 2^63. */
static inline size_t lanes_plan_size(const struct resize_axis *axis, int channels, const struct lane_format *format) {
    size_t n_out = (size_t)axis->n_out;
    return lanes_aligned(sizeof(struct lane_plan)) + 2 * lanes_aligned(n_out * sizeof(int32_t)) +
           lanes_aligned(n_out * lanes_n_weights(axis, format) * sizeof(int32_t)) +
           format->finished_bytes * (size_t)channels + lanes_units(format) * lanes_unit_bytes(axis, channels, format) +
           LANES_ALIGNMENT;
}

/* Pack `count` weights, of which the first stands `shift` columns behind the beginning of a group. Returns the number
 * of groups. */
static inline size_t lanes_pack(const struct lane_format *format, const int32_t *weights, size_t count, size_t shift,
                                int32_t *words) {
    size_t n_groups = (shift + count + format->taps - 1) / format->taps;
    if (format->n_head) {
        format->head(weights, count, words);
        words += format->n_head;
    }
    for (size_t g = 0; g < n_groups; g++, words += format->n_words) {
        int32_t group[4] = {0};
        if (g * format->taps >= shift && (g + 1) * format->taps - shift <= count) {
            format->pack(weights + g * format->taps - shift, words);
            continue;
        }
        for (size_t t = 0; t < format->taps; t++) {
            size_t tap = g * format->taps + t - shift; /* before the first, this wraps to a huge number */
            group[t] = tap < count ? weights[tap] : 0;
        }
        format->pack(group, words);
    }
    return n_groups;
}

/* Lay a plan out in `memory` of lanes_plan_size() bytes, and pack the weights. */
static inline void lanes_plan_init(const struct resize_axis *axis, int channels, const struct lane_format *format,
                                   void *memory) {
    size_t n_out = (size_t)axis->n_out, n_weights = lanes_n_weights(axis, format), granule = lanes_granule(format);
    uint8_t *next = memory;
    struct lane_plan *plan = memory;
    next += lanes_aligned(sizeof *plan);
    int32_t *start = (int32_t *)(void *)next;
    next += lanes_aligned(n_out * sizeof *start);
    int32_t *n_groups = (int32_t *)(void *)next;
    next += lanes_aligned(n_out * sizeof *n_groups);
    int32_t *weights = (int32_t *)(void *)next;
    next += lanes_aligned(n_out * n_weights * sizeof *weights);
    next += -(uintptr_t)next % LANES_ALIGNMENT;
    size_t unit_bytes = lanes_unit_bytes(axis, channels, format);
    *plan = (struct lane_plan){.origin = (size_t)axis->first[0], .n_columns = lanes_columns(axis), .n_out = n_out,
                               .n_weights = n_weights, .start = start, .n_groups = n_groups, .weights = weights,
                               .arranged = next, .unit_bytes = unit_bytes,
                               .finished = next + lanes_units(format) * unit_bytes};
    for (size_t i = 0; i < n_out; i++) {
        size_t first = (size_t)axis->first[i] - plan->origin;
        start[i] = (int32_t)(first / granule);
        n_groups[i] = (int32_t)lanes_pack(format, axis->weights + i * (size_t)axis->n_taps, (size_t)axis->count[i],
                                          first % granule, weights + i * n_weights);
    }
    /* groups that end behind the last column multiply by 0, but not what nobody has written */
    size_t written = plan->n_columns * format->channel_bytes * (size_t)channels / format->taps;
    for (size_t unit = 0; unit < lanes_units(format); unit++) {
        memset(plan->arranged + unit * unit_bytes + written, 0, unit_bytes - written);
    }
}

/* A batch of rows on its way into the arranged form. It stays a few columns ahead of the outputs, so that the samples
 * are still in the nearest cache when they are multiplied. */
enum {
    LANES_AHEAD = 128, /* columns */
    LANES_TAIL = 64    /* bytes: less than one load of 64, or of 16 and one step of at most 12 */
};

struct lane_feed {
    const uint8_t *rows[RESIZE_BATCH]; /* at the column where group 0 begins */
    const uint8_t *tails[RESIZE_BATCH]; /* the last bytes of each row, followed by zeros */
    uint8_t tail_bytes[RESIZE_BATCH][LANES_TAIL];
    size_t step_bytes;
    size_t next;       /* byte of the rows at which the next step begins */
    size_t tail_start; /* steps from here on would read past the rows' end, and read the tails */
    size_t end;
};

/* Prepare `n_lane_rows` rows, of which only `n_rows` exist: the last is repeated. The results of the repetitions are
 * written over those of the last row, with the same bytes. A step reads `load_bytes` of each row, at least as many as
 * its columns have and at most 64. */
static LANES_INLINE void lanes_feed_init(struct lane_feed *feed, const struct lane_plan *plan,
                                         const uint8_t *const *src_rows, size_t n_rows, size_t n_lane_rows,
                                         size_t channels, size_t step_columns, size_t load_bytes) {
    size_t n_bytes = plan->n_columns * channels;
    feed->step_bytes = step_columns * channels;
    feed->next = 0;
    feed->end = n_bytes;
    feed->tail_start = n_bytes < load_bytes ? 0 : ((n_bytes - load_bytes) / feed->step_bytes + 1) * feed->step_bytes;
    for (size_t r = 0; r < n_lane_rows; r++) {
        feed->rows[r] = src_rows[r < n_rows ? r : n_rows - 1] + plan->origin * channels;
        feed->tails[r] = feed->tail_bytes[r];
        memset(feed->tail_bytes[r], 0, sizeof feed->tail_bytes[r]);
        if (feed->tail_start < n_bytes) {
            memcpy(feed->tail_bytes[r], feed->rows[r] + feed->tail_start, n_bytes - feed->tail_start);
        }
    }
}

/* Arrange the columns of one step for all rows of a batch, from byte `offset` of them on. */
typedef void lanes_arrange(const uint8_t *const *rows, size_t offset, int channels, uint8_t *out);

/* Bytes of a row that output `i` and those before it look at. */
static LANES_INLINE size_t lanes_wanted(const struct lane_plan *plan, size_t i, const struct lane_format *format,
                                        int channels) {
    size_t start = (size_t)plan->start[i] * lanes_granule(format);
    return (start + (size_t)plan->n_groups[i] * format->taps) * (size_t)channels;
}

/* Arrange at least as far as output `i` looks. A step makes `step_size` bytes of each unit. */
static LANES_INLINE void lanes_feed_until(struct lane_feed *feed, const struct lane_plan *plan, size_t i,
                                          const struct lane_format *format, int channels, size_t step_size,
                                          lanes_arrange *arrange) {
    size_t wanted = lanes_wanted(plan, i, format, channels);
    if (feed->next >= wanted) {
        return;
    }
    size_t stop = wanted + LANES_AHEAD * (size_t)channels;
    stop = stop < feed->end ? stop : feed->end;
    size_t direct = stop < feed->tail_start ? stop : feed->tail_start, next = feed->next;
    for (size_t unit = 0; unit < lanes_units(format); unit++) {
        size_t first_row = unit * (format->rows / lanes_units(format));
        uint8_t *out = plan->arranged + unit * plan->unit_bytes + feed->next / feed->step_bytes * step_size;
        next = feed->next;
        for (; next < direct; next += feed->step_bytes, out += step_size) {
            arrange(feed->rows + first_row, next, channels, out);
        }
        for (; next < stop; next += feed->step_bytes, out += step_size) {
            arrange(feed->tails + first_row, next - feed->tail_start, channels, out);
        }
    }
    feed->next = next;
}

#endif
