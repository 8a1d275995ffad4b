"""pytorch_model.bin without torch: a zip archive of raw storages, and a pickle that says which tensor lies where.

The pickle is read as data (`pickle_data.py`): it may mention the names below and nothing else, and none of them is
ever imported or called. Tensors are views of the mapped file, as those of safetensors are.
Layout: torch's `torch/serialization.py`; `_rebuild_tensor_v2` in `torch/_utils.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.pickle_data import Machine, Name, UnsafeError
from edgevlm.converters.safetensors import DTYPES, Tensor
from edgevlm.converters.zip_stored import open_zip
from edgevlm.errors import CheckpointError

_PICKLE_LIMIT_BYTES = 64 << 20
_TENSOR_LIMIT = 1_000_000
_NAME_LIMIT = 1024
_RANK_LIMIT = 8
_SIZE_LIMIT = 1 << 48
_STORAGES = {
    "torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64", "torch.LongStorage": "I64", "torch.IntStorage": "I32", "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
}  # fmt: skip
#: Entries beside the pickle and the storages; they say nothing about the numbers, but for `byteorder`.
_SIDE = {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9"  # torch's magic number, pickled, before torch 1.6


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor of a pickle: `count` numbers of a storage from `offset` on."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def open_file(path: Path) -> dict[str, Tensor]:
    """Map one file and list its tensors in the order of the pickle.

    Raises:
        CheckpointError: `checkpoint.invalid` for a damaged file, `checkpoint.unsupported` for a pickle that asks for
            more than tensors, and for torch's oldest format.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_LEGACY)) == _LEGACY:
                _refuse(path, "it has the format of torch before 1.6, which cannot be read without running it")
        entries = open_zip(path)
        raw, storages = _sort_entries(entries)
        views = _views(raw)
        return {name: Tensor(name, *_bits(view, storages)) for name, view in _checked(views, storages).items()}
    except UnsafeError as error:
        _refuse(path, f"its pickle asks for {error}, which no state dict needs; nothing of it was run")
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a valid pytorch_model.bin: {error}; download it again", code="checkpoint.invalid"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", code="checkpoint.invalid") from error


def _sort_entries(entries: dict[str, NDArray[np.uint8]]) -> tuple[bytes, dict[str, NDArray[np.uint8]]]:
    """The pickle, and the storages by key; all entries lie in one folder, whose name is anybody's."""
    roots = {name.partition("/")[0] for name in entries}
    if len(roots) != 1 or f"{(root := roots.pop())}/data.pkl" not in entries:
        raise ValueError("its archive does not hold one folder with data.pkl")
    inside = {name.removeprefix(f"{root}/"): data for name, data in entries.items()}
    pickle = inside.pop("data.pkl")
    storages = {name.removeprefix("data/"): data for name, data in inside.items() if name.startswith("data/")}
    unknown = sorted(name for name in inside if not name.startswith("data/") and name not in _SIDE)
    if unknown:
        raise ValueError(f"its archive holds {unknown[0][:80]!r}, which is no part of a state dict")
    if inside.get("byteorder", np.frombuffer(b"little", np.uint8)).tobytes() != b"little":
        raise ValueError("its numbers are not little-endian")
    if pickle.size > _PICKLE_LIMIT_BYTES:
        raise ValueError(f"its pickle has {pickle.size} bytes")
    return pickle.tobytes(), storages


