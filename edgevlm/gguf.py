"""Read and check a GGUF header before llama.cpp sees the file.

llama.cpp answers many malformed files with abort(), which would take the whole process along. This reader walks the
header with limits on every length (format: ggml's `docs/gguf.md`), checks that all tensor data lies inside the file,
and checks the values that llama.cpp asserts on for the `llama` architecture. It never maps the file and never reads
weights.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgevlm.errors import GGUFError
from edgevlm.files import open_regular

_HEADER_LIMIT_BYTES = 256 << 20
_STRING_LIMIT_BYTES = 16 << 20
_KV_LIMIT = 4096
_TENSOR_LIMIT = 65536
_STRINGS_LIMIT = 1 << 20
#: Arrays that are looked at; of all others (merges above all) only the lengths are walked, and None is kept.
_KEPT_ARRAYS = frozenset({f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores")})
_KEY = re.compile(r"[A-Za-z0-9_.\-]{1,256}")

# enum gguf_type -> struct format of a scalar; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# enum ggml_type -> (elements per block, bytes per block), for the types that llama.cpp can multiply with
_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66), 17: (256, 74), 18: (256, 98),
    19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of the file. `shape` is in numpy order (GGUF stores it reversed), `offset` in bytes from the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """The checked header.

    Attributes:
        path: The file.
        metadata: Values by key; None for arrays that were skipped.
        places: Where each key lies with its value, as offsets of first byte and end.
        tensors: In file order.
        infos: Where the list of tensors lies.
        data_offset: Where the tensors' data begins.
    """

    path: Path
    metadata: dict[str, Any]
    places: dict[str, tuple[int, int]]
    tensors: tuple[TensorInfo, ...]
    infos: tuple[int, int]
    data_offset: int

    @property
    def chat_template(self) -> str | None:
        return self.metadata.get("tokenizer.chat_template")

    @property
    def context_length(self) -> int:
        return int(self.metadata["llama.context_length"])

    @property
    def has_float_matrices(self) -> bool:
        """Whether a matrix is stored as F32, F16 or BF16; norms and biases always are."""
        return any(
            tensor.type_id in (0, 1, 30) and sum(size > 1 for size in tensor.shape) > 1 for tensor in self.tensors
        )

    def token(self, role: str) -> str:
        """Text of the token with a role, such as `bos` or `eos`; empty if the file names none."""
        index = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return "" if index is None else self.metadata["tokenizer.ggml.tokens"][index]


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of a text model of the `llama` architecture.

    Raises:
        FileError: there is no such regular file, or it cannot be read.
        GGUFError: `gguf.invalid`, `gguf.truncated` or `gguf.unsupported`, naming the place.
    """
    header = read_container(path)
    _check_llama(header.path, header)
    return header


def read_container(path: str | os.PathLike[str], kept_arrays: frozenset[str] = _KEPT_ARRAYS) -> GGUFHeader:
    """Read and check the header of a GGUF file that need not be a model: the format's rules alone.

    Args:
        path: The file.
        kept_arrays: Keys of arrays whose values are wanted; of others only the lengths are walked.

    Raises:
        FileError: there is no such regular file, or it cannot be read.
        GGUFError: `gguf.invalid`, `gguf.truncated` or `gguf.unsupported`, naming the place.
    """
    path = Path(path)
    with open_regular(path) as (file, size):
        try:
            return _parse(_Cursor(path, file.fileno(), size, kept_arrays))
        except struct.error as error:
            raise GGUFError(f"{path} is not a usable GGUF file: {error}", code="gguf.invalid") from error


class _Cursor:
    """Sequential reads from a file descriptor, never past the end of the file or the header limit."""

    def __init__(self, path: Path, fd: int, size: int, kept_arrays: frozenset[str]) -> None:
        self.path, self.size, self.position, self.kept_arrays = path, size, 0, kept_arrays
        self._fd, self._window, self._base = fd, b"", 0

    def fail(self, what: str, code: str = "gguf.invalid") -> NoReturn:
        raise GGUFError(f"{self.path} is not a usable GGUF file: {what}", code=code)

    def skip(self, nbytes: int) -> None:
        """Move on without reading."""
        if self.position + nbytes > self.size:
            self.fail("it ends inside its header; copy it again", "gguf.truncated")
        if self.position + nbytes > _HEADER_LIMIT_BYTES:
            self.fail(f"its header is larger than {_HEADER_LIMIT_BYTES >> 20} MiB")
        self.position += nbytes

    def take(self, nbytes: int) -> int:
        """Make the next bytes available in the window; returns where in it they begin."""
        start = self.position
        self.skip(nbytes)
        if not self._base <= start <= self._base + len(self._window) - nbytes:
            self._window = os.pread(self._fd, max(1 << 20, nbytes), start)
            self._base = start
            if len(self._window) < nbytes:
                self.fail("it ends inside its header; copy it again", "gguf.truncated")
        return start - self._base

    def raw(self, nbytes: int) -> bytes:
        start = self.take(nbytes)
        return self._window[start : start + nbytes]

    def scalar(self, form: str) -> Any:
        start = self.take(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self._window, start)[0]

    def array(self, form: str, count: int) -> tuple[Any, ...]:
        start = self.take(struct.calcsize("<" + form) * count)
        return struct.unpack_from(f"<{count}{form}", self._window, start)

    def string_length(self) -> int:
        length = int(self.scalar("Q"))
        if length > _STRING_LIMIT_BYTES:
            self.fail(f"a string of {length} bytes is longer than {_STRING_LIMIT_BYTES >> 20} MiB")
        return length

    def string(self) -> str:
        length = self.string_length()
        # Token texts need not be valid UTF-8 (SentencePiece byte pieces); surrogateescape keeps them distinct.
        return self.raw(length).decode("utf-8", "surrogateescape")

    def strings(self, count: int, *, keep: bool) -> list[str] | None:
        """The next `count` strings, or None if they are only walked.

        Whatever lies in the window is read in a loop of its own: a vocabulary has several 100,000 strings, and to call
        `string` for each took longer than all else that loading a model does.
        """
        found: list[str] = []
        length_of = struct.Struct("<Q").unpack_from
        left = count
        while left:
            window, start = self._window, self.position - self._base
            n_window = len(window)
            while left and start + 8 <= n_window:
                (length,) = length_of(window, start)
                end = start + 8 + length
                if end > n_window or length > _STRING_LIMIT_BYTES:
                    break
                if keep:
                    found.append(window[start + 8 : end].decode("utf-8", "surrogateescape"))
                start, left = end, left - 1
            self.position = self._base + start
            self.skip(0)  # the limits
            if left and keep:  # beyond the window, or too long
                found.append(self.string())
            elif left:
                self.skip(self.string_length())
            left -= bool(left)
        return found if keep else None


