"""The encoder's way into a bundle: tower and connector as one graph, measured beside the same graph in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import verify
from edgevlm.converters.mapping import Mapped, Source
from edgevlm.converters.onnx_vision import EncoderQuant, build_encoder
from edgevlm.converters.progress import Progress
from edgevlm.converters.resolve import ResolvedVision
from edgevlm.converters.weights import as_float32

_EXACT = "exact.onnx"


def write(
    path: Path, mapped: Mapped, vision: ResolvedVision, quant: EncoderQuant, progress: Progress
) -> dict[str, Any]:
    """Write the graph and its data; the float32 graph is built as well when int8 has to be compared with it.

    Returns:
        What it cost: see `verify.encoder_fidelity`.

    Raises:
        CheckpointError: a weight is not finite.
        StorageError: the disk is full or refuses.
        BackendError: ONNX Runtime failed.
    """
    parts = (mapped.tower, mapped.connector)
    once = sum(source.tensor.bits.nbytes for part in parts for source in part.values())
    progress.expect(once * (1 if quant == "fp32" else 2), "bytes")
    tower, connector = (Reader(part, progress) for part in parts)
    build_encoder(path, vision, tower, connector, quant)
    for reader in (tower, connector):
        reader.check_all_used()
    if quant == "fp32":
        return {"against": "the checkpoint's weights", "relative_error": 0.0}
    exact = path.with_name(_EXACT)
    build_encoder(exact, vision, tower, connector, "fp32")
    cost = verify.encoder_fidelity(path, exact, vision.image, vision.encoder)
    exact.unlink()
    exact.with_name(f"{_EXACT}.data").unlink()
    return cost


class Reader:
    """Weights by our own names, as float32; remembers which were asked for."""

    def __init__(self, sources: Mapping[str, Source], progress: Progress) -> None:
        self._sources, self._progress = sources, progress
        self._unread = set(sources)

    def __call__(self, name: str) -> NDArray[np.float32]:
        self._unread.discard(name)
        values = as_float32(self._sources[name].tensor)
        self._progress.add(self._sources[name].tensor.bits.nbytes)
        return values

    def check_all_used(self) -> None:
        """A declared weight that no layer function reads is our bug: the graph would compute something else."""
        assert not self._unread, f"weights without a place in the graph: {sorted(self._unread)}"
