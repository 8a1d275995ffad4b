"""From a name to a loaded model: which files, how large a context, how many threads."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

from edgevlm.bundle import BUILTIN, Bundle, open_bundle
from edgevlm.decoder import Decoder, KVType
from edgevlm.encoder import Encoder
from edgevlm.errors import BundleError, FileError
from edgevlm.kept import Kept
from edgevlm.llama import cpu_features
from edgevlm.machine import available_bytes, cpu_name
from edgevlm.pipeline import Model
from edgevlm.threads import ThreadsLike, resolve_threads
from edgevlm.vision import Vision

#: The memory cache of embeddings: a 32nd of what is available, between these.
_CACHE_PART = 32
_LEAST_CACHE_BYTES, _MOST_CACHE_BYTES = 16 << 20, 256 << 20


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    threads: ThreadsLike = None,
    kv_type: KVType = "f16",
    state: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model.

    Args:
        model: A bundle folder or a `.gguf` file (text only); None is the built-in panel reader.
        context: Positions to reserve for prompt and answer; None takes up to 4096.
        threads: Threads for every phase, or a count for each: `{"encode": 4, "prefill": 4, "decode": 2}`; what is left
            out keeps its default, every core that this process may use.
        kv_type: Type of the key/value cache; `f32` is for comparisons with the reference.
        state: A folder in which pictures' embeddings and the decoder's state behind them are kept, for the next
            process; None keeps nothing on disk.

    Raises:
        EdgeVLMError: the model is missing, damaged, or not for this version.

    Example::

        with edgevlm.load() as model:
            print(model.ask("What does the display read?", images=["panel.jpg"]).text)
    """
    threads = resolve_threads(threads)
    started = time.perf_counter()
    path = BUILTIN if model is None else Path(model)
    # os.path answers False where Path would raise, for a NUL or a name too long; an empty name would mean this folder.
    if model == "" or not os.path.exists(path):
        raise FileError(f"there is no model `{model}`; give a bundle folder or a .gguf file", code="file.not_found")
    if os.path.isdir(path):
        loaded = _load_bundle(path, context, threads, kv_type, state)
    else:
        loaded = Model(path.name, Decoder(path, context=context, threads=threads, kv_type=kv_type))
    loaded.load_s = time.perf_counter() - started
    return loaded


def _load_bundle(
    folder: Path, context: int | None, threads: ThreadsLike, kv_type: KVType, state: str | os.PathLike[str] | None
) -> Model:
    bundle = open_bundle(folder)
    spec, vision, kept = bundle.spec, None, None
    decoder = Decoder(bundle.path("decoder"), context=context, threads=threads, kv_type=kv_type)
    _check_pair(folder, bundle, decoder)
    if spec.encoder is not None:
        open_encoder = functools.partial(Encoder, bundle.path("encoder"), spec.encoder, threads=threads)
        kept = Kept(state) if state else None
        vision = Vision(bundle, open_encoder, cache_bytes=_cache_bytes(), kept=kept)
        if kept is None:
            vision.load()  # with a cache on disk it may not be needed
    return Model(spec.name, decoder, spec, vision, kept=kept, identity=_state_identity(bundle, decoder, kv_type))


def _cache_bytes() -> int:
    """Memory for embeddings: a part of what is free, and enough for hundreds of pictures of a small model."""
    return max(_LEAST_CACHE_BYTES, min(_MOST_CACHE_BYTES, available_bytes() // _CACHE_PART))


def _state_identity(bundle: Bundle, decoder: Decoder, kv_type: KVType) -> dict[str, Any]:
    """What a decoder's state belongs to: llama.cpp itself checks little of it (hostile-inputs, A13)."""
    return {
        "decoder": next(entry.sha256 for entry in bundle.manifest.files if entry.role == "decoder"),
        "context": decoder.n_context,
        "kv_type": kv_type,
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
