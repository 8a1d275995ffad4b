"""The decoder as a GGUF file: which keys and tensors an architecture-`llama` file has, and their values.

Contract: llama.cpp's `src/models/llama.cpp` (what the loader reads) and `conversion/llama.py` (what upstream writes).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import gguf_file, weights
from edgevlm.converters.gguf_file import PlannedTensor
from edgevlm.converters.mapping import Mapped, Source
from edgevlm.converters.quant import Recipe
from edgevlm.converters.resolve import Resolved
from edgevlm.converters.tokenizer import Vocabulary
from edgevlm.converters.transforms import rope_factors_llama3

_ROPE_FREQS = "rope_freqs.weight"


def plan(mapped: Mapped, resolved: Resolved, wanted: Recipe) -> list[PlannedTensor]:
    """The tensors of the file that the quantizer reads, or of the final file for a `direct` recipe.

    Matrices keep the checkpoint's own type on the way to the quantizer, which loses nothing and needs no more room than
    the checkpoint; vectors (norms) are float32 everywhere, as llama.cpp demands.
    """
    planned = [_plan_one(name, source, wanted) for name, source in sources(mapped).items()]
    rope = resolved.llama.rope
    if rope["rope_type"] == "llama3":
        factors = rope_factors_llama3(
            head_dim=resolved.llama.head_dim,
            base=rope["rope_theta"],
            factor=rope["factor"],
            low=rope["low_freq_factor"],
            high=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
        planned.insert(0, PlannedTensor(_ROPE_FREQS, factors.shape, "F32", lambda: factors))
    return planned


def sources(mapped: Mapped) -> dict[str, Source]:
    """Sources of all tensors of the file by GGUF name.

    A head that equals the embedding is left out, llama.cpp then reads the embedding twice. The numbers decide, not the
    flag of config.json: some exporters store a tied matrix twice, others untie without saying so.
    """
    if mapped.head is None or weights.equal(mapped.head.tensor, mapped.decoder["token_embd.weight"].tensor):
        return dict(mapped.decoder)
    return {**mapped.decoder, "output.weight": mapped.head}


def exact_matrices(mapped: Mapped) -> dict[str, Callable[[int], NDArray[np.float32]]]:
    """For each matrix of the file a function that gives each `step`-th row of its true values, in the file's order."""
    return {
        name: partial(weights.sampled, source)
        for name, source in sources(mapped).items()
        if source.tensor.bits.ndim > 1
    }


def _plan_one(name: str, source: Source, wanted: Recipe) -> PlannedTensor:
    shape = source.tensor.shape
    matrix_kind = wanted.types[0] if wanted.direct else source.tensor.dtype
    kind = matrix_kind if len(shape) > 1 else "F32"
    return PlannedTensor(name, shape, kind, partial(weights.stored, source, kind))


def write(
    path: Path, resolved: Resolved, vocabulary: Vocabulary, tensors: list[PlannedTensor], file_type: int,
    general: dict[str, str],
) -> None:  # fmt: skip
    """Write the file; see `gguf_file.write` for the errors."""
    metadata = {
        "general.type": "model",
        **general,
        "general.file_type": file_type,
        **_llama_keys(resolved),
        **_tokenizer_keys(vocabulary),
    }
    gguf_file.write(path, "llama", metadata, tensors)


def _llama_keys(resolved: Resolved) -> dict[str, Any]:
    decoder, llama = resolved.spec.decoder, resolved.llama
    keys: dict[str, Any] = {
        "llama.block_count": decoder.layers,
        "llama.context_length": decoder.context_length,
        "llama.embedding_length": decoder.n_embd,
        "llama.feed_forward_length": llama.n_ff,
        "llama.attention.head_count": llama.heads,
        "llama.attention.head_count_kv": llama.heads_kv,
        "llama.attention.key_length": llama.head_dim,
        "llama.attention.value_length": llama.head_dim,
        "llama.attention.layer_norm_rms_epsilon": llama.rms_eps,
        "llama.rope.dimension_count": llama.head_dim,
        "llama.rope.freq_base": llama.rope["rope_theta"],
        "llama.vocab_size": decoder.vocab,
    }
    # `llama3` is carried by the tensor rope_freqs.weight; llama.cpp aborts on scaling types that it does not know.
    if llama.rope["rope_type"] == "linear":
        keys["llama.rope.scaling.type"] = "linear"
        keys["llama.rope.scaling.factor"] = llama.rope["factor"]
    return keys


def _tokenizer_keys(vocabulary: Vocabulary) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
    }
    if vocabulary.scores:
        keys["tokenizer.ggml.scores"] = vocabulary.scores
    if vocabulary.merges:
        keys["tokenizer.ggml.merges"] = vocabulary.merges
    for role, index in vocabulary.special.items():
        keys[f"tokenizer.ggml.{role}_token_id"] = index
    keys["tokenizer.ggml.add_bos_token"] = vocabulary.add_bos
    keys["tokenizer.ggml.add_eos_token"] = vocabulary.add_eos
    if vocabulary.model == "llama":
        keys["tokenizer.ggml.add_space_prefix"] = vocabulary.add_space_prefix
    if vocabulary.chat_template is not None:
        keys["tokenizer.chat_template"] = vocabulary.chat_template
    return keys
