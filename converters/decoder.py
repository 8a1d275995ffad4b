"""The decoder's way into a bundle: what was asked for is checked, then the file is written and quantized.

Everything that can be refused by looking at names and shapes is refused by `plan`, before the first byte is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import fidelity, gguf_decoder, gguf_file, pages, quant, targets, tensor_types, verify
from edgevlm.converters.gguf_file import PlannedTensor
from edgevlm.converters.imatrix import Imatrix, read_imatrix
from edgevlm.converters.loadable import check_header, check_vocabulary
from edgevlm.converters.mapping import Mapped, Source
from edgevlm.converters.progress import Progress
from edgevlm.converters.quant import AUTO, Recipe
from edgevlm.converters.resolve import Resolved
from edgevlm.converters.targets import Choice
from edgevlm.converters.tokenizer import Vocabulary
from edgevlm.converters.weights import Feed
from edgevlm.errors import UsageError

_EXACT = "decoder.exact.gguf"
_MIXED = quant.RECIPES["q8_0"].file_type  # no type fits a file of several, and nobody keeps this one


@dataclass(frozen=True)
class PlannedFile:
    """A GGUF file to write: its header, and the tensors that follow."""

    head: bytes
    tensors: list[PlannedTensor]

    @property
    def nbytes(self) -> int:
        return gguf_file.file_bytes(self.head, self.tensors)

    def check(self, stops: tuple[int, ...]) -> None:
        """Let the runtime read the header and llama.cpp load the vocabulary; weights play no part in either.

        Args:
            stops: Tokens that must end an answer.

        Raises:
            CheckpointError: `checkpoint.unsupported`.
        """
        with gguf_file.hollow(self.head, self.tensors) as path:
            check_header(path)  # first, because llama.cpp ends the process on some values
            check_vocabulary(path, stops)

    def write(self, path: Path) -> None:
        """See `gguf_file.write`."""
        gguf_file.write(path, self.head, self.tensors)


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
        sources: Where each tensor comes from, by GGUF name.
        final: The finished file.
        plan_exact: Plans the one at the checkpoint's own precision that it is compared with.
        positions: That the model was trained for.
    """

    recipe: Recipe
    reason: str
    types: Mapping[str, str]
    imatrix: Imatrix | None
    rounds: bool
    fidelity_tokens: int
    arguments: Mapping[str, Any]
    sources: Mapping[str, Source]
    final: PlannedFile
    plan_exact: Callable[[], PlannedFile]
    positions: int

    @property
    def peak_bytes(self) -> int:
        """Disk that the conversion takes at most, the unquantized file included."""
        return self.final.nbytes + (self.exact_bytes if self.compares else 0)

    @property
    def exact_bytes(self) -> int:
        """Size of the unquantized file, but for a few bytes of padding."""
        return len(self.final.head) + self.stored_bytes

    @property
    def stored_bytes(self) -> int:
        """Size of the weights as the checkpoint stores them."""
        return sum(source.tensor.bits.nbytes for source in self.sources.values())

    @property
    def compares(self) -> bool:
        """Whether predictions are compared: there must be something that can differ, and one position predicts from
        nothing."""
        return self.rounds and self.fidelity_tokens > 0 and self.positions > 1

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
    resolved: Resolved,
    vocabulary: Vocabulary,
    general: Mapping[str, str],
    decoder_quant: str,
    *,
    device: str | None = None,
    types: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    fidelity_tokens: int = fidelity.TOKENS,
    progress: Progress | None = None,
) -> DecoderPlan:
    """Check what was asked for against the model's tensors, and fix every byte but the weights themselves.

    Args:
        mapped, resolved, vocabulary: The checkpoint.
        general: Keys `general.*` of the file.
        decoder_quant: A recipe's name, or `auto`.
        device: What `auto` chooses for, one of `targets.DEVICES`; this machine by default.
        types: Pattern -> type for single matrices, see `tensor_types.py`.
        imatrix: A file with an importance matrix.
        fidelity_tokens: How many predictions to compare; 0 compares none.
        progress: Told as weights are written.

    Raises:
        UsageError: an option that means nothing for this recipe or this model.
        FileError, ImatrixError: the importance matrix cannot be used.
        CheckpointError: the runtime or llama.cpp refuses the file, its tokenizer above all.
        BackendError: llama.cpp refuses the model.
    """
    check(decoder_quant, device)
    fidelity.check_tokens(fidelity_tokens)
    sources = gguf_decoder.sources(mapped)
    tensors = {name: source.tensor for name, source in sources.items()}
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
    loaded = None if imatrix is None else read_imatrix(imatrix, widths)
    importance = loaded.values if loaded else {}
    feed = Feed(progress, importance)
    final = _final(sources, resolved, recipe, feed, chosen, importance)

    def whole(planned: list[PlannedTensor], file_type: int, *, quantized: bool) -> PlannedFile:
        keys = gguf_decoder.metadata(resolved, vocabulary, general, file_type, quantized=quantized)
        return PlannedFile(gguf_file.header(gguf_decoder.ARCH, keys, planned), planned)

    def plan_exact() -> PlannedFile:
        kinds = {name: tensors[name].dtype for name in matrices}
        return whole(gguf_decoder.plan(sources, resolved, kinds, Feed(progress)), _MIXED, quantized=False)

    finished = whole(final, recipe.file_type, quantized=not recipe.direct)
    finished.check(vocabulary.stops)
    return DecoderPlan(
        recipe=recipe,
        reason=choice.reason,
        types=chosen,
        imatrix=loaded,
        rounds=recipe.name != "f32" and any(tensors[name].dtype not in recipe.types for name in matrices),
        fidelity_tokens=fidelity_tokens,
        arguments=_arguments(choice, device, types),
        sources=sources,
        final=finished,
        plan_exact=plan_exact,
        positions=resolved.spec.decoder.context_length,
    )


