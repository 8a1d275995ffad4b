/* NEON of the first 64-bit Arms (Cortex-A53, A72: Raspberry Pi 4): weights split into two 16-bit halves.
 *
 * A weight w of up to 24 bits is hi * 2^15 + lo with lo in 0..2^15 - 1, so the sum of w * sample is
 * (sum of hi * sample) * 2^15 + sum of lo * sample: two widening multiply-adds, exact modulo 2^32.
 */
#include "kernels.h"

#if defined(__aarch64__)
#include "lanes_neon.h"

enum { HALF_BITS = 15, ROWS = 8, UNITS = 2, TAPS = 4 };

/* A low and a high half for each tap. */
static void pack_halves(const int32_t *weights, int32_t *packed) {
    for (int t = 0; t < TAPS; t++) {
        uint32_t low = (uint32_t)weights[t] & ((1u << HALF_BITS) - 1);
        uint32_t high = (uint32_t)(weights[t] >> HALF_BITS) & 0xFFFF;
        packed[t] = (int32_t)(low | high << 16);
    }
}

/* ---- horizontal: lanes of 16 bits; a vector has two taps of four lanes; two units of 4 rows ---- */

enum { TAP_VECTORS = TAPS / 2 };

static const struct lane_format format = {.rows = ROWS, .taps = TAPS, .n_words = TAPS, .pack = pack_halves,
                                          .channel_bytes = UNITS * TAP_VECTORS * sizeof(uint16x8_t)};

static size_t plan_size(const struct resize_axis *axis, int channels) {
    return lanes_plan_size(axis, channels, &format);
}

static void plan_init(const struct resize_axis *axis, int channels, void *plan) {
    (void)channels;
    lanes_plan_init(axis, &format, plan);
}

/* Sixteen samples of each of four lanes, to where their four groups begin, `group_size` samples apart. */
static LANES_INLINE void arrange_lanes(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d, uint16_t *out,
                                       size_t group_size) {
    uint8x16x2_t ac = vzipq_u8(a, c), bd = vzipq_u8(b, d);
    for (int half = 0; half < 2; half++) {
        uint8x16x2_t abcd = vzipq_u8(ac.val[half], bd.val[half]);
        for (int quarter = 0; quarter < 2; quarter++, out += group_size) {
            vst1q_u16(out, vmovl_u8(vget_low_u8(abcd.val[quarter])));
            vst1q_u16(out + 8, vmovl_high_u8(abcd.val[quarter]));
        }
    }
}

/* Sixteen columns of eight rows, four groups. */
static LANES_INLINE void arrange(const uint8_t *const *rows, size_t offset, int channels, uint8_t *bytes) {
    size_t group_size = (size_t)(UNITS * channels * TAP_VECTORS) * 8;
    uint16_t *out = (uint16_t *)(void *)bytes;
    for (int u = 0; u < UNITS; u++) {
        uint8x16_t lanes[LANES_UNIT_ROWS * 4];
        lanes_load_unit(rows + u * LANES_UNIT_ROWS, offset, channels, lanes);
        for (int v = 0; v < channels; v++, out += 8 * TAP_VECTORS) {
            arrange_lanes(lanes[4 * v], lanes[4 * v + 1], lanes[4 * v + 2], lanes[4 * v + 3], out, group_size);
        }
    }
}

/* Four lanes' samples from their sums, 16 bits each; the last narrowing, by 6 bits more, clips to 0..255. */
static LANES_INLINE int16x4_t halfway(int32x4_t lo, int32x4_t hi) {
    return vshrn_n_s32(vaddq_s32(lo, vshlq_n_s32(hi, HALF_BITS)), 16);
}

