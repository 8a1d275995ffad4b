"""Weights on their way out of a checkpoint: checked, reordered and converted in blocks.

A tensor of the type that is wanted passes as it is, a view of the mapped file. Everything else needs the result and
one block: no more memory than the larger of the two types takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import safetensors
from edgevlm.converters.gguf_file import PLAIN_TYPES
from edgevlm.converters.mapping import Source
from edgevlm.converters.safetensors import Tensor
from edgevlm.converters.sections import invalid
from edgevlm.converters.transforms import TRANSFORMS, to_bfloat16_bits, to_float16

_BLOCK_WEIGHTS = 1 << 18
# All ones in the exponent: infinity or NaN.
_EXPONENTS = {"F32": (np.dtype("<u4"), 0x7F800000), "F16": (np.dtype("<u2"), 0x7C00), "BF16": (np.dtype("<u2"), 0x7F80)}


def check_finite(tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """
    unsigned, exponent = _EXPONENTS[tensor.dtype]
    flat = tensor.bits.reshape(-1).view(unsigned)
    for start in range(0, len(flat), _BLOCK_WEIGHTS):
        if ((flat[start : start + _BLOCK_WEIGHTS] & unsigned.type(exponent)) == exponent).any():
            raise invalid(f"{tensor.name} holds NaN or infinity")


def as_float32(tensor: Tensor) -> NDArray[np.float32]:
    """A copy of a tensor as float32, finite."""
    check_finite(tensor)
    return safetensors.widen(tensor)


def stored(source: Source, kind: str) -> NDArray[Any]:
    """A decoder weight as a GGUF file stores it.

    Args:
        source: Where it comes from.
        kind: F32, F16 or BF16.

    Returns:
        float32, float16 or (for BF16) uint16; a view of the mapped file if nothing changes.

    Raises:
        CheckpointError: `checkpoint.invalid` for NaN or infinity, `checkpoint.overflow`.
    """
    tensor = source.tensor
    check_finite(tensor)
    order = _order(source)
    if kind == tensor.dtype:
        return tensor.bits if order is None else tensor.bits[order]
    narrow: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
        "F32": lambda values: values,
        "F16": lambda values: to_float16(values, tensor.name),
        "BF16": to_bfloat16_bits,
    }
    found = np.empty(tensor.shape, PLAIN_TYPES[kind])
    for rows in _row_blocks(tensor):
        part = tensor.bits[rows] if order is None else tensor.bits[order[rows]]
        found[rows] = narrow[kind](safetensors.widen_bits(part, tensor.dtype))
    return found


def sampled(source: Source, step: int) -> NDArray[np.float32]:
    """Each `step`-th row of a decoder weight as float32, in the order of the GGUF file."""
    order = _order(source)
    bits = source.tensor.bits[::step] if order is None else source.tensor.bits[order[::step]]
    return safetensors.widen_bits(bits, source.tensor.dtype)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices hold the same numbers, whatever their types."""
    return one.shape == other.shape and all(
        np.array_equal(
            safetensors.widen_bits(one.bits[rows], one.dtype), safetensors.widen_bits(other.bits[rows], other.dtype)
        )
        for rows in _row_blocks(one)
    )


def _order(source: Source) -> NDArray[np.int64] | None:
    """Which row of the checkpoint becomes each row of ours; None if they stay."""
    if not source.transform:
        return None
    return TRANSFORMS[source.transform](np.arange(source.tensor.shape[0]), source.argument)


def _row_blocks(tensor: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_WEIGHTS // max(1, tensor.bits[:1].size))
    return (slice(start, start + rows) for start in range(0, tensor.shape[0], rows))
