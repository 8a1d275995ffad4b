/* Attention in integers on every target against scalar. Part of kernels_check. */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Roughly normal, or what an attention may meet at worst. */
static float random_number(uint32_t kind) {
    float x = ((float)random_below(1 << 20) + (float)random_below(1 << 20) - (float)(1 << 20)) / (1 << 18);
    switch (kind) {
    case 0: return 0;
    case 1: return 3.5f;
    case 2: return random_below(50) ? x : x * 1e4f;
    case 3: return random_below(3000) ? x * 1e-20f : NAN;
    case 4: return random_below(3000) ? x : INFINITY;
    case 5: return x * 1e11f;
    default: return x;
    }
}

static float *random_numbers(size_t n) {
    float *block = need(malloc(n * sizeof *block));
    uint32_t kind = random_below(12);
    for (size_t i = 0; i < n; i++) {
        block[i] = random_number(kind);
    }
    return block;
}

static float *answer(const struct attention_ops *ops, struct attention a) {
    size_t n = a.batch * a.tokens * a.heads * a.width;
    a.out = need(malloc(n * sizeof *a.out));
    memset(a.out, 0xA5, n * sizeof *a.out);
    void *scratch = need(aligned_alloc(ATTENTION_ALIGNMENT, attention_scratch(&a, ops)));
    memset(scratch, 0xA5, attention_scratch(&a, ops));
    for (size_t task = attention_prepare_tasks(&a); task > 0; task--) {
        attention_prepare(&a, ops, scratch, task - 1);
    }
    for (size_t task = attention_row_tasks(&a); task > 0; task--) {
        attention_rows(&a, ops, scratch, task - 1);
    }
    free(scratch);
    return a.out;
}

/* Equal to the bit, but for the bits of NaN, which processors choose. */
static bool equal_numbers(const float *found, const float *expected, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (memcmp(&found[i], &expected[i], sizeof *found) != 0 && !(isnan(found[i]) && isnan(expected[i]))) {
            return false;
        }
    }
    return true;
}

bool check_attention(const struct kernel_ops *ops) {
    static const uint32_t tokens[] = {4, 40, 200}, widths[] = {8, 40, 130};
    struct attention a = {.batch = 1 + random_below(2), .tokens = 1 + random_below(tokens[random_below(3)]),
                          .heads = 1 + random_below(3), .width = 1 + random_below(widths[random_below(3)])};
    size_t all = a.heads * a.width, n = a.batch * a.tokens * all;
    float *qkv = random_numbers(3 * n), *bias = random_numbers(3 * all);
    char message[256];
    a.qkv = qkv;
    a.bias = bias;
    bool equal = attention_init(&a, message, sizeof message) == NULL;
    if (equal) {
        float *found = answer(ops->attention, a), *expected = answer(kernels_scalar.attention, a);
        equal = equal_numbers(found, expected, n);
        free(found);
        free(expected);
    }
    if (!equal) {
        printf("%s differs: attention of %zu x %zu tokens, %zu heads of %zu channels\n", ops->name, a.batch, a.tokens,
               a.heads, a.width);
    }
    free(qkv);
    free(bias);
    return equal;
}

void bench_attention(const struct kernel_ops *ops) {
    enum { TOKENS = 577, HEADS = 2, WIDTH = 64, RUNS = 9 };
    struct attention a = {.batch = 1, .tokens = TOKENS, .heads = HEADS, .width = WIDTH};
    float *qkv = need(malloc(3 * TOKENS * HEADS * WIDTH * sizeof *qkv));
    float *bias = need(calloc(3 * HEADS * WIDTH, sizeof *bias));
    for (size_t i = 0; i < 3 * TOKENS * HEADS * WIDTH; i++) {
        qkv[i] = random_number(UINT32_MAX);
    }
    char message[256];
    a.qkv = qkv;
    a.bias = bias;
    attention_init(&a, message, sizeof message);
    double best = INFINITY;
    for (int i = 0; i < RUNS; i++) {
        double start = seconds();
        free(answer(ops->attention, a));
        best = fmin(best, seconds() - start);
    }
    printf("%-8s %7.2f ms, attention of %d tokens, %d heads of %d\n", ops->name, best * 1e3, (int)TOKENS, (int)HEADS,
           (int)WIDTH);
    free(qkv);
    free(bias);
}
