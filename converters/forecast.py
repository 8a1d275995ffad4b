"""What a conversion would do, without doing it: sizes of the files, what it takes, what becomes of each tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import fidelity, onnx_vision, pages
from edgevlm.converters.decoder import DecoderPlan
from edgevlm.converters.encoder import EncoderPlan
from edgevlm.converters.mapping import Mapped
from edgevlm.converters.onnx_graph import MeasuredGraph
from edgevlm.converters.onnx_products import EncoderQuant
from edgevlm.converters.onnx_vision import Weights
from edgevlm.converters.prepared import DecoderForecast, EncoderWeight, EncoderWeights, Fate, Prepared
from edgevlm.converters.resolve import Resolved, ResolvedVision
from edgevlm.machine import peak_rss_bytes, rss_bytes, usable_cpus

_NUMPY_NAMES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U4"}
# Allowances for what numpy, ONNX Runtime and the quantizer take beside the blocks in work; the tests compare the sum.
_BLOCKS_BYTES, _WORKER_BYTES = 32 << 20, 12 << 20


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a conversion would do.

    Attributes:
        files: Name -> size in bytes, exact; bundle.json, a few kilobytes, holds measurements and is not foreseen. An
            int8 encoder grows by those of its products that have to stay in float32, which only pictures can tell.
        disk_bytes: What the conversion writes at its peak, intermediate files included.
        memory_bytes: Expected peak of its memory, mapped files included.
        tensors: What becomes of each.
        decoder_quant, encoder_quant: Types of the weights; the latter is None for a model without pictures.
        reason: Why this `decoder_quant`, if it was chosen by `auto`; else empty.
    """

    files: dict[str, int]
    disk_bytes: int
    memory_bytes: int
    tensors: tuple[Fate, ...]
    decoder_quant: str
    encoder_quant: str | None
    reason: str

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}

    def text(self) -> str:
        """A table of the tensors, then the sums."""
        rows = [("tensor", "shape", "type", "becomes", "type")]
        for fate in self.tensors:
            first, *others = fate.sources or ("(computed)",)
            place = f"{fate.file}: {fate.name}" if fate.file else "(left out)"
            rows.append((first, " x ".join(map(str, fate.shape)), fate.source_type, place, fate.type))
            rows += [(f"+ {other}", "", "", "", "") for other in others]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        sizes = {**self.files, "together": self.total_bytes}
        sums = [f"{name:<20} {nbytes:>15,} bytes" for name, nbytes in sizes.items()]
        needs = [
            f"{'disk, at most':<20} {self.disk_bytes:>15,} bytes",
            f"{'memory, about':<20} {self.memory_bytes:>15,} bytes, mapped files included",
        ]
        chosen = [f"decoder {self.decoder_quant}: {self.reason}"] if self.reason else []
        return "\n".join([*lines, "", *chosen, *sums, *needs])


def predict(prepared: Prepared, seeing: EncoderPlan | None, *, disk_bytes: int) -> Forecast:
    """Foresee a conversion.

    Args:
        prepared: The source.
        seeing: What becomes of its encoder, if it has one.
        disk_bytes: See `Forecast`.
    """
    decoder = prepared.foresee_decoder()
    files, fates, steps = {"decoder.gguf": decoder.nbytes}, list(decoder.fates), [decoder.memory_bytes]
    if seeing and prepared.vision:
        graph, found = measure_encoder(prepared.tower, prepared.connector, prepared.vision, seeing.quant)
        files |= {"encoder.onnx": graph[0], "encoder.onnx.data": graph[1]}
        fates += found
        exact = graph if seeing.quant == "fp32" else measure_encoder(
            prepared.tower, prepared.connector, prepared.vision, "fp32"
        )[0]  # fmt: skip
        steps.append(_encoder_bytes(prepared.vision, exact[1], len(seeing.pictures.tiles_TCHW)))
    return Forecast(
        files=files,
        disk_bytes=disk_bytes,
        # what this process took to read all but the weights, or what it holds of that beside the largest step
        memory_bytes=max(peak_rss_bytes(), rss_bytes() + max(steps)),
        tensors=tuple(sorted(fates, key=lambda fate: not fate.file)),
        decoder_quant=prepared.decoder_type,
        encoder_quant=seeing.quant if seeing else None,
        reason=prepared.reason,
    )


