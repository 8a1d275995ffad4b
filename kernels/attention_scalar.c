/* Attention in integers: the definition of the three inner functions, written to be read. See attention_lanes.h. */
#include <stdint.h>

#define LANES_TARGET
enum { KEY_TAPS = 1, VALUE_TAPS = 1, KEY_MOVED = 0, VALUE_MOVED = 0, WEIGHTS = 64 };
typedef int8_t key, value;
typedef int16_t weight;
#define WEIGHT_OF(row, j) (row)[j]
#include "attention_lanes.h"

static void scores(const key *queries, const int32_t *query_sums, const key *keys, const float *key_scales,
                   size_t channels, size_t n_keys, float *scores_RB, float *largest) {
    (void)query_sums;
    for (size_t r = 0; r < ROWS; r++) {
        for (size_t j = 0; j < n_keys; j++) {
            int32_t sum = 0;
            for (size_t c = 0; c < channels; c++) {
                sum += queries[c * ROWS + r] * keys[c * n_keys + j];
            }
            float score = (float)sum * key_scales[j];
            scores_RB[r * BLOCK + j] = score;
            largest[r] = j == 0 || score > largest[r] ? score : largest[r];
        }
    }
}

static weight weight_of(float x) {
    if (x < -24.0f) {
        return 0; /* 32767 * 2^-24 rounds to nothing */
    }
    float whole = floorf(x), f = x - whole, y = WEIGHT_3;
    y = __builtin_fmaf(y, f, WEIGHT_2);
    y = __builtin_fmaf(y, f, WEIGHT_1);
    y = __builtin_fmaf(y, f, WEIGHT_0);
    return (weight)rounded(ldexpf(y, (int)whole));
}

static void weights(const float *scores_RB, const float *scales, const float *largest, size_t n_keys,
                    weight *weights_RB, int32_t *sums) {
    for (size_t r = 0; r < ROWS; r++) {
        sums[r] = 0;
        for (size_t j = 0; j < n_keys; j++) {
            weight w = weight_of((scores_RB[r * BLOCK + j] - largest[r]) * scales[r]);
            weights_RB[r * WEIGHTS + j] = w;
            sums[r] += w;
        }
    }
}

static void products(const weight *weights_RB, const int32_t *sums, const value *values, size_t channels,
                     size_t n_keys, const float *kept, const float *fresh, float *totals_RC) {
    (void)sums;
    for (size_t r = 0; r < ROWS; r++) {
        for (size_t c = 0; c < channels; c++) {
            int32_t sum = 0;
            for (size_t j = 0; j < n_keys; j++) {
                sum += weights_RB[r * WEIGHTS + j] * values[j * channels + c];
            }
            float *total = &totals_RC[r * channels + c];
            *total = __builtin_fmaf((float)sum, fresh[r], *total * kept[r]);
        }
    }
}

const struct attention_ops attention_scalar = {
    .key_bytes = sizeof(key), .value_bytes = sizeof(value), .prepare = prepare, .rows = rows};
