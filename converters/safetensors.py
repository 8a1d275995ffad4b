"""Read safetensors files, strictly and without copying: a header of JSON, then raw little-endian numbers.

The format promises that tensors cover the data section exactly; the reference implementation relies on that for safety
and so do we (no overlap, no hole, no trailing bytes). Format: the `safetensors` README, "Format".
bfloat16 is the upper half of a float32, so numpy needs no type for it: see `widen_bits`.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import CheckpointError

_HEADER_LIMIT_BYTES = 100_000_000  # the reference implementation's limit
_TENSOR_LIMIT = 1_000_000
_NAME_LIMIT = 1024
_RANK_LIMIT = 8
_SIZE_LIMIT = 1 << 48  # of one axis: more is no shape for numpy, even with an axis of 0 beside it
#: dtype -> (numpy type of the stored bits, whether weights may have it)
DTYPES = {
    "F64": ("<f8", False), "F32": ("<f4", True), "F16": ("<f2", True), "BF16": ("<u2", True),
    "I64": ("<i8", False), "I32": ("<i4", False), "I16": ("<i2", False), "I8": ("i1", False), "U8": ("u1", False),
    "U16": ("<u2", False), "U32": ("<u4", False), "U64": ("<u8", False), "BOOL": ("?", False),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    Attributes:
        name: As in the file.
        dtype: safetensors' name, for example `BF16`.
        shape: Outermost axis first.
        bits: View of the mapped file in that shape; `BF16` appears as uint16.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: NDArray[Any]

    @property
    def usable(self) -> bool:
        """Whether the type is one that weights may have (F32, F16 or BF16)."""
        return DTYPES[self.dtype][1]


def widen(tensor: Tensor) -> NDArray[np.float32]:
    """A copy of the tensor's values as float32, exactly."""
    return widen_bits(tensor.bits, tensor.dtype)


def widen_bits(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored bits as float32: bfloat16 by a shift, float16 by the processor."""
    if dtype != "BF16":
        return bits.astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def open_file(path: Path) -> dict[str, Tensor]:
    """Map one file and list its tensors in the order of their data.

    Raises:
        CheckpointError: `checkpoint.invalid`, naming the file and the rule that it breaks.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 9:
                _refuse(path, f"it has {size} bytes, too few for a header")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", code="checkpoint.invalid") from error
    nbytes = int.from_bytes(mapped[:8], "little")
    if not 2 <= nbytes <= min(_HEADER_LIMIT_BYTES, size - 8):
        _refuse(path, f"its header claims {nbytes} bytes, the file has {size}")
    header = _parse_header(path, mapped[8 : 8 + nbytes])
    data = np.frombuffer(mapped, np.uint8, offset=8 + nbytes)
    return {tensor.name: tensor for tensor in _tensors(path, header, data)}


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json keeps the last of two equal keys: a file could show one tensor to us and another to a scanner
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    if not raw.startswith(b"{"):
        _refuse(path, "its header does not begin with `{`")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON ({error})")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its __metadata__ must map texts to texts")
    if not 1 <= len(header) <= _TENSOR_LIMIT:
        _refuse(path, f"it lists {len(header)} tensors")
    return header  # type: ignore[no-any-return]


def _tensors(path: Path, header: dict[str, Any], data: NDArray[np.uint8]) -> Iterator[Tensor]:
    entries = [(name, *_check_entry(path, name, entry)) for name, entry in header.items()]
    position = 0
    # Two tensors may share a start only if one is empty; sorting by both ends puts that one first.
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != position or end > data.size:
            _refuse(path, f"tensor {name!r} lies at {begin}..{end}, expected to begin at {position} of {data.size}")
        position = end
        yield Tensor(name, dtype, shape, data[begin:end].view(DTYPES[dtype][0]).reshape(shape))
    if position != data.size:
        _refuse(path, f"{data.size - position} bytes follow the last tensor")


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    label = f"tensor {name[:80]!r}"
    if not 1 <= len(name) <= _NAME_LIMIT or not name.isprintable():
        _refuse(path, f"{label} has an unusable name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{label} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(path, f"{label} has the unknown dtype {str(dtype)[:20]!r}")
    if not _whole_numbers(shape) or len(shape) > _RANK_LIMIT or max(shape, default=0) > _SIZE_LIMIT:
        _refuse(path, f"{label} has the unusable shape {str(shape)[:80]}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{label} has the unusable data_offsets {str(offsets)[:80]}")
    nbytes = math.prod(shape) * np.dtype(DTYPES[dtype][0]).itemsize
    if nbytes != offsets[1] - offsets[0]:
        _refuse(path, f"{label} needs {nbytes} bytes for {dtype} {shape}, it has {offsets[1] - offsets[0]}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _whole_numbers(values: Any) -> bool:
    # `type` rather than isinstance: True is an int
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is not a valid safetensors file: {why}; download it again", code="checkpoint.invalid"
    )
