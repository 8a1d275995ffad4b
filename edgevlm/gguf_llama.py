"""What a GGUF header of architecture `llama` must say before llama.cpp may load it.

Each rule stands for an assertion, a division or an allocation in llama.cpp that would end or freeze the process
(`llama-model.cpp`, `llama-vocab.cpp`, `llama-hparams.cpp` of the pinned version). Wrong tensor shapes are not checked
here: llama.cpp reports those cleanly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Why a file is refused; `unsupported` means well-formed but not for us."""

    text: str
    unsupported: bool = False


@dataclass(frozen=True)
class Rule:
    """`key` must be present (unless optional) and its value must pass `accepts`; `says` completes "must be ..."."""

    key: str
    accepts: Callable[[Any], bool]
    says: str
    optional: bool = False


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low < value < high


_RULES = (
    Rule("llama.block_count", _whole(1, 512), "between 1 and 512"),
    Rule("llama.context_length", _whole(1, 1 << 24), "between 1 and 2^24"),
    Rule("llama.embedding_length", _whole(1, 65536), "between 1 and 65536"),
    Rule("llama.feed_forward_length", _whole(1, 1 << 20), "between 1 and 2^20"),
    Rule("llama.attention.head_count", _whole(1, 1024), "between 1 and 1024"),
    Rule("llama.attention.head_count_kv", _whole(1, 1024), "between 1 and 1024", optional=True),
    Rule("llama.attention.layer_norm_rms_epsilon", _number(0, 1), "between 0 and 1"),
    Rule("llama.rope.freq_base", _number(0, math.inf), "positive and finite", optional=True),
    Rule(
        "llama.rope.scaling.type", lambda v: v in ("none", "linear", "yarn", "longrope"), "a known type", optional=True
    ),
    Rule("llama.expert_count", lambda v: v == 0, "0 (mixtures of experts are not supported)", optional=True),
    Rule("llama.expert_used_count", lambda v: v == 0, "0 (mixtures of experts are not supported)", optional=True),
    Rule("llama.expert_group_count", lambda v: v == 0, "0 (mixtures of experts are not supported)", optional=True),
    Rule("llama.nextn_predict_layers", lambda v: v == 0, "0 (prediction layers are not supported)", optional=True),
    Rule("split.count", lambda v: v in (0, 1), "1 (join the shards first)", optional=True),
    Rule("tokenizer.ggml.model", lambda v: v in ("gpt2", "llama"), "`gpt2` or `llama`"),
    Rule("tokenizer.ggml.tokens", lambda v: isinstance(v, list) and 1 <= len(v) <= 1 << 20, "a list of texts"),
    Rule("tokenizer.chat_template", lambda v: isinstance(v, str) and len(v) <= 256 << 10, "a text up to 256 KiB", True),
)


def check(metadata: dict[str, Any]) -> Problem | None:
    """The first problem of the metadata, or None."""
    arch = metadata.get("general.architecture")
    if arch != "llama":
        return Problem(f"its architecture is {arch!r}; only `llama` is supported", unsupported=True)
    for rule in _RULES:
        if rule.key not in metadata:
            if not rule.optional:
                return Problem(f"{rule.key} is missing")
        elif not rule.accepts(metadata[rule.key]):
            return Problem(f"{rule.key} is {str(metadata[rule.key])[:80]}, it must be {rule.says}")
    return _check_heads(metadata) or _check_vocabulary(metadata)


def _check_heads(metadata: dict[str, Any]) -> Problem | None:
    heads = metadata["llama.attention.head_count"]
    heads_kv = metadata.get("llama.attention.head_count_kv", heads)
    width = metadata["llama.embedding_length"]
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    if heads % heads_kv:
        return Problem(f"{heads} attention heads cannot share {heads_kv} key/value heads")
    if "llama.attention.key_length" not in metadata and width % heads:
        return Problem(f"{heads} attention heads do not divide the embedding width {width}")
    if type(head_dim) is not int or not 2 <= head_dim <= 1024 or head_dim % 2:
        return Problem(f"the head width {head_dim} must be even and between 2 and 1024")
    rope = metadata.get("llama.rope.dimension_count", head_dim)
    if type(rope) is not int or not 2 <= rope <= head_dim or rope % 2:
        return Problem(f"llama.rope.dimension_count is {rope}, it must be even and at most {head_dim}")
    return None


def _check_vocabulary(metadata: dict[str, Any]) -> Problem | None:
    tokens = metadata["tokenizer.ggml.tokens"]
    if set(map(type, tokens)) != {str}:
        return Problem("tokenizer.ggml.tokens must hold texts")
    # llama.cpp keeps C strings: tokens that agree up to a NUL count as duplicates, and duplicates abort.
    known = set(tokens)
    seen = {token.split("\0", 1)[0] for token in tokens} if "\0" in "".join(tokens) else known
    if len(seen) != len(tokens) or "" in known:
        return Problem("tokenizer.ggml.tokens has an empty token or one that appears twice")
    if metadata["tokenizer.ggml.model"] == "llama" and not {f"<0x{byte:02X}>" for byte in range(256)} <= known:
        return Problem("tokenizer.ggml.tokens lacks some of the byte tokens <0x00> to <0xFF> of a `llama` vocabulary")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        values = metadata.get(key)
        if values is not None and (not isinstance(values, tuple) or len(values) != len(tokens)):
            return Problem(f"{key} must have {len(tokens)} numbers, one for each token")
    types = metadata.get("tokenizer.ggml.token_type", ())
    if not set(map(type, types)) <= {int} or not set(types) <= set(range(7)):
        return Problem("tokenizer.ggml.token_type must hold whole numbers between 0 and 6")
    if not all(map(math.isfinite, metadata.get("tokenizer.ggml.scores", ()))):
        return Problem("tokenizer.ggml.scores must be finite")
    for key, value in metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and not _whole(0, len(tokens) - 1)(value):
            return Problem(f"{key} is {value}, there are {len(tokens)} tokens")
    for role in ("bos", "eos", "sep"):
        wanted = metadata.get(f"tokenizer.ggml.add_{role}_token", False)
        if wanted and f"tokenizer.ggml.{role}_token_id" not in metadata:
            return Problem(f"tokenizer.ggml.add_{role}_token is set but the file names no such token")
    return None
