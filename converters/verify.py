"""What a conversion cost, measured: the `fidelity` section of a bundle.

No number depends on time, so that converting twice on one machine gives the same bytes. Encoders sum in another order
on other processors; few digits make it unlikely, not impossible, that this shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import gguf_file, pages
from edgevlm.converters.gguf_file import StoredTensor
from edgevlm.converters.quant import Recipe

#: Gives each `step`-th row of a matrix when called with `step`, so that only a sample of one is in memory.
Matrix = Callable[[int], NDArray[np.float32]]

_SAMPLED_WEIGHTS = 1 << 20  # of each tensor, in evenly spaced rows: enough for three digits


def encoder_fidelity(
    reference_TND: NDArray[np.float32], found_TND: NDArray[np.float32], pictures: str
) -> dict[str, Any]:
    """Compare embeddings with those of the float32 graph of the same weights.

    Args:
        reference_TND, found_TND: float32, picture by picture, as the runtime encodes.
        pictures: What they were made of, in words.

    Returns:
        `cosine_mean` and `cosine_min` over all tokens, `relative_error` (RMS of the difference over RMS of the
        float32 embeddings), and what they were measured on.
    """
    cosine_TN = cosines(reference_TND, found_TND)
    return {
        "against": "the float32 graph of the same weights",
        "pictures": pictures,
        "cosine_mean": _cosine(float(cosine_TN.mean())),
        "cosine_min": _cosine(float(cosine_TN.min())),
        "relative_error": _significant(relative_error(reference_TND, found_TND), 2),
    }


def cosines(a_TND: NDArray[np.float32], b_TND: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of the angle between two embeddings of each token: float64 [T, N]."""
    a, b = a_TND.astype(np.float64), b_TND.astype(np.float64)
    lengths_TN = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine_TN: NDArray[np.float64] = (a * b).sum(-1) / np.maximum(lengths_TN, 1e-300)
    return cosine_TN


def relative_error(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """RMS of the difference, divided by the RMS of the reference."""
    difference = reference.astype(np.float64) - found
    return math.sqrt(float((difference**2).sum()) / max(float((reference.astype(np.float64) ** 2).sum()), 1e-300))


def decoder_fidelity(
    path: Path, exact: Mapping[str, Matrix], wanted: Recipe, chosen: Mapping[str, str]
) -> dict[str, Any]:
    """Compare the matrices of a finished GGUF file with the checkpoint's, type by type.

    Args:
        path: The finished file.
        exact: For each matrix a function that gives its true values, float32, in the file's layout.
        wanted: The recipe; matrices of another type are listed as `replaced`, with the reason.
        chosen: Matrices whose type was chosen one by one.

    Returns:
        `types`: for each ggml type the number of tensors, bytes and relative RMS error of its weights;
        `relative_error` over all matrices; `replaced`: tensor -> type, where a row did not fit the recipe's block.
    """
    totals: dict[str, list[float]] = {}  # type -> tensors, bytes, squared difference, squared reference
    replaced: dict[str, str] = {}
    for tensor in gguf_file.read_tensors(path):
        matrix = tensor.name in exact
        squares = _squares(exact[tensor.name], tensor) if matrix else (0.0, 0.0)
        entry = totals.setdefault(tensor.type, [0, 0, 0.0, 0.0])
        for i, amount in enumerate((1, tensor.nbytes, *squares)):
            entry[i] += amount
        if matrix and tensor.type not in (chosen.get(tensor.name), *wanted.types):
            replaced[tensor.name] = f"{tensor.type} ({_why(tensor, wanted)})"
    return {
        "against": "the checkpoint's weights",
        "relative_error": _ratio(sum(e[2] for e in totals.values()), sum(e[3] for e in totals.values())),
        "types": {
            kind: {"tensors": int(entry[0]), "bytes": int(entry[1]), "relative_error": _ratio(entry[2], entry[3])}
            for kind, entry in sorted(totals.items())
        },
        "replaced": replaced,
    }


def _why(tensor: StoredTensor, wanted: Recipe) -> str:
    """Why llama.cpp chose another type."""
    row = tensor.shape[-1]
    if all(row % gguf_file.block_size(kind) == 0 for kind in wanted.types):
        return "llama.cpp's own choice for this tensor"
    return f"rows of {row} do not fit"


def _squares(exact: Matrix, stored: StoredTensor) -> tuple[float, float]:
    """Sum of squared differences and of squared true weights, over evenly spaced rows."""
    step = max(1, math.prod(stored.shape) // _SAMPLED_WEIGHTS)
    found_RD = gguf_file.values(stored, step)
    pages.release(stored.bits)
    chosen_RD = exact(step).astype(np.float64)
    return float(((chosen_RD - found_RD) ** 2).sum()), float((chosen_RD**2).sum())


def _ratio(difference: float, reference: float) -> float:
    return _significant(math.sqrt(difference / reference), 3) if reference else 0.0


def _significant(value: float, digits: int) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits - 1}e}")


def _cosine(value: float) -> float:
    """A cosine near one, with two significant digits of its distance from one: 0.99987."""
    return round(1 - _significant(1 - value, 2), 12)
