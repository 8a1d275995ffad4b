/* Frame kernels with AVX-512 (F, BW): frames_avx2.c with registers of four parts, and masks for blends and tails.
 *
 * No sum of absolute differences: with AVX2 it already waits for memory.
 */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw")))
#define AVX512_INLINE __attribute__((target("avx512f,avx512bw"), always_inline)) static inline

/* ---- YUV: 64 pixels at a time ----
 *
 * As with AVX2: unpack and pack work inside each 16-byte part, and undo each other's order. Part p of `low` has the
 * pixels 16 p to 16 p + 7, of `high` the next eight; of (U, V) pairs half as many. */
enum { PIXELS = 64 };

struct block {
    __m512i y_low, y_high;
    __m512i uv_low, uv_high;
};

/* `layout` is a constant after inlining. */
AVX512_INLINE struct block load(const struct yuv_row *row, enum yuv_layout layout, size_t i) {
    const __m512i zero = _mm512_setzero_si512();
    if (layout == YUV_YUYV) { /* Y0 U0 Y1 V0 Y2 U1 Y3 V1 ...: luma in even bytes, pairs in odd ones */
        const __m512i first = _mm512_loadu_si512(row->y + 2 * i), second = _mm512_loadu_si512(row->y + 2 * i + 64);
        const __m512i take_low = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
        const __m512i take_high = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
        const __m512i low = _mm512_permutex2var_epi64(first, take_low, second);
        const __m512i high = _mm512_permutex2var_epi64(first, take_high, second);
        const __m512i even = _mm512_set1_epi16(0xff);
        return (struct block){_mm512_and_si512(low, even), _mm512_and_si512(high, even), _mm512_srli_epi16(low, 8),
                              _mm512_srli_epi16(high, 8)};
    }
    const __m512i y = _mm512_loadu_si512(row->y + i);
    __m512i uv; /* U0 V0 U1 V1 ... */
    if (layout == YUV_NV12) {
        uv = _mm512_loadu_si512(row->u + i);
    } else {
        const __m256i u = _mm256_loadu_si256((const __m256i *)(const void *)(row->u + i / 2));
        const __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(row->v + i / 2));
        uv = _mm512_or_si512(_mm512_cvtepu8_epi16(u), _mm512_slli_epi16(_mm512_cvtepu8_epi16(v), 8));
    }
    return (struct block){_mm512_unpacklo_epi8(y, zero), _mm512_unpackhi_epi8(y, zero), _mm512_unpacklo_epi8(uv, zero),
                          _mm512_unpackhi_epi8(uv, zero)};
}

/* Weights of one sample, split for 16-bit multiplication; see frames_avx2.c. */
struct split {
    __m512i high, low;           /* (weight of U, weight of V) pairs */
    __m512i bias_high, bias_low; /* 32 bits */
};

AVX512_INLINE struct split split(const struct yuv_weights *weights, int c) {
    const int32_t u = weights->u[c], v = weights->v[c];
    const int64_t bias = weights->bias[c];
    return (struct split){
        .high = _mm512_set1_epi32((int32_t)((uint32_t)(u >> 15 & 0xffff) | (uint32_t)(v >> 15) << 16)),
        .low = _mm512_set1_epi32((u & 0x7fff) | (v & 0x7fff) << 16),
        .bias_high = _mm512_set1_epi32((int32_t)(bias >> 15)),
        .bias_low = _mm512_set1_epi32((int32_t)(bias & 0x7fff)),
    };
}

AVX512_INLINE __m512i chroma_term(__m512i uv, const struct split *w) {
    const __m512i high = _mm512_add_epi32(_mm512_madd_epi16(uv, w->high), w->bias_high);
    const __m512i low = _mm512_add_epi32(_mm512_madd_epi16(uv, w->low), w->bias_low);
    return _mm512_srai_epi32(_mm512_add_epi32(high, _mm512_srai_epi32(low, 15)), 7);
}

