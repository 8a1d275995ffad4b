/* What the parts of kernels_check share. */
#ifndef EDGEVLM_CHECK_H
#define EDGEVLM_CHECK_H

#include "kernels.h"

/* The same numbers on every machine. */
uint32_t random_below(uint32_t n);

/* `block`, or the end of the program if memory ran out. */
void *need(void *block);

/* CPU time of this process. */
double seconds(void);

/* ---- check_frames.c ---- */

/* One random trial of each frame kernel against scalar; false, and a line on stdout, if one differs. */
bool check_frames(const struct kernel_ops *ops);

/* Best of 31 runs of each frame kernel on a 1920x1080 frame. */
void bench_frames(const struct kernel_ops *ops);

#endif
