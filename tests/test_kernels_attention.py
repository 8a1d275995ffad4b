"""Attention in integers: every target gives the bits of a definition in numpy, which is close to real attention.

The definition here is written from docs/kernels.md and attention_lanes.h, token by token and without their layouts.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pictures import THIN

from edgevlm import _kernels, kernels

F32 = np.float32
BLOCK = 64
WEIGHT = [F32(float.fromhex(c)) for c in ("0x1.3f9426p+11", "0x1.cef8b0p+12", "0x1.644182p+14", "0x1.fff232p+14")]
POWER = [
    F32(float.fromhex(c))
    for c in ("0x1.c722p-13", "0x1.461794p-10", "0x1.3d2826p-7", "0x1.c684c2p-5", "0x1.ebfd96p-3", "0x1.62e44p-1", "1")
]

# ---- the definition


def fused(a, b, c):
    """a * b + c with one rounding: 64 bits of significand hold the product of two float32."""
    return (np.longdouble(a) * np.longdouble(b) + np.longdouble(c)).astype(F32)


def polynomial(coefficients, f):
    y = np.broadcast_to(coefficients[0], f.shape)
    for coefficient in coefficients[1:]:
        y = fused(y, f, coefficient)
    return y


def power(x):
    x = np.minimum(np.maximum(x, F32(-100)), F32(0))
    whole = np.rint(x - F32(0.5)).astype(F32)
    return np.ldexp(polynomial(POWER, x - whole), whole.astype(np.int32))


def steps(largest):
    """(what a number is multiplied with to become an integer, what gives it back)."""
    usable = largest >= F32(2.0**-100)
    safe = np.where(usable, largest, F32(1))
    return np.where(usable, F32(127) / safe, F32(0)), np.where(usable, largest / F32(127), F32(0))


def mean(x_SC):
    total_C = np.zeros(x_SC.shape[1], F32)
    for x_C in x_SC:  # one after the other: numpy's own sum takes another order
        total_C += x_C
    return total_C / F32(len(x_SC))


def define_head(q_SC, k_SC, v_SC, v_bias_C, block=BLOCK):
    """One head; queries have their bias, keys need none, values get theirs at the end."""
    width = q_SC.shape[1]
    k_SC, v_mean_C = k_SC - mean(k_SC), mean(v_SC)
    inverse_S, k_scale_S = steps(np.abs(k_SC).max(axis=1))
    k_SC = np.rint(k_SC * inverse_S[:, None]).astype(np.int64)
    v_SC = v_SC - v_mean_C
    inverse_C, v_scale_C = steps(np.abs(v_SC).max(axis=0))
    v_SC = np.rint(v_SC * inverse_C).astype(np.int64)
    inverse_S, q_scale_S = steps(np.abs(q_SC).max(axis=1))
    q_SC = np.rint(q_SC * inverse_S[:, None]).astype(np.int64)
    scale_S = q_scale_S * F32(1.4426950408889634 / np.sqrt(float(width)))
    total_SC = total_S = largest_S = None
    for start in range(0, len(k_SC), block):
        keys = slice(start, start + block)
        score_SB = (q_SC @ k_SC[keys].T).astype(F32) * k_scale_S[keys]
        found_S = score_SB.max(axis=1)
        x_SB = np.maximum((score_SB - found_S[:, None]) * scale_S[:, None], F32(-24))
        whole_SB = np.floor(x_SB)
        weight_SB = np.rint(np.ldexp(polynomial(WEIGHT, x_SB - whole_SB), whole_SB.astype(np.int32))).astype(np.int64)
        assert weight_SB.max() < 2**15
        old_S = found_S if largest_S is None else largest_S
        largest_S = np.maximum(found_S, old_S)
        kept_S, fresh_S = power((old_S - largest_S) * scale_S), power((found_S - largest_S) * scale_S)
        before_SC = F32(0) if total_SC is None else total_SC * kept_S[:, None]
        before_S = F32(0) if total_S is None else total_S * kept_S
        total_SC = fused((weight_SB @ v_SC[keys]).astype(F32), fresh_S[:, None], before_SC)
        total_S = fused(weight_SB.sum(axis=1).astype(F32), fresh_S, before_S)
    return fused(total_SC * (F32(1) / total_S)[:, None], v_scale_C, v_mean_C + v_bias_C)


def heads_of(x, heads):
    """[..., 3 * D] -> [3, heads, ..., width]."""
    return np.moveaxis(x.reshape(*x.shape[:-1], 3, heads, -1), (-3, -2), (0, 1))


def define(qkv_BSE, bias_E, heads, block=BLOCK):
    (q, k, v), (q_bias, _, v_bias) = heads_of(qkv_BSE, heads), heads_of(bias_E, heads)
    found = [
        [define_head(q[h, b] + q_bias[h], k[h, b], v[h, b], v_bias[h], block) for h in range(heads)]
        for b in range(len(qkv_BSE))
    ]
    return np.stack([np.concatenate(one, axis=1) for one in found])


def exact(qkv_BSE, bias_E, heads):
    """Attention in float64, and what integers may lose of it, for each output (see `allowed`)."""
    q, k, v = heads_of((qkv_BSE.astype(np.float64) + bias_E), heads)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = (p / p.sum(-1, keepdims=True)) @ v
    return tuple(np.moveaxis(x, 0, 2).reshape(*qkv_BSE.shape[:2], -1) for x in (out, allowed(q, k, v)))


def allowed(q, k, v):
    """How far the integers may lead away, from the definition alone: no number here was measured.

    A rounded query or key is off by half a step in each channel, so a score by at most `e`, and a weight by a factor
    exp(e); the polynomial adds 7.5e-5; a weight is rounded to a whole, of a sum of at least 32764. Weights that are
    wrong by a share r in all, and a sum that is, too, move the mean of the values by at most 2 r / (1 - r) of the
    distance between the farthest of them and their mean. A rounded value is off by half a step. float32 adds 1e-5.
    """
    k, v = (x - x.mean(-2, keepdims=True) for x in (k, v))
    q_step, k_step = (np.abs(x).max(-1, keepdims=True) / 127 for x in (q, k))
    tokens, width = q.shape[-2:]
    e = (
        np.abs(q).sum(-1)[..., :, None] * k_step.swapaxes(-1, -2) / 2
        + q_step * np.abs(k).sum(-1)[..., None, :] / 2
        + width * q_step * k_step.swapaxes(-1, -2) / 4
    ).max(-1, keepdims=True) / np.sqrt(width)
    share = np.minimum(np.expm1(2 * e) + 7.5e-5 + tokens * 0.5 / 32764, 0.999)
    farthest = np.abs(v).max(-2, keepdims=True)
    return np.minimum(2 * share / (1 - share), 2) * farthest + farthest / 254 + 1e-5 * (1 + farthest)


def attend(qkv_BSE, bias_E, heads, target=None):
    batch, tokens, all_ = qkv_BSE.shape
    out_BSD = np.full((batch, tokens, all_ // 3), 7, F32)
    _kernels.attention(np.ascontiguousarray(qkv_BSE), bias_E, out_BSD, heads, target)
    return out_BSD


def numbers(batch, tokens, heads, width, seed=0):
    rng = np.random.default_rng([seed, tokens, heads, width])
    all_ = 3 * heads * width
    return rng.standard_normal((batch, tokens, all_), dtype=F32), rng.standard_normal(all_, dtype=F32)


#: Every width of a published tower's heads, and odd ones; blocks of 64 keys, sixteens and rows that are not full.
SHAPES = [
    (1, 1, 1, 1), (1, 1, 2, 64), (2, 2, 3, 3), (1, 15, 1, 20), (1, 16, 2, 64), (1, 17, 1, 72), (1, 63, 2, 80),
    (2, 64, 1, 88), (1, 65, 3, 64), (1, 81, 1, 96), (1, 100, 1, 128), (1, 130, 1, 33), (1, 197, 2, 64),
    (1, 50, 1, 256),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES[::THIN])
def test_every_target_gives_the_bits_of_the_definition(shape):
    qkv_BSE, bias_E = numbers(*shape)
    heads = shape[2]
    expected = define(qkv_BSE, bias_E, heads)
    for target in kernels.targets():
        assert np.array_equal(attend(qkv_BSE, bias_E, heads, target), expected), target
    if shape[1] > BLOCK:  # the twin: blocks belong to the definition
        assert not np.array_equal(define(qkv_BSE, bias_E, heads, block=48), expected)


def outlier(x, rng):
    x[..., rng.integers(x.shape[-1], size=3)] *= F32(300)
    x[:, rng.integers(x.shape[1])] *= F32(1000)
    return x


EXTREMES = {
    "zeros": lambda x, rng: np.zeros_like(x),
    "constant": lambda x, rng: np.full_like(x, 2.5),
    "outliers": outlier,
    "huge": lambda x, rng: x * F32(1e11),
    "tiny": lambda x, rng: x * F32(1e-35),
    "one key outshines": lambda x, rng: np.where(np.arange(x.shape[1])[None, :, None] == 5, x * F32(30), x),
    "alike": lambda x, rng: np.broadcast_to(x[:, :1], x.shape).copy(),
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_every_target_gives_the_bits_of_the_definition_for(extreme):
    qkv_BSE, bias_E = numbers(1, 90, 2, 40)
    qkv_BSE = EXTREMES[extreme](qkv_BSE, np.random.default_rng(1))
    expected = define(qkv_BSE, bias_E, 2)
    assert np.isfinite(expected).all()
    for target in kernels.targets():
        assert np.array_equal(attend(qkv_BSE, bias_E, 2, target), expected), target


@pytest.mark.parametrize("spread", [0.25, 1, 2])
def test_it_is_attention(spread):
    for shape in SHAPES[::THIN]:
        qkv_BSE, bias_E = numbers(*shape, seed=1)
        qkv_BSE *= F32(spread)
        expected, tolerance = exact(qkv_BSE, bias_E, shape[2])
        found = attend(qkv_BSE, bias_E, shape[2])
        assert (np.abs(found - expected) <= tolerance).all(), shape
    # the twins: values off by four steps; two heads exchanged
    assert not (np.abs(found + tolerance.max() - expected) <= tolerance).all()
    qkv_BSE, bias_E = numbers(1, 65, 3, 64, seed=1)
    (expected, tolerance), found = exact(qkv_BSE * F32(0.25), bias_E, 3), attend(qkv_BSE * F32(0.25), bias_E, 3)
    assert not (np.abs(np.roll(found, 64, axis=-1) - expected) <= tolerance).all()


def test_what_it_loses_of_normal_numbers():
    """The bound above is for the worst case. The usual one, seen: 0.018 of how far results lie from their mean."""
    qkv_BSE, bias_E = numbers(1, 300, 2, 64)
    expected, _ = exact(qkv_BSE * F32(1.5), bias_E, 2)
    found = attend(qkv_BSE * F32(1.5), bias_E, 2)
    lost = np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(axis=1, keepdims=True))
    assert lost < 0.025


def test_one_bright_key_does_not_drown_the_others():
    """A key with 60 % of the weight in its own block; the other blocks keep their precision."""
    qkv_BSE, bias_E = numbers(1, 256, 1, 64)
    bias_E[:] = 0
    qkv_BSE[..., :128] *= F32(0.3)
    qkv_BSE[..., 0] = 8
    qkv_BSE[:, 3, 64] = 8 * np.log(400) / 8  # a score that is larger by log(400)
    expected, _ = exact(qkv_BSE, bias_E, 1)
    found = attend(qkv_BSE, bias_E, 1)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e12])
def test_numbers_that_are_not_finite_make_nan_of_what_depends_on_them(bad):
    """A query its row of its head; a key or value its whole head. 2^40 and more counts as infinite."""
    for part, target in itertools.product(range(3), kernels.targets()):
        qkv_BSE, bias_E = numbers(2, 70, 2, 24)
        usual = attend(qkv_BSE, bias_E, 2, target)
        qkv_BSE[1, 65, part * 48 + 24 + 5] = bad  # of the second picture's second head
        found = attend(qkv_BSE, bias_E, 2, target)
        lost = np.zeros(found.shape, bool)
        lost[1, 65 if part == 0 else slice(None), 24:] = True
        assert np.isnan(found[lost]).all()
        assert np.array_equal(found[~lost], usual[~lost])


@pytest.mark.parametrize(
    ("qkv", "bias", "out", "heads", "words"),
    [
        ((1, 4, 25), (25,), (1, 4, 8), 1, "with 1 heads"),
        ((1, 4, 24), (24,), (1, 4, 8), 3, "with 3 heads"),
        ((1, 4, 24), (24,), (1, 4, 8), 0, "with 0 heads"),
        ((1, 4, 24), (23,), (1, 4, 8), 1, r"bias \(23,\)"),
        ((1, 4, 24), (24,), (1, 5, 8), 1, r"into \(1, 5, 8\)"),
        ((1, 0, 24), (24,), (1, 0, 8), 1, "tokens go from 1"),
        ((1, 4, 774), (774,), (1, 4, 258), 1, "of a head to 256"),
    ],
)
def test_sizes_that_make_no_sense(qkv, bias, out, heads, words):
    with pytest.raises(ValueError, match=words):
        _kernels.attention(np.zeros(qkv, F32), np.zeros(bias, F32), np.zeros(out, F32), heads, None)
