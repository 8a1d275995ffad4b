/* Attention in integers with AVX-512 VNNI: four products of bytes for each of 16 lanes in one instruction. */
#include <stdint.h>

#if defined(__x86_64__)
#define LANES_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
/* vpdpbusd multiplies unsigned by signed bytes: keys are moved by 128, and the sum of a query's channels makes up. */
enum { KEYS = 16, KEY_TAPS = 4, VALUE_TAPS = 2, KEY_MOVED = 128, VALUE_MOVED = 0, WEIGHTS = 64 };
typedef uint8_t key;
typedef int16_t value, weight;
/* Vectors of weights become half words without leaving their 128-bit lanes: of two vectors, fours of keys alternate. */
#define WEIGHT_AT(j) ((j) / 32 * 32 + (j) / 4 % 4 * 8 + (j) / 16 % 2 * 4 + (j) % 4)
#define WEIGHT_OF(row, j) (row)[WEIGHT_AT(j)]
#include "attention_lanes.h"

#include <immintrin.h>

enum { TOGETHER = 4 }; /* rows whose sums are in registers */

/* 32 bits in every lane: four queries' channels, or two weights. */
ATTENTION_INLINE __m512i everywhere(const void *bytes) {
    int32_t word;
    memcpy(&word, bytes, sizeof word);
    return _mm512_set1_epi32(word);
}

/* The four largest lanes of four vectors, side by side. */
ATTENTION_INLINE __m128 largest_of_four(const __m512 x[4]) {
    __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512 lanes = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 halves = _mm256_max_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

/* The sums of four vectors, side by side. */
ATTENTION_INLINE __m128i sums_of_four(const __m512i x[4]) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    __m512i lanes = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti32x8_epi32(lanes, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

/* `n` vectors of keys, TOGETHER rows. */
ATTENTION_INLINE void score_rows(const key *queries, const int32_t *query_sums, const key *keys,
                                 const float *key_scales, size_t channels, size_t n, float *scores_RB,
                                 float *largest) {
    __m512i sums[TOGETHER][4];
    for (size_t r = 0; r < TOGETHER; r++) {
        for (size_t v = 0; v < n; v++) {
            sums[r][v] = _mm512_set1_epi32(-KEY_MOVED * query_sums[r]);
        }
    }
    for (size_t c = 0; c < channels; c += KEY_TAPS, queries += ROWS * KEY_TAPS, keys += n * KEYS * KEY_TAPS) {
        __m512i k[4];
        for (size_t v = 0; v < n; v++) {
            k[v] = _mm512_load_si512(keys + v * KEYS * KEY_TAPS);
        }
        for (size_t r = 0; r < TOGETHER; r++) {
            __m512i q = everywhere(queries + r * KEY_TAPS);
            for (size_t v = 0; v < n; v++) {
                sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], k[v], q);
            }
        }
    }
    __m512 most[TOGETHER];
    for (size_t r = 0; r < TOGETHER; r++) {
        for (size_t v = 0; v < n; v++) {
            __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), _mm512_load_ps(key_scales + v * KEYS));
            _mm512_store_ps(scores_RB + r * BLOCK + v * KEYS, score);
            most[r] = v == 0 ? score : _mm512_max_ps(most[r], score);
        }
    }
    _mm_storeu_ps(largest, largest_of_four(most));
}

static LANES_TARGET void scores(const key *queries, const int32_t *query_sums, const key *keys, const float *key_scales,
                                size_t channels, size_t n_keys, float *scores_RB, float *largest) {
    for (size_t r = 0; r < ROWS; r += TOGETHER) {
        const key *q = queries + r * KEY_TAPS;
        float *to = scores_RB + r * BLOCK;
        switch (n_keys / KEYS) {
        case 1: score_rows(q, query_sums + r, keys, key_scales, channels, 1, to, largest + r); break;
        case 2: score_rows(q, query_sums + r, keys, key_scales, channels, 2, to, largest + r); break;
        case 3: score_rows(q, query_sums + r, keys, key_scales, channels, 3, to, largest + r); break;
        default: score_rows(q, query_sums + r, keys, key_scales, channels, 4, to, largest + r); break;
        }
    }
}