/* floor(sum / 73) as in frames_avx2.c. */
AVX512_INLINE __m512i divide_by_unit(__m512i sum) {
    return _mm512_srai_epi16(_mm512_mulhi_epi16(sum, _mm512_set1_epi16(28729)), 5);
}

/* One sample of all pixels. `luma_*` are in our unit; each chroma term serves two pixels. */
AVX512_INLINE __m512i samples(const struct block *block, __m512i luma_low, __m512i luma_high, const struct split *w) {
    const __m512i terms = _mm512_packs_epi32(chroma_term(block->uv_low, w), chroma_term(block->uv_high, w));
    const __m512i low = _mm512_adds_epi16(luma_low, _mm512_unpacklo_epi16(terms, terms));
    const __m512i high = _mm512_adds_epi16(luma_high, _mm512_unpackhi_epi16(terms, terms));
    return _mm512_packus_epi16(divide_by_unit(low), divide_by_unit(high));
}

/* Planes to R0 G0 B0 R1 ...: 3 x 64 bytes; frames_avx2.c explains the order. Each part makes three 16-byte rows, which
 * lie next to each other in memory. */
AVX512_INLINE void store_rgb(uint8_t *dst, __m512i r, __m512i g, __m512i b) {
    const __m512i place_r = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15, 10, 5));
    const __m512i place_g = _mm512_broadcast_i32x4(
        _mm_setr_epi8(5, 0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15, 10));
    const __m512i place_b = _mm512_broadcast_i32x4(
        _mm_setr_epi8(10, 5, 0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15));
    const __mmask64 at_1 = 0x2492249224922492, at_2 = 0x4924492449244924; /* bytes 1, 4, ... and 2, 5, ... of a part */
    r = _mm512_shuffle_epi8(r, place_r);
    g = _mm512_shuffle_epi8(g, place_g);
    b = _mm512_shuffle_epi8(b, place_b);
    const __m512i row_0 = _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(r, at_1, g), at_2, b);
    const __m512i row_1 = _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(g, at_1, b), at_2, r);
    const __m512i row_2 = _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(b, at_1, r), at_2, g);
    /* With parts A to D of the rows 0 to 2: A0 A1 A2 B0 | B1 B2 C0 C1 | C2 D0 D1 D2. Two permutations each, of 64-bit
     * halves: the first takes three parts from two rows and leaves a hole (-), the second fills it. */
    const __m512i pick_0 = _mm512_setr_epi64(0, 1, 8, 9, 0, 0, 2, 3); /* A0 A1 - B0 */
    const __m512i fill_0 = _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 6, 7);
    const __m512i pick_1 = _mm512_setr_epi64(2, 3, 10, 11, 0, 0, 4, 5); /* B1 B2 - C1 */
    const __m512i fill_1 = _mm512_setr_epi64(0, 1, 2, 3, 12, 13, 6, 7);
    const __m512i pick_2 = _mm512_setr_epi64(4, 5, 14, 15, 0, 0, 6, 7); /* C2 D0 - D2 */
    const __m512i fill_2 = _mm512_setr_epi64(0, 1, 2, 3, 14, 15, 6, 7);
    _mm512_storeu_si512(dst, _mm512_permutex2var_epi64(_mm512_permutex2var_epi64(row_0, pick_0, row_1), fill_0, row_2));
    _mm512_storeu_si512(dst + 64,
                        _mm512_permutex2var_epi64(_mm512_permutex2var_epi64(row_1, pick_1, row_2), fill_1, row_0));
    _mm512_storeu_si512(dst + 128,
                        _mm512_permutex2var_epi64(_mm512_permutex2var_epi64(row_2, pick_2, row_0), fill_2, row_1));
}

AVX512_INLINE size_t whole_blocks(const struct yuv_row *row, enum yuv_layout layout, const struct yuv_weights *weights,
                                  uint8_t *dst, size_t n_pixels) {
    const struct split red = split(weights, 0), green = split(weights, 1), blue = split(weights, 2);
    const __m512i luma = _mm512_set1_epi16((int16_t)weights->luma);
    size_t i = 0;
    for (; i + PIXELS <= n_pixels; i += PIXELS) {
        const struct block block = load(row, layout, i);
        const __m512i low = _mm512_mullo_epi16(block.y_low, luma), high = _mm512_mullo_epi16(block.y_high, luma);
        store_rgb(dst + 3 * i, samples(&block, low, high, &red), samples(&block, low, high, &green),
                  samples(&block, low, high, &blue));
    }
    return i;
}

