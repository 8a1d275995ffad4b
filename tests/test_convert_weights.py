"""Weights on their way into a GGUF file: the same numbers as by plain arithmetic, and little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from edgevlm.converters import verify, weights
from edgevlm.converters.gguf_file import StoredTensor
from edgevlm.converters.mapping import Source
from edgevlm.converters.safetensors import Tensor, widen
from edgevlm.converters.transforms import rope_interleave, to_bfloat16_bits
from edgevlm.errors import CheckpointError

RNG = np.random.default_rng(0)
KINDS = ("F32", "F16", "BF16")


def source(kind, rows=64, columns=24, transform="rope_interleave"):
    values = RNG.normal(size=(rows, columns)).astype(np.float32)
    bits = {"F32": values, "F16": values.astype(np.float16), "BF16": to_bfloat16_bits(values)}[kind]
    return Source(Tensor("w", kind, bits.shape, bits), transform, 4 if transform else 0)


@pytest.mark.parametrize("transform", ["", "rope_interleave"])
@pytest.mark.parametrize("found", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_blocks_give_the_numbers_of_the_whole(monkeypatch, found, wanted, transform):
    monkeypatch.setattr(weights, "_BLOCK_WEIGHTS", 100)  # blocks of 4 rows, the last one too
    one = source(found, transform=transform)
    true = rope_interleave(widen(one.tensor), 4) if transform else widen(one.tensor)
    narrow = {"F32": true, "F16": true.astype(np.float16), "BF16": to_bfloat16_bits(np.ascontiguousarray(true))}
    result = weights.stored(one, wanted)
    assert (result.dtype, result.shape) == (narrow[wanted].dtype, true.shape)
    assert np.array_equal(result, narrow[wanted])
    assert np.array_equal(weights.sampled(one, 7), true[::7])
    assert np.shares_memory(result, one.tensor.bits) == (found == wanted and not transform)


def test_blocks_need_not_divide_the_rows(monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK_WEIGHTS", 5 * 24)
    one = source("BF16")
    assert np.array_equal(weights.stored(one, "F32"), rope_interleave(widen(one.tensor), 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_number_that_is_not_finite_is_found(kind, value):
    one = source(kind)
    weights.check_finite(one.tensor)
    number = np.float32(value)
    one.tensor.bits[63, 23] = number.view(np.uint32) >> 16 if kind == "BF16" else number
    with pytest.raises(CheckpointError, match="w holds NaN or infinity"):
        weights.stored(one, "F32")


def test_matrices_are_compared_by_number_not_by_type():
    one = source("BF16").tensor
    wide = Tensor("other", "F32", one.shape, widen(one))
    assert weights.equal(one, wide)
    wide.bits[-1, -1] += 1e-3
    assert not weights.equal(one, wide)


@pytest.mark.parametrize("transform", ["", "rope_interleave"])
@pytest.mark.parametrize("found", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_no_step_takes_more_than_twice_the_tensor(found, wanted, transform):
    one = source(found, rows=2048, columns=2048, transform=transform)
    size = one.tensor.bits.nbytes
    stored = StoredTensor("w", one.tensor.shape, "F32", one.tensor.bits.size * 4, widen(one.tensor))
    steps = {
        "convert": lambda: weights.stored(one, wanted),
        "compare": lambda: weights.equal(one.tensor, one.tensor),
        "measure": lambda: verify._squares(lambda step: weights.sampled(one, step), stored),
    }
    for name, step in steps.items():
        tracemalloc.start()
        step()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # blocks of 2^18 weights; samples of 2^20 in float64, with their difference
        constant = 40 << 20 if name == "measure" else 4 << 20
        assert peak <= 2 * size + constant, name
