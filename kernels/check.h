/* What the parts of kernels_check share. */
#ifndef EDGEVLM_CHECK_H
#define EDGEVLM_CHECK_H

#include "kernels.h"

enum sink_kind { PACKED, TILES_U8, TILES_F32 };

/* One resize: its arguments, and a picture in a block of its exact size. Zeros mean: no border, no canvas, no gaps. */
struct trial {
    enum resize_filter filter;
    int channels, pixel_bytes;
    int32_t n_in[2], n_out[2], origin[2], n_window[2]; /* [0]: along x, [1]: along y; n_in with the border */
    float box[2][2];
    int32_t border[2][2]; /* pixels before and after the picture */
    uint8_t border_colour[4], canvas_colour[4];
    size_t src_gap, dst_gap; /* bytes between rows */
    enum sink_kind kind;
    size_t canvas[2], canvas_origin[2], tile[2]; /* of tiles only */
    float *lut;                                  /* of TILES_F32 only */
    uint8_t *src;
    size_t n_src, n_dst;
};

/* Pixels of the picture itself. */
static inline size_t picture_side(const struct trial *t, int axis) {
    return (size_t)(t->n_in[axis] - t->border[axis][0] - t->border[axis][1]);
}

static inline size_t src_stride(const struct trial *t) {
    return picture_side(t, 0) * (size_t)t->pixel_bytes + t->src_gap;
}

static inline size_t dst_stride(const struct trial *t) {
    return (size_t)t->n_window[0] * (size_t)t->channels + t->dst_gap;
}

/* The same numbers on every machine. */
uint32_t random_below(uint32_t n);

/* `block`, or the end of the program if memory ran out. */
void *need(void *block);

/* CPU time of this process. */
double seconds(void);

/* The axes of a trial, to be freed. */
void init_axes(const struct trial *t, struct resize_axis axes[2]);

/* Room for an answer: a block of its exact size. Gaps between rows keep the bytes that are in it. */
uint8_t *new_answer(const struct trial *t);

/* ---- check_plain.c ---- */

/* What every target has to answer, in a new block. */
uint8_t *plain_answer(const struct trial *t);

/* ---- check_frames.c ---- */

/* One random trial of each frame kernel against scalar; false, and a line on stdout, if one differs. */
bool check_frames(const struct kernel_ops *ops);

/* Best of 31 runs of each frame kernel on a 1920x1080 frame. */
void bench_frames(const struct kernel_ops *ops);

/* ---- check_attention.c ---- */

/* One random attention against scalar; false, and a line on stdout, if it differs. */
bool check_attention(const struct kernel_ops *ops);

/* Best of 9 runs of an attention. */
void bench_attention(const struct kernel_ops *ops);

#endif
