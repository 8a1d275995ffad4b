"""Whether a model fits into memory, decided before it is loaded, and how to load it so that it does.

With a budget, a plan gives up what costs least until the estimate fits, in this order: the faster copy of the decoder's
weights, the size of a batch, half the context and half of that, the encoder's stay in memory, the rest of the context;
or it refuses with figures. Without one, only what certainly cannot work is refused: a wrong refusal is worse.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.bundle import Manifest
from edgevlm.errors import MemoryPlanError, UsageError
from edgevlm.files import open_regular
from edgevlm.footprint import (
    PICTURE_PX,
    Footprint,
    Part,
    Settings,
    decoder_footprint,
    image_positions,
    with_encoder,
)
from edgevlm.gguf import GGUFHeader
from edgevlm.held import N_TOKENS
from edgevlm.machine import available_bytes
from edgevlm.options import shown
from edgevlm.spec import ModelSpec

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Z]{0,3})")
#: A budget never takes the context below this, or a picture and `_TALK` positions.
_LEAST_CONTEXT, _TALK = 512, 256
#: With the encoder in memory, a budget rather lets it go than take the context below this.
_GOOD_CONTEXT = 2048
#: Positions of one call at most, and what a budget makes of them: never fewer than llama.cpp's other kernel begins at.
MOST_ROWS = 512
_BATCHES = (MOST_ROWS, 256, 128)
#: Of an encoder's graph at most so much is looked at; the weights lie in a file of their own.
_GRAPH_BYTES = 16 << 20
#: Without a budget, so many times what is available must be needed for a refusal: the estimate may be off, and the
#: system can make room by swapping.
_HOPELESS = 1.25


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is known of a model before it is loaded.

    Attributes:
        header: Of the decoder's file.
        manifest: Of the bundle; None for a plain GGUF file.
        features: What llama.cpp makes use of on this CPU (`edgevlm.llama.cpu_features`).
        before: What this process held before it read the header.
        scores: Whether the encoder holds the scores of all heads at once (`holds_scores`).
    """

    header: GGUFHeader
    manifest: Manifest | None
    features: frozenset[str]
    before: Part
    scores: bool = True

    def footprint(self, settings: Settings, picture_px: tuple[int, int] = PICTURE_PX) -> Footprint:
        """The estimate for these settings."""
        found = decoder_footprint(self.header, settings, self.features, self.before)
        spec = self.manifest.spec if self.manifest else None
        if spec is None or spec.encoder is None or spec.image is None:
            return found
        released = settings.encoder == "released"
        assert self.manifest is not None
        nbytes = sum(entry.size for entry in self.manifest.files if entry.role == "encoder-data")
        return with_encoder(
            found, spec.encoder, spec.image, nbytes, released=released, scores=self.scores, picture_px=picture_px
        )

    def batch(self, kv_type: str) -> int:
        """The most positions that are ever decoded in one call: a picture's, or tokens (`edgevlm.held`)."""
        spec = self.manifest.spec if self.manifest else None
        if kv_type == "f32" or (spec and spec.encoder and spec.image and _in_one_piece(spec)):
            return MOST_ROWS
        rows = spec.encoder.n_tokens if spec and spec.encoder else 0
        return min(MOST_ROWS, max(N_TOKENS, rows))

    @property
    def sees(self) -> bool:
        return self.manifest is not None and self.manifest.spec.encoder is not None

    def least_context(self, wanted: int) -> int:
        """Below this the model would be of no use: it must have room for a picture."""
        spec = self.manifest.spec if self.manifest else None
        needed = _LEAST_CONTEXT
        if spec and spec.encoder and spec.image:
            needed = max(needed, image_positions(spec.encoder, spec.image) + _TALK)
        return min(wanted, needed)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a model is going to be loaded.

    Attributes:
        settings: What was chosen.
        footprint: What that takes.
        budget: What was allowed, in bytes, or None.
        available: What this process may still take.
        given_up: What the budget cost, in words.
    """

    settings: Settings
    footprint: Footprint
    budget: int | None
    available: int
    given_up: tuple[str, ...] = ()

    @property
    def left(self) -> int | None:
        """Bytes of the budget that nothing needs."""
        return None if self.budget is None else max(0, self.budget - self.footprint.peak.total)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, sizes in bytes."""
        peak, settings = self.footprint.peak, self.settings
        return {
            "peak": {"total": peak.total, "own": peak.own, "mapped": peak.mapped},
            "parts": {name: {"own": part.own, "mapped": part.mapped} for name, part in self.footprint.parts().items()},
            "settings": {
                "context": settings.context, "kv_type": settings.kv_type, "batch": settings.batch,
                "repack": settings.repack, "encoder": settings.encoder,
            },
            "budget": self.budget,
            "available": self.available,
            "given_up": list(self.given_up),
            "picture_px": list(PICTURE_PX),
        }  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) for people."""
        peak = self.footprint.peak
        rows = [("memory", f"{_mb(peak.total)} at most: {_mb(peak.own)} own, {_mb(peak.mapped)} pages of files")]
        for name, part in self.footprint.parts().items():
            rows.append(("memory", f"{_mb(part.total):>9}  {name}"))
        if self.footprint.released:
            rows.append(("memory", "encoder and decoder take turns"))
        rows.append(("memory", f"{_mb(self.available)} available; context {self.settings.context:,}"))
        if self.budget is not None:
            rows.append(("budget", f"{_mb(self.budget)}"))
        return rows + [("budget", words) for words in self.given_up]


def holds_scores(graph: Path) -> bool:
    """Whether an encoder's graph has ONNX Runtime's attention, which holds the scores of all heads; ours does not.

    The file is looked through for the operator's name: reading a graph takes a library.
    """
    with open_regular(graph) as (file, size):
        return b"MultiHeadAttention" in file.read(min(size, _GRAPH_BYTES))


def parse_size(size: str | int | None) -> int | None:
    """Bytes of `900MB`, `1.5GB`, `512MiB` or a plain number.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    if size is None:
        return None
    found = _SIZE.fullmatch(size.strip().upper()) if isinstance(size, str) else None
    nbytes = size if type(size) is int else None
    if found and found[2] in _UNITS:
        nbytes = int(min(float(found[1]) * _UNITS[found[2]], 1 << 60))
    if nbytes is None or not 0 < nbytes < 1 << 60:
        raise UsageError(f"a size such as 900MB, 1.5GB or 512MiB is needed for ram_budget, found {shown(size)}")
    return nbytes


