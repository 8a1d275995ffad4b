"""From a name to a loaded model: which files, how large a context, how many threads."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any, get_args

from edgevlm.budget import Budget, parse_budget
from edgevlm.bundle import BUILTIN, Bundle, Manifest, open_bundle, read_manifest
from edgevlm.decoder import Decoder
from edgevlm.encoder import Encoder
from edgevlm.errors import BundleError, FileError, UsageError
from edgevlm.footprint import Settings, resident
from edgevlm.gguf import read_header
from edgevlm.kept import Kept
from edgevlm.llama import cpu_features
from edgevlm.machine import available_bytes, cpu_name
from edgevlm.memory import Files, MemoryPlan, holds_scores, parse_size, plan_memory
from edgevlm.native import KVType, context_size
from edgevlm.options import MOST_LOOKUP, shown
from edgevlm.pipeline import Model
from edgevlm.threads import Threads, ThreadsLike, resolve_threads
from edgevlm.tuning import identity, recall
from edgevlm.vision import Vision, no_vision

#: The memory cache of embeddings: a 32nd of what is available, between these.
_CACHE_PART = 32
_LEAST_CACHE_BYTES, _MOST_CACHE_BYTES = 16 << 20, 256 << 20
#: Rows of logits at once: what lookup guesses, and one more. A vocabulary of 128k takes half a megabyte for each.
_SCORED = MOST_LOOKUP + 1


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    threads: ThreadsLike = None,
    kv_type: KVType = "f16",
    state: str | os.PathLike[str] | None = None,
    image_tokens: int | str = "full",
    ram_budget: str | int | None = None,
) -> Model:
    """Load a model.

    Args:
        model: A bundle folder or a `.gguf` file (text only); None is the built-in panel reader.
        context: Positions to reserve for prompt and answer; None takes up to 4096.
        threads: Threads for every phase, or a count for each: `{"encode": 4, "prefill": 4, "decode": 2}`. What is left
            out is as `Model.tune` found on this machine, or else every core that this process may use.
        kv_type: Type of the key/value cache; `f32` is for comparisons with the reference.
        state: A folder in which pictures' embeddings and the decoder's state behind them are kept, for the next
            process; None keeps nothing on disk.
        image_tokens: The most embeddings that a picture may take, `docs/image-tokens.md`; `full` takes all.
        ram_budget: The most that this process may hold, such as `"900MB"` or a number of bytes: `edgevlm.memory` says
            what is given up for it, and `model.memory` what was. None takes what is best for speed.

    Raises:
        MemoryPlanError: it does not fit into the budget, or certainly not into memory.
        EdgeVLMError: the model is missing, damaged, or not for this version.

    Example::

        with edgevlm.load() as model:
            print(model.ask("What does the display read?", images=["panel.jpg"]).text)
    """
    for name, value in (("model", model), ("state", state)):
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise UsageError(f"{name} must be a path, found {shown(value)}")
    if kv_type not in get_args(KVType):
        raise UsageError(f"kv_type must be one of {', '.join(get_args(KVType))}, found {shown(kv_type)}")
    resolve_threads(threads)  # a count that cannot be is refused before anything is read
    nbytes, budget = parse_size(ram_budget), parse_budget(image_tokens)
    started = time.perf_counter()
    path = BUILTIN if model is None else Path(model)
    # os.path answers False where Path would raise, for a NUL or a name too long; an empty name would mean this folder.
    if model == "" or not os.path.exists(path):
        raise FileError(f"there is no model `{model}`; give a bundle folder or a .gguf file", code="file.not_found")
    bundle = open_bundle(path) if os.path.isdir(path) else None
    if budget and (bundle is None or bundle.spec.encoder is None):
        raise no_vision(bundle.spec.name if bundle else path.name)
    files = _files(path, bundle.manifest if bundle else None)
    plan = _plan(files, context, kv_type, nbytes)
    owner = identity(path, bundle)
    counts = resolve_threads(threads, None if isinstance(threads, int) else recall(owner))
    decoder = _open_decoder(files, plan, counts)
    if bundle:
        _check_pair(path, bundle, decoder)
        kept = Kept(state) if state and bundle.spec.encoder else None
        vision = _open_vision(bundle, decoder, plan, kept, budget)
        identity_of_state = _state_identity(bundle, plan.settings)
        loaded = Model(bundle.spec.name, decoder, bundle.spec, vision, kept=kept, identity=identity_of_state)
    else:
        loaded = Model(path.name, decoder)
    loaded.memory, loaded.tuning_identity = plan, owner
    loaded.load_s = time.perf_counter() - started
    return loaded


def forecast(
    model: str | os.PathLike[str] | None = None, *, context: int | None = None, ram_budget: str | int | None = None
) -> MemoryPlan:
    """What memory a model would take, and how `load` would fit it; arguments are those of `load`.

    Nothing is loaded, and the files are not checked against their hashes.

    Raises:
        EdgeVLMError: as `load`.
    """
    path = BUILTIN if model is None else Path(model)
    manifest = read_manifest(path) if os.path.isdir(path) else None
    return _plan(_files(path, manifest), context, "f16", parse_size(ram_budget))


def _files(path: Path, manifest: Manifest | None) -> Files:
    features = cpu_features()  # before the measurement: it loads the library
    before = resident()
    named = {entry.role: path / entry.name for entry in manifest.files} if manifest else {}
    return Files(
        header=read_header(named.get("decoder", path)),
        manifest=manifest,
        features=features,
        before=before,
        scores="encoder" in named and holds_scores(named["encoder"]),
    )


def _plan(files: Files, context: int | None, kv_type: KVType, budget: int | None) -> MemoryPlan:
    settings = Settings(
        context=context_size(files.header, context), kv_type=kv_type, batch=files.batch(kv_type), scored=_SCORED
    )
    return plan_memory(files, settings, budget=budget, context_is_fixed=context is not None)


def _open_decoder(files: Files, plan: MemoryPlan, threads: Threads) -> Decoder:
    chosen = plan.settings
    return Decoder(
        files.header.path,
        header=files.header,
        context=chosen.context,
        threads=threads,
        kv_type=chosen.kv_type,
        repack=chosen.repack,
        batch=chosen.batch,
        scored=chosen.scored,
    )


def _open_vision(
    bundle: Bundle, decoder: Decoder, plan: MemoryPlan, kept: Kept | None, budget: Budget | None
) -> Vision | None:
    if bundle.spec.encoder is None:
        return None
    in_turns = plan.settings.encoder == "released"
    vision = Vision(
        bundle,
        functools.partial(Encoder, bundle.path("encoder"), bundle.spec.encoder),
        cache_bytes=_cache_bytes(plan),
        kept=kept,
        budget=budget,
        make_room=decoder.set_aside if in_turns else None,
        threads=decoder.threads,
    )
    if kept is None and not in_turns:
        vision.load()  # with a cache on disk it may not be needed
    return vision


def _cache_bytes(plan: MemoryPlan) -> int:
    """Memory for embeddings: a part of what is free, and enough for hundreds of pictures of a small model; of a budget
    half of what is left."""
    free = max(_LEAST_CACHE_BYTES, min(_MOST_CACHE_BYTES, available_bytes() // _CACHE_PART))
    return free if plan.left is None else min(free, plan.left // 2)


def _state_identity(bundle: Bundle, settings: Settings) -> dict[str, Any]:
    """What a decoder's state belongs to: llama.cpp itself checks little of it (hostile-inputs, A13)."""
    return {
        "decoder": next(entry.sha256 for entry in bundle.manifest.files if entry.role == "decoder"),
        "context": settings.context,
        "kv_type": settings.kv_type,
        "batch": settings.batch,
        "repack": settings.repack,
        "cpu": [cpu_name(), *sorted(cpu_features())],
        "versions": {name: importlib.metadata.version(name) for name in ("edgevlm", "llama-cpp-python")},
    }


def _check_pair(path: Path, bundle: Bundle, decoder: Decoder) -> None:
    """Each file may be whole and yet not belong to the other."""
    spec = bundle.spec
    promised = (spec.encoder.n_embd if spec.encoder else spec.decoder.n_embd, spec.decoder.vocab)
    if promised != (decoder.n_embd, decoder.n_vocab):
        raise BundleError(
            f"{path}: the encoder gives rows of {promised[0]} for a vocabulary of {promised[1]}, the decoder takes "
            f"{decoder.n_embd} and has {decoder.n_vocab}; convert the checkpoint again",
            code="bundle.invalid",
        )
