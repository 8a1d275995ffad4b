"""The decoder's way into a bundle: what was asked for is checked, then the file is written and quantized.

Everything that can be refused by looking at names and shapes is refused by `plan`, before the first byte is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.converters import fidelity, gguf_decoder, gguf_file, quant, targets, tensor_types, verify
from edgevlm.converters.imatrix import Imatrix, read_imatrix
from edgevlm.converters.loadable import check_header, check_vocabulary
from edgevlm.converters.mapping import Mapped
from edgevlm.converters.quant import AUTO, Recipe
from edgevlm.converters.resolve import Resolved
from edgevlm.converters.targets import Choice
from edgevlm.converters.tokenizer import Vocabulary
from edgevlm.errors import UsageError

_EXACT = "decoder.exact.gguf"
_AS_STORED = quant.RECIPES["q8_0"]  # any recipe that is quantized later: every tensor keeps the checkpoint's type


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """What becomes of the decoder's weights.

    Attributes:
        recipe: The type of the weights.
        reason: Why this one, if it was not asked for by name; else empty.
        types: Matrices that get another type than the recipe's, by GGUF name.
        imatrix: Steers the quantizer, if given.
        rounds: Whether any number of the checkpoint is changed.
        fidelity_tokens: How many predictions are compared with the unquantized decoder's.
        arguments: What was asked for, as `provenance` records it.
        stored_bytes: Size of the weights as the checkpoint stores them.
        final_bytes: Estimated size of the finished file.
    """

    recipe: Recipe
    reason: str
    types: Mapping[str, str]
    imatrix: Imatrix | None
    rounds: bool
    fidelity_tokens: int
    arguments: Mapping[str, Any]
    stored_bytes: int
    final_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Disk that the conversion takes at most, the unquantized file included."""
        return self.final_bytes + (self.stored_bytes if self.needs_exact else 0)

    @property
    def compares(self) -> bool:
        """Whether predictions are compared: there must be something that can differ."""
        return self.rounds and self.fidelity_tokens > 0

    @property
    def needs_exact(self) -> bool:
        """Whether a file at the checkpoint's own precision is made: to be quantized, or to be compared with."""
        return self.compares or not self.recipe.direct

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
    fidelity_tokens: int = fidelity.TOKENS,
) -> DecoderPlan:
    """Check what was asked for against the model's tensors.

    Args:
        mapped: The checkpoint's tensors.
        decoder_quant: A recipe's name, or `auto`.
        device: What `auto` chooses for, one of `targets.DEVICES`; this machine by default.
        types: Pattern -> type for single matrices, see `tensor_types.py`.
        imatrix: A file with an importance matrix.
        fidelity_tokens: How many predictions to compare; 0 compares none.

    Raises:
        UsageError: an option that means nothing for this recipe or this model.
        FileError, ImatrixError: the importance matrix cannot be used.
    """
    check(decoder_quant, device)
    fidelity.check_tokens(fidelity_tokens)
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
    arguments: dict[str, Any] = {"decoder_quant": recipe.name}
    if choice.reason:
        arguments["decoder_quant_auto"] = {"device": device or targets.THIS, "reason": choice.reason}
    if types:
        arguments["decoder_types"] = dict(types)
    chosen = tensor_types.resolve(types or {}, matrices)
    widths = {name: shape[-1] for name, shape in matrices.items()}
    return DecoderPlan(
        recipe=recipe,
        reason=choice.reason,
        types=chosen,
        imatrix=None if imatrix is None else read_imatrix(imatrix, widths),
        rounds=recipe.name != "f32" and any(tensors[name].dtype not in recipe.types for name in matrices),
        fidelity_tokens=fidelity_tokens,
        arguments=arguments,
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
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Write the finished file, by way of one at the checkpoint's own precision if that is needed.

    Returns:
        What it cost: see `verify.decoder_fidelity`, and as `predictions` what `fidelity.compare` gives.

    Raises:
        CheckpointError: a weight or the tokenizer cannot be used.
        StorageError: the disk is full or refuses.
        BackendError: llama.cpp failed.
    """
    recipe, exact = planned.recipe, final.with_name(_EXACT)
    for path, kind in ((exact, _AS_STORED), (final, recipe)):
        if (path == exact and not planned.needs_exact) or (path == final and not recipe.direct):
            continue
        tensors = gguf_decoder.plan(mapped, resolved, kind)
        gguf_decoder.write(path, resolved, vocabulary, tensors, recipe.file_type, general)
        check_header(path)  # before llama.cpp reads it, which ends the process on some values
        check_vocabulary(path, vocabulary.stops)
    if not recipe.direct:
        importance = planned.imatrix.values if planned.imatrix else None
        quant.quantize(
            exact, final, recipe, size_estimate=planned.final_bytes, importance=importance, types=planned.types
        )
        check_header(final)
    cost = verify.decoder_fidelity(final, gguf_decoder.exact_matrices(mapped), recipe, planned.types)
    if planned.compares and resolved.spec.decoder.context_length > 1:  # one position predicts from nothing
        report(f"comparing {planned.fidelity_tokens} predictions with the unquantized decoder's")
        cost["predictions"] = fidelity.compare(exact, final, n_tokens=planned.fidelity_tokens)
    elif not planned.rounds:
        cost["predictions"] = fidelity.nothing_lost()
    exact.unlink(missing_ok=True)
    return cost
