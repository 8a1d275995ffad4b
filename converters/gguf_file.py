"""GGUF files, written in one stream and read back one tensor at a time: the only import of the package `gguf`.

The writer leaves out everything that differs between two runs (dates, paths, ids): equal input gives equal bytes. The
header is known before the first weight is read, and so is the size of the file. Format: ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import CheckpointError, need
from edgevlm.files import open_regular
from edgevlm.gguf import GGUFHeader, read_container
from edgevlm.storage import storage_errors

#: Stored type -> the numpy type that carries its bits.
PLAIN_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
# enum gguf_type -> struct format; a text has none
_STRING, _ARRAY = 8, 9
_FORMATS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_SCALAR_TYPES = {bool: 7, str: _STRING, float: 6, int: 4}
#: Types whose bits numpy has a type for; gguf takes the others as bytes.
_TYPED = ("F32", "F16")
_ITEM_TYPES = {str: _STRING, float: 6, int: 5}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: `produce()` gives its bytes when its turn comes, as arrays that follow one another."""

    name: str
    shape: tuple[int, ...]
    type: str
    produce: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.type)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a finished file: `bits` is a view of the mapped file, bytes in rows unless it is F32 or F16."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    bits: NDArray[Any]


def header(arch: str, metadata: dict[str, Any], tensors: list[PlannedTensor]) -> bytes:
    """Everything before the weights, padded.

    Args:
        arch: `general.architecture`.
        metadata: Keys in file order. bool, str, float (stored as float32) and int (uint32); lists of str, int (int32)
            or float (float32).
        tensors: In file order.
    """
    keys = {"general.architecture": arch, **metadata}
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(keys))]
    for key, value in keys.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [_text(tensor.name), dims, struct.pack("<IQ", type_id(tensor.type), offset)]
        offset += padded(tensor.nbytes)
    joined = b"".join(parts)
    return joined + bytes(-len(joined) % _ALIGNMENT)


def file_bytes(head: bytes, tensors: Iterable[PlannedTensor]) -> int:
    """The size of the file that `write` makes."""
    return len(head) + sum(padded(tensor.nbytes) for tensor in tensors)


def padded(size: int) -> int:
    """Bytes that a tensor takes in a file, with what keeps the next one aligned."""
    return size + -size % _ALIGNMENT


def write(path: Path, head: bytes, tensors: list[PlannedTensor]) -> None:
    """Write a file.

    Args:
        path: Must not exist.
        head: What `header` made of these tensors.
        tensors: In file order.

    Raises:
        StorageError: the disk is full or refuses.
        CheckpointError: whatever a tensor's `produce` raises.
    """
    needed = file_bytes(head, tensors)
    with storage_errors(path, needed=needed):
        file = open(path, "xb")  # noqa: SIM115 - closed below, where a failure has to become ours as well
    try:
        _write_all(file, path, needed, [head])
        for tensor in tensors:
            written = _write_all(file, path, needed, tensor.produce())
            assert written == tensor.nbytes, f"{tensor.name} has {written} bytes, {tensor.nbytes} were planned"
            _write_all(file, path, needed, [bytes(-written % _ALIGNMENT)])
    finally:
        with storage_errors(path, needed=needed):
            file.close()


@contextlib.contextmanager
def hollow(head: bytes, tensors: list[PlannedTensor]) -> Iterator[Path]:
    """A file whose weights are a hole: it has its full length and takes no room. For what reads headers alone.

    Raises:
        StorageError: not even such a file can be made.
    """
    with contextlib.ExitStack() as stack:
        with storage_errors(Path(tempfile.gettempdir()), needed=file_bytes(head, tensors)):
            file: IO[bytes]
            if hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd"):
                file = stack.enter_context(os.fdopen(os.memfd_create("edgevlm"), "wb"))
                path = Path(f"/proc/self/fd/{file.fileno()}")
            else:
                file = stack.enter_context(tempfile.NamedTemporaryFile("wb"))
                path = Path(file.name)
            file.write(head)
            file.flush()
            file.truncate(file_bytes(head, tensors))
        yield path


def _write_all(file: IO[bytes], path: Path, needed: int, blocks: Iterable[bytes | NDArray[Any]]) -> int:
    """Write blocks one after the other, each before the next is asked for; returns the bytes."""
    written = 0
    for block in blocks:
        whole = np.ascontiguousarray(block).data if isinstance(block, np.ndarray) else block
        with storage_errors(path, needed=needed):
            written += file.write(whole)
            file.flush()
    return written


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value behind its type."""
    if not isinstance(value, list):
        kind = _SCALAR_TYPES[type(value)]
        return struct.pack("<I", kind) + (_text(value) if kind == _STRING else struct.pack(_FORMATS[kind], value))
    kind = _ITEM_TYPES[type(value[0])]
    head = struct.pack("<IIQ", _ARRAY, kind, len(value))
    if kind == _STRING:
        return head + b"".join([_text(item) for item in value])
    return head + struct.pack(f"<{len(value)}{_FORMATS[kind][1]}", *value)


def read_tensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a finished file, in file order."""
    gguf = need("gguf", "convert")
    found = read_container(path)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for tensor in found.tensors:
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        raw = np.frombuffer(mapped, np.uint8, tensor.nbytes, found.data_offset + tensor.offset)
        if kind.name in _TYPED:
            bits = raw.view(PLAIN_TYPES[kind.name]).reshape(tensor.shape)
        else:
            bits = raw.reshape(*tensor.shape[:-1], -1)
        yield StoredTensor(tensor.name, tensor.shape, kind.name, tensor.nbytes, bits)


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
