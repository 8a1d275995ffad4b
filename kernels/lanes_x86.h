/* What the two x86 targets share. */
#ifndef EDGEVLM_LANES_X86_H
#define EDGEVLM_LANES_X86_H

#include "lanes.h"

#include <immintrin.h>

/* Four bytes of no interest, as indices of a shuffle. */
#define LANES_NONE -1, -1, -1, -1

/* 16 bytes of row k in the low half, of row k + 4 in the high half. Loading two rows into one register takes no
 * shuffle, which is what these targets are short of. */
static LANES_INLINE __m256i lanes_load_rows(const uint8_t *const *rows, int k, size_t offset) {
    __m128i low = _mm_loadu_si128((const void *)(rows[k] + offset));
    __m128i high = _mm_loadu_si128((const void *)(rows[k + 4] + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

static LANES_INLINE __m256i lanes_both_halves(const int8_t *bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)bytes));
}

#endif
