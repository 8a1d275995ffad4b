"""Weights on their way into a GGUF file: the same numbers as by plain arithmetic, and little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from edgevlm.converters import gguf_file, verify, weights
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


def stored(one, wanted):
    """All blocks of a tensor, in its shape."""
    blocks = list(weights.Feed().blocks("w", one, wanted))
    return np.concatenate([block.reshape(-1, one.tensor.shape[-1]) for block in blocks])


@pytest.mark.parametrize("transform", ["", "rope_interleave"])
@pytest.mark.parametrize("found", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_blocks_give_the_numbers_of_the_whole(monkeypatch, found, wanted, transform):
    monkeypatch.setattr(weights, "_BLOCK_WEIGHTS", 100)  # blocks of 4 rows, the last one too
    one = source(found, transform=transform)
    true = rope_interleave(widen(one.tensor), 4) if transform else widen(one.tensor)
    narrow = {"F32": true, "F16": true.astype(np.float16), "BF16": to_bfloat16_bits(np.ascontiguousarray(true))}
    result = stored(one, wanted)
    assert (result.dtype, result.shape) == (narrow[wanted].dtype, true.shape)
    assert np.array_equal(result, narrow[wanted])
    assert np.array_equal(weights.sampled(one, 7), true[::7])
    block = next(weights.Feed().blocks("w", one, wanted))
    assert np.shares_memory(block, one.tensor.bits) == (found == wanted and not transform)


def test_blocks_need_not_divide_the_rows(monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK_WEIGHTS", 5 * 24)
    one = source("BF16")
    assert np.array_equal(stored(one, "F32"), rope_interleave(widen(one.tensor), 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_number_that_is_not_finite_is_found(kind, value):
    one = source(kind)
    weights.check_finite(one.tensor.bits, kind, "w")
    number = np.float32(value)
    one.tensor.bits[63, 23] = number.view(np.uint32) >> 16 if kind == "BF16" else number
    with pytest.raises(CheckpointError, match="w holds NaN or infinity"):
        stored(one, "F32")


def test_matrices_are_compared_by_number_not_by_type():
    one = source("BF16").tensor
    wide = Tensor("other", "F32", one.shape, widen(one))
    assert weights.equal(one, wide)
    wide.bits[-1, -1] += 1e-3
    assert not weights.equal(one, wide)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_quantized_blocks_are_the_whole_quantized_at_once(monkeypatch, kind):
    """Whatever the block and the number of processors: rows do not depend on each other."""
    one = source("BF16", rows=67, columns=96, transform="")
    whole = b"".join(block.tobytes() for block in weights.Feed().blocks("w", one, kind))
    assert len(whole) == gguf_file.nbytes((67, 96), kind)
    monkeypatch.setattr(weights, "_BLOCK_WEIGHTS", 5 * 96)
    monkeypatch.setattr(weights, "usable_cpus", lambda: 3)
    assert b"".join(block.tobytes() for block in weights.Feed().blocks("w", one, kind)) == whole
    one.tensor.bits[66, 95] ^= 0x8000  # the twin: a sign in the last block
    assert b"".join(block.tobytes() for block in weights.Feed().blocks("w", one, kind)) != whole


def test_a_scale_beyond_float16_is_refused():
    one = source("F32", columns=32, transform="")
    one.tensor.bits[3, 3] = 1e9
    with pytest.raises(CheckpointError, match=r"w holds 1e\+09, too much for Q8_0") as caught:
        list(weights.Feed().blocks("w", one, "Q8_0"))
    assert caught.value.code == "checkpoint.overflow"


def test_blocks_that_nobody_wants_any_more_stop_the_work():
    blocks = weights.Feed().blocks("w", source("BF16", rows=4096, columns=1024), "F32")
    next(blocks)
    blocks.close()  # waits for what is in work, and raises if that fails


@pytest.mark.parametrize("transform", ["", "rope_interleave"])
@pytest.mark.parametrize("found", KINDS)
@pytest.mark.parametrize("wanted", [*KINDS, "Q4_K"])
def test_no_step_takes_more_than_some_blocks(monkeypatch, found, wanted, transform):
    monkeypatch.setattr(weights, "usable_cpus", lambda: 2)
    one = source(found, rows=4096, columns=2048, transform=transform)
    stored = StoredTensor("w", one.tensor.shape, "F32", one.tensor.bits.size * 4, widen(one.tensor))
    steps = {
        "convert": lambda: sum(block.nbytes for block in weights.Feed().blocks("w", one, wanted)),
        "compare": lambda: weights.equal(one.tensor, one.tensor),
        "measure": lambda: verify._squares(lambda step: weights.sampled(one, step), stored),
    }
    for name, step in steps.items():
        tracemalloc.start()
        step()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # blocks of 2^18 weights, six in the row and two in work with their copies; samples of 2^20 in float64, with
        # their difference
        assert peak <= (40 << 20 if name == "measure" else 16 << 20), name
