"""A finished decoder file, looked at as the runtime will: what converts must also load."""

from __future__ import annotations

import os
from pathlib import Path

from edgevlm import llama
from edgevlm.converters import gguf_file, pages
from edgevlm.converters.finite import all_finite
from edgevlm.converters.sections import invalid, unsupported
from edgevlm.errors import GGUFError
from edgevlm.gguf import read_container, read_header


def check_header(path: Path) -> None:
    """Refuse a file whose header the runtime refuses: a limit of ours, or a value that llama.cpp asserts on.

    Raises:
        CheckpointError: `checkpoint.unsupported`.
    """
    try:
        read_header(path)
    except GGUFError as error:
        reason = str(error).replace(str(path), "the decoder")
        raise unsupported(f"the checkpoint gives a decoder that the runtime refuses: {reason}") from error


def check_vocabulary(path: Path, stops: tuple[int, ...]) -> None:
    """Load the vocabulary with llama.cpp, and ask it whether each token of `stops` ends an answer.

    Raises:
        CheckpointError: `checkpoint.unsupported`.
    """
    native = llama.library()
    params = native.llama_model_default_params()
    params.vocab_only = True
    llama.clear_log()
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise unsupported(f"llama.cpp cannot load the tokenizer: {llama.last_log()}")
    try:
        vocab = native.llama_model_get_vocab(model)
        ignored = [index for index in stops if not native.llama_vocab_is_eog(vocab, index)]
    finally:
        native.llama_model_free(model)
    if ignored:
        raise unsupported(f"generation_config.json ends answers at {list(stops)}, llama.cpp would run past {ignored}")


def check_weights(path: Path) -> None:
    """Look at every weight, and load the whole model with llama.cpp: names and shapes.

    The file is mapped and nothing of it is copied.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """
    for name, tensor in gguf_file.map_tensors(read_container(path)).items():
        if not all_finite(tensor.bits, tensor.type):
            raise invalid(f"{name} of the text model holds NaN or infinity")
        pages.release(tensor.bits)
    native = llama.library()
    params = native.llama_model_default_params()
    params.use_extra_bufts = False  # repacking would copy the weights
    params.n_gpu_layers = 0
    params.load_mode = native.LLAMA_LOAD_MODE_MMAP
    llama.clear_log()
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise invalid(f"llama.cpp refuses the text model: {llama.last_log()}")
    native.llama_model_free(model)
