/* AVX-512 with VNNI: weights in three signed digits of radix 256, four taps in one dot product.
 *
 * A weight w is d0 + 256 * d1 + 65536 * d2 with digits of -128..127, so the sum of w * sample is
 * sum(d0 * sample) + 256 * sum(d1 * sample) + 65536 * sum(d2 * sample): three vpdpbusd, exact modulo 2^32.
 */
#include "kernels.h"

#if defined(__x86_64__)
#define LANES_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#include "lanes_x86.h"

enum { ROWS = RESIZE_BATCH, TAPS = 4, DIGITS = 3 };

/* The weight in three signed digits of radix 256, least first: w = d[0] + 256 * d[1] + 65536 * d[2]. Exact for
 * |w| < 127.5 * 65536, and weights stay below 2^23 by far. */
static void to_digits(int32_t weight, int8_t digits[3]) {
    for (int i = 0; i < 3; i++) {
        digits[i] = (int8_t)(uint8_t)(weight & 0xFF);
        weight = (weight - digits[i]) / 256; /* no remainder */
    }
}

/* A word for each power of 256, with the digits of four taps. */
static void pack_digits(const int32_t *weights, int32_t *packed) {
    uint32_t words[DIGITS] = {0};
    for (int t = 0; t < TAPS; t++) {
        int8_t digits[DIGITS];
        to_digits(weights[t], digits);
        for (int d = 0; d < DIGITS; d++) {
            words[d] |= (uint32_t)(uint8_t)digits[d] << (8 * t);
        }
    }
    memcpy(packed, words, sizeof words);
}

/* The value that the digits' sums stand for, rounded and shifted; not yet clipped. */
static LANES_INLINE __m512i combined(const __m512i sums[DIGITS]) {
    __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), _mm512_slli_epi32(sums[2], 16));
    return _mm512_srai_epi32(_mm512_add_epi32(sums[0], high), RESIZE_WEIGHT_BITS);
}

/* ---- horizontal: lanes of 32 bits, each with four samples; 16 rows, 4 in each 128 bits ---- */

static const struct lane_format format = {
    .rows = ROWS, .load_bytes = sizeof(__m128i), .taps = TAPS,
    .channel_bytes = sizeof(__m512i), .finished_bytes = 4 * sizeof(__m512i), .n_words = DIGITS,
    .pack = pack_digits};

/* Channel c of four pixels. */
#define FOUR(c, step) (c), (c) + (step), (c) + 2 * (step), (c) + 3 * (step)

/* Row k of four, rotated so that its three lanes come to stand where they belong; see lanes.h. */
static const int8_t rgb_fours[4][16] = {
    {FOUR(0, 3), FOUR(1, 3), FOUR(2, 3), LANES_NONE},
    {FOUR(1, 3), FOUR(2, 3), LANES_NONE, FOUR(0, 3)},
    {FOUR(2, 3), LANES_NONE, FOUR(0, 3), FOUR(1, 3)},
    {LANES_NONE, FOUR(0, 3), FOUR(1, 3), FOUR(2, 3)},
};
static const int8_t rgba_fours[16] = {FOUR(0, 4), FOUR(1, 4), FOUR(2, 4), FOUR(3, 4)};

/* Eight rows into one half of each vector. RGB: four pixels, one group of three vectors. */
static LANES_INLINE void arrange_rgb(const uint8_t *const *rows, size_t offset, __m512i *out, int half) {
    __m256i x[4];
    for (int k = 0; k < 4; k++) {
        x[k] = _mm256_shuffle_epi8(lanes_load_rows(rows, k, offset), lanes_both_halves(rgb_fours[k]));
    }
    _mm256_store_si256((__m256i *)(out + 0) + half, _mm256_blend_epi32(x[0], x[1], 0x88));
    _mm256_store_si256((__m256i *)(out + 1) + half, _mm256_blend_epi32(x[1], x[2], 0xCC));
    _mm256_store_si256((__m256i *)(out + 2) + half, _mm256_blend_epi32(x[2], x[3], 0xEE));
}

