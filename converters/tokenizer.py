"""tokenizer.json and its companions, as the tokenizer keys of a GGUF file. No tokenizer library is needed.

Rules after llama.cpp's `conversion/base.py` and `llama-vocab.cpp`. Two kinds exist: byte-level BPE (`gpt2`) with a
pre-tokenizer that llama.cpp knows by name, and SentencePiece-like BPE with byte fallback (`llama`).

What tokenizer.json says is what the `tokenizers` library does with it. `add_bos_token` and `add_eos_token` of
tokenizer_config.json do nothing in transformers 5.23, so they do nothing here.

Known differences, both of the SentencePiece kind:
- Where a normalizer exists, Hugging Face looks for added tokens with `normalized: true` in the normalized text,
  llama.cpp always in the original one. Control tokens of published vocabularies are `normalized: false`.
- Hugging Face joins two neighbours if the merge list has this pair, llama.cpp if their joint text is a token.
  Vocabularies that come from SentencePiece list every such pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.converters.checkpoint import Checkpoint
from edgevlm.converters.pretokenizers import (
    DIGITS_TOGETHER,
    WHOLE_WORDS_FIRST,
    check_digits,
    prepends_space,
    recognise,
    steps_of,
)
from edgevlm.converters.sections import invalid, unsupported

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type

# Tokens that end an answer in llama.cpp by their text alone; all others need one of the three keys.
_STOPS_BY_TEXT = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "</s>"}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file stores about text.

    Attributes:
        model: `gpt2` or `llama`.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: By id, padded to the rows of the embedding.
        merges: `"left right"`, best first; empty for `llama`.
        scores: By id, for `llama` only.
        special: Ids by role: bos, eos, eot, eom (further tokens that end an answer), padding, unknown.
        stops: Every token at which transformers ends an answer.
        add_bos, add_eos, add_space_prefix: What the tokenizer does around a text.
        chat_template: Verbatim, or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    stops: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def token_texts(checkpoint: Checkpoint) -> dict[int, str]:
    """Every token by id, added ones included, without padding."""
    return _collect(_tokenizer_json(checkpoint))[0]


def read_vocabulary(checkpoint: Checkpoint, *, rows: int, ids: Mapping[str, int | None]) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        checkpoint: The opened checkpoint.
        rows: Rows of the embedding matrix; the token list is padded to that length.
        ids: Special ids by role as config.json has them (`bos`, `eos`, `padding`).

    Raises:
        CheckpointError: `checkpoint.invalid` or `checkpoint.unsupported`.
    """
    data = _tokenizer_json(checkpoint)
    settings = checkpoint.json("tokenizer_config.json") or {}
    texts, added = _collect(data)
    if max(texts) >= rows:
        raise invalid(f"the tokenizer has the id {max(texts)}, the embedding has {rows} rows")
    model = data["model"]
    _check_model(model)
    normalizer, pre_steps = (steps_of(data.get(key)) for key in ("normalizer", "pre_tokenizer"))
    byte_level = any(step.get("type") == "ByteLevel" for step in pre_steps)
    if byte_level == (model.get("byte_fallback") is True):
        raise unsupported("the tokenizer is neither byte-level BPE nor BPE with byte fallback")
    if byte_level and normalizer:
        raise unsupported("a byte-level tokenizer with a normalizer, which llama.cpp cannot apply")
    plain = {text for index, text in texts.items() if index not in added}
    merges = [_merge_pair(merge, plain) for merge in model["merges"]]
    pre = recognise(pre_steps) if byte_level else "default"
    if byte_level:
        _check_whole_words(plain, merges, wanted=pre in WHOLE_WORDS_FIRST, found=model.get("ignore_merges") is True)
    if pre in DIGITS_TOGETHER:
        check_digits(left + right for left, right in merges)
    tokens, types = _lay_out(texts, added, rows, unknown=model.get("unk_token"), bytes_are_tokens=not byte_level)
    special, stops = _special_ids(checkpoint, settings, {text: index for index, text in texts.items()}, ids)
    add_bos, add_eos = _bracketing(data, {role: texts[index] for role, index in special.items()})
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges] if byte_level else [],
        scores=[] if byte_level else _scores(texts, plain, merges, rows),
        special=special,
        stops=stops,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=not byte_level and prepends_space(normalizer, pre_steps),
        chat_template=_chat_template(checkpoint, settings),
    )


def _tokenizer_json(checkpoint: Checkpoint) -> dict[str, Any]:
    data = checkpoint.json("tokenizer.json")
    if data is None:
        raise invalid(f"{checkpoint.folder} has no tokenizer.json; save the tokenizer with `save_pretrained`")
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise unsupported(
            f"the tokenizer is {model.get('type') if isinstance(model, dict) else model!r}, only BPE is supported"
        )
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list) or not model["vocab"]:
        raise invalid("tokenizer.json has no vocab or no merges")
    return data


