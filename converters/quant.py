"""Types of decoder weights, and llama.cpp's quantizer, called in this process.

llama.cpp mixes types within one recipe and replaces a type whose block does not divide a tensor's rows, with no more
than a log line. `Recipe.types` says what the recipe may produce, so that `verify.py` can name every replacement.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm import llama
from edgevlm.converters import gguf_file
from edgevlm.errors import BackendError, UsageError
from edgevlm.machine import usable_cpus
from edgevlm.storage import free_bytes, full, storage_errors

_BUFFER_BYTES = 256 << 20  # rows in memory at once; llama.cpp's own default of 8 GiB is too much for a small board


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One choice of `decoder_quant`.

    Attributes:
        name: As the user writes it.
        file_type: enum llama_ftype, also stored as `general.file_type`.
        types: ggml types of matrices that the recipe produces when every row fits.
        bits: Bits per weight, rounded up, to estimate the size beforehand.
        direct: Written without the quantizer: the numbers are only rounded.
        pure: One type for all matrices, the embedding and the output included.
    """

    name: str
    file_type: int
    types: tuple[str, ...]
    bits: float
    direct: bool = False
    pure: bool = False


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="f32", file_type=0, types=("F32",), bits=32, direct=True),
        Recipe(name="f16", file_type=1, types=("F16",), bits=16, direct=True),
        Recipe(name="bf16", file_type=32, types=("BF16",), bits=16, direct=True),
        Recipe(name="q8_0", file_type=7, types=("Q8_0",), bits=8.5),
        Recipe(name="q6_k", file_type=18, types=("Q6_K",), bits=6.6),
        Recipe(name="q5_k_m", file_type=17, types=("Q5_K", "Q6_K"), bits=6.0),
        Recipe(name="q4_k_m", file_type=15, types=("Q4_K", "Q6_K"), bits=5.5),
        # IQ4_NL keeps the output in Q6_K and, without an importance matrix, the first down projections (and V under
        # grouped attention) in Q5_K.
        Recipe(name="iq4_nl", file_type=25, types=("IQ4_NL", "Q5_K", "Q6_K"), bits=5.2),
        Recipe(name="q4_0", file_type=2, types=("Q4_0",), bits=4.5, pure=True),
    )
}


#: Instead of a recipe's name: `targets.py` chooses.
AUTO = "auto"


def recipe(name: str) -> Recipe:
    """Find a recipe, ignoring case.

    Raises:
        UsageError: with the valid names.
    """
    found = RECIPES.get(name.lower())
    if found is None:
        raise UsageError(f"decoder_quant is {name!r}, it must be one of {', '.join(RECIPES)} or {AUTO}")
    return found


def quantize(
    source: Path,
    out: Path,
    wanted: Recipe,
    *,
    size_estimate: int,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Quantize a GGUF file with llama.cpp; the result does not depend on the number of threads.

    Args:
        source: F32, F16 or BF16 matrices.
        out: Must not exist.
        wanted: Not a `direct` recipe.
        size_estimate: Bytes that `out` will take, to tell a full disk from other failures.
        importance: For each matrix how much each of its inputs matters, float32 [row width] (see `imatrix.py`). With
            it llama.cpp would store a few matrices of `q4_0` as Q4_1, were that recipe not pure.
        types: For single matrices another ggml type than the recipe's; its blocks must divide their rows.

    Raises:
        StorageError: the disk is full.
        BackendError: llama.cpp failed, with the end of its log.
    """
    native = llama.library()
    params = native.llama_model_quantize_default_params()
    params.nthread = usable_cpus()
    params.ftype = wanted.file_type
    params.pure = wanted.pure
    params.max_buf_size = _BUFFER_BYTES
    # llama.cpp reads these arrays during the call: they need names of their own, or they would be freed before.
    entries, overrides = _imatrix(native, importance or {}), _overrides(native, types or {})
    if importance:
        params.imatrix = entries
    if types:
        params.tt_overrides = overrides
    llama.clear_log()
    status = native.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    if status == 0:
        return
    reason = llama.last_log()
    _check_room(out, size_estimate)
    raise BackendError(f"llama.cpp could not quantize to {wanted.name}: {reason}", code="backend.failed")


def _imatrix(native: ModuleType, importance: Mapping[str, NDArray[np.float32]]) -> Any:
    """llama.cpp's array of entries, ended by one without a name; it points into the arrays of `importance`."""
    numbers = ctypes.POINTER(ctypes.c_float)
    entries = (native.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        assert values.dtype == np.float32, name
        assert values.flags.c_contiguous, name
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(numbers), values.size
    return entries


def _overrides(native: ModuleType, types: Mapping[str, str]) -> Any:
    """llama.cpp's array of (regular expression, type), ended by one without an expression."""
    entries = (native.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(entries, types.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), gguf_file.type_id(kind)
    return entries


def _check_room(out: Path, needed: int) -> None:
    """Raise StorageError if there is no room for `out`: llama.cpp says only "iostream error" then.

    Free room is compared because a write beyond the end takes none; that write finds the limits on a file's length.
    """
    written = out.stat().st_size if out.exists() else 0
    if written + free_bytes(out) < needed:
        raise full(out, needed)
    with storage_errors(out, needed=needed), open(out, "r+b" if written else "wb") as file:
        file.seek(needed)
        file.write(b"\0")
