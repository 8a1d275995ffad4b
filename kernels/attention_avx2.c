/* Attention in integers with AVX2: pairs of products of half words, which no sum of two can overflow. */
#include <stdint.h>

#if defined(__x86_64__)
#define LANES_TARGET __attribute__((target("avx2,fma")))
enum { KEYS = 8, KEY_TAPS = 2, VALUE_TAPS = 2, KEY_MOVED = 0, VALUE_MOVED = 0, WEIGHTS = 64 };
typedef int16_t key, value, weight;
/* Two vectors of weights become half words without leaving their 128-bit lanes: fours of keys alternate. */
#define WEIGHT_AT(j) ((j) / 16 * 16 + (j) / 4 % 2 * 8 + (j) / 8 % 2 * 4 + (j) % 4)
#define WEIGHT_OF(row, j) (row)[WEIGHT_AT(j)]
#include "attention_lanes.h"

#include <immintrin.h>

enum { TOGETHER = 4, VECTORS = 2 }; /* rows and vectors whose sums are in registers */

/* 32 bits in every lane: two queries' channels, or two weights. */
ATTENTION_INLINE __m256i everywhere(const void *bytes) {
    int32_t word;
    memcpy(&word, bytes, sizeof word);
    return _mm256_set1_epi32(word);
}

ATTENTION_INLINE __m256i vector_at(const int16_t *x) {
    return _mm256_load_si256((const __m256i *)(const void *)x);
}

ATTENTION_INLINE void multiply(__m256i sums[TOGETHER][VECTORS], const int16_t *factors, size_t stride,
                               const int16_t *vectors) {
    __m256i x[VECTORS] = {vector_at(vectors), vector_at(vectors + 16)};
    for (size_t r = 0; r < TOGETHER; r++) {
        __m256i two = everywhere(factors + r * stride);
        for (size_t v = 0; v < VECTORS; v++) {
            sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(two, x[v]));
        }
    }
}

ATTENTION_INLINE float largest_lane(__m256 x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

ATTENTION_INLINE int32_t sum_of_lanes(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
}

static LANES_TARGET void scores(const key *queries, const int32_t *query_sums, const key *keys, const float *key_scales,
                                size_t channels, size_t n_keys, float *scores_RB, float *largest) {
    (void)query_sums;
    for (size_t first = 0; first < ROWS; first += TOGETHER) {
        __m256 most[TOGETHER];
        for (size_t j = 0; j < n_keys; j += VECTORS * KEYS) {
            __m256i sums[TOGETHER][VECTORS] = {{_mm256_setzero_si256()}};
            for (size_t c = 0; c < channels; c += KEY_TAPS) {
                multiply(sums, queries + c * ROWS + first * KEY_TAPS, KEY_TAPS, keys + c * n_keys + j * KEY_TAPS);
            }
            for (size_t r = 0; r < TOGETHER; r++) {
                for (size_t v = 0; v < VECTORS; v++) {
                    size_t at = j + v * KEYS;
                    __m256 score = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][v]), _mm256_loadu_ps(key_scales + at));
                    _mm256_store_ps(scores_RB + (first + r) * BLOCK + at, score);
                    most[r] = at == 0 ? score : _mm256_max_ps(most[r], score);
                }
            }
        }
        for (size_t r = 0; r < TOGETHER; r++) {
            largest[first + r] = largest_lane(most[r]);
        }
    }
}

ATTENTION_INLINE __m256i weights_of(const float *scores, __m256 scale, __m256 largest) {
    __m256 x = _mm256_mul_ps(_mm256_sub_ps(_mm256_load_ps(scores), largest), scale);
    x = _mm256_max_ps(x, _mm256_set1_ps(-24.0f)); /* and all below rounds to nothing */
    __m256 whole = _mm256_floor_ps(x), f = _mm256_sub_ps(x, whole), y = _mm256_set1_ps(WEIGHT_3);
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(WEIGHT_2));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(WEIGHT_1));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(WEIGHT_0));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_cvtps_epi32(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent)));
}

static LANES_TARGET void weights(const float *scores_RB, const float *scales, const float *largest, size_t n_keys,
                                 weight *weights_RB, int32_t *sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (size_t r = 0; r < ROWS; r++) {
        __m256 scale = _mm256_set1_ps(scales[r]), most = _mm256_set1_ps(largest[r]);
        __m256i sum = _mm256_setzero_si256();
        for (size_t j = 0; j < n_keys; j += 2 * KEYS) {
            const float *from = scores_RB + r * BLOCK + j;
            __m256i both = _mm256_packs_epi32(weights_of(from, scale, most), weights_of(from + KEYS, scale, most));
            _mm256_store_si256((__m256i *)(void *)(weights_RB + r * WEIGHTS + j), both);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(both, ones));
        }
        sums[r] = sum_of_lanes(sum);
    }
}

static LANES_TARGET void products(const weight *weights_RB, const int32_t *sums, const value *values, size_t channels,
                                  size_t n_keys, const float *kept, const float *fresh, float *totals_RC) {
    (void)sums;
    for (size_t first = 0; first < ROWS; first += TOGETHER) {
        for (size_t c = 0; c < channels; c += VECTORS * KEYS) {
            __m256i parts[TOGETHER][VECTORS] = {{_mm256_setzero_si256()}};
            for (size_t j = 0; j < n_keys; j += VALUE_TAPS) {
                multiply(parts, weights_RB + first * WEIGHTS + WEIGHT_AT(j), WEIGHTS,
                         values + j * channels + c * VALUE_TAPS);
            }
            for (size_t r = 0; r < TOGETHER; r++) {
                __m256 before = _mm256_set1_ps(kept[first + r]), now = _mm256_set1_ps(fresh[first + r]);
                for (size_t v = 0; v < VECTORS; v++) {
                    float *total = totals_RC + (first + r) * channels + c + v * KEYS;
                    __m256 old = _mm256_mul_ps(_mm256_load_ps(total), before);
                    _mm256_store_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(parts[r][v]), now, old));
                }
            }
        }
    }
}

const struct attention_ops attention_avx2 = {
    .key_bytes = sizeof(key), .value_bytes = sizeof(value), .prepare = prepare, .rows = rows};
#endif