def _views(raw: bytes) -> dict[str, _View]:
    """What the pickle says of each tensor."""
    calls: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _ordered_dict,
        "torch.Size": _size,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
    }
    found = Machine(raw, frozenset({*calls, *_STORAGES}), calls, _storage).run()
    if type(found) is not dict or not 1 <= len(found) <= _TENSOR_LIMIT:
        raise ValueError(f"its pickle holds a {type(found).__name__}, no tensors by name")
    for name, view in found.items():
        if type(name) is not str or not 1 <= len(name) <= _NAME_LIMIT or not name.isprintable():
            raise ValueError("a tensor has an unusable name")
        if not isinstance(view, _View):
            raise ValueError(f"{name[:80]!r} is a {type(view).__name__}, no tensor")
    return found


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _storage(parts: Any) -> _Storage:
    """A persistent id: ("storage", type, key, device, count)."""
    if type(parts) is not tuple or len(parts) != 5 or parts[0] != "storage":
        raise UnsafeError("an object outside the file that is no storage")
    _, kind, key, _, count = parts
    if not isinstance(kind, Name) or kind.text not in _STORAGES or type(key) is not str:
        raise UnsafeError("a storage of an unknown type")
    if type(count) is not int or not 0 <= count <= _SIZE_LIMIT:
        raise ValueError("a storage has an unusable size")
    return _Storage(key, _STORAGES[kind.text], count)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any) -> _View:
    """What follows the strides says whether gradients are wanted."""
    if not isinstance(storage, _Storage) or type(offset) is not int or not 0 <= offset <= _SIZE_LIMIT:
        raise ValueError("a tensor has no storage, or an unusable offset")
    shape, strides = _size(shape), _size(strides)
    if len(shape) != len(strides) or len(_unused) > 3:
        raise ValueError("a tensor has as many strides as axes, here are others")
    dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if 0 not in shape and any(n > 1 and a != b for n, a, b in zip(shape, strides, dense, strict=True)):
        raise UnsafeError(f"a tensor of the strides {strides} instead of {tuple(dense)}, a transposed or cut-out one")
    return _View(storage, offset, shape)


def _rebuild_parameter(tensor: Any, *_unused: Any) -> _View:
    if not isinstance(tensor, _View) or len(_unused) > 2:
        raise ValueError("a parameter is no tensor")
    return tensor


def _size(numbers: Any) -> tuple[int, ...]:
    if type(numbers) is not tuple or len(numbers) > _RANK_LIMIT:
        raise ValueError("a tensor has an unusable shape")
    if not all(type(number) is int and 0 <= number <= _SIZE_LIMIT for number in numbers):
        raise ValueError("a tensor has an unusable shape")
    return numbers


def _checked(views: dict[str, _View], storages: dict[str, NDArray[np.uint8]]) -> dict[str, _View]:
    """Tensors may share a storage as one and the same or side by side; each storage has its size and is used."""
    by_key: dict[str, _Storage] = {}
    for name, view in views.items():
        storage = by_key.setdefault(view.storage.key, view.storage)
        if storage != view.storage:
            raise ValueError(f"{name[:80]!r} gives its storage another type or size than others do")
        if storage.key not in storages:
            raise ValueError(f"the numbers of {name[:80]!r} are missing")
        nbytes = storage.count * np.dtype(DTYPES[storage.dtype][0]).itemsize
        if nbytes != storages[storage.key].size or view.offset + view.count > storage.count:
            raise ValueError(f"{name[:80]!r} does not fit its storage of {storages[storage.key].size} bytes")
    if set(by_key) != set(storages):
        raise ValueError("it holds numbers that no tensor uses")
    spans = {(view.storage.key, view.offset, view.offset + view.count) for view in views.values() if view.count}
    for (key, _, end), (other, begin, _) in itertools.pairwise(sorted(spans)):
        if key == other and begin < end:
            raise ValueError("two tensors overlap in part")
    return views


def _bits(view: _View, storages: dict[str, NDArray[np.uint8]]) -> tuple[str, tuple[int, ...], NDArray[Any]]:
    """(dtype, shape, the mapped numbers)."""
    kind = np.dtype(DTYPES[view.storage.dtype][0])
    begin = view.offset * kind.itemsize
    data = storages[view.storage.key][begin : begin + view.count * kind.itemsize]
    return view.storage.dtype, view.shape, data.view(kind).reshape(view.shape)


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {why}; save the model as safetensors (`save_pretrained`) on a machine that trusts it",
        code="checkpoint.unsupported",
    )
