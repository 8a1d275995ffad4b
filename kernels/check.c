/* Checks every target, and times it. Not part of the library; see docs/kernels.md for how to build it.
 *
 *     kernels_check           random pictures, sizes, filters, boxes, windows, borders, canvases and tiles, frames and
 *                             attentions, until one differs; all blocks allocated to the byte, so that a sanitizer or valgrind
 *                             sees any access outside
 *     kernels_check --bench   best of 9 runs, in CPU time, of 4000x3000 to 384x384, RGB, bicubic, for each target; of
 *                             31 runs of each frame kernel; and of 9 of an attention
 *     kernels_check --repeat TARGET N     800x600 to 77x77 N times: two runs differ by the instructions of the resizes
 *
 * Pixels are compared with memcmp, with those of the plain resize in check_plain.c, which takes only the weights from
 * the library: scalar and what all targets share are checked, too. Against Pillow the tests in Python compare, on every
 * target.
 */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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
    size_t sample = t->kind == TILES_F32 ? sizeof(float) : 1;
    /* the last pixel ends before the sample that is ignored */
    t->n_src = picture_side(t, 1) * src_stride(t) - t->src_gap - (size_t)(t->pixel_bytes - t->channels);
    t->n_dst = t->kind == PACKED ? (size_t)t->n_window[1] * dst_stride(t) - t->dst_gap
                                 : t->canvas[0] * t->canvas[1] * (size_t)t->channels * sample;
    t->src = need(malloc(t->n_src));
    bool full_swing = random_below(2); /* only 0 and 255: overshoot, the largest sums */
    for (size_t i = 0; i < t->n_src; i++) {
        uint32_t value = random_below(256);
        t->src[i] = (uint8_t)(full_swing ? (value & 1) * 255 : value);
    }
}

static int32_t random_margin(void) {
    static const int32_t margins[] = {0, 0, 0, 1, 7, 50};
    return margins[random_below(6)];
}

/* A canvas that holds the window, and the tiles that make it up. */
static void make_canvas(struct trial *t) {
    for (int axis = 0; axis < 2; axis++) {
        t->canvas_origin[axis] = (size_t)random_margin();
        t->tile[axis] = 1 + random_below(70);
        size_t needed = t->canvas_origin[axis] + (size_t)t->n_window[axis] + (size_t)random_margin();
        t->canvas[axis] = (needed + t->tile[axis] - 1) / t->tile[axis] * t->tile[axis];
    }
    if (t->kind == TILES_F32) {
        size_t n = (size_t)t->channels * 256;
        t->lut = need(malloc(n * sizeof *t->lut));
        for (size_t i = 0; i < n; i++) {
            t->lut[i] = (float)random_below(1 << 20) / 1024;
        }
    }
}

static struct trial random_trial(void) {
    static const int channels[] = {1, 3, 4};
    struct trial t = {.filter = (enum resize_filter)random_below(FILTER_COUNT), .channels = channels[random_below(3)]};
    t.pixel_bytes = t.channels == 3 && random_below(2) ? 4 : t.channels;
    for (int axis = 0; axis < 2; axis++) {
        t.border[axis][0] = random_margin();
        t.border[axis][1] = random_margin();
        t.n_in[axis] = t.border[axis][0] + random_side() + t.border[axis][1];
        t.n_out[axis] = random_below(4) ? random_side() : t.n_in[axis];
        t.origin[axis] = random_below(2) ? 0 : (int32_t)random_below((uint32_t)t.n_out[axis]);
        t.n_window[axis] = t.n_out[axis] - t.origin[axis];
        t.n_window[axis] -= random_below(2) ? 0 : (int32_t)random_below((uint32_t)t.n_window[axis]);
        float size = (float)t.n_in[axis];
        float a = 0, b = size;
        if (random_below(2)) {
            a = size * (float)random_below(1025) / 1024;
            b = size * (float)random_below(1025) / 1024;
        }
        t.box[axis][0] = fminf(a, b);
        t.box[axis][1] = fmaxf(a, b);
    }
    for (int c = 0; c < 4; c++) {
        t.border_colour[c] = (uint8_t)random_below(256);
        t.canvas_colour[c] = (uint8_t)random_below(256);
    }
    t.src_gap = random_below(2) ? 0 : random_below(20);
    t.kind = (enum sink_kind)random_below(3);
    if (t.kind == PACKED) {
        t.dst_gap = random_below(2) ? 0 : random_below(20);
    } else {
        make_canvas(&t);
    }
    make_picture(&t);
    return t;
}

