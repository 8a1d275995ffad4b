/* Frame kernels with AVX2. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE __attribute__((target("avx2"), always_inline)) static inline

/* ---- YUV: 32 pixels at a time ----
 *
 * Unpack and pack instructions work inside each half of a register. They undo each other's order, so 16-bit pixels live
 * in two registers, low = 0-7 | 16-23 and high = 8-15 | 24-31, and (U, V) pairs likewise: low = 0-3 | 8-11 and
 * high = 4-7 | 12-15. */
enum { PIXELS = 32 };

struct block {
    __m256i y_low, y_high;
    __m256i uv_low, uv_high;
};

/* `layout` is a constant after inlining. */
AVX2_INLINE struct block load(const struct yuv_row *row, enum yuv_layout layout, size_t i) {
    const __m256i zero = _mm256_setzero_si256();
    if (layout == YUV_YUYV) { /* Y0 U0 Y1 V0 Y2 U1 Y3 V1 ...: luma in even bytes, pairs in odd ones */
        const __m128i *src = (const __m128i *)(const void *)(row->y + 2 * i);
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(src)),
                                                    _mm_loadu_si128(src + 2), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(src + 1)),
                                                     _mm_loadu_si128(src + 3), 1);
        const __m256i even = _mm256_set1_epi16(0xff);
        return (struct block){_mm256_and_si256(low, even), _mm256_and_si256(high, even), _mm256_srli_epi16(low, 8),
                              _mm256_srli_epi16(high, 8)};
    }
    const __m256i y = _mm256_loadu_si256((const __m256i *)(const void *)(row->y + i));
    __m256i uv; /* U0 V0 U1 V1 ... */
    if (layout == YUV_NV12) {
        uv = _mm256_loadu_si256((const __m256i *)(const void *)(row->u + i));
    } else {
        const __m128i u = _mm_loadu_si128((const __m128i *)(const void *)(row->u + i / 2));
        const __m128i v = _mm_loadu_si128((const __m128i *)(const void *)(row->v + i / 2));
        uv = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(u, v)), _mm_unpackhi_epi8(u, v), 1);
    }
    return (struct block){_mm256_unpacklo_epi8(y, zero), _mm256_unpackhi_epi8(y, zero), _mm256_unpacklo_epi8(uv, zero),
                          _mm256_unpackhi_epi8(uv, zero)};
}

/* Weights of one sample, split for 16-bit multiplication: w = high * 2^15 + low with 0 <= low < 2^15. Then
 * floor((high * 2^15 + low) / 2^22) = (high + (low >> 15)) >> 7, in 32 bits and without error. */
struct split {
    __m256i high, low;           /* (weight of U, weight of V) pairs */
    __m256i bias_high, bias_low; /* 32 bits */
};

AVX2_INLINE struct split split(const struct yuv_weights *weights, int c) {
    const int32_t u = weights->u[c], v = weights->v[c];
    const int64_t bias = weights->bias[c];
    return (struct split){
        .high = _mm256_set1_epi32((int32_t)((uint32_t)(u >> 15 & 0xffff) | (uint32_t)(v >> 15) << 16)),
        .low = _mm256_set1_epi32((u & 0x7fff) | (v & 0x7fff) << 16),
        .bias_high = _mm256_set1_epi32((int32_t)(bias >> 15)),
        .bias_low = _mm256_set1_epi32((int32_t)(bias & 0x7fff)),
    };
}

AVX2_INLINE __m256i chroma_term(__m256i uv, const struct split *w) {
    const __m256i high = _mm256_add_epi32(_mm256_madd_epi16(uv, w->high), w->bias_high);
    const __m256i low = _mm256_add_epi32(_mm256_madd_epi16(uv, w->low), w->bias_low);
    return _mm256_srai_epi32(_mm256_add_epi32(high, _mm256_srai_epi32(low, 15)), 7);
}

/* floor(sum / 73) for a saturated sum; exact for 0 <= sum < 32263, and more than 255 or less than 0 beyond:
 * 2^21 / 73 = 28728.1, so the multiplier 28729 is too large by 65 / 73, and the error stays below 1 / 73. */