/* Four RGBA pixels, one group of four vectors. */
static LANES_INLINE void arrange_rgba(const uint8_t *const *rows, size_t offset, __m512i *out, int half) {
    for (int k = 0; k < 4; k++) {
        __m256i x = _mm256_shuffle_epi8(lanes_load_rows(rows, k, offset), lanes_both_halves(rgba_fours));
        _mm256_store_si256((__m256i *)(out + k) + half, x);
    }
}

/* Sixteen grey pixels, four groups of one vector. */
static LANES_INLINE void arrange_grey(const uint8_t *const *rows, size_t offset, __m512i *out, int half) {
    __m256i x[4];
    for (int k = 0; k < 4; k++) {
        x[k] = lanes_load_rows(rows, k, offset);
    }
    /* a 4 x 4 transposition of four pixels, 32 bits, in each 128 bits */
    __m256i x01[2] = {_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1])};
    __m256i x23[2] = {_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3])};
    for (int i = 0; i < 2; i++) {
        _mm256_store_si256((__m256i *)out++ + half, _mm256_unpacklo_epi64(x01[i], x23[i]));
        _mm256_store_si256((__m256i *)out++ + half, _mm256_unpackhi_epi64(x01[i], x23[i]));
    }
}

static LANES_INLINE void arrange(const uint8_t *const *rows, size_t offset, int channels, uint8_t *out) {
    __m512i *vectors = (__m512i *)(void *)out;
    for (int half = 0; half < 2; half++) {
        const uint8_t *const *eight = rows + 8 * half;
        switch (channels) {
        case 1: arrange_grey(eight, offset, vectors, half); break;
        case 3: arrange_rgb(eight, offset, vectors, half); break;
        default: arrange_rgba(eight, offset, vectors, half); break;
        }
    }
}

/* Four outputs of sixteen rows, 4 bytes each, into the rows: a transposition. */
static LANES_INLINE void deliver(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels) {
    __m512i x[4], rows[4];
    for (int j = 0; j < 4; j++) {
        x[j] = _mm512_loadu_si512((const __m512i *)(const void *)plan->finished + j);
    }
    if (channels == 1) {
        __m512i pairs[2] = {_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpacklo_epi8(x[2], x[3])};
        rows[0] = _mm512_unpacklo_epi16(pairs[0], pairs[1]);
    } else {
        for (int half = 0; half < 2; half++) {
            __m512i left = half ? _mm512_unpackhi_epi32(x[0], x[1]) : _mm512_unpacklo_epi32(x[0], x[1]);
            __m512i right = half ? _mm512_unpackhi_epi32(x[2], x[3]) : _mm512_unpacklo_epi32(x[2], x[3]);
            rows[2 * half] = _mm512_unpacklo_epi64(left, right);
            rows[2 * half + 1] = _mm512_unpackhi_epi64(left, right);
        }
        static const int8_t close[16] = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1};
        for (int k = 0; k < 4 && channels == 3; k++) {
            rows[k] = _mm512_shuffle_epi8(rows[k], _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)close)));
        }
    }
    uint8_t bytes[4][sizeof(__m512i)];
    for (int k = 0; k < (channels == 1 ? 1 : 4); k++) {
        _mm512_storeu_si512(bytes[k], rows[k]);
    }
    lanes_deliver_four(plan, i, dst, channels, bytes[0], sizeof(__m512i), ROWS);
}

