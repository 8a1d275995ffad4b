/* Sizes, memory and tasks of an attention in integers. See attention.h. */
#include "attention.h"

#include <math.h>
#include <stdio.h>

const char *attention_init(struct attention *a, char *message, size_t size) {
    if (a->width < 1 || a->width > ATTENTION_MOST_WIDTH || a->tokens < 1 || a->tokens > ATTENTION_MOST_TOKENS ||
        a->heads < 1 || a->heads > 1024 || a->batch > ATTENTION_MOST_TOKENS) {
        snprintf(message, size,
                 "attention over %zu pictures of %zu tokens with %zu heads of %zu channels: tokens go from 1 to %d, "
                 "heads to 1024, channels of a head to %d",
                 a->batch, a->tokens, a->heads, a->width, (int)ATTENTION_MOST_TOKENS, (int)ATTENTION_MOST_WIDTH);
        return message;
    }
    const double log2_e = 1.4426950408889634;
    a->scale = (float)(log2_e / sqrt((double)a->width));
    return NULL;
}

static size_t aligned(size_t n) {
    return attention_padded(n, ATTENTION_ALIGNMENT);
}

/* How much memory one head takes, and where its parts lie if `memory` is given. */
static size_t divide(const struct attention *a, const struct attention_ops *ops, uint8_t *memory,
                     struct attention_head *packed) {
    size_t tokens = attention_padded(a->tokens, 16), channels = attention_padded(a->width, 16);
    size_t keys = 0;
    size_t values = keys + aligned(tokens * attention_padded(a->width, 4) * ops->key_bytes);
    size_t key_scales = values + aligned(tokens * channels * ops->value_bytes);
    size_t value_scales = key_scales + aligned(tokens * sizeof(float));
    size_t value_means = value_scales + aligned(channels * sizeof(float));
    size_t finite = value_means + aligned(channels * sizeof(float));
    if (memory) {
        *packed = (struct attention_head){
            .keys = memory + keys,
            .key_scales = (float *)(void *)(memory + key_scales),
            .values = memory + values,
            .value_scales = (float *)(void *)(memory + value_scales),
            .value_means = (float *)(void *)(memory + value_means),
            .finite = (bool *)(memory + finite),
        };
    }
    return finite + ATTENTION_ALIGNMENT;
}

size_t attention_scratch(const struct attention *a, const struct attention_ops *ops) {
    return a->batch * a->heads * divide(a, ops, NULL, NULL);
}

size_t attention_prepare_tasks(const struct attention *a) {
    return a->batch * a->heads;
}

size_t attention_row_tasks(const struct attention *a) {
    return a->batch * a->heads * ((a->tokens + ATTENTION_TASK - 1) / ATTENTION_TASK);
}

static struct attention_head head_at(const struct attention *a, const struct attention_ops *ops, void *scratch,
                                     size_t index) {
    struct attention_head packed;
    divide(a, ops, (uint8_t *)scratch + index * divide(a, ops, NULL, NULL), &packed);
    return packed;
}

void attention_prepare(const struct attention *a, const struct attention_ops *ops, void *scratch, size_t task) {
    struct attention_head packed = head_at(a, ops, scratch, task);
    ops->prepare(a, task / a->heads, task % a->heads, &packed);
}

void attention_rows(const struct attention *a, const struct attention_ops *ops, void *scratch, size_t task) {
    size_t per_head = (a->tokens + ATTENTION_TASK - 1) / ATTENTION_TASK, index = task / per_head;
    size_t from = task % per_head * ATTENTION_TASK;
    size_t to = from + ATTENTION_TASK < a->tokens ? from + ATTENTION_TASK : a->tokens;
    struct attention_head packed = head_at(a, ops, scratch, index);
    ops->rows(a, index / a->heads, index % a->heads, &packed, from, to);
}
