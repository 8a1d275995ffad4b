"""The encoder's way into a bundle: built, compared with float32 on pictures, and for int8 treated until it is good.

The float32 graph is built for every other form, because that is what they are compared with. For int8 it also shows
what each product's input looks like (`smoothing.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import limits, smoothing, verify
from edgevlm.converters.calibration import Pictures, built_in, find_pictures, of_files
from edgevlm.converters.onnx_products import EncoderQuant, Sample, Treatment
from edgevlm.converters.onnx_vision import Weights, build_encoder
from edgevlm.converters.prepared import EncoderWeights
from edgevlm.converters.progress import Progress
from edgevlm.converters.resolve import ResolvedVision
from edgevlm.converters.smoothing import Choice
from edgevlm.encoder import Encoder
from edgevlm.errors import UsageError
from edgevlm.spec import ImageSpec

ENCODER_QUANTS: tuple[EncoderQuant, ...] = ("int8", "fp32", "fp16", "int4")

_EXACT = "exact.onnx"
#: If int8 as a whole is beyond a limit, its worst products become float32: these shares of them, one after the other.
_EXACT_SHARES = (1 / 16, 1 / 8, 1 / 4)


@dataclass(frozen=True, kw_only=True)
class EncoderPlan:
    """What becomes of the encoder.

    Attributes:
        quant: The form of its products.
        pictures: What it is compared on.
        arguments: What was asked for, as `provenance` records it.
    """

    quant: EncoderQuant
    pictures: Pictures
    arguments: Mapping[str, Any]


def check(quant: str) -> None:
    """Refuse an unknown form.

    Raises:
        UsageError: with the valid ones.
    """
    if quant not in ENCODER_QUANTS:
        raise UsageError(f"encoder_quant is {quant!r}, it must be one of {', '.join(ENCODER_QUANTS)}")


def plan(image: ImageSpec | None, quant: str, calibration: str | os.PathLike[str] | None) -> EncoderPlan | None:
    """Everything that can be refused before the first byte is written; None for a model without an encoder.

    Args:
        image: How pictures are prepared, if the model takes any.
        quant: One of `ENCODER_QUANTS`.
        calibration: A folder of pictures, or None for the built-in ones.

    Raises:
        UsageError: pictures for a model that takes none, or too many or too few of them.
        FileError, ImageError: the folder or one of its pictures cannot be read.
    """
    arguments: dict[str, Any] = {"encoder_quant": quant}
    if image is None:
        if calibration is not None:
            raise UsageError("this model takes no pictures, so there is nothing to calibrate; leave calibration out")
        return None
    if calibration is None:
        pictures = built_in(image)
    else:
        pictures = of_files(find_pictures(Path(calibration)), image)
        arguments["calibration"] = pictures.record
    return EncoderPlan(quant=quant, pictures=pictures, arguments=arguments)  # type: ignore[arg-type]


def write(
    path: Path,
    planned: EncoderPlan,
    vision: ResolvedVision,
    tower: EncoderWeights,
    connector: EncoderWeights,
    progress: Progress,
) -> dict[str, Any]:
    """Write the graph at `path` and its data beside it.

    Returns:
        What it cost: the section `fidelity.encoder` of the manifest.

    Raises:
        StorageError: the disk is full or refuses.
        CheckpointError: a weight is not finite, or too large for `fp16`.
        BackendError: ONNX Runtime failed.
    """
    weights = Reader(tower, progress), Reader(connector, progress)
    quant, pictures = planned.quant, planned.pictures
    once = sum(weight.nbytes for part in (tower, connector) for weight in part.values())
    progress.expect(once * (1 if quant == "fp32" else 2), "bytes")
    if quant == "fp32":
        build_encoder(path, vision, *weights, quant)
        _check_all_used(*weights)
        return {"against": "the checkpoint's weights", "relative_error": 0.0}
    exact = path.with_name(_EXACT)
    probes: dict[str, Sample] | None = {} if quant == "int8" else None
    build_encoder(exact, vision, *weights, "fp32", probes=probes)
    _check_all_used(*weights)
    runs = list(_run(exact, vision, pictures, repack=False))  # all of its weights, as float32: let them stay pages
    _remove(exact)
    reference_TND = np.concatenate([run.pop("embeds_TND") for run in runs])
    if probes is None:
        return _attempt(path, vision, weights, quant, {}, reference_TND, pictures)
    choices = smoothing.choose(smoothing.observe(runs, probes), probes) | smoothing.choose_attentions(runs)
    return _best_int8(path, vision, weights, choices, reference_TND, pictures)


def _run(
    path: Path, vision: ResolvedVision, pictures: Pictures, *, repack: bool = True
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """All outputs of a graph, picture by picture, as the runtime encodes."""
    encoder = Encoder(path, vision.encoder, threads=1, repack=repack)
    for tile_CHW in pictures.tiles_TCHW:
        yield encoder.outputs(tile_CHW[None])


def _best_int8(
    path: Path,
    vision: ResolvedVision,
    weights: tuple[Weights, Weights],
    choices: Mapping[str, Choice],
    reference_TND: NDArray[np.float32],
    pictures: Pictures,
) -> dict[str, Any]:
    """Write the int8 graph; if it is beyond a limit, again with more products and attentions in float32."""
    treatments = {name: choice.treatment for name, choice in choices.items()}
    cost = _attempt(path, vision, weights, "int8", treatments, reference_TND, pictures)
    left = [name for name, choice in choices.items() if not choice.treatment.exact]
    worst = sorted(left, key=lambda name: choices[name].error, reverse=True)
    for share in _EXACT_SHARES:
        if limits.encoder_is_good(cost, "int8"):
            break
        _remove(path)
        for name in worst[: int(np.ceil(share * len(worst)))]:
            treatments[name] = Treatment(exact=True)
        cost = _attempt(path, vision, weights, "int8", treatments, reference_TND, pictures)
    smoothed = sum(treatment.smooth_K is not None and not treatment.exact for treatment in treatments.values())
    in_float = sorted(name for name, treatment in treatments.items() if treatment.exact)
    attentions = sum(name.endswith(".attention") for name in treatments)
    return {**cost, "products": len(treatments) - attentions, "smoothed": smoothed, "in_float32": in_float}


def _attempt(
    path: Path,
    vision: ResolvedVision,
    weights: tuple[Weights, Weights],
    quant: EncoderQuant,
    treatments: Mapping[str, Treatment],
    reference_TND: NDArray[np.float32],
    pictures: Pictures,
) -> dict[str, Any]:
    """Write a graph, and compare it."""
    build_encoder(path, vision, *weights, quant, treatments=treatments)
    found_TND = np.concatenate([run["embeds_TND"] for run in _run(path, vision, pictures)])
    return verify.encoder_fidelity(reference_TND, found_TND, pictures.name)


def _remove(path: Path) -> None:
    path.unlink()
    path.with_name(f"{path.name}.data").unlink()


class Reader:
    """Weights by our own names, as float32; remembers which were asked for."""

    def __init__(self, weights: EncoderWeights, progress: Progress) -> None:
        self._weights, self._progress = weights, progress
        self.unread = set(weights)

    def __call__(self, name: str) -> NDArray[np.float32]:
        self.unread.discard(name)
        values = self._weights[name].read()
        self._progress.add(self._weights[name].nbytes)
        return values


def _check_all_used(*readers: Reader) -> None:
    """A declared weight that no layer function reads is our bug: the graph would compute something else."""
    unread = sorted(name for reader in readers for name in reader.unread)
    assert not unread, f"weights without a place in the graph: {unread}"
