"""Weights on their way out of a checkpoint: checked, reordered, converted and quantized in blocks of whole rows.

Every processor works on a block of its own; the blocks leave in order. No more than a few of them are in memory,
however large the tensor is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import pages, quant, safetensors
from edgevlm.converters.finite import all_finite
from edgevlm.converters.mapping import Source
from edgevlm.converters.progress import Progress
from edgevlm.converters.safetensors import Tensor
from edgevlm.converters.sections import invalid
from edgevlm.converters.transforms import TRANSFORMS, to_bfloat16_bits, to_float16
from edgevlm.machine import usable_cpus

_BLOCK_WEIGHTS = 1 << 18
#: Blocks that are in work or wait for their turn, for each processor.
_AHEAD = 3


def check_finite(bits: NDArray[Any], dtype: str, name: str) -> None:
    """Refuse NaN and infinity.

    Args:
        bits: As stored.
        dtype: F32, F16 or BF16.
        name: Of the tensor, for the error.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """
    if not all_finite(bits, dtype):
        raise invalid(f"{name} holds NaN or infinity")


def as_float32(tensor: Tensor) -> NDArray[np.float32]:
    """A copy of a tensor as float32, finite."""
    check_finite(tensor.bits, tensor.dtype, tensor.name)
    values = safetensors.widen(tensor)
    pages.release(tensor.bits)
    return values


class Feed:
    """Decoder weights as a GGUF file stores them.

    Args:
        progress: Told how many bytes of the checkpoint were read.
        importance: For each matrix how much its inputs matter, by GGUF name (see `imatrix.py`).
    """

    def __init__(
        self, progress: Progress | None = None, importance: Mapping[str, NDArray[np.float32]] | None = None
    ) -> None:
        self._progress, self._importance = progress or Progress(), importance or {}

    def blocks(self, name: str, source: Source, kind: str) -> Iterator[NDArray[Any]]:
        """The bytes of one tensor, in blocks that follow one another.

        Args:
            name: Its GGUF name.
            source: Where it comes from.
            kind: A ggml type.

        Yields:
            float32, float16, (for BF16) uint16, or (for quantized types) uint8.

        Raises:
            CheckpointError: `checkpoint.invalid` for NaN or infinity, `checkpoint.overflow`.
        """
        tensor, order, threads = source.tensor, _order(source), usable_cpus()
        importance = self._importance.get(name)

        def work(rows: slice) -> tuple[NDArray[Any], slice]:
            bits = tensor.bits[rows] if order is None else tensor.bits[order[rows]]
            check_finite(bits, tensor.dtype, tensor.name)
            return _converted(bits, tensor.dtype, kind, tensor.name, importance), rows

        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[tuple[NDArray[Any], slice]]] = deque()
            try:
                for rows in _row_blocks(tensor):
                    waiting.append(pool.submit(work, rows))
                    if len(waiting) == _AHEAD * threads:
                        yield from self._next(waiting, tensor)
                while waiting:
                    yield from self._next(waiting, tensor)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        pages.release(tensor.bits)

    def _next(self, waiting: deque[Future[tuple[NDArray[Any], slice]]], tensor: Tensor) -> Iterator[NDArray[Any]]:
        block, rows = waiting.popleft().result()
        yield block
        pages.release(tensor.bits[rows])
        self._progress.add(tensor.bits[rows].nbytes)


def _converted(
    bits: NDArray[Any], dtype: str, kind: str, name: str, importance: NDArray[np.float32] | None
) -> NDArray[Any]:
    """Finite numbers of one type as another."""
    if kind == dtype:
        return bits
    values = safetensors.widen_bits(bits, dtype)
    if kind == "F32":
        return values
    if kind == "F16":
        return to_float16(values, name)
    return to_bfloat16_bits(values) if kind == "BF16" else quant.quantize_rows(values, kind, name, importance)


def sampled(source: Source, step: int) -> NDArray[np.float32]:
    """Each `step`-th row of a decoder weight as float32, in the order of the GGUF file."""
    order = _order(source)
    bits = source.tensor.bits[::step] if order is None else source.tensor.bits[order[::step]]
    values = safetensors.widen_bits(bits, source.tensor.dtype)
    pages.release(source.tensor.bits)
    return values


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices hold the same numbers, whatever their types."""

    def same(rows: slice) -> bool:
        found = np.array_equal(
            safetensors.widen_bits(one.bits[rows], one.dtype), safetensors.widen_bits(other.bits[rows], other.dtype)
        )
        for tensor in (one, other):
            pages.release(tensor.bits[rows])
        return found

    return one.shape == other.shape and all(same(rows) for rows in _row_blocks(one))


def _order(source: Source) -> NDArray[np.int64] | None:
    """Which row of the checkpoint becomes each row of ours; None if they stay."""
    if not source.transform:
        return None
    return TRANSFORMS[source.transform](np.arange(source.tensor.shape[0]), source.argument)


def _row_blocks(tensor: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_WEIGHTS // max(1, tensor.bits[:1].size))
    return (slice(start, start + rows) for start in range(0, tensor.shape[0], rows))