def _check_model(model: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's byte-pair merging does not have."""
    for key, harmless in (
        ("dropout", (None, 0, 0.0)), ("continuing_subword_prefix", (None, "")), ("end_of_word_suffix", (None, ""))
    ):  # fmt: skip
        if model.get(key) not in harmless:
            raise unsupported(f"tokenizer.json: model.{key} is {model[key]!r}, which llama.cpp does not have")
    for key in ("byte_fallback", "ignore_merges"):
        if model.get(key) not in (None, False, True) or type(model.get(key)) is int:
            raise invalid(f"tokenizer.json: model.{key} is {model[key]!r}, true or false is needed")
    if not isinstance(model.get("unk_token"), str | None):
        raise invalid(f"tokenizer.json: model.unk_token is {model['unk_token']!r}, a text is needed")


def _collect(data: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, bool]]:
    """Texts by id, and of the added tokens whether they are special."""
    texts: dict[int, str] = {}
    pairs = [(text, index) for text, index in data["model"]["vocab"].items()]
    added: dict[int, bool] = {}
    entries = data.get("added_tokens") or []
    if not isinstance(entries, list):
        raise invalid("tokenizer.json: added_tokens is not a list")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
            raise invalid(f"tokenizer.json has the odd added token {str(entry)[:80]}")
        if any(entry.get(key, False) is not False for key in ("lstrip", "rstrip", "single_word")):
            raise unsupported(
                f"the added token {entry['content']!r} has lstrip, rstrip or single_word, which llama.cpp does not have"
            )
        pairs.append((entry["content"], entry["id"]))
        added[entry["id"]] = entry.get("special") is True
    for text, index in pairs:
        if type(index) is not int or not 0 <= index < 1 << 20:
            raise invalid(f"tokenizer.json gives {text[:40]!r} the id {index!r}")
        if texts.setdefault(index, text) != text:
            raise invalid(f"tokenizer.json gives the id {index} to {texts[index][:40]!r} and {text[:40]!r}")
    if len(set(texts.values())) != len(texts) or "" in texts.values() or any("\0" in text for text in texts.values()):
        raise invalid("tokenizer.json has an empty token, a token with NUL, or one text with two ids")
    return texts, added


def _lay_out(
    texts: Mapping[int, str], added: Mapping[int, bool], rows: int, *, unknown: str | None, bytes_are_tokens: bool
) -> tuple[list[str], list[int]]:
    """Token texts and types by id; rows without a token get `[PADi]`, as llama.cpp's converter names them."""
    tokens, types = [], []
    for index in range(rows):
        text = texts.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        tokens.append(text)
        is_byte = bytes_are_tokens and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        plain = BYTE if is_byte else NORMAL
        kind = plain if index not in added else CONTROL if added[index] else USER_DEFINED
        types.append(UNKNOWN if bytes_are_tokens and text == unknown else kind)
    if len(set(tokens)) != rows:
        raise invalid("a token of tokenizer.json has the text of a padding token `[PADi]`")
    return tokens, types


def _merge_pair(merge: Any, plain: set[str]) -> tuple[str, str]:
    """`"a b"` in old files, `["a", "b"]` in new ones; both and their joint text are tokens."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise invalid(f"tokenizer.json has the odd merge {str(merge)[:80]}")
    if not {pair[0], pair[1], pair[0] + pair[1]} <= plain:
        raise invalid(f"tokenizer.json has the merge {str(merge)[:80]} of texts that are no tokens")
    return pair[0], pair[1]


def _scores(texts: Mapping[int, str], plain: set[str], merges: list[tuple[str, str]], rows: int) -> list[float]:
    """Scores that make llama.cpp join texts in the same order as the merge list.

    llama.cpp joins the neighbours whose joint text has the best score, so a text's score is the negative rank of the
    first merge that makes it. A text that no merge makes gets -1e9, and must not be two tokens in a row: llama.cpp
    would join them all the same.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    for text in plain:
        if text not in rank and any(text[:cut] in plain and text[cut:] in plain for cut in range(1, len(text))):
            raise unsupported(f"no merge makes the token {text!r}, but llama.cpp would join its halves")
    return [0.0 if index not in texts else -float(rank.get(texts[index], 1e9)) for index in range(rows)]


def _check_whole_words(plain: set[str], merges: list[tuple[str, str]], *, wanted: bool, found: bool) -> None:
    """llama.cpp ties `ignore_merges` to the pre-tokenizer's name; if the file says otherwise, it must not matter.

    It does not matter if merging a token's own text gives that token, which holds for most trained vocabularies.
    """
    if wanted == found:
        return
    rank = {pair: index for index, pair in reversed(list(enumerate(merges)))}
    bad = next((word for word in sorted(plain) if _merge(word, rank) != [word]), None)
    if bad is not None:
        raise unsupported(f"ignore_merges is {found}, llama.cpp has {wanted} here, and they split {bad!r} differently")