void init_axes(const struct trial *t, struct resize_axis axes[2]) {
    for (int i = 0; i < 2; i++) {
        if (!resize_axis_init(&axes[i], t->filter, t->n_in[i], t->box[i][0], t->box[i][1], t->n_out[i], t->origin[i],
                              t->n_window[i])) {
            need(NULL);
        }
    }
}

uint8_t *new_answer(const struct trial *t) {
    return memset(need(malloc(t->n_dst)), 0xA5, t->n_dst);
}

/* The answer of `ops`. */
static uint8_t *run(const struct kernel_ops *ops, const struct trial *t) {
    struct resize_axis axes[2];
    init_axes(t, axes);
    uint8_t *dst = new_answer(t);
    struct resize_source source = {.pixels = t->src, .stride = src_stride(t), .channels = t->channels,
                                   .pixel_bytes = t->pixel_bytes, .height = (int32_t)picture_side(t, 1),
                                   .width = (int32_t)picture_side(t, 0), .top = t->border[1][0],
                                   .left = t->border[0][0]};
    memcpy(source.colour, t->border_colour, sizeof source.colour);
    struct resize_sink sink = {.pixels = t->kind == PACKED ? dst : NULL, .stride = dst_stride(t),
                               .tiles_u8 = t->kind == TILES_U8 ? dst : NULL,
                               .tiles_f32 = t->kind == TILES_F32 ? (float *)(void *)dst : NULL, .lut_C256 = t->lut,
                               .height = t->canvas[1], .width = t->canvas[0], .top = t->canvas_origin[1],
                               .left = t->canvas_origin[0], .tile_height = t->tile[1], .tile_width = t->tile[0],
                               .end_row = t->canvas[1]};
    memcpy(sink.colour, t->canvas_colour, sizeof sink.colour);
    if (!kernels_resize(ops, &source, &sink, &axes[0], &axes[1])) {
        need(NULL);
    }
    resize_axis_free(&axes[0]);
    resize_axis_free(&axes[1]);
    return dst;
}

static bool check_resize(const struct kernel_ops *ops, const struct trial *t, const uint8_t *expected) {
    uint8_t *found = run(ops, t);
    bool equal = memcmp(found, expected, t->n_dst) == 0;
    if (!equal) {
        printf("%s differs: filter %d, %d channels, %dx%d -> %dx%d, window (%d, %d), box (%g, %g, %g, %g), sink %d\n",
               ops->name, (int)t->filter, t->channels, t->n_in[0], t->n_in[1], t->n_out[0], t->n_out[1], t->origin[0],
               t->origin[1], t->box[0][0], t->box[1][0], t->box[0][1], t->box[1][1], (int)t->kind);
        printf("    pixels of %d bytes, border (%d, %d, %d, %d), canvas %zux%zu from (%zu, %zu), tiles %zux%zu\n",
               t->pixel_bytes, t->border[0][0], t->border[1][0], t->border[0][1], t->border[1][1], t->canvas[0],
               t->canvas[1], t->canvas_origin[0], t->canvas_origin[1], t->tile[0], t->tile[1]);
    }
    free(found);
    return equal;
}