def plan_memory(
    files: Files, settings: Settings, *, budget: int | None = None, context_is_fixed: bool = False
) -> MemoryPlan:
    """Choose how to load a model.

    Args:
        files: The model.
        settings: What is wanted if there is room.
        budget: Bytes that this process may hold at most, pages of mapped files included; None is no limit.
        context_is_fixed: Whether the context was asked for, so that a plan must not make it smaller.

    Raises:
        MemoryPlanError: nothing fits, or without a budget, what is wanted certainly does not.
    """
    available = available_bytes()
    wanted = MemoryPlan(settings=settings, footprint=files.footprint(settings), budget=budget, available=available)
    if budget is None:
        _refuse_hopeless(wanted)
        return wanted
    least = wanted
    for choice in _choices(files, settings, context_is_fixed=context_is_fixed):
        found = replace(
            wanted, settings=choice, footprint=files.footprint(choice), given_up=_given_up(settings, choice)
        )
        if found.footprint.peak.total <= budget:
            return found
        least = min(least, found, key=lambda plan: plan.footprint.peak.total)
    raise _refusal(least, budget, files, context_is_fixed)


def _in_one_piece(spec: ModelSpec) -> bool:
    """Whether the embeddings of several tiles follow each other without a text between them."""
    assert spec.image is not None
    return spec.image.policy in ("tiles", "slices") and spec.prompt.tile_texts is None


