"""Types of decoder weights, and llama.cpp's quantizer, called in this process.

llama.cpp mixes types within one recipe and replaces a type whose block does not divide a tensor's rows, with no more
than a log line. So it is asked first, by a rehearsal on a file without weights, which type each tensor gets; then the
same functions that its own quantizer calls make them, block by block, from the checkpoint itself: no file in between,
and the size is known beforehand. The result is the file that `llama-quantize` writes, byte by byte.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm import llama
from edgevlm.converters import gguf_file
from edgevlm.converters.finite import all_finite
from edgevlm.converters.gguf_file import PlannedTensor
from edgevlm.errors import BackendError, CheckpointError, UsageError

#: `GGML_QNT_VERSION`: the version of the quantized formats, which files carry.
VERSION = 2
# "[  3/ 20] blk.0.attn_k.weight - [64, 32, 1, 1], type = f16, size = 1.00 MiB -> 0.50 MiB (q8_0)"
_REHEARSED = re.compile(
    r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +\w+, size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)

# The most that a block of any type can stand for is 65504 * 128 * 32 (Q6_K: a float16, an int8 and six bits). ggml
# raises weights to the fourth power in float32: far beyond, it stores zeros (Q6_K, Q3_K), or aborts (IQ3_S).
_LARGEST = 2.0**29


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


def stored_types(
    arch: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Recipe,
    *,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    types: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Which type llama.cpp's quantizer gives to each matrix.

    Args:
        arch, metadata: Of the file; the sizes of the model are enough.
        shapes: Every tensor of the file, matrices and vectors.
        wanted: Not a `direct` recipe.
        importance: For each matrix how much each of its inputs matters, float32 [row width] (see `imatrix.py`).
        types: For single matrices another ggml type than the recipe's; its blocks must divide their rows.

    Returns:
        GGUF name -> ggml type, of matrices alone, in the order of the quantizer's files.

    Raises:
        BackendError: llama.cpp refuses the model, with the end of its log.
        StorageError: a file as large as the checkpoint, but empty, cannot be made.
    """
    native = llama.library()
    params = native.llama_model_quantize_default_params()
    params.dry_run = True
    params.ftype = wanted.file_type
    params.pure = wanted.pure
    # llama.cpp reads these arrays during the call: they need names of their own, or they would be freed before.
    entries, overrides = _imatrix(native, importance or {}), _overrides(native, types or {})
    if importance:
        params.imatrix = entries
    if types:
        params.tt_overrides = overrides
    tensors = [
        PlannedTensor(name, shape, "F16" if len(shape) > 1 else "F32", lambda: ()) for name, shape in shapes.items()
    ]
    with (
        gguf_file.hollow(gguf_file.header(arch, dict(metadata), tensors), tensors) as path,
        llama.recorded_log() as log,
    ):
        status = native.llama_model_quantize(os.fsencode(path), b"", ctypes.byref(params))
    if status != 0:
        raise BackendError(f"llama.cpp could not quantize to {wanted.name}: {llama.last_log()}", code="backend.failed")
    found = {name: (kind or "F16").upper() for name, kind in _REHEARSED.findall("".join(log))}
    if set(found) != set(shapes):
        raise BackendError("llama.cpp's log has another form than this version should have", code="backend.failed")
    return {name: kind for name, kind in found.items() if len(shapes[name]) > 1}


@functools.cache
def _quantizer() -> Any:
    """`ggml_quantize_chunk`, which llama.cpp's library brings along and the binding does not declare."""
    function = llama.library()._lib.ggml_quantize_chunk
    whole = ctypes.c_int64
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, whole, whole, whole, ctypes.c_void_p]
    return function


def quantize_rows(
    rows_RD: NDArray[np.float32], kind: str, name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Rows of a matrix as a ggml type; what becomes of a row does not depend on its neighbours.

    Args:
        rows_RD: float32 [rows, width], contiguous and finite.
        kind: A type whose blocks divide the width.
        name: Of the matrix, for the error.
        importance: float32 [width], contiguous, or None.

    Returns:
        uint8, the rows one after the other.

    Raises:
        CheckpointError: `checkpoint.overflow`: a scale does not fit into float16.
    """
    rows, width = rows_RD.shape
    assert rows_RD.dtype == np.float32, name
    assert rows_RD.flags.c_contiguous, name
    assert importance is None or importance.shape == (width,), name
    assert importance is None or importance.dtype == np.float32, name
    largest = max(float(rows_RD.max()), -float(rows_RD.min()))
    if largest <= _LARGEST:
        out = np.empty(gguf_file.nbytes((rows, width), kind), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        written = _quantizer()(gguf_file.type_id(kind), rows_RD.ctypes.data, out.ctypes.data, 0, rows, width, weights)
        assert written == out.nbytes, name
        if all_finite(out, kind):
            return out
    raise CheckpointError(
        f"{name} holds {largest:.6g}, too much for {kind}; convert with bf16 or f32", code="checkpoint.overflow"
    )


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
