"""Importance matrices, as llama.cpp's `llama-imatrix` writes them: how much each input of a matrix matters.

Two forms are read. GGUF: for each matrix `NAME.in_sum2` (sums of squared inputs) and `NAME.counts` (over how many
tokens); importance is their quotient. The older binary form: a count of entries, for each its name, number of calls and
values already multiplied by that number. Contract: llama.cpp's `common/imatrix-loader.cpp` and `tools/quantize`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import GGUFError, ImatrixError
from edgevlm.files import open_regular
from edgevlm.gguf import GGUFHeader, TensorInfo, read_container

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = 0  # enum ggml_type
_SHOWN = 5  # names listed in an error
_NAME_LIMIT_BYTES = 63  # of a tensor in a GGUF file
_ENTRIES_LIMIT = 1 << 16
# A mean of squared activations. The quantizer multiplies it with third powers of weights in float32, and IQ3_S aborts
# where that overflows: this is the most that `quant.py`'s largest weight leaves.
_LARGEST = 1e12
#: `llama-imatrix` leaves these out unless it is told otherwise, and a tied model has one of them only.
_OPTIONAL = frozenset({"token_embd.weight", "output.weight"})


@dataclass(frozen=True)
class Imatrix:
    """A checked importance matrix.

    Attributes:
        name: The file's name, without its folder.
        sha256: Of the file, 64 hex digits.
        values: For each matrix of the model that the file knows, float32 [row width], finite and not negative.
    """

    name: str
    sha256: str
    values: Mapping[str, NDArray[np.float32]]


def read_imatrix(path: str | os.PathLike[str], widths: Mapping[str, int]) -> Imatrix:
    """Read an importance matrix for a model.

    Args:
        path: A file of either form; its first bytes say which.
        widths: Row width of each matrix of the model, by GGUF name.

    Raises:
        FileError: there is no such regular file.
        ImatrixError: `imatrix.invalid` for a file that is no importance matrix or a damaged one, `imatrix.mismatch`
            for one that belongs to another model, naming the tensors.
    """
    path = Path(path)
    with open_regular(path) as (file, size):
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        is_gguf = file.read(4) == b"GGUF"
        file.seek(0)
        reader = _read_gguf if is_gguf else _read_legacy
        values = reader(path, file, size, widths)
    return Imatrix(path.name, sha256, values)


def _read_gguf(
    path: Path, file: BufferedReader, size: int, widths: Mapping[str, int]
) -> dict[str, NDArray[np.float32]]:
    try:
        header = read_container(path)
    except GGUFError as error:
        raise ImatrixError(f"{error}; {_ADVICE}", code="imatrix.invalid") from error
    sums, counts = _pairs(path, header)
    _check_names(path, list(sums), widths)
    found = {}
    for name, info in sums.items():
        _check_width(path, name, info.shape[-1], widths)
        if info.shape[:-1] not in ((), (1,)) or counts[name].shape not in ((1,), (1, 1)):
            _mismatch(path, f"{name} has several matrices in it, as experts have")
        (count,) = _numbers(file, header, counts[name])
        if not 1 <= count <= 2.0**40 or count != np.floor(count):
            _invalid(path, f"{name} counts {count} tokens, a whole number above 0 is needed")
        found[name] = _checked(path, name, _numbers(file, header, info) / count)
    return found


def _pairs(path: Path, header: GGUFHeader) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Sums and counts by the name of their matrix; each must have its partner, and nothing else may be there."""
    kind = header.metadata.get("general.type", "imatrix")
    sums = {t.name.removesuffix(_SUMS): t for t in header.tensors if t.name.endswith(_SUMS)}
    counts = {t.name.removesuffix(_COUNTS): t for t in header.tensors if t.name.endswith(_COUNTS)}
    if kind != "imatrix" or not sums or len(sums) + len(counts) != len(header.tensors):
        _invalid(path, f"it is a GGUF file of another kind (general.type is {str(kind)[:40]!r})")
    single = sorted(set(sums) ^ set(counts))
    if single:
        _invalid(path, f"sums and counts do not both exist for {_listed(single)}")
    wrong = sorted(t.name for t in header.tensors if t.type_id != _F32)
    if wrong:
        _invalid(path, f"{_listed(wrong)} must be F32")
    return sums, counts


