"""Which number of threads is best for each phase of a model on this machine: measured once, kept, used by `load`.

The rates of all candidates are taken in turns, so that whatever else the machine does hits all alike, and their medians
compared; fewer threads win unless more are clearly faster. What is kept counts only for the same files, processor,
number of CPUs and library versions; with any doubt it is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.errors import EdgeVLMError, StorageError
from edgevlm.files import open_regular
from edgevlm.machine import cpu_name, heavy_cores, usable_cpus
from edgevlm.splice import TextSegment
from edgevlm.state_folder import make_private, state_folder
from edgevlm.storage import atomic_write
from edgevlm.threads import PHASES, Threads
from edgevlm.versions import versions

if TYPE_CHECKING:
    from edgevlm.bundle import Bundle
    from edgevlm.decoder import Decoder
    from edgevlm.vision import Vision

_FORMAT = 1
#: More threads must be faster than fewer by this part, or the fewer are taken: they leave the machine to others.
_MARGIN = 0.03
_PREFILL, _STEPS = 128, 16
_FILE_BYTES = 1 << 16
#: Of a plain GGUF file this much is looked at, besides its size: header, vocabulary and the first weights.
_LOOKED_AT_BYTES = 1 << 20

Rates = dict[str, dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a tuning run found.

    `rates` are medians per second by phase and number of threads: tiles for `encode`, tokens for the others.
    """

    threads: Threads
    rates: Rates

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        rates = {phase: {str(count): rate for count, rate in found.items()} for phase, found in self.rates.items()}
        return {"threads": asdict(self.threads), "rates": rates}


def identity(path: Path, bundle: Bundle | None) -> dict[str, Any]:
    """What a tuning belongs to: the model's files, the processor, how many CPUs there are for us, the libraries."""
    if bundle is not None:
        files = [entry.sha256 for entry in bundle.manifest.files]
    else:
        with open_regular(path) as (file, size):
            files = [f"{size}:{hashlib.sha256(file.read(_LOOKED_AT_BYTES)).hexdigest()}"]
    return {
        "files": files,
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "versions": versions("llama-cpp-python", "onnxruntime"),
    }


def tune(
    decoder: Decoder,
    vision: Vision | None,
    *,
    counts: Iterable[int] | None = None,
    rounds: int = 5,
    report: Callable[[str], None] | None = None,
) -> Tuned:
    """Measure a model's phases with different numbers of threads.

    What the decoder's context holds is lost; the model has the chosen numbers afterwards.

    Args:
        decoder: Its language model.
        vision: The half that sees, or None.
        counts: Candidates; None takes up to as many as there are CPUs for us.
        rounds: Turns of each candidate.
        report: Called with a line for each round.

    Raises:
        BackendError: the model failed.
    """
    tried = sorted(set(counts or candidates(usable_cpus(), heavy_cores())))
    seen: dict[str, dict[int, list[float]]] = {phase: {count: [] for count in tried} for phase in PHASES}
    before = decoder.threads
    for number in range(rounds):
        for count in tried if number % 2 else reversed(tried):
            _measure_decoder(decoder, count, seen)
            if vision is not None:
                _measure_encoder(vision, count, seen)
        if report:
            report(f"round {number + 1} of {rounds}")
    rates = {
        phase: {count: statistics.median(values) for count, values in found.items() if values}
        for phase, found in seen.items()
    }
    best = {phase: choose(found) for phase, found in rates.items() if found}
    chosen = Threads(**{**asdict(before), **best})
    decoder.use_threads(chosen)
    if vision is not None:
        vision.use_threads(chosen)
    return Tuned(threads=chosen, rates={phase: found for phase, found in rates.items() if found})


def candidates(cpus: int, cores: int) -> list[int]:
    """Numbers worth trying: all small ones, then ever further apart; all cores and all CPUs among them."""
    steps = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    return sorted({count for count in [*steps, cores, cpus] if count <= cpus})


def choose(rates: Mapping[int, float]) -> int:
    """The fewest threads that are as good as the best, up to the margin."""
    best = max(rates.values())
    return min(count for count, rate in rates.items() if rate >= (1 - _MARGIN) * best)


def _measure_decoder(decoder: Decoder, count: int, seen: dict[str, dict[int, list[float]]]) -> None:
    decoder.use_threads(Threads(encode=count, prefill=count, decode=count))
    decoder.reset()
    length = max(1, min(_PREFILL, decoder.n_context - _STEPS - 1))
    decoder.prefill([TextSegment((1,))])  # the pool changes its size
    started = time.perf_counter()
    decoder.prefill([TextSegment((1,) * length)])
    between = time.perf_counter()
    steps = min(_STEPS, decoder.n_context - decoder.n_past)
    for _ in range(steps):
        decoder.step(1)
    ended = time.perf_counter()
    seen["prefill"][count].append(length / (between - started))
    if steps:
        seen["decode"][count].append(steps / (ended - between))
    decoder.reset()


def _measure_encoder(vision: Vision, count: int, seen: dict[str, dict[int, list[float]]]) -> None:
    import numpy as np

    vision.use_threads(Threads(encode=count, prefill=count, decode=count))
    encoder, image = vision.load(), vision.image_spec
    tiles_TCHW = np.zeros((1, 3, image.height_px, image.width_px), np.float32)
    encoder.encode(tiles_TCHW)
    started = time.perf_counter()
    encoder.encode(tiles_TCHW)
    seen["encode"][count].append(1 / (time.perf_counter() - started))
    vision.release()


# ---- what is kept


def tune_and_keep(decoder: Decoder, vision: Vision | None, owner: Mapping[str, Any], *, rounds: int) -> Tuned:
    """`tune`, then `keep` for this owner; nothing is kept for an empty one."""
    tuned = tune(decoder, vision, rounds=rounds)
    if owner:
        keep(tuned, owner)
    return tuned


def keep(tuned: Tuned, owner: Mapping[str, Any], folder: Path | None = None) -> Path | None:
    """Keep a result for `recall`; a folder that cannot be written is a warning.

    Args:
        tuned: The result.
        owner: What it belongs to (`identity`).
        folder: For state; None is `state_folder()`.

    Returns:
        The file, or None if nothing was kept.
    """
    folder = folder or state_folder()
    if folder is None:
        return None
    path = _path(folder, owner)
    document = {"format": _FORMAT, "identity": dict(owner), **tuned.to_json()}
    try:
        make_private(path.parent)
        atomic_write(path, (json.dumps(document, indent=2) + "\n").encode(), mode=0o600)
    except StorageError as error:
        warnings.warn(f"the tuned numbers of threads are not kept: {error}", RuntimeWarning, stacklevel=2)
        return None
    return path


def recall(owner: Mapping[str, Any], folder: Path | None = None) -> Threads | None:
    """The numbers that were kept for this owner; None if there are none that can be trusted."""
    folder = folder or state_folder()
    if folder is None:
        return None
    try:
        with open_regular(_path(folder, owner)) as (file, size):
            raw = file.read(_FILE_BYTES) if size <= _FILE_BYTES else b""
        document = json.loads(raw)
        if document["format"] != _FORMAT or document["identity"] != dict(owner):
            return None
        found = Threads(**document["threads"])
    except (EdgeVLMError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # More threads than CPUs were never tried.
    return found if max(asdict(found).values()) <= usable_cpus() else None


def _path(folder: Path, owner: Mapping[str, Any]) -> Path:
    digest = hashlib.blake2b(json.dumps(dict(owner), sort_keys=True).encode(), digest_size=16).hexdigest()
    return folder / "tuned" / f"{digest}.json"
