"""Writes small GGUF files byte by byte, so that every field can be made wrong."""

from __future__ import annotations

import struct
from typing import Any

U8, I32, U32, F32, BOOL, STR, ARR, U64 = 0, 5, 4, 6, 7, 8, 9, 10
_FORMS = {U8: "B", I32: "i", U32: "I", F32: "f", BOOL: "B", U64: "Q"}

Value = tuple[Any, ...]  # (type, value) or (ARR, item type, values)

VALID: dict[str, Value] = {
    "general.architecture": (STR, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 128),
    "llama.embedding_length": (U32, 64),
    "llama.feed_forward_length": (U32, 128),
    "llama.attention.head_count": (U32, 4),
    "llama.attention.head_count_kv": (U32, 2),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 10000.0),
    "tokenizer.ggml.model": (STR, "gpt2"),
    "tokenizer.ggml.pre": (STR, "llama-bpe"),
    "tokenizer.ggml.tokens": (ARR, STR, ["a", "b", "<s>"]),
    "tokenizer.ggml.token_type": (ARR, I32, [1, 1, 3]),
    "tokenizer.ggml.bos_token_id": (U32, 2),
    "tokenizer.chat_template": (STR, "{{ messages[0].content }}"),
}

#: (name, dims in GGUF order, type id, offset, bytes of data): two tensors, padded to 32
TENSORS = [("token_embd.weight", (64, 3), 0, 0, 768), ("output_norm.weight", (64,), 0, 768, 256)]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, *rest: Any) -> bytes:
    if kind == STR:
        return string(rest[0])
    if kind == ARR:
        item, values = rest
        return struct.pack("<IQ", item, len(values)) + b"".join(
            value(item, *v) if item == ARR else value(item, v) for v in values
        )
    return struct.pack("<" + _FORMS[kind], rest[0])


def build(
    metadata: dict[str, Value] | None = None,
    tensors: list[tuple[str, tuple[int, ...], int, int, int]] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    extra: bytes = b"",
) -> bytes:
    """A GGUF file; counts can be made to lie, and `extra` bytes follow the data."""
    metadata = VALID if metadata is None else metadata
    tensors = TENSORS if tensors is None else tensors
    head = magic + struct.pack(
        "<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(metadata) if n_kv is None else n_kv
    )
    for key, (kind, *rest) in metadata.items():
        head += string(key) + struct.pack("<I", kind) + value(kind, *rest)
    for name, dims, type_id, offset, _ in tensors:
        head += string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        head += struct.pack("<IQ", type_id, offset)
    head += b"\0" * (-len(head) % 32)
    return head + b"\0" * sum(nbytes for *_, nbytes in tensors) + extra
