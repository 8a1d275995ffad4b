/* Attention over all tokens of a picture, in 8-bit integers: what each function promises. docs/kernels.md has the idea.
 *
 *   attention_ort.c    offers it to ONNX Runtime as an operator; ort_abi.h is what that takes of its interface.
 *   attention.c        checks sizes, divides memory, and calls a target's functions.
 *   attention_lanes.h  what all targets share, compiled for each: numbers into integers, and the walk over the blocks.
 *   attention_scalar.c defines the three inner functions; attention_*.c do them in a target's instructions. All targets
 *                      give the same bits: sums are of integers, and float32 is computed lane by lane in a fixed order.
 */
#ifndef EDGEVLM_ATTENTION_H
#define EDGEVLM_ATTENTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    ATTENTION_MOST_WIDTH = 256, /* channels of a head */
    ATTENTION_MOST_TOKENS = 1 << 20,
    ATTENTION_BLOCK = 64,   /* keys whose weights share a scale: a part of the definition */
    ATTENTION_ROWS = 16,    /* queries that are computed side by side: changes no number */
    ATTENTION_TASK = 64,    /* queries of one task */
    ATTENTION_ALIGNMENT = 64,
};

/* Magnitudes from which on a number counts as not finite: products of three of them still fit into float32. */
#define ATTENTION_LIMIT 0x1p40f

/* One call. Each token has its queries, keys and values behind each other, each with `heads` * `width` channels. */
struct attention {
    size_t batch, tokens, heads, width;
    const float *qkv;  /* [batch, tokens, 3 * heads * width] */
    const float *bias; /* [3 * heads * width], added to qkv */
    float *out;        /* [batch, tokens, heads * width] */
    float scale;       /* log2(e) / sqrt(width); set by attention_init() */
};

/* Keys and values of one head of one picture, as the target's instructions want them. */
struct attention_head {
    void *keys;          /* of each token, less their mean over the tokens, with a scale for each token */
    float *key_scales;   /* [padded tokens] */
    void *values;        /* the same with a scale for each channel */
    float *value_scales; /* [padded channels] */
    float *value_means;  /* [padded channels], with the bias */
    bool *finite;        /* whether all of them are */
};

struct attention_ops {
    size_t key_bytes, value_bytes; /* of a stored key and value */
    /* Fill `packed` from head `head` of picture `picture`. */
    void (*prepare)(const struct attention *a, size_t picture, size_t head,
                    const struct attention_head *packed);
    /* Compute the queries [from, to) of it. */
    void (*rows)(const struct attention *a, size_t picture, size_t head, const struct attention_head *packed,
                 size_t from, size_t to);
};

/* Keys are padded to whole sixteens, with repetitions of the last one. */
static inline size_t attention_padded(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* Check sizes and set `scale`. NULL, or what is wrong with them, in words for `message` of `size` bytes. */
const char *attention_init(struct attention *a, char *message, size_t size);

/* Bytes of scratch for a whole call, to be aligned to ATTENTION_ALIGNMENT. */
size_t attention_scratch(const struct attention *a, const struct attention_ops *ops);

/* A call is two rounds of tasks: all of the first, in any order and on any thread, before any of the second. */
size_t attention_prepare_tasks(const struct attention *a);
size_t attention_row_tasks(const struct attention *a);
void attention_prepare(const struct attention *a, const struct attention_ops *ops, void *scratch, size_t task);
void attention_rows(const struct attention *a, const struct attention_ops *ops, void *scratch, size_t task);

extern const struct attention_ops attention_scalar;
#if defined(__x86_64__)
extern const struct attention_ops attention_avx2, attention_avx512;
#elif defined(__aarch64__)
extern const struct attention_ops attention_neon, attention_dotprod;
#endif

#endif
