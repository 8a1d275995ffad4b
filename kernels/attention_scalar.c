/* Attention in integers: the definition of the three inner functions, written to be read. See attention_lanes.h. */
#include <stdint.h>

#define LANES_TARGET
enum { KEYS = 4, TAPS = 4, KEY_MOVED = 0, VALUE_MOVED = 0 };
typedef int8_t element;
typedef uint8_t weight;
typedef uint32_t unit;
#define WEIGHT_AT(j) (j)
#include "attention_lanes.h"

static void scores(const unit *queries, const int32_t *query_sums, const element *keys, const float *key_scales,
                   size_t channels, size_t n_vectors, float *scores_RB, float *largest) {
    (void)query_sums;
    const element *q = (const element *)queries;
    for (size_t r = 0; r < ROWS; r++) {
        for (size_t j = 0; j < n_vectors * KEYS; j++) {
            int32_t sum = 0;
            for (size_t c = 0; c < channels; c++) {
                size_t group = c / TAPS, tap = c % TAPS;
                sum += q[(group * ROWS + r) * TAPS + tap] * keys[(group * n_vectors * KEYS + j) * TAPS + tap];
            }
            float score = (float)sum * key_scales[j];
            scores_RB[r * BLOCK + j] = score;
            largest[r] = j == 0 || score > largest[r] ? score : largest[r];
        }
    }
}

static weight weight_of(float x) {
    if (x < -16.0f) {
        return 0; /* 255 * 2^-16 rounds to nothing */
    }
    float whole = floorf(x), f = x - whole, y = WEIGHT_3;
    y = __builtin_fmaf(y, f, WEIGHT_2);
    y = __builtin_fmaf(y, f, WEIGHT_1);
    y = __builtin_fmaf(y, f, WEIGHT_0);
    return (weight)rounded(ldexpf(y, (int)whole));
}

static void weights(const float *scores_RB, const float *scales, const float *offsets, size_t n_vectors,
                    weight *weights_RB, int32_t *sums) {
    for (size_t r = 0; r < ROWS; r++) {
        sums[r] = 0;
        for (size_t j = 0; j < n_vectors * KEYS; j++) {
            weight w = weight_of(__builtin_fmaf(scores_RB[r * BLOCK + j], scales[r], offsets[r]));
            weights_RB[r * BLOCK + WEIGHT_AT(j)] = w;
            sums[r] += w;
        }
    }
}

static void products(const weight *weights_RB, const int32_t *sums, const element *values, size_t channels,
                     size_t n_vectors, const float *kept, const float *fresh, float *totals_RC) {
    (void)sums;
    for (size_t r = 0; r < ROWS; r++) {
        for (size_t c = 0; c < channels; c++) {
            int32_t sum = 0;
            for (size_t j = 0; j < n_vectors * KEYS; j++) {
                sum += weights_RB[r * BLOCK + j] * values[(j / TAPS * channels + c) * TAPS + j % TAPS];
            }
            float *total = &totals_RC[r * channels + c];
            *total = __builtin_fmaf((float)sum, fresh[r], *total * kept[r]);
        }
    }
}

const struct attention_ops attention_scalar = {.element_bytes = sizeof(element), .prepare = prepare, .rows = rows};
