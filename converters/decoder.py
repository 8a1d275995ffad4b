"""The decoder's way into a bundle: what was asked for is checked, then the file is written and quantized.

Everything that can be refused by looking at names and shapes is refused by `plan`, before the first byte is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.converters import gguf_decoder, gguf_file, quant, targets, tensor_types, verify
from edgevlm.converters.imatrix import Imatrix, read_imatrix
from edgevlm.converters.loadable import check_header, check_vocabulary
from edgevlm.converters.mapping import Mapped
from edgevlm.converters.quant import AUTO, Recipe
from edgevlm.converters.resolve import Resolved
from edgevlm.converters.targets import Choice
from edgevlm.converters.tokenizer import Vocabulary
from edgevlm.errors import UsageError

_EXACT = "decoder.exact.gguf"


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """What becomes of the decoder's weights.

    Attributes:
        recipe: The type of the weights.
        reason: Why this one, if it was not asked for by name; else empty.
        types: Matrices that get another type than the recipe's, by GGUF name.
        imatrix: Steers the quantizer, if given.
        stored_bytes: Size of the weights as the checkpoint stores them.
        final_bytes: Estimated size of the finished file.
    """

    recipe: Recipe
    reason: str
    types: Mapping[str, str]
    imatrix: Imatrix | None
    stored_bytes: int
    final_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Disk that the conversion takes at most, the file before quantization included."""
        return self.final_bytes + (0 if self.recipe.direct else self.stored_bytes)

    def record(self) -> dict[str, Any]:
        """What `provenance` says beyond the arguments; empty if there is nothing to say."""
        if self.imatrix is None:
            return {}
        return {"imatrix": {"name": self.imatrix.name, "sha256": self.imatrix.sha256}}


def check(decoder_quant: str, device: str | None) -> None:
    """Refuse what needs no look at the checkpoint.

    Raises:
        UsageError: an unknown recipe or device, or a device although the recipe does not depend on it.
    """
    if device is not None:
        targets.check_device(device)
    if decoder_quant.lower() == AUTO:
        return
    recipe = quant.recipe(decoder_quant)
    if device is not None:
        raise UsageError(
            f"device {device} was asked for with decoder_quant {recipe.name}, but only `{AUTO}` chooses by device"
        )


def plan(
    mapped: Mapped,
    decoder_quant: str,
    *,
    device: str | None = None,
    types: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
) -> DecoderPlan:
    """Check what was asked for against the model's tensors.

    Args:
        mapped: The checkpoint's tensors.
        decoder_quant: A recipe's name, or `auto`.
        device: What `auto` chooses for, one of `targets.DEVICES`; this machine by default.
        types: Pattern -> type for single matrices, see `tensor_types.py`.
        imatrix: A file with an importance matrix.

    Raises:
        UsageError: an option that means nothing for this recipe or this model.
        FileError, ImatrixError: the importance matrix cannot be used.
    """
    check(decoder_quant, device)
    tensors = {name: source.tensor for name, source in gguf_decoder.sources(mapped).items()}
    matrices = {name: tensor.shape for name, tensor in tensors.items() if len(tensor.shape) > 1}
    if decoder_quant.lower() == AUTO:
        choice = targets.choose(device or targets.THIS, matrices)
    else:
        choice = Choice(quant.recipe(decoder_quant), "")
    recipe = choice.recipe
    for option, given in (("an importance matrix", imatrix is not None), ("types of single matrices", bool(types))):
        if recipe.direct and given:
            raise UsageError(
                f"decoder_quant {recipe.name} only rounds, {option} would change nothing; "
                "leave out the one or choose a quantized type such as q4_k_m"
            )
    chosen = tensor_types.resolve(types or {}, matrices)
    widths = {name: shape[-1] for name, shape in matrices.items()}
    return DecoderPlan(
        recipe=recipe,
        reason=choice.reason,
        types=chosen,
        imatrix=None if imatrix is None else read_imatrix(imatrix, widths),
        stored_bytes=sum(tensor.bits.nbytes for tensor in tensors.values()),
        final_bytes=sum(_final_bytes(tensors[name].shape, recipe, chosen.get(name)) for name in tensors),
    )


def _final_bytes(shape: tuple[int, ...], recipe: Recipe, kind: str | None) -> int:
    return gguf_file.nbytes(shape, kind) if kind else math.ceil(math.prod(shape) * recipe.bits / 8)


def write(
    final: Path,
    planned: DecoderPlan,
    mapped: Mapped,
    resolved: Resolved,
    vocabulary: Vocabulary,
    general: dict[str, str],
) -> dict[str, Any]:
    """Write the finished file, by way of one at the checkpoint's own precision unless the recipe only rounds.

    Returns:
        What it cost: see `verify.decoder_fidelity`.

    Raises:
        CheckpointError: a weight or the tokenizer cannot be used.
        StorageError: the disk is full or refuses.
        BackendError: llama.cpp failed.
    """
    recipe = planned.recipe
    written = final if recipe.direct else final.with_name(_EXACT)
    tensors = gguf_decoder.plan(mapped, resolved, recipe)
    gguf_decoder.write(written, resolved, vocabulary, tensors, recipe.file_type, general)
    check_header(written)  # before llama.cpp reads it, which ends the process on some values
    check_vocabulary(written, vocabulary.stops)
    if not recipe.direct:
        importance = planned.imatrix.values if planned.imatrix else None
        quant.quantize(
            written, final, recipe, size_estimate=planned.final_bytes, importance=importance, types=planned.types
        )
        written.unlink()
        check_header(final)
    return verify.decoder_fidelity(final, gguf_decoder.exact_matrices(mapped), recipe, planned.types)
