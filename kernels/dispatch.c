/* Which targets exist, which of them this CPU runs, and which one is used. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

/* Slowest first; scalar is always there and complete. A new target adds one line, in its architecture's #if. */
static const struct kernel_ops *const targets[] = {
    &kernels_scalar,
#if defined(__x86_64__)
    &kernels_avx2,
    &kernels_avx512,
#elif defined(__aarch64__)
    &kernels_neon,
#ifdef KERNELS_DOTPROD
    &kernels_dotprod,
#endif
#endif
    NULL,
};

const struct kernel_ops *const *kernels_targets(void) {
    return targets;
}

uint32_t kernels_cpu_features(void) {
    uint32_t features = CPU_BASELINE;
#if defined(__x86_64__)
    /* The compiler's run-time library asks CPUID, and XGETBV for what the system saves. */
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        features |= CPU_AVX2;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
        features |= CPU_AVX512;
    }
#elif defined(__aarch64__)
    features |= CPU_NEON; /* part of the base architecture */
#if defined(__APPLE__)
    features |= CPU_DOTPROD; /* every Apple silicon Mac has it */
#elif defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        features |= CPU_DOTPROD;
    }
#endif
#endif
    return features;
}

/* Later targets overwrite what they do better. */
static void overlay(struct kernel_ops *ops, const struct kernel_ops *target) {
    ops->name = target->name;
    ops->needs |= target->needs;
    if (target->horizontal) {
        ops->horizontal = target->horizontal;
    }
    if (target->vertical) {
        ops->vertical = target->vertical;
    }
    if (target->planes_u8) {
        ops->planes_u8 = target->planes_u8;
    }
    if (target->planes_f32) {
        ops->planes_f32 = target->planes_f32;
    }
    if (target->yuv_row) {
        ops->yuv_row = target->yuv_row;
    }
    if (target->composite_row) {
        ops->composite_row = target->composite_row;
    }
    if (target->sum_abs_diff) {
        ops->sum_abs_diff = target->sum_abs_diff;
    }
    if (target->attention) {
        ops->attention = target->attention;
    }
}

static bool runs_on(const struct kernel_ops *target, uint32_t features) {
    return (target->needs & features) == target->needs;
}

/* "scalar, avx2": the targets that run on `features`. Cut short rather than overflowing. */
static void list_names(uint32_t features, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; targets[i] && used < size; i++) {
        if (runs_on(targets[i], features)) {
            int n = snprintf(text + used, size - used, "%s%s", i ? ", " : "", targets[i]->name);
            used += n > 0 ? (size_t)n : 0;
        }
    }
}

/* Index of target `name`, or -1. */
static int find(const char *name) {
    for (int i = 0; targets[i]; i++) {
        if (strcmp(targets[i]->name, name) == 0) {
            return i;
        }
    }
    return -1;
}

enum select_status kernels_select(const char *name, uint32_t features, struct kernel_ops *ops, char *message,
                                  size_t size) {
    const char *origin = "target";
    if (!name) {
        name = getenv("EDGEVLM_KERNELS");
        origin = "EDGEVLM_KERNELS";
    }
    int last = -1; /* the last target that may contribute; -1: no limit */
    if (name && *name) {
        char names[128];
        list_names(features, names, sizeof names);
        last = find(name);
        if (last < 0) {
            snprintf(message, size, "%s=%.64s: no SIMD target has that name; this CPU runs: %s", origin, name, names);
            return SELECT_UNKNOWN;
        }
        if (!runs_on(targets[last], features)) {
            snprintf(message, size, "%s=%s: this CPU cannot run that SIMD target; it runs: %s", origin, name, names);
            return SELECT_UNSUPPORTED;
        }
    }
    *ops = kernels_scalar;
    for (int i = 1; targets[i] && (last < 0 || i <= last); i++) {
        if (runs_on(targets[i], features)) {
            overlay(ops, targets[i]);
        }
    }
    return SELECT_OK;
}