/* Output `i` of 8 rows. */
static LANES_INLINE void output(const struct lane_plan *plan, size_t i, uint8_t *const *dst, int channels, bool last) {
    size_t group_size = (size_t)(UNITS * channels * TAP_VECTORS) * 8;
    const int16_t *samples = (const int16_t *)(const void *)plan->arranged + (size_t)plan->start[i] * group_size;
    const int32_t *weights = plan->weights + i * plan->n_weights;
    int32x4_t lo[UNITS * 4], hi[UNITS * 4];
    for (int v = 0; v < UNITS * channels; v++) {
        lo[v] = vdupq_n_s32(1 << (RESIZE_WEIGHT_BITS - 1));
        hi[v] = vdupq_n_s32(0);
    }
    for (int32_t g = 0; g < plan->n_groups[i]; g++, weights += TAPS, samples += group_size) {
        int16x8_t w = vreinterpretq_s16_s32(vld1q_s32(weights));
        for (int v = 0; v < UNITS * channels; v++) {
            int16x8_t x01 = vld1q_s16(samples + 16 * v), x23 = vld1q_s16(samples + 16 * v + 8);
            lo[v] = vmlal_laneq_s16(lo[v], vget_low_s16(x01), w, 0);
            hi[v] = vmlal_laneq_s16(hi[v], vget_low_s16(x01), w, 1);
            lo[v] = vmlal_high_laneq_s16(lo[v], x01, w, 2);
            hi[v] = vmlal_high_laneq_s16(hi[v], x01, w, 3);
            lo[v] = vmlal_laneq_s16(lo[v], vget_low_s16(x23), w, 4);
            hi[v] = vmlal_laneq_s16(hi[v], vget_low_s16(x23), w, 5);
            lo[v] = vmlal_high_laneq_s16(lo[v], x23, w, 6);
            hi[v] = vmlal_high_laneq_s16(hi[v], x23, w, 7);
        }
    }
    for (int u = 0; u < UNITS; u++) {
        int16x4_t quads[4];
        for (int v = 0; v < 4; v++) {
            int s = u * channels + (v < channels ? v : channels - 1);
            quads[v] = halfway(lo[s], hi[s]);
        }
        lanes_store_narrowed(vcombine_s16(quads[0], quads[1]), vcombine_s16(quads[2], quads[3]), dst + 4 * u,
                             i * (size_t)channels, channels, last);
    }
}

static void rows(const uint8_t *const *src_rows, uint8_t *const *dst_rows, size_t n_rows, int channels,
                 const struct resize_axis *axis, void *plan) {
    lanes_rows(src_rows, dst_rows, n_rows, channels, axis, plan, &format, arrange, output);
}

static const struct horizontal_ops horizontal = {.plan_size = plan_size, .plan_init = plan_init, .rows = rows};

/* ---- vertical: 16 columns at a time ---- */

/* Columns [start, start + 16). `halves` holds lo and hi of each tap. */
static LANES_INLINE void columns(const uint8_t *const *src_rows, const int32_t *halves, size_t n_taps,
                                 uint8_t *dst_row, size_t start) {
    int32x4_t lo[4], hi[4];
    for (int v = 0; v < 4; v++) {
        lo[v] = vdupq_n_s32(1 << (RESIZE_WEIGHT_BITS - 1));
        hi[v] = vdupq_n_s32(0);
    }
    for (size_t t = 0; t < n_taps; t++) {
        uint8x16_t bytes = vld1q_u8(src_rows[t] + start);
        int16x4_t w = vreinterpret_s16_s32(vld1_dup_s32(halves + t));
        int16x8_t x[2] = {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))),
                          vreinterpretq_s16_u16(vmovl_high_u8(bytes))};
        for (int half = 0; half < 2; half++) {
            lo[2 * half] = vmlal_lane_s16(lo[2 * half], vget_low_s16(x[half]), w, 0);
            hi[2 * half] = vmlal_lane_s16(hi[2 * half], vget_low_s16(x[half]), w, 1);
            lo[2 * half + 1] = vmlal_high_lane_s16(lo[2 * half + 1], x[half], w, 0);
            hi[2 * half + 1] = vmlal_high_lane_s16(hi[2 * half + 1], x[half], w, 1);
        }
    }
    int16x8_t low = vcombine_s16(halfway(lo[0], hi[0]), halfway(lo[1], hi[1]));
    int16x8_t high = vcombine_s16(halfway(lo[2], hi[2]), halfway(lo[3], hi[3]));
    vst1q_u8(dst_row + start, lanes_narrowed(low, high));
}

static void vertical(const uint8_t *const *src_rows, const int32_t *weights, size_t n_taps, uint8_t *dst_row,
                     size_t n_bytes, int32_t *scratch) {
    lanes_vertical(src_rows, weights, n_taps, dst_row, n_bytes, scratch, &format, 16, columns, &kernels_scalar);
}

const struct kernel_ops kernels_neon = {
    .name = "neon",
    .needs = CPU_NEON,
    .horizontal = &horizontal,
    .vertical = vertical,
    .yuv_row = neon_yuv_row,
    .composite_row = neon_composite_row,
    .sum_abs_diff = neon_sum_abs_diff,
};
#endif