def _choices(files: Files, settings: Settings, *, context_is_fixed: bool) -> Iterator[Settings]:
    """From what is wanted to what takes least."""
    yield settings
    plain = replace(settings, repack=False)
    yield plain
    contexts = [settings.context]
    least = files.least_context(settings.context)
    while not context_is_fixed and contexts[-1] > least:
        contexts.append(max(least, contexts[-1] // 2))
    good = [context for context in contexts if context >= min(settings.context, _GOOD_CONTEXT)]
    residents = (
        [plain] if not files.sees or settings.encoder == "released" else [plain, replace(plain, encoder="released")]
    )
    for choice in residents:
        for context in good:
            for batch in _batches(settings):
                yield replace(choice, context=context, batch=batch)
    for context in contexts[len(good) :]:
        yield replace(residents[-1], context=context, batch=_batches(settings)[-1])


def _batches(settings: Settings) -> list[int]:
    return [batch for batch in _BATCHES if batch <= settings.batch] or [settings.batch]


def _given_up(wanted: Settings, chosen: Settings) -> tuple[str, ...]:
    found = []
    if wanted.repack and not chosen.repack:
        found.append("weights stay in their file, without a faster copy")
    if chosen.batch < wanted.batch:
        found.append(f"batches of {chosen.batch} positions instead of {wanted.batch}")
    if chosen.context < wanted.context:
        found.append(f"a context of {chosen.context} positions instead of {wanted.context}")
    if chosen.encoder != wanted.encoder:
        found.append("the encoder is loaded for each new picture, in turn with the decoder")
    return tuple(found)


def _refusal(least: MemoryPlan, budget: int, files: Files, context_is_fixed: bool) -> MemoryPlanError:
    needed, settings = least.footprint.peak.total, least.settings
    parts = sorted(least.footprint.parts().items(), key=lambda item: -item[1].total)[:3]
    largest = ", ".join(f"{name} {_mb(part.total)}" for name, part in parts)
    smaller = " or a smaller context" if context_is_fixed and settings.context > _LEAST_CONTEXT else ""
    return MemoryPlanError(
        f"{files.header.path} needs {_mb(needed)} at least, with a context of {settings.context} ({largest}); the "
        f"budget is {_mb(budget)}; allow more, or choose a smaller model{smaller}",
        needed=needed,
        available=budget,
    )


def _refuse_hopeless(plan: MemoryPlan) -> None:
    """Without a budget: refuse what cannot be had, whatever the system swaps or drops."""
    new = plan.footprint.new
    limits = [(plan.available + _swap_bytes(), new.own, "are available"), *_process_limits(new)]
    for room, needed, words in limits:
        if needed > _HOPELESS * room:
            raise MemoryPlanError(
                f"the model needs {_mb(needed)} of memory with a context of {plan.settings.context}, {_mb(room)} "
                f"{words}; ask for a smaller context, give a ram budget, or choose a smaller model",
                needed=needed,
                available=room,
            )


def _process_limits(new: Part) -> list[tuple[int, int, str]]:
    """(room, needed, words) of `ulimit -v` and `ulimit -d`, where they are set."""
    try:
        status = Path("/proc/self/status").read_text()
        size, data = (int(status.partition(f"{name}:")[2].split()[0]) * 1024 for name in ("VmSize", "VmData"))
    except (OSError, ValueError, IndexError):
        return []
    found = []
    for limit, used, needed, name in (
        (resource.RLIMIT_AS, size, new.total, "-v"),
        (resource.RLIMIT_DATA, data, new.own, "-d"),
    ):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            found.append((max(0, soft - used), needed, f"are left by this process's limit (ulimit {name})"))
    return found


def _swap_bytes() -> int:
    try:
        return int(Path("/proc/meminfo").read_text().partition("SwapFree:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
