"""What each int8 product of an encoder needs, decided by what it does to real activations.

The float32 graph runs once over the calibration pictures and shows, for every product, some rows of its input and the
range of each channel. On these, quantizing is imitated: as it is, and smoothed with three strengths. A product is
smoothed if that takes a tenth of its error away, and stays in float32 if nothing brings its error down far enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters.onnx_products import Sample, Treatment
from edgevlm.converters.transforms import quantize_columns

#: SmoothQuant's alpha: how much of the activations' unevenness moves into the weights (arXiv 2211.10438, equation 4).
STRENGTHS = (0.25, 0.5, 0.75)
#: Smoothing must take away this share of the error; less is within what eight pictures can tell.
WORTHWHILE = 0.1
#: Error of one product, relative to its result, beyond which it stays in float32: seven times that of normally
#: distributed activations and weights, 0.015, and twice the whole error that a cosine of 0.999 means.
TOLERABLE = 0.1
#: What reads a normed or an attended input. The other product, fc2, reads an activation, which cannot be divided.
SMOOTHABLE = ("qkv", "o", "fc1")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A product's input on some pictures: `rows_PRK`, and the smallest and largest value of each channel.

    Pictures of different sizes may have different numbers of rows.
    """

    rows_PRK: Sequence[NDArray[np.float32]] | NDArray[np.float32]
    low_PK: NDArray[np.float32]
    high_PK: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A treatment, and the error that it leaves, relative to the product."""

    treatment: Treatment
    error: float


def observe(runs: Iterable[Mapping[str, NDArray[np.float32]]], names: Iterable[str]) -> dict[str, Observation]:
    """Put the probes' outputs of several pictures together (see `Products.probes`).

    Args:
        runs: For each picture all outputs of the graph.
        names: The products.
    """
    outputs = list(runs)
    return {
        name: Observation(
            rows_PRK=[rows_RK for run in outputs for rows_RK in run[f"{name}.rows"]],
            low_PK=np.stack([run[f"{name}.low"] for run in outputs]),
            high_PK=np.stack([run[f"{name}.high"] for run in outputs]),
        )
        for name in names
    }


def choose(observations: Mapping[str, Observation], samples: Mapping[str, Sample]) -> dict[str, Choice]:
    """The treatment of every product."""
    return {name: _choose(name, observations[name], samples[name]) for name in samples}


def choose_attentions(runs: Iterable[Mapping[str, NDArray[np.float32]]]) -> dict[str, Choice]:
    """Which attentions are computed in integers: those that lose no more than a product may.

    Args:
        runs: As for `observe`; the operator itself ran beside float32 in that graph, so nothing is imitated.
    """
    sums: dict[str, list[float]] = {}
    for run in runs:
        for output, value in run.items():
            name, _, part = output.rpartition(".")
            if part in ("difference", "reference"):
                sums.setdefault(name, [0.0, 0.0])[part == "reference"] += float(value)
    errors = {name: float(np.sqrt(lost / all_)) if all_ else 0.0 for name, (lost, all_) in sums.items()}
    return {
        name: Choice(treatment=Treatment(exact=not error <= TOLERABLE), error=error) for name, error in errors.items()
    }


def _choose(name: str, seen: Observation, sample: Sample) -> Choice:
    found = Choice(treatment=Treatment(), error=error_of(seen, sample.columns_KN, None))
    if name.rpartition(".")[2] in SMOOTHABLE:
        for strength in STRENGTHS:
            factors_K = smoothing_factors(seen, sample, strength)
            error = error_of(seen, sample.columns_KN, factors_K)
            if error < found.error * (1 - WORTHWHILE):
                found = Choice(treatment=Treatment(smooth_K=factors_K), error=error)
    return found if found.error <= TOLERABLE else Choice(treatment=Treatment(exact=True), error=found.error)


def smoothing_factors(seen: Observation, sample: Sample, strength: float) -> NDArray[np.float32]:
    """float32 [inputs]: largest activation ** strength / largest weight ** (1 - strength), around one."""
    activation_K = np.maximum(np.abs(seen.low_PK), np.abs(seen.high_PK)).max(axis=0)
    floors = [np.float32(max(float(values.max()), 1e-30) * 1e-4) for values in (activation_K, sample.largest_K)]
    activation_K, weight_K = np.maximum(activation_K, floors[0]), np.maximum(sample.largest_K, floors[1])
    factors_K = activation_K**strength / weight_K ** (1 - strength)
    # In steps of a quarter octave, so that the last bits of activations, which processors sum in another order, rarely
    # change a bundle.
    octaves_K = np.log2(factors_K)
    even_K: NDArray[np.float32] = np.exp2(np.rint((octaves_K - octaves_K.mean()) * 4) / 4).astype(np.float32)
    return even_K


def error_of(seen: Observation, columns_KN: NDArray[np.float32], factors_K: NDArray[np.float32] | None) -> float:
    """Relative error of a DynamicQuantizeMatMul: RMS of the difference over RMS of the product, over all pictures."""
    factors: Any = np.float32(1) if factors_K is None else factors_K
    int8_KN, scale_N = quantize_columns(columns_KN * np.reshape(factors, (-1, 1)))
    stored_KN = int8_KN * scale_N
    difference = reference = 0.0
    for rows_RK, low_K, high_K in zip(seen.rows_PRK, seen.low_PK, seen.high_PK, strict=True):
        low, high = min(0.0, float((low_K / factors).min())), max(0.0, float((high_K / factors).max()))
        scale = (high - low) / 255 or 1.0
        zero = np.rint(-low / scale)
        seen_RK = (np.clip(np.rint(rows_RK / factors / scale) + zero, 0, 255) - zero) * np.float32(scale)
        exact_RN = rows_RK @ columns_KN
        difference += float(((seen_RK @ stored_KN - exact_RN) ** 2).sum())
        reference += float((exact_RN**2).sum())
    return float(np.sqrt(difference / reference)) if reference else 0.0