def _arguments(choice: Choice, device: str | None, types: Mapping[str, str] | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"decoder_quant": choice.recipe.name}
    if choice.reason:
        arguments["decoder_quant_auto"] = {"device": device or targets.THIS, "reason": choice.reason}
    if types:
        arguments["decoder_types"] = dict(types)
    return arguments


def _final(
    sources: Mapping[str, Source],
    resolved: Resolved,
    recipe: Recipe,
    feed: Feed,
    chosen: Mapping[str, str],
    importance: Mapping[str, NDArray[np.float32]],
) -> list[PlannedTensor]:
    """The tensors of the finished file."""
    if recipe.direct:
        return gguf_decoder.plan(sources, resolved, dict.fromkeys(sources, recipe.types[0]), feed)
    kinds = stored_types(resolved, {name: s.tensor.shape for name, s in sources.items()}, recipe, chosen, importance)
    return gguf_decoder.in_quantizer_order(gguf_decoder.plan(sources, resolved, kinds, feed))


def stored_types(
    resolved: Resolved,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    chosen: Mapping[str, str] | None = None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[str, str]:
    """The type of each matrix of a file: see `quant.stored_types`."""
    if recipe.direct:
        return {name: recipe.types[0] for name, shape in shapes.items() if len(shape) > 1}
    keys = {"general.type": "model", **gguf_decoder.llama_keys(resolved)}
    return quant.stored_types(gguf_decoder.ARCH, keys, shapes, recipe, importance=importance, types=chosen)


def write(final: Path, planned: DecoderPlan, progress: Progress) -> dict[str, Any]:
    """Write the finished file.

    Returns:
        What it cost the weights: see `verify.decoder_fidelity`.

    Raises:
        CheckpointError: a weight cannot be used.
        StorageError: the disk is full or refuses.
        BackendError: llama.cpp failed.
    """
    progress.expect(planned.stored_bytes, "bytes")
    planned.final.write(final)
    matrices = gguf_decoder.exact_matrices(planned.sources)
    return verify.decoder_fidelity(final, matrices, planned.recipe, planned.types)


def predictions(final: Path, planned: DecoderPlan, progress: Progress) -> dict[str, Any]:
    """Compare a finished file's predictions with those of the unquantized decoder, which is made for it and removed.

    Returns:
        See `fidelity.compare`; empty if nothing is to be compared.

    Raises:
        CheckpointError, StorageError, BackendError: as for `write`.
    """
    if not planned.rounds:
        return fidelity.nothing_lost()
    if not planned.compares:
        return {}
    progress.step(f"comparing {planned.fidelity_tokens} predictions with the unquantized decoder's")
    exact = final.with_name(_EXACT)
    progress.expect(planned.stored_bytes, "bytes")
    planned.plan_exact().write(exact)
    progress.expect(planned.fidelity_tokens, "tokens")
    with pages.bounded(exact, final):
        cost = fidelity.compare(exact, final, n_tokens=planned.fidelity_tokens, advance=progress.add)
    exact.unlink()
    return cost
