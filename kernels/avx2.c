/* AVX2: weights split into two 16-bit halves, pairs of taps in one multiply-add.
 *
 * A weight w of up to 24 bits is hi * 2^15 + lo with lo in 0..2^15 - 1, so the sum of w * sample is
 * (sum of hi * sample) * 2^15 + sum of lo * sample: two pmaddwd, exact modulo 2^32 (32767 * 255 * 2 < 2^31).
 */
#include "kernels.h"

#if defined(__x86_64__)
#define LANES_TARGET __attribute__((target("avx2")))
#include "lanes_x86.h"

enum { HALF_BITS = 15, ROWS = 8, TAPS = 2 };

/* ---- horizontal: lanes of 32 bits, each with two samples of 16 bits; 8 rows, 4 in each 128 bits ---- */

/* Two low halves in one word, two high halves in the next. */
static void pack_halves(const int32_t *weights, int32_t *packed) {
    uint32_t low[TAPS], high[TAPS];
    for (int t = 0; t < TAPS; t++) {
        low[t] = (uint32_t)weights[t] & ((1u << HALF_BITS) - 1);
        high[t] = (uint32_t)(weights[t] >> HALF_BITS) & 0xFFFF;
    }
    packed[0] = (int32_t)(low[0] | low[1] << 16);
    packed[1] = (int32_t)(high[0] | high[1] << 16);
}

static const struct lane_format format = {
    .rows = ROWS, .load_bytes = sizeof(__m128i), .taps = TAPS,
    .channel_bytes = sizeof(__m256i), .finished_bytes = 4 * sizeof(__m256i), .n_words = 2, .pack = pack_halves};

/* Channel c of pixels 0 and 1 (2 and 3 for the second), widened to 16 bits. */
#define PAIR(base, c, step) (base) + (c), -1, (base) + (c) + (step), -1

/* Row k of four, rotated so that its three lanes come to stand where they belong; see lanes.h. */
#define RGB_ROWS(base)                                                      \
    {                                                                       \
        {PAIR(base, 0, 3), PAIR(base, 1, 3), PAIR(base, 2, 3), LANES_NONE},       \
            {PAIR(base, 1, 3), PAIR(base, 2, 3), LANES_NONE, PAIR(base, 0, 3)},   \
            {PAIR(base, 2, 3), LANES_NONE, PAIR(base, 0, 3), PAIR(base, 1, 3)},   \
            {LANES_NONE, PAIR(base, 0, 3), PAIR(base, 1, 3), PAIR(base, 2, 3)},   \
    }
static const int8_t rgb_pairs[2][4][16] = {RGB_ROWS(0), RGB_ROWS(6)};
static const int8_t rgba_pairs[2][16] = {
    {PAIR(0, 0, 4), PAIR(0, 1, 4), PAIR(0, 2, 4), PAIR(0, 3, 4)},
    {PAIR(8, 0, 4), PAIR(8, 1, 4), PAIR(8, 2, 4), PAIR(8, 3, 4)},
};

/* Four RGB pixels of each row, two groups of three vectors. */
static LANES_INLINE void arrange_rgb(const uint8_t *const *rows, size_t offset, __m256i *out) {
    __m256i pixels[4]; /* loaded before anything is stored, or the compiler has to load them again */
    for (int k = 0; k < 4; k++) {
        pixels[k] = lanes_load_rows(rows, k, offset);
    }
    for (int g = 0; g < 2; g++) {
        __m256i x[4];
        for (int k = 0; k < 4; k++) {
            x[k] = _mm256_shuffle_epi8(pixels[k], lanes_both_halves(rgb_pairs[g][k]));
        }
        _mm256_store_si256(out++, _mm256_blend_epi32(x[0], x[1], 0x88));
        _mm256_store_si256(out++, _mm256_blend_epi32(x[1], x[2], 0xCC));
        _mm256_store_si256(out++, _mm256_blend_epi32(x[2], x[3], 0xEE));
    }
}

/* Four RGBA pixels of each row, two groups of four vectors. */
static LANES_INLINE void arrange_rgba(const uint8_t *const *rows, size_t offset, __m256i *out) {
    for (int k = 0; k < 4; k++) {
        __m256i x = lanes_load_rows(rows, k, offset);
        _mm256_store_si256(out + k, _mm256_shuffle_epi8(x, lanes_both_halves(rgba_pairs[0])));
        _mm256_store_si256(out + 4 + k, _mm256_shuffle_epi8(x, lanes_both_halves(rgba_pairs[1])));
    }
}