def _merge(word: str, rank: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte-pair merging: the best-ranked neighbours join until none can."""
    parts = list(word)
    while True:
        best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, len(rank)), default=None)
        if best is None or best not in rank:
            return parts
        joined, i = [], 0
        while i < len(parts):
            both = i + 1 < len(parts) and (parts[i], parts[i + 1]) == best
            joined.append(parts[i] + parts[i + 1] if both else parts[i])
            i += 2 if both else 1
        parts = joined


def _bracketing(data: Mapping[str, Any], special: Mapping[str, str]) -> tuple[bool, bool]:
    """Whether the post-processor puts bos before and eos after a text; it may do nothing else.

    Args:
        data: tokenizer.json.
        special: Token texts by role.
    """
    # ByteLevel as a post-processor only moves offsets.
    steps = [step for step in steps_of(data.get("post_processor")) if step.get("type") != "ByteLevel"]
    if not steps:
        return False, False
    pieces = steps[0].get("single")
    if len(steps) > 1 or steps[0].get("type") != "TemplateProcessing" or not isinstance(pieces, list):
        raise unsupported(f"an unknown post-processor: {str(steps)[:200]}")
    found = [_piece(piece, steps[0].get("special_tokens")) for piece in pieces]
    for before, after in itertools.product((True, False), repeat=2):
        wanted = [special.get("bos")] * before + [None] + [special.get("eos")] * after
        if found == wanted and (not before or "bos" in special) and (not after or "eos" in special):
            return before, after
    raise unsupported(f"the post-processor puts {found} around a text, llama.cpp only bos and eos")


def _piece(piece: Any, special_tokens: Any) -> str | None:
    """The token that a piece of a template stands for, None for the text itself."""
    kind, content = next(iter(piece.items())) if isinstance(piece, dict) and len(piece) == 1 else ("", None)
    if kind == "Sequence" and isinstance(content, dict) and content.get("id") == "A":
        return None
    if kind == "SpecialToken" and isinstance(content, dict):
        name = content.get("id")
        entry = special_tokens.get(name) if isinstance(special_tokens, dict) and isinstance(name, str) else None
        tokens = entry.get("tokens") if isinstance(entry, dict) else None
        if isinstance(tokens, list) and len(tokens) == 1 and isinstance(tokens[0], str):
            return tokens[0]
    raise unsupported(f"the post-processor has the odd piece {str(piece)[:80]}")


def _special_ids(
    checkpoint: Checkpoint, settings: Mapping[str, Any], index_of: Mapping[str, int], ids: Mapping[str, int | None]
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Ids by role (the tokenizer's own tokens first, then config.json), and every id that ends an answer."""
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    known = set(index_of.values())
    found: dict[str, int] = {}
    for role, key in names.items():
        text = settings.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text is not None and not isinstance(text, str):
            raise invalid(f"tokenizer_config.json: {key} is {str(text)[:80]!r}, a text is needed")
        index = ids.get(role) if text is None else index_of.get(text)
        if text is not None and index is None:
            raise invalid(f"tokenizer_config.json: {key} {text!r} is not in tokenizer.json")
        if index is not None and index in known:
            found[role] = index
    stops = _stops(checkpoint, known) or ((found["eos"],) if "eos" in found else ())
    if stops and found.get("eos") not in stops:  # `generate` asks generation_config.json alone
        found["eos"] = stops[0]
    text_of = {index: text for text, index in index_of.items()}
    others = [index for index in stops if index != found["eos"] and text_of[index] not in _STOPS_BY_TEXT]
    return {**found, **dict(zip(("eot", "eom"), others, strict=False))}, stops


def _stops(checkpoint: Checkpoint, known: set[int]) -> tuple[int, ...]:
    """Tokens at which generation_config.json ends an answer; none if it is silent."""
    value = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    stops = value if isinstance(value, list) else [] if value is None or value == -1 else [value]
    if not all(type(index) is int and index in known for index in stops):
        raise invalid(f"generation_config.json: eos_token_id {str(value)[:80]} is not a token of tokenizer.json")
    return tuple(stops)


def _chat_template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    """The template, verbatim, from the newest of its three places: .jinja, .json, tokenizer_config.json."""
    text: Any = checkpoint.text("chat_template.jinja")
    if text is None:
        text = (checkpoint.json("chat_template.json") or {}).get("chat_template", settings.get("chat_template"))
    if isinstance(text, list):  # named templates: [{"name": "default", "template": "..."}]
        named = [entry for entry in text if isinstance(entry, dict) and entry.get("name") == "default"]
        text = named[0].get("template") if named else None
    if text is not None and not isinstance(text, str):
        raise invalid("the chat template is not a text")
    return text
