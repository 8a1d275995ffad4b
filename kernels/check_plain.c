/* A resize once more, a plain step at a time and every step a picture in memory: what kernels_check expects. Only the
 * weights are the library's. */
#include "check.h"

#include <stdlib.h>
#include <string.h>

/* The picture in its border. */
static uint8_t *bordered_picture(const struct trial *t) {
    size_t width = (size_t)t->n_in[0], height = (size_t)t->n_in[1], channels = (size_t)t->channels;
    uint8_t *picture = need(malloc(height * width * channels));
    for (size_t i = 0; i < height * width * channels; i++) {
        picture[i] = t->border_colour[i % channels];
    }
    for (size_t y = 0; y < picture_side(t, 1); y++) {
        size_t at = (y + (size_t)t->border[1][0]) * width + (size_t)t->border[0][0];
        for (size_t x = 0; x < picture_side(t, 0); x++) {
            memcpy(picture + (at + x) * channels, t->src + y * src_stride(t) + x * (size_t)t->pixel_bytes, channels);
        }
    }
    return picture;
}

/* Resample the middle axis of `in`, (outer, axis->n_in, inner), and free it. */
static uint8_t *resampled(const struct resize_axis *axis, uint8_t *in, size_t outer, size_t inner) {
    size_t n_in = (size_t)axis->n_in, n_out = (size_t)axis->n_out;
    uint8_t *out = need(malloc(outer * n_out * inner));
    for (size_t o = 0; o < outer; o++) {
        for (size_t i = 0; i < n_out; i++) {
            const uint8_t *first = in + (o * n_in + (size_t)axis->first[i]) * inner;
            for (size_t k = 0; k < inner; k++) {
                int64_t sum = 1 << (RESIZE_WEIGHT_BITS - 1);
                for (size_t tap = 0; tap < (size_t)axis->count[i]; tap++) {
                    int64_t weight = axis->identity ? 1 << RESIZE_WEIGHT_BITS
                                                    : axis->weights[i * (size_t)axis->n_taps + tap];
                    sum += weight * first[tap * inner + k];
                }
                sum >>= RESIZE_WEIGHT_BITS;
                out[(o * n_out + i) * inner + k] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
            }
        }
    }
    free(in);
    return out;
}

/* The window of the output, packed. */
static uint8_t *plain_window(const struct trial *t) {
    struct resize_axis axes[2];
    init_axes(t, axes);
    int32_t lost_rows = t->n_in[1] - t->n_out[1], lost_columns = t->n_in[0] - t->n_out[0];
    bool rows_first = lost_rows > 0 && lost_rows > 2 * lost_columns; /* Pillow 13 */
    size_t channels = (size_t)t->channels;
    uint8_t *picture = bordered_picture(t);
    if (rows_first) {
        picture = resampled(&axes[1], picture, 1, (size_t)t->n_in[0] * channels);
        picture = resampled(&axes[0], picture, (size_t)t->n_window[1], channels);
    } else {
        picture = resampled(&axes[0], picture, (size_t)t->n_in[1], channels);
        picture = resampled(&axes[1], picture, 1, (size_t)t->n_window[0] * channels);
    }
    resize_axis_free(&axes[0]);
    resize_axis_free(&axes[1]);
    return picture;
}

/* Sample (y, x, c) of the canvas. */
static uint8_t canvas_sample(const struct trial *t, const uint8_t *window, size_t y, size_t x, size_t c) {
    size_t row = y - t->canvas_origin[1], column = x - t->canvas_origin[0]; /* before the window these are huge */
    size_t rows = (size_t)t->n_window[1], columns = (size_t)t->n_window[0];
    return row < rows && column < columns ? window[(row * columns + column) * (size_t)t->channels + c]
                                          : t->canvas_colour[c];
}

uint8_t *plain_answer(const struct trial *t) {
    uint8_t *window = plain_window(t), *dst = new_answer(t);
    size_t channels = (size_t)t->channels;
    for (size_t y = 0; t->kind == PACKED && y < (size_t)t->n_window[1]; y++) {
        size_t row_bytes = (size_t)t->n_window[0] * channels;
        memcpy(dst + y * dst_stride(t), window + y * row_bytes, row_bytes);
    }
    for (size_t i = 0; t->kind != PACKED && i < t->canvas[0] * t->canvas[1] * channels; i++) {
        /* i counts through (tile row, tile column, channel, y, x) */
        size_t n_across = t->canvas[0] / t->tile[0], x = i % t->tile[0], y = i / t->tile[0] % t->tile[1];
        size_t plane = i / (t->tile[0] * t->tile[1]), c = plane % channels, tile = plane / channels;
        uint8_t value = canvas_sample(t, window, tile / n_across * t->tile[1] + y, tile % n_across * t->tile[0] + x, c);
        if (t->kind == TILES_F32) {
            memcpy(dst + i * sizeof(float), &t->lut[c * 256 + value], sizeof(float));
        } else {
            dst[i] = value;
        }
    }
    free(window);
    return dst;
}
