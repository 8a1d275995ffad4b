"""The decoder as a GGUF file: which keys and tensors an architecture-`llama` file has, and their values.

Contract: llama.cpp's `src/models/llama.cpp` (what the loader reads) and `conversion/llama.py` (what upstream writes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.converters import quant, weights
from edgevlm.converters.gguf_file import PlannedTensor
from edgevlm.converters.mapping import Mapped, Source
from edgevlm.converters.resolve import Resolved
from edgevlm.converters.tokenizer import Vocabulary
from edgevlm.converters.transforms import rope_factors_llama3
from edgevlm.converters.weights import Feed

ARCH = "llama"
_ROPE_FREQS = "rope_freqs.weight"


def plan(
    sources: Mapping[str, Source], resolved: Resolved, kinds: Mapping[str, str], feed: Feed | None = None
) -> list[PlannedTensor]:
    """The tensors of a file.

    Args:
        sources: See `sources`.
        resolved: The numbers of the checkpoint.
        kinds: For each matrix its ggml type. Vectors (norms) are float32 everywhere, as llama.cpp demands.
        feed: Where their bytes come from.
    """
    feed = feed or Feed()
    planned = []
    for name, source in sources.items():
        kind = kinds[name] if len(source.tensor.shape) > 1 else "F32"
        planned.append(PlannedTensor(name, source.tensor.shape, kind, partial(feed.blocks, name, source, kind)))
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
        planned.insert(0, PlannedTensor(_ROPE_FREQS, factors.shape, "F32", lambda: (factors,)))
    return planned


def in_quantizer_order(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """As llama.cpp's quantizer orders a file: what belongs to no block first, blocks by number, names inside."""

    def key(tensor: PlannedTensor) -> tuple[int, str]:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        return (int(block[1]) if block else -1, tensor.name)

    return sorted(tensors, key=key)


def sources(mapped: Mapped) -> dict[str, Source]:
    """Sources of all tensors of the file by GGUF name.

    A head that equals the embedding is left out, llama.cpp then reads the embedding twice. The numbers decide, not the
    flag of config.json: some exporters store a tied matrix twice, others untie without saying so.
    """
    if mapped.head is None or weights.equal(mapped.head.tensor, mapped.decoder["token_embd.weight"].tensor):
        return dict(mapped.decoder)
    return {**mapped.decoder, "output.weight": mapped.head}


def exact_matrices(sources: Mapping[str, Source]) -> dict[str, Callable[[int], NDArray[np.float32]]]:
    """For each matrix of the file a function that gives each `step`-th row of its true values, in the file's order."""
    return {name: partial(weights.sampled, source) for name, source in sources.items() if source.tensor.bits.ndim > 1}


def metadata(
    resolved: Resolved, vocabulary: Vocabulary, general: Mapping[str, str], file_type: int, *, quantized: bool
) -> dict[str, Any]:
    """The keys of a file, without `general.architecture`; in the order of llama.cpp's quantizer for its files."""
    keys = {"general.type": "model", **general, "general.file_type": file_type, **llama_keys(resolved)}
    keys |= _tokenizer_keys(vocabulary)
    if quantized:
        del keys["general.file_type"]
        keys |= {"general.quantization_version": quant.VERSION, "general.file_type": file_type}
    return keys


def llama_keys(resolved: Resolved) -> dict[str, Any]:
    """What llama.cpp must know of the model's sizes."""
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