ATTENTION_INLINE __m512i weights_of(const float *scores, __m512 scale, __m512 largest) {
    __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores), largest), scale);
    __m512 f = _mm512_sub_ps(x, _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    __m512 y = _mm512_set1_ps(WEIGHT_3);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(WEIGHT_2));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(WEIGHT_1));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(WEIGHT_0));
    return _mm512_cvt_roundps_epi32(_mm512_scalef_ps(y, x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static LANES_TARGET void weights(const float *scores_RB, const float *scales, const float *largest, size_t n_keys,
                                 weight *weights_RB, int32_t *sums) {
    const __m512i ones = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
    for (size_t first = 0; first < ROWS; first += TOGETHER) {
        __m512i parts[TOGETHER];
        for (size_t i = 0; i < TOGETHER; i++) {
            size_t r = first + i;
            __m512 scale = _mm512_set1_ps(scales[r]), most = _mm512_set1_ps(largest[r]);
            parts[i] = zero;
            for (size_t j = 0; j < n_keys; j += 2 * KEYS) {
                const float *from = scores_RB + r * BLOCK + j;
                __m512i low = weights_of(from, scale, most);
                __m512i high = j + KEYS < n_keys ? weights_of(from + KEYS, scale, most) : zero;
                __m512i both = _mm512_packs_epi32(low, high);
                _mm512_store_si512(weights_RB + r * WEIGHTS + j, both);
                parts[i] = _mm512_dpwssd_epi32(parts[i], both, ones);
            }
        }
        _mm_storeu_si128((__m128i *)(void *)(sums + first), sums_of_four(parts));
    }
}

/* `n` vectors of channels, TOGETHER rows. */
ATTENTION_INLINE void product_rows(const weight *weights_RB, const value *values, size_t channels, size_t n_keys,
                                   size_t n, const float *kept, const float *fresh, float *totals_RC) {
    __m512i sums[TOGETHER][6];
    for (size_t r = 0; r < TOGETHER; r++) {
        for (size_t v = 0; v < n; v++) {
            sums[r][v] = _mm512_setzero_si512();
        }
    }
    for (size_t j = 0; j < n_keys; j += KEYS) {
        const weight *w = weights_RB + WEIGHT_AT(j);
        for (size_t l = 0; l < KEYS / 4; l++, w += 8) {
            for (size_t t = 0; t < 4; t += VALUE_TAPS, values += channels * VALUE_TAPS) {
                __m512i x[6];
                for (size_t v = 0; v < n; v++) {
                    x[v] = _mm512_load_si512(values + v * KEYS * VALUE_TAPS);
                }
                for (size_t r = 0; r < TOGETHER; r++) {
                    __m512i two = everywhere(w + r * WEIGHTS + t);
                    for (size_t v = 0; v < n; v++) {
                        sums[r][v] = _mm512_dpwssd_epi32(sums[r][v], two, x[v]);
                    }
                }
            }
        }
    }
    for (size_t r = 0; r < TOGETHER; r++) {
        for (size_t v = 0; v < n; v++) {
            float *total = totals_RC + r * channels + v * KEYS;
            __m512 before = _mm512_mul_ps(_mm512_load_ps(total), _mm512_set1_ps(kept[r]));
            _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), _mm512_set1_ps(fresh[r]), before));
        }
    }
}

static LANES_TARGET void products(const weight *weights_RB, const int32_t *sums, const value *values, size_t channels,
                                  size_t n_keys, const float *kept, const float *fresh, float *totals_RC) {
    (void)sums;
    for (size_t c = 0; c < channels;) {
        size_t left = (channels - c) / KEYS, n = left <= 6 ? left : 4;
        for (size_t r = 0; r < ROWS; r += TOGETHER) {
            const weight *w = weights_RB + r * WEIGHTS;
            const value *x = values + c * VALUE_TAPS;
            float *to = totals_RC + r * channels + c;
            switch (n) {
            case 1: product_rows(w, x, channels, n_keys, 1, kept + r, fresh + r, to); break;
            case 2: product_rows(w, x, channels, n_keys, 2, kept + r, fresh + r, to); break;
            case 3: product_rows(w, x, channels, n_keys, 3, kept + r, fresh + r, to); break;
            case 4: product_rows(w, x, channels, n_keys, 4, kept + r, fresh + r, to); break;
            case 5: product_rows(w, x, channels, n_keys, 5, kept + r, fresh + r, to); break;
            default: product_rows(w, x, channels, n_keys, 6, kept + r, fresh + r, to); break;
            }
        }
        c += n * KEYS;
    }
}

const struct attention_ops attention_avx512 = {
    .key_bytes = sizeof(key), .value_bytes = sizeof(value), .prepare = prepare, .rows = rows};
#endif