/* Sixteen grey pixels of each row, eight groups of one vector. */
static LANES_INLINE void arrange_grey(const uint8_t *const *rows, size_t offset, __m256i *out) {
    __m256i x[4], zero = _mm256_setzero_si256();
    for (int k = 0; k < 4; k++) {
        x[k] = lanes_load_rows(rows, k, offset);
    }
    /* pairs of pixels, of 16 bits, change places: after two steps the four rows of a pair lie side by side */
    for (int half = 0; half < 2; half++) {
        __m256i x01 = half ? _mm256_unpackhi_epi16(x[0], x[1]) : _mm256_unpacklo_epi16(x[0], x[1]);
        __m256i x23 = half ? _mm256_unpackhi_epi16(x[2], x[3]) : _mm256_unpacklo_epi16(x[2], x[3]);
        __m256i pairs[2] = {_mm256_unpacklo_epi32(x01, x23), _mm256_unpackhi_epi32(x01, x23)};
        for (int i = 0; i < 2; i++) {
            _mm256_store_si256(out++, _mm256_unpacklo_epi8(pairs[i], zero));
            _mm256_store_si256(out++, _mm256_unpackhi_epi8(pairs[i], zero));
        }
    }
}

static LANES_INLINE void arrange(const uint8_t *const *rows, size_t offset, int channels, uint8_t *out) {
    __m256i *vectors = (__m256i *)(void *)out;
    switch (channels) {
    case 1: arrange_grey(rows, offset, vectors); break;
    case 3: arrange_rgb(rows, offset, vectors); break;
    default: arrange_rgba(rows, offset, vectors); break;
    }
}

/* Four outputs of eight rows, 4 bytes each, into the rows: a transposition. */
static LANES_INLINE void deliver(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels) {
    __m256i x[4], rows[4];
    for (int j = 0; j < 4; j++) {
        x[j] = _mm256_loadu_si256((const __m256i *)(const void *)plan->finished + j);
    }
    if (channels == 1) {
        __m256i pairs[2] = {_mm256_unpacklo_epi8(x[0], x[1]), _mm256_unpacklo_epi8(x[2], x[3])};
        rows[0] = _mm256_unpacklo_epi16(pairs[0], pairs[1]);
    } else {
        for (int half = 0; half < 2; half++) {
            __m256i left = half ? _mm256_unpackhi_epi32(x[0], x[1]) : _mm256_unpacklo_epi32(x[0], x[1]);
            __m256i right = half ? _mm256_unpackhi_epi32(x[2], x[3]) : _mm256_unpacklo_epi32(x[2], x[3]);
            rows[2 * half] = _mm256_unpacklo_epi64(left, right);
            rows[2 * half + 1] = _mm256_unpackhi_epi64(left, right);
        }
        static const int8_t close[16] = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1};
        for (int k = 0; k < 4 && channels == 3; k++) {
            rows[k] = _mm256_shuffle_epi8(rows[k], lanes_both_halves(close));
        }
    }
    uint8_t bytes[4][sizeof(__m256i)];
    for (int k = 0; k < (channels == 1 ? 1 : 4); k++) {
        _mm256_storeu_si256((void *)bytes[k], rows[k]);
    }
    lanes_deliver_four(plan, i, dst, channels, bytes[0], sizeof(__m256i), ROWS);
}

/* Output `i` of 8 rows. */
static LANES_INLINE void output(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels, bool last) {
    const __m256i *samples = (const __m256i *)(const void *)plan->arranged + plan->start[i] * channels;
    const int32_t *weights = plan->weights + i * plan->n_weights;
    __m256i lo[4], hi[4];
    for (int v = 0; v < channels; v++) {
        lo[v] = _mm256_set1_epi32(1 << (RESIZE_WEIGHT_BITS - 1));
        hi[v] = _mm256_setzero_si256();
    }
    for (int32_t g = 0; g < plan->n_groups[i]; g++, weights += 2, samples += channels) {
        __m256i w_lo = _mm256_set1_epi32(weights[0]), w_hi = _mm256_set1_epi32(weights[1]);
        for (int v = 0; v < channels; v++) {
            __m256i x = _mm256_load_si256(samples + v);
            lo[v] = _mm256_add_epi32(lo[v], _mm256_madd_epi16(x, w_lo));
            hi[v] = _mm256_add_epi32(hi[v], _mm256_madd_epi16(x, w_hi));
        }
    }
    __m256i sums[4];
    for (int v = 0; v < 4; v++) {
        int s = v < channels ? v : channels - 1;
        sums[v] = _mm256_srai_epi32(_mm256_add_epi32(lo[s], _mm256_slli_epi32(hi[s], HALF_BITS)), RESIZE_WEIGHT_BITS);
    }
    /* Both packs saturate, which is the clip to 0..255. */
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
    if (channels == 3) {
        static const int8_t spread[16] = {0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1};
        bytes = _mm256_shuffle_epi8(bytes, lanes_both_halves(spread));
    }
    _mm256_storeu_si256((__m256i *)(void *)plan->finished + i % 4, bytes);
    if (i % 4 == 3 || last) {
        deliver(plan, i, dst, channels);
    }
}

static LANES_TARGET void rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                              const struct resize_axis *axis, void *plan) {
    lanes_rows(src_rows, dst_rows, n_rows, channels, axis, plan, &format, arrange, output);
}

