/* Resize weights in fixed point: Pillow's, to the last bit (Pillow 13, `Image.resize`).
 *
 * All arithmetic is double, in Pillow's order of operations; reordering a sum here changes pixels. The build forbids
 * the compiler to contract a * b + c into one rounding (-ffp-contract=off) for the same reason.
 */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

#define PI 3.14159265358979323846

static double box(double x) {
    return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
}

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double hamming(double x) {
    x = fabs(x);
    if (x == 0.0) {
        return 1.0;
    }
    if (x >= 1.0) {
        return 0.0;
    }
    x *= PI;
    return sin(x) / x * (0.54f + 0.46f * cos(x)); /* the window's constants are float in Pillow, too */
}

/* Keys' cubic convolution with a = -0.5. */
static double bicubic(double x) {
    x = fabs(x);
    if (x < 1.0) {
        return (1.5 * x - 2.5) * x * x + 1.0;
    }
    if (x < 2.0) {
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    }
    return 0.0;
}

static double sinc(double x) {
    if (x == 0.0) {
        return 1.0;
    }
    x *= PI;
    return sin(x) / x;
}

static double lanczos(double x) {
    return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
}

static const struct {
    double (*weight)(double x); /* at distance x, in units of max(scale, 1) inputs */
    double support;             /* 0 beyond this distance */
} filters[FILTER_COUNT] = {
    [FILTER_BOX] = {box, 0.5},         [FILTER_BILINEAR] = {bilinear, 1.0}, [FILTER_HAMMING] = {hamming, 1.0},
    [FILTER_BICUBIC] = {bicubic, 2.0}, [FILTER_LANCZOS] = {lanczos, 3.0},
};

/* To units of 2^-22, halves away from zero. |w| < 2, so the result fits. */
static int32_t to_fixed(double w) {
    return (int32_t)((w < 0 ? -0.5 : 0.5) + w * (1 << RESIZE_WEIGHT_BITS));
}

/* Allocate `a` * `b` elements of `size` bytes; NULL on overflow. At least one byte, so that NULL means failure. */
static void *alloc(size_t a, size_t b, size_t size) {
    if (b != 0 && a > SIZE_MAX / b / size) {
        return NULL;
    }
    size_t n_bytes = a * b * size;
    return malloc(n_bytes != 0 ? n_bytes : 1);
}

/* Weights of one output whose centre is at input coordinate `center`; `scratch` holds n_taps doubles. */
static void output_weights(struct resize_axis *axis, int32_t i, enum resize_filter filter, double center,
                           double stretch, double *scratch) {
    double support = filters[filter].support * stretch;
    double inverse = 1.0 / stretch;

    /* Casts truncate: below 0 that differs from rounding, but the limit to [0, n_in] hides it. */
    int32_t first = (int32_t)(center - support + 0.5);
    int32_t end = (int32_t)(center + support + 0.5);
    first = first < 0 ? 0 : first;
    end = end > axis->n_in ? axis->n_in : end;
    int32_t count = end - first;

    double sum = 0.0;
    for (int32_t t = 0; t < count; t++) {
        scratch[t] = filters[filter].weight((t + first - center + 0.5) * inverse);
        sum += scratch[t];
    }
    int32_t *weights = axis->weights + (size_t)i * (size_t)axis->n_taps;
    for (int32_t t = 0; t < axis->n_taps; t++) {
        double w = t < count ? scratch[t] : 0.0;
        weights[t] = to_fixed(sum != 0.0 ? w / sum : w);
    }
    axis->first[i] = first;
    axis->count[i] = count;
}

bool resize_axis_init(struct resize_axis *axis, enum resize_filter filter, int32_t n_in, float in0, float in1,
                      int32_t n_out, int32_t origin, int32_t n_window) {
    *axis = (struct resize_axis){.n_in = n_in, .n_total = n_out, .n_out = n_window};
    double scale = (double)(in1 - in0) / n_out; /* the difference is float32, as in Pillow */
    double stretch = scale < 1.0 ? 1.0 : scale; /* antialiasing: the filter grows with the reduction */

    /* Same scale at a whole offset: every filter is then 1 at its centre and 0 at the other integers, so the pass would
     * return its input. Pillow skips fewer such passes; the pixels are the same. */
    axis->identity = in1 - in0 == (float)n_out && in0 == floorf(in0);

    /* Rounding at both ends can add one tap to the 2 * ceil(support) that a filter spans. */
    double widest = 2.0 * ceil(filters[filter].support * stretch) + 1.0;
    axis->n_taps = axis->identity ? 1 : widest < n_in ? (int32_t)widest : n_in;

    size_t n_outputs = (size_t)n_window, n_taps = (size_t)axis->n_taps;
    double *scratch = alloc(n_taps, 1, sizeof(double));
    axis->first = alloc(n_outputs, 1, sizeof(int32_t));
    axis->count = alloc(n_outputs, 1, sizeof(int32_t));
    axis->weights = axis->identity ? NULL : alloc(n_outputs, n_taps, sizeof(int32_t));
    if (!scratch || !axis->first || !axis->count || (!axis->identity && !axis->weights)) {
        free(scratch);
        resize_axis_free(axis);
        return false;
    }
    for (int32_t i = 0; i < n_window; i++) {
        if (axis->identity) {
            axis->first[i] = (int32_t)in0 + origin + i;
            axis->count[i] = 1;
        } else {
            output_weights(axis, i, filter, in0 + (origin + i + 0.5) * scale, stretch, scratch);
        }
    }
    free(scratch);
    return true;
}

void resize_axis_free(struct resize_axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weights);
    *axis = (struct resize_axis){0};
}