AVX2_INLINE __m256i divide_by_unit(__m256i sum) {
    return _mm256_srai_epi16(_mm256_mulhi_epi16(sum, _mm256_set1_epi16(28729)), 5);
}

/* One sample of all pixels. `luma_*` are in our unit; each chroma term serves two pixels. */
AVX2_INLINE __m256i samples(const struct block *block, __m256i luma_low, __m256i luma_high, const struct split *w) {
    const __m256i terms = _mm256_packs_epi32(chroma_term(block->uv_low, w), chroma_term(block->uv_high, w));
    const __m256i low = _mm256_adds_epi16(luma_low, _mm256_unpacklo_epi16(terms, terms));
    const __m256i high = _mm256_adds_epi16(luma_high, _mm256_unpackhi_epi16(terms, terms));
    return _mm256_packus_epi16(divide_by_unit(low), divide_by_unit(high));
}

/* Planes to R0 G0 B0 R1 ...: 3 x 32 bytes. Byte p of the three 16-byte rows that a half of the registers becomes is of
 * channel p, p + 1 and p + 2 (mod 3). One shuffle for each channel puts its pixels where any of the rows wants them:
 *     R  0 11  6  1 12  7  2 13  8  3 14  9  4 15 10  5
 * then blends pick from the channels. */
AVX2_INLINE void store_rgb(uint8_t *dst, __m256i r, __m256i g, __m256i b) {
    const __m256i place_r = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15, 10, 5));
    const __m256i place_g = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(5, 0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15, 10));
    const __m256i place_b = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(10, 5, 0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15));
    const __m256i at_1 = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0));
    const __m256i at_2 = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0));
    r = _mm256_shuffle_epi8(r, place_r);
    g = _mm256_shuffle_epi8(g, place_g);
    b = _mm256_shuffle_epi8(b, place_b);
    const __m256i row_0 = _mm256_blendv_epi8(_mm256_blendv_epi8(r, g, at_1), b, at_2);
    const __m256i row_1 = _mm256_blendv_epi8(_mm256_blendv_epi8(g, b, at_1), r, at_2);
    const __m256i row_2 = _mm256_blendv_epi8(_mm256_blendv_epi8(b, r, at_1), g, at_2);
    __m256i *out = (__m256i *)(void *)dst;
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(row_0, row_1, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(row_2, row_0, 0x30));
    _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(row_1, row_2, 0x31));
}

AVX2_INLINE size_t whole_blocks(const struct yuv_row *row, enum yuv_layout layout, const struct yuv_weights *weights,
                                uint8_t *dst, size_t n_pixels) {
    const struct split red = split(weights, 0), green = split(weights, 1), blue = split(weights, 2);
    const __m256i luma = _mm256_set1_epi16((int16_t)weights->luma);
    size_t i = 0;
    for (; i + PIXELS <= n_pixels; i += PIXELS) {
        const struct block block = load(row, layout, i);
        const __m256i low = _mm256_mullo_epi16(block.y_low, luma), high = _mm256_mullo_epi16(block.y_high, luma);
        store_rgb(dst + 3 * i, samples(&block, low, high, &red), samples(&block, low, high, &green),
                  samples(&block, low, high, &blue));
    }
    return i;
}

AVX2 static size_t yuv_blocks(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst,
                              size_t n_pixels) {
    switch (row->layout) {
    case YUV_NV12: return whole_blocks(row, YUV_NV12, weights, dst, n_pixels);
    case YUV_I420: return whole_blocks(row, YUV_I420, weights, dst, n_pixels);
    default: return whole_blocks(row, YUV_YUYV, weights, dst, n_pixels);
    }
}

AVX2 void avx2_yuv_row(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst, size_t n_pixels) {
    size_t done = yuv_blocks(row, weights, dst, n_pixels);
    if (done < n_pixels) {
        struct yuv_tail tail;
        struct yuv_row rest = yuv_row_at(row, done);
        kernels_yuv_tail(&tail, &rest, n_pixels - done);
        yuv_blocks(&tail.row, weights, tail.rgb, PIXELS);
        memcpy(dst + 3 * done, tail.rgb, 3 * (n_pixels - done));
    }
}