def of_decoder(mapped: Mapped, resolved: Resolved, planned: DecoderPlan) -> DecoderForecast:
    """What becomes of a checkpoint's decoder."""
    steps = [_BLOCKS_BYTES + usable_cpus() * _WORKER_BYTES]
    if planned.compares:
        steps.append(_comparison_bytes(resolved, planned))
    fates = (*_decoder_fates(planned), *_left_out(mapped, planned))
    return DecoderForecast(nbytes=planned.final.nbytes, memory_bytes=max(steps), fates=fates)


def _decoder_fates(planned: DecoderPlan) -> list[Fate]:
    fates = []
    for tensor in planned.final.tensors:
        source = planned.sources.get(tensor.name)
        fates.append(
            Fate(
                file="decoder.gguf",
                sources=(source.tensor.name,) if source else (),
                shape=tensor.shape,
                source_type=source.tensor.dtype if source else "",
                name=tensor.name,
                type=tensor.type,
            )
        )
    return fates


def _left_out(mapped: Mapped, planned: DecoderPlan) -> list[Fate]:
    """Tensors that never reach the output, and a head that equals the embedding."""
    names = list(mapped.unused)
    fates = [Fate(file="", sources=(name,), shape=(), source_type="", name="", type="") for name in names]
    if mapped.head is not None and "output.weight" not in planned.sources:
        head = mapped.head.tensor
        fates.append(Fate(file="", sources=(head.name,), shape=head.shape, source_type=head.dtype, name="", type=""))
    return fates


def measure_encoder(
    tower: EncoderWeights, connector: EncoderWeights, vision: ResolvedVision, quant: EncoderQuant
) -> tuple[tuple[int, int], list[Fate]]:
    """Build the encoder's graph without weights.

    Returns:
        Sizes of encoder.onnx and its data, and what becomes of each weight: the graph's functions read some weights and
        then store what they made of them.
    """
    pending: list[EncoderWeight] = []
    fates: list[Fate] = []
    last: list[EncoderWeight] = []

    def on_weight(name: str, array: NDArray[Any]) -> None:
        nonlocal last
        if array.dtype.name not in _NUMPY_NAMES:
            return  # a shape or an axis
        if pending:
            last = pending.copy()
            pending.clear()
        elif not name.endswith(".scale"):
            return  # zeros in the place of a bias
        fates.append(
            Fate(
                file="encoder.onnx",
                sources=tuple(weight.name for weight in last),
                shape=last[0].shape,
                source_type=last[0].type,
                name=name,
                type=_NUMPY_NAMES[array.dtype.name],
            )
        )

    def reader(weights: EncoderWeights) -> Weights:
        def read(name: str) -> NDArray[np.float32]:
            pending.append(weights[name])
            return np.zeros(weights[name].shape, np.float32)

        return read

    path = Path("encoder.onnx")
    graph = MeasuredGraph("encoder", path.with_name(path.name + ".data"), on_weight)
    onnx_vision.build_encoder(path, vision, reader(tower), reader(connector), quant, graph=graph)
    return graph.nbytes, fates


def _comparison_bytes(resolved: Resolved, planned: DecoderPlan) -> int:
    """Two models in llama.cpp: mapped weights, tables of the vocabulary, caches, buffers, rows of logits."""
    decoder, llama = resolved.spec.decoder, resolved.llama
    positions = min(fidelity.WINDOW, decoder.context_length)
    rows = fidelity.rows_at_once(decoder.vocab)
    mapped = min(planned.final.nbytes + planned.exact_bytes, pages.LIMIT_BYTES)
    cache = decoder.layers * positions * llama.heads_kv * llama.head_dim * 2 * 4
    activations = positions * (3 * llama.n_ff + 4 * decoder.n_embd + llama.heads * positions) * 4
    logits = 3 * rows * decoder.vocab * 4
    return mapped + 2 * (cache + activations + logits + 5 * len(planned.final.head))


def _encoder_bytes(vision: ResolvedVision, exact_bytes: int, pictures: int) -> int:
    """The float32 graph in ONNX Runtime, whose weights are pages of the mapped file."""
    positions = onnx_vision.usual_tokens(vision)
    activations = positions * (vision.encoder.heads * positions + 8 * vision.encoder.intermediate) * 4
    return exact_bytes + activations + pictures * 3 * vision.image.height_px * vision.image.width_px * 12
