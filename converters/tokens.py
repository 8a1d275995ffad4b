"""What a tokenizer file says, whichever of the two it is: the common ground of their readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.converters.sections import invalid

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenizer, without what other files say of it.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece-like).
        pre: llama.cpp's name of the pre-tokenizer.
        texts: Every token by id, added ones included.
        added: Of the added tokens, by id, whether they are special.
        unknown: The text of the unknown token.
        merges: Best first; empty for `llama`.
        scores: By id, for `llama` only.
        roles: Ids by role (`bos`, `eos`, `padding`, `unknown`) that the file itself names.
        add_space_prefix: Whether a space is put before a text.
        around: What becomes of a text: texts of tokens before and after it, and None for itself.
    """

    model: str
    pre: str
    texts: Mapping[int, str]
    added: Mapping[int, bool]
    unknown: str | None
    merges: list[tuple[str, str]]
    scores: Mapping[int, float]
    roles: Mapping[str, int]
    add_space_prefix: bool
    around: list[str | None]


def is_byte(text: str) -> bool:
    """Whether a token of a SentencePiece-like vocabulary stands for one byte, as `<0x0A>` does."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def check_texts(where: str, texts: Mapping[int, str]) -> None:
    """Refuse texts that a GGUF vocabulary cannot hold.

    Raises:
        CheckpointError: `checkpoint.invalid`.
    """
    found = set(texts.values())
    if len(found) != len(texts) or "" in found or any("\0" in text for text in found):
        raise invalid(f"{where} has an empty token, a token with NUL, or one text with two ids")


def lay_out(tokens: Tokens, rows: int) -> tuple[list[str], list[int], list[float]]:
    """Texts, types and scores by id; rows without a token get `[PADi]`, as llama.cpp's converter names them."""
    names, types = [], []
    bytes_are_tokens = tokens.model == "llama"
    for index in range(rows):
        text = tokens.texts.get(index)
        if text is None:
            names.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        names.append(text)
        plain = BYTE if bytes_are_tokens and is_byte(text) else NORMAL
        kind = plain if index not in tokens.added else CONTROL if tokens.added[index] else USER_DEFINED
        types.append(UNKNOWN if bytes_are_tokens and text == tokens.unknown else kind)
    if len(set(names)) != rows:
        raise invalid("a token has the text of a padding token `[PADi]`")
    return names, types, [tokens.scores.get(index, 0.0) for index in range(rows)] if tokens.scores else []