def _numbers(file: BufferedReader, header: GGUFHeader, info: TensorInfo) -> NDArray[np.float32]:
    file.seek(header.data_offset + info.offset)
    return np.frombuffer(file.read(info.nbytes), "<f4")


def _read_legacy(
    path: Path, file: BufferedReader, size: int, widths: Mapping[str, int]
) -> dict[str, NDArray[np.float32]]:
    def whole(what: str, low: int, high: int) -> int:
        value: int = struct.unpack("<i", take(4, what))[0]
        if not low <= value <= high:
            _invalid(path, f"{what} is {value}, not a number from {low} to {high}")
        return value

    def take(nbytes: int, what: str) -> bytes:
        if file.tell() + nbytes > size:
            _invalid(path, f"it ends inside {what}")
        return file.read(nbytes)

    found = {}
    for i in range(whole("the number of entries", 1, _ENTRIES_LIMIT)):
        where = f"entry {i + 1}"
        raw = take(whole(f"the length of the name of {where}", 1, _NAME_LIMIT_BYTES), where)
        name = raw.decode("ascii", "replace")
        if not name.isprintable() or "\N{REPLACEMENT CHARACTER}" in name or name in found:
            _invalid(path, f"the name of {where} is malformed or appears twice")
        calls = whole(f"the number of calls of {name}", 0, (1 << 31) - 1)
        width = whole(f"the number of values of {name}", 1, (1 << 31) - 1)
        _check_names(path, [name], widths, complete=False)
        _check_width(path, name, width, widths)
        sums = np.frombuffer(take(4 * width, name), "<f4")
        found[name] = _checked(path, name, np.divide(sums, calls or 1, dtype=np.float32))
    # llama.cpp appends how many chunks it read, and of which file; older versions do not.
    if file.tell() < size:
        whole("the number of chunks", 0, (1 << 31) - 1)
    if file.tell() < size:
        take(whole("the length of the data set's name", 0, 1 << 16), "the data set's name")
    if file.tell() < size:
        _invalid(path, f"{size - file.tell()} bytes follow its end")
    _check_names(path, list(found), widths)
    return found


def _check_names(path: Path, names: list[str], widths: Mapping[str, int], *, complete: bool = True) -> None:
    """Whether a file's names are the model's: a matrix of another model would steer the quantizer astray."""
    unknown = sorted(set(names) - set(widths) - _OPTIONAL)
    if unknown:
        _mismatch(path, f"this model has no {_listed(unknown)}")
    missing = sorted(set(widths) - set(names) - _OPTIONAL) if complete else []
    if missing:
        _mismatch(path, f"it has nothing about {_listed(missing)}")


def _check_width(path: Path, name: str, width: int, widths: Mapping[str, int]) -> None:
    if width != widths.get(name, width):
        _mismatch(path, f"{name} has {width} values, this model's rows have {widths[name]}")


def _checked(path: Path, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values as they are, if the quantizer can work with them."""
    if not np.all((values >= 0) & (values <= _LARGEST)):  # false for NaN, too
        _invalid(path, f"{name} has a value that is negative, not finite or above {_LARGEST:g}")
    if not values.any():
        _invalid(path, f"{name} is zero throughout")
    return np.ascontiguousarray(values, np.float32)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:80] for name in names[:_SHOWN]) + more


_ADVICE = "give a file that llama-imatrix wrote, and copy it again if it should be one"


def _invalid(path: Path, what: str) -> NoReturn:
    raise ImatrixError(f"{path} is not a usable importance matrix: {what}; {_ADVICE}", code="imatrix.invalid")


def _mismatch(path: Path, what: str) -> NoReturn:
    raise ImatrixError(
        f"{path} is the importance matrix of another model: {what}; give one that was made from this model",
        code="imatrix.mismatch",
    )