/* One row into planes, against scalar. */
static bool check_planes(const struct kernel_ops *ops) {
    static const int layouts[][2] = {{1, 1}, {3, 3}, {4, 3}, {4, 4}}; /* bytes of a pixel, planes */
    const int *layout = layouts[random_below(4)];
    bool is_float = random_below(2);
    size_t n_pixels = 1 + random_below(100), n_src = n_pixels * (size_t)layout[0];
    size_t n_dst = n_pixels * (size_t)layout[1] * (is_float ? sizeof(float) : 1);
    float lut[4 * 256];
    for (int i = 0; i < 4 * 256; i++) {
        lut[i] = (float)random_below(1 << 20) / 1024;
    }
    uint8_t *src = need(malloc(n_src));
    for (size_t i = 0; i < n_src; i++) {
        src[i] = (uint8_t)random_below(256);
    }
    void *expected = need(malloc(n_dst)), *found = need(malloc(n_dst));
    if (is_float) {
        kernels_scalar.planes_f32(src, expected, n_pixels, n_pixels, layout[0], layout[1], lut);
        ops->planes_f32(src, found, n_pixels, n_pixels, layout[0], layout[1], lut);
    } else {
        kernels_scalar.planes_u8(src, expected, n_pixels, n_pixels, layout[0], layout[1]);
        ops->planes_u8(src, found, n_pixels, n_pixels, layout[0], layout[1]);
    }
    bool equal = memcmp(found, expected, n_dst) == 0;
    if (!equal) {
        printf("%s differs: %d planes of %zu pixels\n", ops->name, layout[1], n_pixels);
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

/* A whole RGB picture to a square, bicubic. */
static struct trial photograph(int32_t width, int32_t height, int32_t side) {
    struct trial t = {.filter = FILTER_BICUBIC, .channels = 3, .pixel_bytes = 3, .n_in = {width, height},
                      .n_out = {side, side}, .n_window = {side, side},
                      .box = {{0, (float)width}, {0, (float)height}}};
    make_picture(&t);
    return t;
}

static void bench(const struct kernel_ops *ops) {
    struct trial t = photograph(4000, 3000, 384);
    double best = INFINITY;
    for (int i = 0; i < 9; i++) {
        double start = seconds();
        free(run(ops, &t));
        best = fmin(best, seconds() - start);
    }
    printf("%-8s %7.1f ms, %5.0f Mpx/s in\n", ops->name, best * 1e3, 12.0 / best);
    free(t.src);
}

static int repeat(const char *target, int n) {
    struct kernel_ops ops;
    char message[512];
    if (kernels_select(target, kernels_cpu_features(), &ops, message, sizeof message) != SELECT_OK) {
        fprintf(stderr, "%s\n", message);
        return 2;
    }
    struct trial t = photograph(800, 600, 77);
    for (int i = 0; i < n; i++) {
        free(run(&ops, &t));
    }
    free(t.src);
    return 0;
}

/* Every table that kernels_select() makes on some CPU with a part of this one's features, which it must respect. */
enum { MOST_TABLES = 16 };

static size_t all_tables(struct kernel_ops tables[MOST_TABLES]) {
    uint32_t features = kernels_cpu_features(), subset = 0;
    size_t n = 0;
    do {
        for (const struct kernel_ops *const *target = kernels_targets(); *target; target++) {
            struct kernel_ops ops;
            char message[512];
            bool runs = ((*target)->needs & ~subset) == 0;
            if (kernels_select((*target)->name, subset, &ops, message, sizeof message) !=
                (runs ? SELECT_OK : SELECT_UNSUPPORTED) || (runs && (ops.needs & ~subset))) {
                printf("%s is selected wrongly on a CPU with the features %#x\n", (*target)->name, (unsigned)subset);
                exit(1);
            }
            size_t i = 0; /* name and needs tell from what a table was overlaid */
            while (i < n && (strcmp(tables[i].name, ops.name) != 0 || tables[i].needs != ops.needs)) {
                i++;
            }
            if (runs && i == n && n < MOST_TABLES) {
                tables[n++] = ops;
            }
        }
        subset = (subset - features) & features; /* the next one; 0 again after the last */
    } while (subset);
    return n;
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "--repeat") == 0) {
        return repeat(argv[2], atoi(argv[3]));
    }
    enum { TRIALS = 3000, ATTENTION_EVERY = 10 };
    bool timing = argc > 1 && strcmp(argv[1], "--bench") == 0, ok = true;
    struct kernel_ops tables[MOST_TABLES];
    size_t n_tables = all_tables(tables);
    for (size_t k = 0; timing && k < n_tables; k++) {
        bench(&tables[k]);
        bench_frames(&tables[k]);
        bench_attention(&tables[k]);
    }
    for (int i = 0; !timing && ok && i < TRIALS; i++) {
        struct trial t = random_trial();
        uint8_t *expected = plain_answer(&t);
        for (size_t k = 0; ok && k < n_tables; k++) {
            ok = check_resize(&tables[k], &t, expected) && check_planes(&tables[k]) && check_frames(&tables[k]) &&
                 (i % ATTENTION_EVERY != 0 || check_attention(&tables[k]));
        }
        free(expected);
        free(t.lut);
        free(t.src);
    }
    if (!timing) {
        printf("%zu targets, %d trials each: %s\n", n_tables, TRIALS, ok ? "all equal" : "DIFFERENT");
    }
    return ok ? 0 : 1;
}
