/* What the targets share of an attention in integers, compiled for each of them; attention.h has the map of files.
 *
 * For one head, with the mean over the tokens taken from keys and from values, which changes no result (softmax does
 * not see what all scores share; weights that add up to one give the values' mean back):
 *
 *     keys    [key] = 8 bits and a scale for each key            queries [row] = 8 bits and a scale for each row
 *     values  [key][channel] = 8 bits and a scale for each channel
 *
 * For each block of 64 keys, and 16 rows side by side:
 *
 *     score  = float(sum of query * key) * key's scale                     exact integers, one rounding
 *     x      = (score - block's largest) * row's scale, never above 0      an exponent of two
 *     weight = round(32767 * 2^x), 15 bits                                 the largest of each block is near 32767
 *     sum    = sum of weights; products[channel] = sum of weight * value   exact integers
 *     total  = total * 2^(old largest - new) + sum * 2^(block's largest - new), and the products likewise
 *
 * Weights have 15 bits because attention that was trained is uneven: with 8 bits they lose three times as much as
 * queries, keys and values together, with 15 nothing that shows. A file defines before it includes this one:
 *
 *     LANES_TARGET            the attribute that names its instructions
 *     key, value              types of a stored key and value; KEY_MOVED, VALUE_MOVED make them unsigned, or are 0
 *     KEY_TAPS, VALUE_TAPS    how many of them lie together, as one instruction sums them up
 *     weight                  type of a stored weight, or of its parts; WEIGHTS of them for a row of a block
 *     WEIGHT_OF(row, j)       the weight of a block's key j
 *
 * and behind it the functions scores(), weights() and products().
 */
#ifndef EDGEVLM_ATTENTION_LANES_H
#define EDGEVLM_ATTENTION_LANES_H

#include "attention.h"

#include <math.h>
#include <string.h>

#define ATTENTION_INLINE static inline __attribute__((always_inline)) LANES_TARGET

enum { MOST_PADDED = ATTENTION_MOST_WIDTH, ROWS = ATTENTION_ROWS, BLOCK = ATTENTION_BLOCK };

/* Queries lie as [channel / KEY_TAPS][row][channel % KEY_TAPS], the keys of a block likewise, values as
 * [key / VALUE_TAPS][channel][key % VALUE_TAPS]. A query has a key's type, but signed. */

/* scores_RB[r][j] = float(sum over channels of query * key) * key_scales[j] for the `n_keys` keys, a multiple of 16, and
 * the largest of each row. `query_sums` are the sums of a row's channels. */
static LANES_TARGET void scores(const key *queries, const int32_t *query_sums, const key *keys, const float *key_scales,
                                size_t channels, size_t n_keys, float *scores_RB, float *largest);

/* The weight round(32767 * 2^x), x = (score - largest[r]) * scales[r], of each score, and the sum of each row. */
static LANES_TARGET void weights(const float *scores_RB, const float *scales, const float *largest, size_t n_keys,
                                 weight *weights_RB, int32_t *sums);

/* totals_RC[r][c] = fma(float(sum of weight * value), fresh[r], totals_RC[r][c] * kept[r]). `sums` are the weights'. */
static LANES_TARGET void products(const weight *weights_RB, const int32_t *sums, const value *values, size_t channels,
                                  size_t n_keys, const float *kept, const float *fresh, float *totals_RC);

/* 32767 * 2^f for 0 <= f <= 1, largest relative error 7.5e-5 (minimax), of one sign at both ends: none exceeds 32767. */
#define WEIGHT_3 0x1.3f94260000000p+11f
#define WEIGHT_2 0x1.cef8bp+12f
#define WEIGHT_1 0x1.6441820000000p+14f
#define WEIGHT_0 0x1.fff2320000000p+14f

ATTENTION_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The nearest integer, of two the even one, of a number whose magnitude is below 2^22. */
ATTENTION_INLINE int32_t rounded(float x) {
    const float magic = 0x1.8p23f;
    return (int32_t)(bits_of(x + magic) - bits_of(magic));
}