AVX512 static size_t yuv_blocks(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst,
                                size_t n_pixels) {
    switch (row->layout) {
    case YUV_NV12: return whole_blocks(row, YUV_NV12, weights, dst, n_pixels);
    case YUV_I420: return whole_blocks(row, YUV_I420, weights, dst, n_pixels);
    default: return whole_blocks(row, YUV_YUYV, weights, dst, n_pixels);
    }
}

AVX512 void avx512_yuv_row(const struct yuv_row *row, const struct yuv_weights *weights, uint8_t *dst,
                           size_t n_pixels) {
    size_t done = yuv_blocks(row, weights, dst, n_pixels);
    if (done < n_pixels) {
        struct yuv_tail tail;
        struct yuv_row rest = yuv_row_at(row, done);
        kernels_yuv_tail(&tail, &rest, n_pixels - done);
        yuv_blocks(&tail.row, weights, tail.rgb, PIXELS);
        memcpy(dst + 3 * done, tail.rgb, 3 * (n_pixels - done));
    }
}

/* ---- RGBA over a colour: 16 pixels at a time ---- */

/* As in frames_avx2.c. */
AVX512_INLINE __m512i blend(__m512i colour, __m512i alpha, __m512i background, __m512i start) {
    const __m512i x = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_sub_epi16(colour, background), alpha), start);
    return _mm512_mulhi_epu16(x, _mm512_set1_epi16(257));
}

/* RGBA to RGB, in the first 48 bytes. */
AVX512_INLINE __m512i composite_16(__m512i rgba, __m512i background, __m512i start) {
    const __m512i alpha_low = _mm512_broadcast_i32x4(
        _mm_setr_epi8(3, -1, 3, -1, 3, -1, 3, -1, 7, -1, 7, -1, 7, -1, 7, -1));
    const __m512i alpha_high = _mm512_broadcast_i32x4(
        _mm_setr_epi8(11, -1, 11, -1, 11, -1, 11, -1, 15, -1, 15, -1, 15, -1, 15, -1));
    const __m512i drop_alpha = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m512i join = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low = blend(_mm512_unpacklo_epi8(rgba, zero), _mm512_shuffle_epi8(rgba, alpha_low), background,
                              start);
    const __m512i high = blend(_mm512_unpackhi_epi8(rgba, zero), _mm512_shuffle_epi8(rgba, alpha_high), background,
                               start);
    return _mm512_permutexvar_epi32(join, _mm512_shuffle_epi8(_mm512_packus_epi16(low, high), drop_alpha));
}

AVX512 void avx512_composite_row(const uint8_t *src, const uint8_t background[3], uint8_t *dst, size_t n_pixels) {
    const int64_t rgb = background[0] | background[1] << 16 | (int64_t)background[2] << 32;
    const __m512i ground = _mm512_set1_epi64(rgb);
    const __m512i start = _mm512_add_epi16(_mm512_mullo_epi16(ground, _mm512_set1_epi16(255)), _mm512_set1_epi16(128));
    size_t i = 0;
    for (; i + 16 <= n_pixels; i += 16) {
        _mm512_mask_storeu_epi32(dst + 3 * i, 0x0fff, composite_16(_mm512_loadu_si512(src + 4 * i), ground, start));
    }
    const __mmask16 pixels = (__mmask16)((1u << (n_pixels - i)) - 1);
    const __mmask64 bytes = ((__mmask64)1 << 3 * (n_pixels - i)) - 1;
    const __m512i rest = composite_16(_mm512_maskz_loadu_epi32(pixels, src + 4 * i), ground, start);
    _mm512_mask_storeu_epi8(dst + 3 * i, bytes, rest);
}

#endif
