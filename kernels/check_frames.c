/* The frame kernels of every target against scalar, and their times. Part of kernels_check. */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const layout_names[YUV_LAYOUT_COUNT] = {"yuyv", "nv12", "i420"};

/* A block of its exact size; noise, or only 0 and 255: clipping, the largest sums. */
static uint8_t *random_block(size_t n_bytes) {
    uint8_t *block = need(malloc(n_bytes));
    bool full_swing = random_below(2);
    for (size_t i = 0; i < n_bytes; i++) {
        uint32_t value = random_below(256);
        block[i] = (uint8_t)(full_swing ? (value & 1) * 255 : value);
    }
    return block;
}

/* Compare and free. */
static bool same(uint8_t *found, uint8_t *expected, size_t n_bytes) {
    bool equal = memcmp(found, expected, n_bytes) == 0;
    free(found);
    free(expected);
    return equal;
}

static bool check_yuv(const struct kernel_ops *ops) {
    struct yuv_frame frame = {.layout = (enum yuv_layout)random_below(YUV_LAYOUT_COUNT),
                              .height = 1 + (int32_t)random_below(5),
                              .width = 1 + (int32_t)random_below(200)};
    enum yuv_matrix matrix = (enum yuv_matrix)random_below(YUV_MATRIX_COUNT);
    bool full_range = random_below(2);
    struct yuv_weights weights = kernels_yuv_weights(matrix, full_range);
    frame.stride = kernels_yuv_row_bytes(frame.layout, frame.width) + (random_below(2) ? random_below(9) : 0);
    uint8_t *data = random_block(kernels_yuv_size(frame.layout, frame.height, frame.stride));
    frame.data = data;
    size_t n_dst = (size_t)frame.height * (size_t)frame.width * 3;
    uint8_t *expected = need(malloc(n_dst)), *found = need(malloc(n_dst));
    kernels_yuv_to_rgb(&kernels_scalar, &frame, &weights, expected);
    kernels_yuv_to_rgb(ops, &frame, &weights, found);
    free(data);
    bool equal = same(found, expected, n_dst);
    if (!equal) {
        printf("%s differs: %s, %dx%d, stride %zu, matrix %d, %s range\n", ops->name, layout_names[frame.layout],
               frame.width, frame.height, frame.stride, (int)matrix, full_range ? "full" : "video");
    }
    return equal;
}

static bool check_composite(const struct kernel_ops *ops) {
    size_t n_pixels = 1 + random_below(100);
    uint8_t *src = random_block(4 * n_pixels), *ground = random_block(3);
    uint8_t *expected = need(malloc(3 * n_pixels)), *found = need(malloc(3 * n_pixels));
    kernels_scalar.composite_row(src, ground, expected, n_pixels);
    ops->composite_row(src, ground, found, n_pixels);
    free(src);
    free(ground);
    bool equal = same(found, expected, 3 * n_pixels);
    if (!equal) {
        printf("%s differs: composite, %zu pixels\n", ops->name, n_pixels);
    }
    return equal;
}

static bool check_sum_abs_diff(const struct kernel_ops *ops) {
    size_t n_bytes = random_below(1000) ? 1 + random_below(600) : 1 + random_below(1 << 20);
    uint8_t *a = random_block(n_bytes), *b = random_block(n_bytes);
    uint64_t expected = kernels_scalar.sum_abs_diff(a, b, n_bytes), found = ops->sum_abs_diff(a, b, n_bytes);
    free(a);
    free(b);
    if (found != expected) {
        printf("%s differs: sum_abs_diff, %zu bytes\n", ops->name, n_bytes);
    }
    return found == expected;
}

bool check_frames(const struct kernel_ops *ops) {
    bool yuv = check_yuv(ops), composite = check_composite(ops), difference = check_sum_abs_diff(ops);
    return yuv && composite && difference;
}

enum { WIDTH = 1920, HEIGHT = 1080, RUNS = 31 };

static void report(const struct kernel_ops *ops, const char *what, double best) {
    printf("%-8s %-20s %6.2f ms, %5.0f Mpx/s\n", ops->name, what, best * 1e3, WIDTH * HEIGHT / best / 1e6);
}

static void bench_yuv(const struct kernel_ops *ops, enum yuv_layout layout) {
    struct yuv_frame frame = {.layout = layout, .height = HEIGHT, .width = WIDTH,
                              .stride = kernels_yuv_row_bytes(layout, WIDTH)};
    struct yuv_weights weights = kernels_yuv_weights(YUV_BT601, false);
    size_t n_bytes = kernels_yuv_size(layout, HEIGHT, frame.stride);
    uint8_t *data = random_block(n_bytes), *dst = random_block(3 * WIDTH * HEIGHT);
    for (size_t i = 0; i < n_bytes; i++) {
        data[i] = (uint8_t)(96 + data[i] % 64); /* seldom clipped, like a photograph: branches are easy to predict */
    }
    frame.data = data;
    double best = INFINITY;
    for (int i = 0; i < RUNS; i++) {
        double start = seconds();
        kernels_yuv_to_rgb(ops, &frame, &weights, dst);
        best = fmin(best, seconds() - start);
    }
    report(ops, layout_names[layout], best);
    free(data);
    free(dst);
}

static void bench_others(const struct kernel_ops *ops) {
    static const uint8_t white[3] = {255, 255, 255};
    uint8_t *src = random_block(4 * WIDTH * HEIGHT), *dst = random_block(3 * WIDTH * HEIGHT);
    double composite = INFINITY, difference = INFINITY;
    for (int i = 0; i < RUNS; i++) {
        double start = seconds();
        kernels_composite(ops, src, 4 * WIDTH, HEIGHT, WIDTH, white, dst);
        double middle = seconds();
        volatile uint64_t sum = kernels_sum_abs_diff(ops, src, 3 * WIDTH, dst, 3 * WIDTH, HEIGHT, 3 * WIDTH);
        (void)sum;
        composite = fmin(composite, middle - start);
        difference = fmin(difference, seconds() - middle);
    }
    report(ops, "composite", composite);
    report(ops, "mean_abs_diff, RGB", difference);
    free(src);
    free(dst);
}

void bench_frames(const struct kernel_ops *ops) {
    for (int layout = 0; layout < YUV_LAYOUT_COUNT; layout++) {
        bench_yuv(ops, (enum yuv_layout)layout);
    }
    bench_others(ops);
}
