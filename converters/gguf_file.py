"""GGUF files, written and read back one tensor at a time: the only import of the package `gguf`.

The writer leaves out everything that differs between two runs (dates, paths, ids): equal input gives equal bytes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import CheckpointError, need
from edgevlm.files import open_regular
from edgevlm.gguf import GGUFHeader
from edgevlm.storage import storage_errors

#: Stored type -> the numpy type that carries its bits.
PLAIN_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: `produce()` gives its bits (float32, float16, or bfloat16 as uint16) when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: str
    produce: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * PLAIN_TYPES[self.type].itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a finished file: `bits` is a view of the mapped file, rows outermost for quantized types."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    bits: NDArray[Any]


def write(path: Path, arch: str, metadata: dict[str, Any], tensors: list[PlannedTensor]) -> None:
    """Write a file.

    Args:
        path: Must not exist.
        arch: `general.architecture`.
        metadata: Keys in file order. bool, str, float (stored as float32) and int (uint32); lists of str, int (int32)
            or float (float32).
        tensors: In file order.

    Raises:
        StorageError: the disk is full or refuses.
        CheckpointError: whatever a tensor's `produce` raises.
    """
    gguf = need("gguf", "convert")
    writer = gguf.GGUFWriter(None, arch)
    for key, value in metadata.items():
        _add(gguf, writer, key, value)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, PLAIN_TYPES[tensor.type], tensor.nbytes, kind)
    try:
        with storage_errors(path, needed=sum(tensor.nbytes for tensor in tensors)):
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for tensor in tensors:
            values = tensor.produce()
            assert (values.shape, values.dtype) == (tensor.shape, PLAIN_TYPES[tensor.type]), tensor.name
            with storage_errors(path, needed=sum(tensor.nbytes for tensor in tensors)):
                writer.write_tensor_data(np.ascontiguousarray(values))
    finally:
        with storage_errors(path):
            writer.close()


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """Add one key with its type made explicit: gguf's own `add_array` guesses from the first item."""
    kinds = gguf.GGUFValueType
    kind_of = {bool: kinds.BOOL, str: kinds.STRING, float: kinds.FLOAT32, int: kinds.UINT32}
    if not isinstance(value, list):
        writer.add_key_value(key, value, kind_of[type(value)])
        return
    item_kind = {str: kinds.STRING, int: kinds.INT32, float: kinds.FLOAT32}[type(value[0])]
    writer.add_key_value(key, value, kinds.ARRAY, sub_type=item_kind)


def read_tensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a finished file, in file order."""
    gguf = need("gguf", "convert")
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield StoredTensor(tensor.name, shape, tensor.tensor_type.name, int(tensor.n_bytes), tensor.data)


def map_tensors(header: GGUFHeader) -> dict[str, StoredTensor]:
    """The tensors of a file whose header was checked, by name: views of the mapped file, nothing is read.

    Raises:
        FileError: the file cannot be read.
        CheckpointError: `checkpoint.invalid`, the file became shorter.
    """
    with open_regular(header.path) as (file, size):
        end = max((header.data_offset + tensor.offset + tensor.nbytes for tensor in header.tensors), default=1)
        if size < end:
            raise CheckpointError(f"{header.path} changed while it was being read", code="checkpoint.invalid")
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    found = {}
    for tensor in header.tensors:
        kind = type_name(tensor.type_id)
        start = header.data_offset + tensor.offset
        bits = data[start : start + tensor.nbytes]
        bits = bits.view(PLAIN_TYPES[kind]) if kind in ("F32", "F16") else bits  # all others are bytes to `values`
        bits = bits.reshape(*tensor.shape[:-1], -1)
        found[tensor.name] = StoredTensor(tensor.name, tensor.shape, kind, tensor.nbytes, bits)
    return found


def values(tensor: StoredTensor, row_step: int = 1) -> NDArray[np.float32]:
    """Each `row_step`-th row of a stored tensor as float32 [rows, columns]."""
    gguf = need("gguf", "convert")
    kind = gguf.GGMLQuantizationType[tensor.type]
    bits_RB = tensor.bits.reshape(-1, tensor.bits.shape[-1])[::row_step]
    return gguf.quants.dequantize(np.ascontiguousarray(bits_RB), kind)  # type: ignore[no-any-return]


def block_size(kind: str) -> int:
    """Weights in one block of a type: rows must be a multiple of it."""
    gguf = need("gguf", "convert")
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def type_id(kind: str) -> int:
    """enum ggml_type."""
    return int(need("gguf", "convert").GGMLQuantizationType[kind])


def type_name(type_id: int) -> str:
    """The reverse of `type_id`."""
    return str(need("gguf", "convert").GGMLQuantizationType(type_id).name)


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Size of a tensor of a type; rows must be a multiple of its block."""
    gguf = need("gguf", "convert")
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // int(block) * int(block_bytes)
