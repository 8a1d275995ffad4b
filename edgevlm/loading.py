"""From a name to a loaded model: which files, how large a context, how many threads."""

from __future__ import annotations

import os
import time
from pathlib import Path

from edgevlm.bundle import BUILTIN, Bundle, open_bundle
from edgevlm.decoder import Decoder, KVType
from edgevlm.encoder import Encoder
from edgevlm.errors import BundleError, FileError
from edgevlm.machine import check_threads
from edgevlm.pipeline import Model


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    threads: int | None = None,
    kv_type: KVType = "f16",
) -> Model:
    """Load a model.

    Args:
        model: A bundle folder or a `.gguf` file (text only); None is the built-in panel reader.
        context: Positions to reserve for prompt and answer; None takes up to 4096.
        threads: Threads for every stage; None takes every CPU that this process may use.
        kv_type: Type of the key/value cache; `f32` is for comparisons with the reference.

    Raises:
        EdgeVLMError: the model is missing, damaged, or not for this version.

    Example::

        with edgevlm.load() as model:
            print(model.ask("What does the display read?", images=["panel.jpg"]).text)
    """
    check_threads(threads)
    started = time.perf_counter()
    path = BUILTIN if model is None else Path(model)
    bundle = encoder = None
    # os.path answers False where Path would raise, for a NUL or a name too long; an empty name would mean this folder.
    if model == "" or not os.path.exists(path):
        raise FileError(f"there is no model `{model}`; give a bundle folder or a .gguf file", code="file.not_found")
    if os.path.isdir(path):
        bundle = open_bundle(path)
        decoder = Decoder(bundle.path("decoder"), context=context, threads=threads, kv_type=kv_type)
        _check_pair(path, bundle, decoder)
        if bundle.spec.encoder is not None:
            encoder = Encoder(bundle.path("encoder"), bundle.spec.encoder, threads=threads)
    else:
        decoder = Decoder(path, context=context, threads=threads, kv_type=kv_type)
    loaded = Model(bundle.spec.name if bundle else path.name, decoder, bundle, encoder)
    loaded.load_s = time.perf_counter() - started
    return loaded


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
