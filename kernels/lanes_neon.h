/* What the two Arm targets share: rows into lanes, and lanes back into rows. */
#ifndef EDGEVLM_LANES_NEON_H
#define EDGEVLM_LANES_NEON_H

#include "lanes.h"

#include <arm_neon.h>

enum { LANES_UNIT_ROWS = 4 };

/* Sixteen columns of four rows as 4 * channels lanes of sixteen samples. */
static LANES_INLINE void lanes_load_unit(const uint8_t *const *rows, size_t offset, int channels, uint8x16_t *lanes) {
    for (int r = 0; r < LANES_UNIT_ROWS; r++) {
        const uint8_t *row = rows[r] + offset;
        if (channels == 1) {
            lanes[r] = vld1q_u8(row);
        } else if (channels == 3) {
            uint8x16x3_t rgb = vld3q_u8(row);
            for (int c = 0; c < 3; c++) {
                lanes[3 * r + c] = rgb.val[c];
            }
        } else {
            uint8x16x4_t rgba = vld4q_u8(row);
            for (int c = 0; c < 4; c++) {
                lanes[4 * r + c] = rgba.val[c];
            }
        }
    }
}

/* Sums shifted by 16 so far, by the remaining 6 bits; saturating, which is the clip to 0..255. */
static LANES_INLINE uint8x16_t lanes_narrowed(int16x8_t low, int16x8_t high) {
    return vqshrun_high_n_s16(vqshrun_n_s16(low, RESIZE_WEIGHT_BITS - 16), high, RESIZE_WEIGHT_BITS - 16);
}

/* One output of four rows; `low` and `high` hold their lanes in order. */
static LANES_INLINE void lanes_store_narrowed(int16x8_t low, int16x8_t high, uint8_t *const *dst, size_t offset,
                                              int channels, bool last) {
    static const uint8_t spread[16] = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255};
    uint8x16_t bytes = lanes_narrowed(low, high);
    uint8_t pixels[sizeof bytes];
    vst1q_u8(pixels, channels == 3 ? vqtbl1q_u8(bytes, vld1q_u8(spread)) : bytes);
    lanes_store(pixels, dst, offset, channels, last);
}

#endif
