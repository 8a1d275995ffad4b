"""tokenizer.model, SentencePiece's own file: pieces, scores and types are what llama.cpp was made for.

Format: `sentencepiece_model.proto` of google/sentencepiece. Only what Llama's tokenizers are is accepted: BPE with byte
fallback that changes nothing of a text but its spaces. Tokens that were added later stand in added_tokens.json or in
`added_tokens_decoder` of tokenizer_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from edgevlm.converters.protobuf import Field, Message, parse, repeated
from edgevlm.converters.sections import invalid, unsupported
from edgevlm.converters.tokens import Tokens, check_texts, is_byte

_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
_MOST_PIECES = 1 << 20
_NO_ID = 1 << 31  # ids are int32; -1, in two's complement, is none
_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")

# ModelProto and its SentencePiece
_PIECES, _TRAINER, _NORMALIZER = 1, Field(2, b""), Field(3, b"")
_TEXT, _SCORE, _TYPE = Field(1, b""), Field(2, 0.0), Field(3, _NORMAL)
_ROLES = {"unknown": Field(40, 0), "bos": Field(41, 1), "eos": Field(42, 2)}
#: Fields of TrainerSpec and NormalizerSpec, the only value that llama.cpp repeats, and what another one means.
_TRAINER_MUST = (
    (Field(3, 1), _BPE, "is not BPE"),
    (Field(24, 0), 0, "puts spaces behind words"),
    (Field(35, 0), 1, "has no byte fallback"),
)
_NORMALIZER_MUST = (
    (Field(2, b""), b"", "normalizes characters"),
    (Field(4, 1), 0, "removes spaces"),
    (Field(5, 1), 1, "keeps spaces as they are"),
)
_PREFIX = Field(3, 1)


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


class _Model(NamedTuple):
    pieces: list[_Piece]
    roles: dict[str, int]
    add_space_prefix: bool


def read_sentencepiece(raw: bytes, settings: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> Tokens:
    """Read a tokenizer.model.

    Args:
        raw: The file.
        settings: tokenizer_config.json.
        added_tokens: added_tokens.json, ids by text. It does not say whether they are special; they are taken so.

    Raises:
        CheckpointError: `checkpoint.invalid` or `checkpoint.unsupported`.
    """
    if settings.get("tokenizer_class") not in _CLASSES:
        found = str(settings["tokenizer_class"])[:80]
        raise unsupported(f"a tokenizer.model of the class {found!r}, only LlamaTokenizer is supported")
    try:
        model = _read(raw)
    except ValueError as error:
        raise invalid(f"tokenizer.model cannot be read: {error}") from error
    kinds = [piece.type for piece in model.pieces]
    texts = {i: piece.text for i, piece in enumerate(model.pieces)}
    added = {i: kind == _CONTROL for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}
    for index, text, special in _additions(settings, added_tokens):
        if texts.setdefault(index, text) != text:
            raise invalid(f"the added token {text[:40]!r} has the id {index}, which is {texts[index][:40]!r}")
        if index >= len(model.pieces):
            added[index] = special
    check_texts("tokenizer.model", texts)
    _check_control(texts, added)
    return Tokens(
        model="llama",
        pre="default",
        texts=texts,
        added=added,
        unknown=texts[kinds.index(_UNKNOWN)],
        merges=[],
        scores={i: piece.score for i, piece in enumerate(model.pieces)},
        roles=model.roles,
        add_space_prefix=model.add_space_prefix,
        around=_around(settings, {role: texts[index] for role, index in model.roles.items()}),
    )


def _read(raw: bytes) -> _Model:
    """The model's own part; a ValueError says what is wrong with the file."""
    model = parse(raw)
    trainer, normalizer = parse(_TRAINER.of(model)), parse(_NORMALIZER.of(model))
    for part, must in ((trainer, _TRAINER_MUST), (normalizer, _NORMALIZER_MUST)):
        for field, wanted, what in must:
            if field.of(part) != wanted:
                raise unsupported(f"tokenizer.model {what}, which llama.cpp does not repeat")
    pieces = [_piece(parse(piece)) for piece in repeated(model, _PIECES)]
    if not 1 <= len(pieces) <= _MOST_PIECES:
        raise ValueError(f"it has {len(pieces)} pieces")
    if sorted(piece.text for piece in pieces if piece.type == _BYTE) != [f"<0x{byte:02X}>" for byte in range(256)]:
        raise ValueError("it does not have one piece for each byte")
    roles = {role: field.of(trainer) for role, field in _ROLES.items()}
    roles = {role: index for role, index in roles.items() if index < _NO_ID}
    for role, index in roles.items():
        if index >= len(pieces) or pieces[index].type != (_UNKNOWN if role == "unknown" else _CONTROL):
            raise ValueError(f"its special id {index} ({role}) is no such piece")
    if [i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN] != [roles.get("unknown")]:
        raise ValueError("it does not have exactly one unknown piece")
    return _Model(pieces, roles, bool(_PREFIX.of(normalizer)))


def _piece(message: Message) -> _Piece:
    piece = _Piece(_TEXT.of(message).decode("utf-8"), _SCORE.of(message), _TYPE.of(message))
    if not math.isfinite(piece.score):
        raise ValueError(f"{piece.text[:40]!r} has the score {piece.score}")
    known = (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    if piece.type not in known or is_byte(piece.text) != (piece.type == _BYTE):
        raise unsupported(f"tokenizer.model gives {piece.text[:40]!r} the type {piece.type}, llama.cpp another one")
    return piece


def _additions(settings: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """(id, text, whether it is special) of the tokens that were added to the model's."""
    described = settings.get("added_tokens_decoder", {})
    if not isinstance(described, dict):
        raise invalid("tokenizer_config.json: added_tokens_decoder is not an object")
    for key, entry in described.items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdigit() and len(key) < 8) or not isinstance(text, str):
            raise invalid(f"tokenizer_config.json has the odd added token {key[:20]!r}: {str(entry)[:80]}")
        if any(entry.get(flag, False) is not False for flag in ("lstrip", "rstrip", "single_word")):
            raise unsupported(
                f"the added token {text!r} has lstrip, rstrip or single_word, which llama.cpp does not have"
            )
        yield int(key), text, entry.get("special") is True
    for text, index in added_tokens.items():
        if type(index) is not int or not 0 <= index < _MOST_PIECES:
            raise invalid(f"added_tokens.json gives {text[:40]!r} the id {str(index)[:40]}")
        if str(index) not in described:
            yield index, text, True


def _check_control(texts: Mapping[int, str], added: Mapping[int, bool]) -> None:
    """SentencePiece never joins neighbours to a control token, llama.cpp whenever their joint text is one."""
    plain = {text for index, text in texts.items() if index not in added}
    for index, special in added.items():
        text = texts[index]
        if special and any(text[:cut] in plain and text[cut:] in plain for cut in range(1, len(text))):
            raise unsupported(f"llama.cpp would make the control token {text!r} out of its halves")


def _around(settings: Mapping[str, Any], text_of: Mapping[str, str]) -> list[str | None]:
    """What LlamaTokenizer makes of a text: bos before it and no eos behind, unless the settings say otherwise."""

    def added(role: str, default: bool) -> list[str | None]:
        flag, said = settings.get(f"add_{role}_token", default), settings.get(f"{role}_token")
        if type(flag) is not bool:
            raise invalid(f"tokenizer_config.json: add_{role}_token is {str(flag)[:40]!r}, true or false is needed")
        said = said.get("content") if isinstance(said, dict) else said
        return [said or text_of.get(role)] if flag else []

    return [*added("bos", True), None, *added("eos", False)]