def _parse(cursor: _Cursor) -> GGUFHeader:
    if cursor.size < 24 or cursor.raw(4) != b"GGUF":
        cursor.fail("it does not begin with `GGUF`")
    version = cursor.scalar("I")
    if version not in (2, 3):
        cursor.fail(f"version {version}; versions 2 and 3 (little-endian) are supported", "gguf.unsupported")
    n_tensors, n_kv = cursor.scalar("Q"), cursor.scalar("Q")
    if n_kv > _KV_LIMIT or n_tensors > _TENSOR_LIMIT:
        cursor.fail(f"{n_kv} keys and {n_tensors} tensors are more than {_KV_LIMIT} and {_TENSOR_LIMIT}")
    metadata: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(n_kv):
        start = cursor.position
        key = cursor.string()
        if not _KEY.fullmatch(key) or key in metadata:
            cursor.fail(f"key {key[:80]!r} is malformed or appears twice")
        metadata[key] = _value(cursor, key, cursor.scalar("I"))
        places[key] = (start, cursor.position)
    start = cursor.position
    tensors = [_tensor(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 4096 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r}, not a power of two between 8 and 4096")
    infos = (start, cursor.position)
    data_offset = -(-cursor.position // alignment) * alignment
    _check_layout(cursor, tensors, data_offset, alignment)
    return GGUFHeader(
        path=cursor.path, metadata=metadata, places=places, tensors=tuple(tensors), infos=infos, data_offset=data_offset
    )


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        cursor.fail(f"{key} has the unknown type {kind}")
    item, count = cursor.scalar("I"), cursor.scalar("Q")
    if item in _SCALARS:
        if key in cursor.kept_arrays and count <= _STRINGS_LIMIT:
            return cursor.array(_SCALARS[item], count)
        cursor.skip(struct.calcsize("<" + _SCALARS[item]) * count)
        return None
    if item != _STRING:
        cursor.fail(f"{key} is an array of type {item}; only numbers and strings are allowed")
    if count > _STRINGS_LIMIT:
        cursor.fail(f"{key} has {count} strings, at most {_STRINGS_LIMIT} are allowed")
    return cursor.strings(count, keep=key in cursor.kept_arrays)


def _tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    n_dims = cursor.scalar("I")
    if not 1 <= len(name) <= 63 or "\0" in name or not 1 <= n_dims <= 4:
        cursor.fail(f"tensor {name[:80]!r} has a malformed name or {n_dims} dimensions")
    dims = cursor.array("Q", n_dims)
    type_id, offset = cursor.scalar("I"), cursor.scalar("Q")
    if type_id not in _TENSOR_TYPES:
        cursor.fail(f"tensor {name} has the unknown type {type_id}", "gguf.unsupported")
    block, block_bytes = _TENSOR_TYPES[type_id]
    if any(not 1 <= dim <= 1 << 40 for dim in dims) or dims[0] % block:
        cursor.fail(f"tensor {name} of shape {dims[::-1]} does not consist of whole blocks of {block}")
    elements = 1
    for dim in dims:
        elements *= dim
    return TensorInfo(
        name=name, shape=dims[::-1], type_id=type_id, offset=offset, nbytes=elements // block * block_bytes
    )


def _check_layout(cursor: _Cursor, tensors: list[TensorInfo], data_offset: int, alignment: int) -> None:
    """Tensor data is contiguous after padding and in order, as ggml writes it: no overlap, no gap, no hidden bytes."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        cursor.fail("a tensor name appears twice")
    end = 0
    for tensor in tensors:
        if tensor.offset != end:
            cursor.fail(f"tensor {tensor.name} begins at {tensor.offset} instead of {end}")
        end = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
    needed = data_offset + (tensors[-1].offset + tensors[-1].nbytes if tensors else 0)
    if cursor.size < needed:
        cursor.fail(f"it has {cursor.size} bytes, its header needs {needed}; copy it again", "gguf.truncated")
    if cursor.size > data_offset + end:
        cursor.fail(f"{cursor.size - data_offset - end} bytes follow the last tensor")


def _check_llama(path: Path, header: GGUFHeader) -> None:
    """The values on which llama.cpp asserts or divides, for architecture `llama`."""
    from edgevlm.gguf_llama import check

    problem = check(header.metadata)
    if problem:
        code = "gguf.unsupported" if problem.unsupported else "gguf.invalid"
        raise GGUFError(f"{path} cannot be run: {problem.text}", code=code)