/* Output `i` of 16 rows. */
static LANES_INLINE void output(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels, bool last) {
    const __m512i *samples = (const __m512i *)(const void *)plan->arranged + plan->start[i] * channels;
    const int32_t *weights = plan->weights + i * plan->n_weights;
    __m512i sums[4][DIGITS];
    for (int v = 0; v < channels; v++) {
        sums[v][0] = _mm512_set1_epi32(1 << (RESIZE_WEIGHT_BITS - 1));
        sums[v][1] = sums[v][2] = _mm512_setzero_si512();
    }
    for (int32_t g = 0; g < plan->n_groups[i]; g++, weights += DIGITS, samples += channels) {
        __m512i w[DIGITS];
        for (int d = 0; d < DIGITS; d++) {
            w[d] = _mm512_set1_epi32(weights[d]);
        }
        for (int v = 0; v < channels; v++) {
            __m512i x = _mm512_load_si512(samples + v);
            for (int d = 0; d < DIGITS; d++) {
                sums[v][d] = _mm512_dpbusd_epi32(sums[v][d], x, w[d]);
            }
        }
    }
    __m512i words[2];
    for (int pair = 0; pair < 2; pair++) {
        int v = 2 * pair < channels ? 2 * pair : channels - 1, next = v + 1 < channels ? v + 1 : v;
        words[pair] = _mm512_packs_epi32(combined(sums[v]), combined(sums[next]));
    }
    __m512i bytes = _mm512_packus_epi16(words[0], words[1]); /* both packs saturate: the clip to 0..255 */
    if (channels == 3) {
        static const int8_t spread[16] = {0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1};
        bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)spread)));
    }
    _mm512_storeu_si512((__m512i *)(void *)plan->finished + i % 4, bytes);
    if (i % 4 == 3 || last) {
        deliver(plan, i, dst, channels);
    }
}

static LANES_TARGET void rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                              const struct resize_axis *axis, void *plan) {
    lanes_rows(src_rows, dst_rows, n_rows, channels, axis, plan, &format, arrange, output);
}

static const struct horizontal_ops horizontal = {.format = &format, .rows = rows};

/* ---- vertical: 64 columns at a time, four rows interleaved ---- */

/* Columns [start, start + 64). `digits` holds DIGITS words for each four taps. */
static LANES_INLINE void columns(const uint8_t *const *src_rows, const int32_t *digits, size_t n_taps, uint8_t *dst_row,
                           size_t start) {
    __m512i sums[4][DIGITS];
    for (int v = 0; v < 4; v++) {
        sums[v][0] = _mm512_set1_epi32(1 << (RESIZE_WEIGHT_BITS - 1));
        sums[v][1] = sums[v][2] = _mm512_setzero_si512();
    }
    for (size_t t = 0; t < n_taps; t += TAPS, digits += DIGITS) {
        __m512i row[TAPS];
        for (size_t k = 0; k < TAPS; k++) { /* past the end the last row again; its weights are 0 */
            row[k] = _mm512_loadu_si512(src_rows[t + k < n_taps ? t + k : n_taps - 1] + start);
        }
        __m512i ab_low = _mm512_unpacklo_epi8(row[0], row[1]), ab_high = _mm512_unpackhi_epi8(row[0], row[1]);
        __m512i cd_low = _mm512_unpacklo_epi8(row[2], row[3]), cd_high = _mm512_unpackhi_epi8(row[2], row[3]);
        __m512i x[4] = {_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
                        _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
        for (int d = 0; d < DIGITS; d++) {
            __m512i w = _mm512_set1_epi32(digits[d]);
            for (int v = 0; v < 4; v++) {
                sums[v][d] = _mm512_dpbusd_epi32(sums[v][d], x[v], w);
            }
        }
    }
    /* Packing restores the order that unpacking changed. */
    __m512i low = _mm512_packs_epi32(combined(sums[0]), combined(sums[1]));
    __m512i high = _mm512_packs_epi32(combined(sums[2]), combined(sums[3]));
    _mm512_storeu_si512(dst_row + start, _mm512_packus_epi16(low, high));
}

static LANES_TARGET void vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps,
                                  uint8_t *dst_row, size_t n_bytes, int32_t *scratch) {
    lanes_vertical(src_rows, weights, n_taps, dst_row, n_bytes, scratch, &format, 64, columns, &kernels_avx2);
}

const struct kernel_ops kernels_avx512 = {
    .name = "avx512",
    .needs = CPU_AVX2 | CPU_AVX512,
    .horizontal = &horizontal,
    .vertical = vertical,
    .yuv_row = avx512_yuv_row,
    .composite_row = avx512_composite_row,
    .attention = &attention_avx512,
};
#endif
