/* Checks every target against scalar, and times it. Not part of the library; see docs/images.md for how to build it.
 *
 *     kernels_check           random pictures, sizes, filters, boxes and windows; all blocks allocated to the byte, so
 *                             that a sanitizer or valgrind sees any access outside
 *     kernels_check --bench   best of 9 runs, in CPU time, of 4000x3000 to 384x384, RGB, bicubic, for each target; and
 *                             of 31 runs of each frame kernel
 *
 * Pixels are compared with memcmp. Against Pillow the tests in Python compare, on every target, too.
 */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* One resize: its arguments, and a picture in a block of its exact size. */
struct trial {
    enum resize_filter filter;
    int channels;
    int32_t n_in[2], n_out[2], origin[2], n_window[2]; /* [0]: along x, [1]: along y */
    float box[2][2];
    uint8_t *src;
    size_t n_src, n_dst;
};

static uint64_t state = 88172645463325252u;

/* xorshift64 */
uint32_t random_below(uint32_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % n;
}

/* Mostly small, where borders and lane remainders rule. */
static int32_t random_side(void) {
    static const uint32_t limits[] = {4, 40, 300};
    return 1 + (int32_t)random_below(limits[random_below(3)]);
}

void *need(void *block) {
    if (!block) {
        fputs("out of memory\n", stderr);
        exit(2);
    }
    return block;
}

static void make_picture(struct trial *t) {
    t->n_src = (size_t)t->n_in[0] * (size_t)t->n_in[1] * (size_t)t->channels;
    t->n_dst = (size_t)t->n_window[0] * (size_t)t->n_window[1] * (size_t)t->channels;
    t->src = need(malloc(t->n_src));
    bool full_swing = random_below(2); /* only 0 and 255: overshoot, the largest sums */
    for (size_t i = 0; i < t->n_src; i++) {
        uint32_t value = random_below(256);
        t->src[i] = (uint8_t)(full_swing ? (value & 1) * 255 : value);
    }
}

static struct trial random_trial(void) {
    static const int channels[] = {1, 3, 4};
    struct trial t = {.filter = (enum resize_filter)random_below(FILTER_COUNT), .channels = channels[random_below(3)]};
    for (int axis = 0; axis < 2; axis++) {
        t.n_in[axis] = random_side();
        t.n_out[axis] = random_below(4) ? random_side() : t.n_in[axis];
        t.origin[axis] = random_below(2) ? 0 : (int32_t)random_below((uint32_t)t.n_out[axis]);
        t.n_window[axis] = t.n_out[axis] - t.origin[axis];
        float size = (float)t.n_in[axis];
        float a = 0, b = size;
        if (random_below(2)) {
            a = size * (float)random_below(1025) / 1024;
            b = size * (float)random_below(1025) / 1024;
        }
        t.box[axis][0] = fminf(a, b);
        t.box[axis][1] = fmaxf(a, b);
    }
    make_picture(&t);
    return t;
}

/* The answer of `ops` in a new block of its exact size. */
static uint8_t *run(const struct kernel_ops *ops, const struct trial *t) {
    struct resize_axis axes[2];
    for (int i = 0; i < 2; i++) {
        if (!resize_axis_init(&axes[i], t->filter, t->n_in[i], t->box[i][0], t->box[i][1], t->n_out[i], t->origin[i],
                              t->n_window[i])) {
            need(NULL);
        }
    }
    uint8_t *dst = need(malloc(t->n_dst));
    size_t channels = (size_t)t->channels;
    struct resize_source source = {.pixels = t->src, .stride = (size_t)t->n_in[0] * channels, .channels = t->channels,
                                   .height = t->n_in[1], .width = t->n_in[0]};
    struct resize_sink sink = {.pixels = dst, .stride = (size_t)t->n_window[0] * channels};
    if (!kernels_resize(ops, &source, &sink, &axes[0], &axes[1])) {
        need(NULL);
    }
    resize_axis_free(&axes[0]);
    resize_axis_free(&axes[1]);
    return dst;
}

static bool check_resize(const struct kernel_ops *ops, const struct trial *t) {
    uint8_t *expected = run(&kernels_scalar, t), *found = run(ops, t);
    bool equal = memcmp(found, expected, t->n_dst) == 0;
    if (!equal) {
        printf("%s differs: filter %d, %d channels, %dx%d -> %dx%d, window (%d, %d), box (%g, %g, %g, %g)\n", ops->name,
               (int)t->filter, t->channels, t->n_in[0], t->n_in[1], t->n_out[0], t->n_out[1], t->origin[0],
               t->origin[1], t->box[0][0], t->box[1][0], t->box[0][1], t->box[1][1]);
    }
    free(expected);
    free(found);
    return equal;
}

static bool check_planes(const struct kernel_ops *ops, size_t n_pixels) {
    float lut[3 * 256];
    for (int i = 0; i < 3 * 256; i++) {
        lut[i] = (float)random_below(1 << 20) / 1024;
    }
    uint8_t *src = need(malloc(3 * n_pixels));
    for (size_t i = 0; i < 3 * n_pixels; i++) {
        src[i] = (uint8_t)random_below(256);
    }
    size_t n_bytes = 3 * n_pixels * sizeof(float);
    float *expected = need(malloc(n_bytes)), *found = need(malloc(n_bytes));
    kernels_scalar.planes_f32(src, expected, n_pixels, n_pixels, 3, lut);
    ops->planes_f32(src, found, n_pixels, n_pixels, 3, lut);
    bool equal = memcmp(found, expected, n_bytes) == 0;
    if (!equal) {
        printf("%s differs: planes, %zu pixels\n", ops->name, n_pixels);
    }
    free(src);
    free(expected);
    free(found);
    return equal;
}

/* This process has one thread: what other programs do on the machine hardly matters. */
double seconds(void) {
    return (double)clock() / CLOCKS_PER_SEC;
}

static void bench(const struct kernel_ops *ops) {
    struct trial t = {.filter = FILTER_BICUBIC, .channels = 3, .n_in = {4000, 3000}, .n_out = {384, 384},
                      .n_window = {384, 384}, .box = {{0, 4000}, {0, 3000}}};
    make_picture(&t);
    double best = INFINITY;
    for (int i = 0; i < 9; i++) {
        double start = seconds();
        free(run(ops, &t));
        best = fmin(best, seconds() - start);
    }
    printf("%-8s %7.1f ms, %5.0f Mpx/s in\n", ops->name, best * 1e3, 12.0 / best);
    free(t.src);
}

int main(int argc, char **argv) {
    enum { TRIALS = 3000 };
    bool timing = argc > 1 && strcmp(argv[1], "--bench") == 0, ok = true;
    int n_targets = 0;
    for (const struct kernel_ops *const *target = kernels_targets(); *target; target++) {
        struct kernel_ops ops;
        char message[512];
        if (kernels_select((*target)->name, kernels_cpu_features(), &ops, message, sizeof message) != SELECT_OK) {
            printf("skipped: %s\n", message);
            continue;
        }
        n_targets++;
        if (timing) {
            bench(&ops);
            bench_frames(&ops);
            continue;
        }
        for (int i = 0; i < TRIALS; i++) {
            struct trial t = random_trial();
            ok = check_resize(&ops, &t) && check_planes(&ops, 1 + random_below(70)) && check_frames(&ops) && ok;
            free(t.src);
        }
    }
    if (!timing) {
        printf("%d targets, %d trials each: %s\n", n_targets, TRIALS, ok ? "all equal" : "DIFFERENT");
    }
    return ok ? 0 : 1;
}