/* ---- RGBA over a colour: 8 pixels at a time ---- */

/* (colour * alpha + background * (255 - alpha)) / 255 = (alpha * (colour - background) + 255 * background) / 255: in
 * 16 bits the difference may wrap, the sum is right again. Then Pillow's division, for which x * 257 / 2^16 stands.
 * `start` is 255 * background + 128. */
AVX2_INLINE __m256i blend(__m256i colour, __m256i alpha, __m256i background, __m256i start) {
    const __m256i x = _mm256_add_epi16(_mm256_mullo_epi16(_mm256_sub_epi16(colour, background), alpha), start);
    return _mm256_mulhi_epu16(x, _mm256_set1_epi16(257));
}

/* Writes 24 bytes and spoils 4 more. */
AVX2_INLINE void composite_8(const uint8_t *src, uint8_t *dst, __m256i background, __m256i start) {
    const __m256i alpha_low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(3, -1, 3, -1, 3, -1, 3, -1, 7, -1, 7, -1, 7, -1, 7, -1));
    const __m256i alpha_high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(11, -1, 11, -1, 11, -1, 11, -1, 15, -1, 15, -1, 15, -1, 15, -1));
    const __m256i drop_alpha = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m256i zero = _mm256_setzero_si256();
    const __m256i rgba = _mm256_loadu_si256((const __m256i *)(const void *)src);
    const __m256i low = blend(_mm256_unpacklo_epi8(rgba, zero), _mm256_shuffle_epi8(rgba, alpha_low), background,
                              start);
    const __m256i high = blend(_mm256_unpackhi_epi8(rgba, zero), _mm256_shuffle_epi8(rgba, alpha_high), background,
                               start);
    const __m256i rgb = _mm256_shuffle_epi8(_mm256_packus_epi16(low, high), drop_alpha);
    _mm_storeu_si128((__m128i *)(void *)dst, _mm256_castsi256_si128(rgb));
    _mm_storeu_si128((__m128i *)(void *)(dst + 12), _mm256_extracti128_si256(rgb, 1));
}

AVX2 void avx2_composite_row(const uint8_t *src, const uint8_t background[3], uint8_t *dst, size_t n_pixels) {
    const int64_t rgb = background[0] | background[1] << 16 | (int64_t)background[2] << 32;
    const __m256i ground = _mm256_set1_epi64x(rgb);
    const __m256i start = _mm256_add_epi16(_mm256_mullo_epi16(ground, _mm256_set1_epi16(255)), _mm256_set1_epi16(128));
    size_t i = 0;
    for (; i + 10 <= n_pixels; i += 8) { /* two pixels more, into which the store may spill */
        composite_8(src + 4 * i, dst + 3 * i, ground, start);
    }
    while (i < n_pixels) {
        uint8_t in[4 * 8] = {0}, out[3 * 8 + 4];
        size_t n = n_pixels - i < 8 ? n_pixels - i : 8;
        memcpy(in, src + 4 * i, 4 * n);
        composite_8(in, out, ground, start);
        memcpy(dst + 3 * i, out, 3 * n);
        i += n;
    }
}

/* ---- Sum of absolute differences ---- */

AVX2_INLINE __m256i sad(const uint8_t *a, const uint8_t *b) {
    return _mm256_sad_epu8(_mm256_loadu_si256((const __m256i *)(const void *)a),
                           _mm256_loadu_si256((const __m256i *)(const void *)b));
}

AVX2 uint64_t avx2_sum_abs_diff(const uint8_t *a, const uint8_t *b, size_t n_bytes) {
    __m256i even = _mm256_setzero_si256(), odd = even;
    size_t i = 0;
    for (; i + 64 <= n_bytes; i += 64) {
        even = _mm256_add_epi64(even, sad(a + i, b + i));
        odd = _mm256_add_epi64(odd, sad(a + i + 32, b + i + 32));
    }
    uint64_t sums[4];
    _mm256_storeu_si256((__m256i *)(void *)sums, _mm256_add_epi64(even, odd));
    return sums[0] + sums[1] + sums[2] + sums[3] + scalar_sum_abs_diff(a + i, b + i, n_bytes - i);
}

#endif