static const struct horizontal_ops horizontal = {.format = &format, .rows = rows};

/* ---- vertical: 32 columns at a time, pairs of rows ---- */

/* Columns [start, start + 32). `pairs` holds lo and hi of two taps each. */
static LANES_INLINE void columns(const uint8_t *const *src_rows, const int32_t *pairs, size_t n_taps, uint8_t *dst_row,
                         size_t start) {
    __m256i lo[4], hi[4], zero = _mm256_setzero_si256();
    for (int v = 0; v < 4; v++) {
        lo[v] = _mm256_set1_epi32(1 << (RESIZE_WEIGHT_BITS - 1));
        hi[v] = zero;
    }
    for (size_t t = 0; t < n_taps; t += TAPS, pairs += 2) {
        /* An odd row at the end is paired with itself; its second weight is 0. */
        const uint8_t *second = src_rows[t + 1 < n_taps ? t + 1 : t];
        __m256i a = _mm256_loadu_si256((const void *)(src_rows[t] + start));
        __m256i b = _mm256_loadu_si256((const void *)(second + start));
        __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
        __m256i x[4] = {_mm256_unpacklo_epi8(ab_low, zero), _mm256_unpackhi_epi8(ab_low, zero),
                        _mm256_unpacklo_epi8(ab_high, zero), _mm256_unpackhi_epi8(ab_high, zero)};
        __m256i w_lo = _mm256_set1_epi32(pairs[0]), w_hi = _mm256_set1_epi32(pairs[1]);
        for (int v = 0; v < 4; v++) {
            lo[v] = _mm256_add_epi32(lo[v], _mm256_madd_epi16(x[v], w_lo));
            hi[v] = _mm256_add_epi32(hi[v], _mm256_madd_epi16(x[v], w_hi));
        }
    }
    __m256i sums[4];
    for (int v = 0; v < 4; v++) {
        sums[v] = _mm256_srai_epi32(_mm256_add_epi32(lo[v], _mm256_slli_epi32(hi[v], HALF_BITS)), RESIZE_WEIGHT_BITS);
    }
    /* Packing restores the order that unpacking changed. */
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
    _mm256_storeu_si256((void *)(dst_row + start), bytes);
}

static LANES_TARGET void vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps,
                                  uint8_t *dst_row, size_t n_bytes, int32_t *scratch) {
    lanes_vertical(src_rows, weights, n_taps, dst_row, n_bytes, scratch, &format, 32, columns, &kernels_scalar);
}

/* ---- planes: 16 pixels at a time ---- */

/* Sample c of each of `n_pixels` >= 16 pixels. A shuffle leaves zeros where the highest bit of its index is set: the
 * saturated sum sets it for bytes before and behind the vector. */
static LANES_INLINE void plane(const uint8_t *src, uint8_t *dst, size_t n_pixels, int pixel_bytes, int c) {
    __m128i indices[4];
    for (int v = 0; v < pixel_bytes; v++) {
        int8_t bytes[16];
        for (int i = 0; i < 16; i++) {
            bytes[i] = (int8_t)(pixel_bytes * i + c - 16 * v);
        }
        indices[v] = _mm_adds_epu8(_mm_loadu_si128((const void *)bytes), _mm_set1_epi8(0x70));
    }
    for (size_t start = 0; start < n_pixels; start += 16) {
        size_t i = start + 16 <= n_pixels ? start : n_pixels - 16; /* the last ones overlap those before */
        const __m128i *vectors = (const __m128i *)(const void *)(src + i * (size_t)pixel_bytes);
        __m128i samples = _mm_setzero_si128();
        for (int v = 0; v < pixel_bytes; v++) {
            samples = _mm_or_si128(samples, _mm_shuffle_epi8(_mm_loadu_si128(vectors + v), indices[v]));
        }
        _mm_storeu_si128((void *)(dst + i), samples);
    }
}

static LANES_TARGET void planes_u8(const uint8_t *src, uint8_t *dst, size_t plane_size, size_t n_pixels,
                                   int pixel_bytes, int n_planes) {
    if (n_pixels < 16 || pixel_bytes == 1) {
        kernels_scalar.planes_u8(src, dst, plane_size, n_pixels, pixel_bytes, n_planes);
        return;
    }
    for (int c = 0; c < n_planes; c++) {
        if (pixel_bytes == 3) {
            plane(src, dst + (size_t)c * plane_size, n_pixels, 3, c);
        } else {
            plane(src, dst + (size_t)c * plane_size, n_pixels, 4, c);
        }
    }
}

const struct kernel_ops kernels_avx2 = {
    .name = "avx2",
    .needs = CPU_AVX2,
    .horizontal = &horizontal,
    .vertical = vertical,
    .planes_u8 = planes_u8,
    .yuv_row = avx2_yuv_row,
    .composite_row = avx2_composite_row,
    .sum_abs_diff = avx2_sum_abs_diff,
    .attention = &attention_avx2,
};
#endif