/* 2^x for x <= 0; below 2^-100 that. */
ATTENTION_INLINE float power(float x) {
    x = x > -100.0f ? x : -100.0f;
    x = x < 0.0f ? x : 0.0f;
    int32_t whole = rounded(x - 0.5f);
    float f = x - (float)whole, y = 0x1.c722p-13f;
    y = __builtin_fmaf(y, f, 0x1.461794p-10f);
    y = __builtin_fmaf(y, f, 0x1.3d2826p-7f);
    y = __builtin_fmaf(y, f, 0x1.c684c2p-5f);
    y = __builtin_fmaf(y, f, 0x1.ebfd96p-3f);
    y = __builtin_fmaf(y, f, 0x1.62e44p-1f);
    y = __builtin_fmaf(y, f, 1.0f);
    uint32_t bits = (uint32_t)(whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}

/* The largest magnitude, as bits: those of a number that is not finite are larger than all others. */
ATTENTION_INLINE uint32_t largest_magnitude(const float *x, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(x[i]) & 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* What a number is multiplied with to become an integer of -127..127, and what gives it back. */
struct step {
    float inverse, scale;
};

ATTENTION_INLINE struct step step_of(uint32_t magnitude) {
    float largest;
    memcpy(&largest, &magnitude, sizeof largest);
    bool usable = largest >= 0x1p-100f && largest < ATTENTION_LIMIT;
    return (struct step){usable ? 127.0f / largest : 0.0f, usable ? largest / 127.0f : 0.0f};
}

ATTENTION_INLINE bool is_finite(uint32_t magnitude) {
    return magnitude < bits_of(ATTENTION_LIMIT);
}

/* Put a row of channels where every KEY_TAPS of them have `together` neighbours. */
ATTENTION_INLINE void spread(const key *row, size_t channels, key *keys, size_t together) {
    for (size_t c = 0; c < channels; c += KEY_TAPS) {
        memcpy(keys + c * together, row + c, KEY_TAPS * sizeof *row);
    }
}

/* Ask for a row that will be needed: rows lie so far apart that no processor foresees it. */
ATTENTION_INLINE void ahead(const float *x, size_t row, const struct attention *a, size_t stride) {
    enum { DISTANCE = 12 };
    for (size_t c = 0; c < a->width && row + DISTANCE < a->tokens; c += ATTENTION_ALIGNMENT / sizeof *x) {
        __builtin_prefetch(x + (row + DISTANCE) * stride + c);
    }
}

/* Keys less their mean, with a scale for each token. */
ATTENTION_INLINE bool prepare_keys(const struct attention *a, const float *k, size_t stride,
                                   const struct attention_head *packed) {
    size_t width = a->width, channels = attention_padded(width, 4), padded = attention_padded(a->tokens, 16);
    float mean[MOST_PADDED] = {0}, x[MOST_PADDED];
    key row[MOST_PADDED];
    for (size_t s = 0; s < a->tokens; s++) {
        ahead(k, s, a, stride);
        for (size_t c = 0; c < width; c++) {
            mean[c] += k[s * stride + c];
        }
    }
    for (size_t c = 0; c < width; c++) {
        mean[c] /= (float)a->tokens;
    }
    memset(row, 0, sizeof row);
    uint32_t most = largest_magnitude(mean, width);
    for (size_t s = 0; s < padded; s++) {
        if (s < a->tokens) {
            for (size_t c = 0; c < width; c++) {
                x[c] = k[s * stride + c] - mean[c];
            }
            uint32_t magnitude = largest_magnitude(x, width);
            most = magnitude > most ? magnitude : most;
            struct step step = step_of(magnitude);
            packed->key_scales[s] = step.scale;
            if (!is_finite(magnitude)) {
                return false;
            }
            for (size_t c = 0; c < width; c++) {
                row[c] = (key)(rounded(x[c] * step.inverse) + KEY_MOVED);
            }
            for (size_t c = width; c < channels; c++) {
                row[c] = KEY_MOVED;
            }
        } else {
            packed->key_scales[s] = packed->key_scales[a->tokens - 1];
        }
        size_t start = s / BLOCK * BLOCK, together = padded - start < BLOCK ? padded - start : BLOCK;
        spread(row, channels, (key *)packed->keys + start * channels + s % BLOCK * KEY_TAPS, together);
    }
    return is_finite(most);
}

/* Values less their mean, with a scale for each channel; behind the last key zeros. */
ATTENTION_INLINE bool prepare_values(const struct attention *a, const float *v, const float *bias, size_t stride,
                                     const struct attention_head *packed) {
    size_t width = a->width, channels = attention_padded(width, 16), padded = attention_padded(a->tokens, 16);
    float mean[MOST_PADDED] = {0}, low[MOST_PADDED], high[MOST_PADDED], inverse[MOST_PADDED] = {0};
    memcpy(low, v, width * sizeof *v);
    memcpy(high, v, width * sizeof *v);
    for (size_t s = 0; s < a->tokens; s++) {
        ahead(v, s, a, stride);
        for (size_t c = 0; c < width; c++) {
            float x = v[s * stride + c];
            mean[c] += x;
            low[c] = x < low[c] ? x : low[c];
            high[c] = x > high[c] ? x : high[c];
        }
    }
    bool finite = true;
    for (size_t c = 0; c < channels; c++) {
        packed->value_scales[c] = packed->value_means[c] = 0;
        if (c < width) {
            mean[c] /= (float)a->tokens;
            float sides[] = {mean[c], high[c] - mean[c], mean[c] - low[c]};
            struct step step = step_of(largest_magnitude(sides + 1, 2));
            finite = finite && is_finite(largest_magnitude(sides, 3));
            inverse[c] = step.inverse;
            packed->value_scales[c] = step.scale;
            packed->value_means[c] = mean[c] + bias[c];
        }
    }
    if (!finite) {
        return false;
    }
    value *to = packed->values;
    for (size_t s = 0; s < padded; s += VALUE_TAPS) {
        value taps[VALUE_TAPS][MOST_PADDED];
        for (size_t t = 0; t < VALUE_TAPS; t++) {
            for (size_t c = 0; c < channels; c++) {
                taps[t][c] = VALUE_MOVED;
            }
            for (size_t c = 0; c < width && s + t < a->tokens; c++) {
                taps[t][c] = (value)(rounded((v[(s + t) * stride + c] - mean[c]) * inverse[c]) + VALUE_MOVED);
            }
        }
        for (size_t c = 0; c < channels; c++) {
            for (size_t t = 0; t < VALUE_TAPS; t++) {
                *to++ = taps[t][c];
            }
        }
    }
    return true;
}

ATTENTION_INLINE void prepare_head(const struct attention *a, size_t picture, size_t head,
                                   const struct attention_head *packed) {
    size_t all = a->heads * a->width, stride = 3 * all, first = head * a->width;
    const float *k = a->qkv + picture * a->tokens * stride + all + first;
    *packed->finite = prepare_keys(a, k, stride, packed) &&
                      prepare_values(a, k + all, a->bias + 2 * all + first, stride, packed);
}

/* Up to ROWS queries as integers; rows that do not exist, or are not finite, are zeros. */
ATTENTION_INLINE void prepare_queries(const float *q, const float *bias, size_t stride, size_t n_rows, size_t width,
                                      float factor, key *queries, int32_t *sums, float *scales, bool *finite) {
    size_t channels = attention_padded(width, 4);
    float x[MOST_PADDED];
    key row[MOST_PADDED];
    memset(row, 0, sizeof row);
    for (size_t r = 0; r < ROWS; r++) {
        struct step step = {0, 0};
        int32_t sum = 0;
        finite[r] = false;
        if (r < n_rows) {
            for (size_t c = 0; c < width; c++) {
                x[c] = q[r * stride + c] + bias[c];
            }
            uint32_t magnitude = largest_magnitude(x, width);
            finite[r] = is_finite(magnitude);
            step = step_of(magnitude);
        }
        for (size_t c = 0; c < width; c++) {
            int32_t integer = finite[r] ? rounded(x[c] * step.inverse) : 0;
            row[c] = (key)integer;
            sum += integer;
        }
        spread(row, channels, queries + r * KEY_TAPS, ROWS);
        scales[r] = step.scale * factor;
        sums[r] = sum;
    }
}

/* Up to ROWS queries, from their integers to the output. */
ATTENTION_INLINE void finish_rows(const struct attention *a, const struct attention_head *packed, const key *queries,
                                  const int32_t *query_sums, const float *scales, float *totals_RC, float *sums) {
    size_t channels = attention_padded(a->width, 4), columns = attention_padded(a->width, 16);
    const key *keys = packed->keys;
    const value *values = packed->values;
    _Alignas(ATTENTION_ALIGNMENT) float scores_RB[ROWS * BLOCK];
    _Alignas(ATTENTION_ALIGNMENT) weight weights_RB[ROWS * WEIGHTS];
    float largest[ROWS], found[ROWS], kept[ROWS], fresh[ROWS];
    int32_t weight_sums[ROWS];
    memset(totals_RC, 0, ROWS * columns * sizeof *totals_RC);
    memset(sums, 0, ROWS * sizeof *sums);
    for (size_t start = 0; start < a->tokens; start += BLOCK) {
        size_t n = a->tokens - start < BLOCK ? a->tokens - start : BLOCK, padded = attention_padded(n, 16);
        scores(queries, query_sums, keys + start * channels, packed->key_scales + start, channels, padded,
               scores_RB, found);
        for (size_t r = 0; r < ROWS; r++) {
            float old = start == 0 ? found[r] : largest[r];
            largest[r] = found[r] > old ? found[r] : old;
            kept[r] = power((old - largest[r]) * scales[r]);
            fresh[r] = power((found[r] - largest[r]) * scales[r]);
        }
        weights(scores_RB, scales, found, padded, weights_RB, weight_sums);
        products(weights_RB, weight_sums, values + start * columns, columns, padded, kept, fresh, totals_RC);
        for (size_t r = 0; r < ROWS && n < padded; r++) { /* what repeats the last key does not count */
            weight_sums[r] -= (int32_t)(padded - n) * WEIGHT_OF(weights_RB + r * WEIGHTS, n - 1);
        }
        for (size_t r = 0; r < ROWS; r++) {
            sums[r] = __builtin_fmaf((float)weight_sums[r], fresh[r], sums[r] * kept[r]);
        }
    }
}

ATTENTION_INLINE void compute_rows(const struct attention *a, size_t picture, size_t head,
                                   const struct attention_head *packed, size_t from, size_t to) {
    size_t all = a->heads * a->width, stride = 3 * all, first = head * a->width;
    size_t columns = attention_padded(a->width, 16);
    _Alignas(ATTENTION_ALIGNMENT) key queries[ROWS * MOST_PADDED];
    _Alignas(ATTENTION_ALIGNMENT) float totals_RC[ROWS * MOST_PADDED];
    static const float zeros[MOST_PADDED];
    int32_t query_sums[ROWS];
    float scales[ROWS], sums[ROWS];
    bool finite[ROWS];
    for (size_t row = from; row < to; row += ROWS) {
        size_t n_rows = to - row < ROWS ? to - row : ROWS;
        const float *q = a->qkv + (picture * a->tokens + row) * stride + first;
        float *out = a->out + (picture * a->tokens + row) * all + first;
        for (size_t r = n_rows; r < n_rows + ROWS && row + r < to; r++) { /* the next ones lie far apart */
            for (size_t c = 0; c < a->width; c += ATTENTION_ALIGNMENT / sizeof *q) {
                __builtin_prefetch(q + r * stride + c);
            }
        }
        if (*packed->finite) {
            prepare_queries(q, a->bias + first, stride, n_rows, a->width, a->scale, queries, query_sums, scales,
                            finite);
            finish_rows(a, packed, queries, query_sums, scales, totals_RC, sums);
        }
        for (size_t r = 0; r < n_rows; r++) {
            bool known = *packed->finite && finite[r];
            float inverse = known ? 1.0f / sums[r] : NAN;
            const float *totals = known ? totals_RC + r * columns : zeros;
            const float *scaled = known ? packed->value_scales : zeros, *means = known ? packed->value_means : zeros;
            for (size_t c = 0; c < a->width; c++) {
                out[r * all + c] = __builtin_fmaf(totals[c] * inverse, scaled[c], means[c]);
            }
        }
    }
}

static LANES_TARGET void prepare(const struct attention *a, size_t picture, size_t head,
                                 const struct attention_head *packed) {
    prepare_head(a, picture, head, packed);
}

static LANES_TARGET void rows(const struct attention *a, size_t picture, size_t head,
                              const struct attention_head *packed, size_t from, size_t to) {
    compute_rows(a, picture, head, packed, from, to);
}

#endif
