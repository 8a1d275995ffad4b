"""tokenizer.json, as far as llama.cpp can repeat what the `tokenizers` library does with it.

Two kinds exist: byte-level BPE with a pre-tokenizer that llama.cpp knows by name, and SentencePiece-like BPE with byte
fallback. What the file says is what counts: `add_bos_token` and `add_eos_token` of tokenizer_config.json do nothing in
transformers 5.23 beside a tokenizer.json.

Known differences, both of the SentencePiece kind:
- Where a normalizer exists, Hugging Face looks for added tokens with `normalized: true` in the normalized text,
  llama.cpp always in the original one. Control tokens of published vocabularies are `normalized: false`.
- Hugging Face joins two neighbours if the merge list has this pair, llama.cpp if their joint text is a token.
  Vocabularies that come from SentencePiece list every such pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from edgevlm.converters.pretokenizers import (
    DIGITS_TOGETHER,
    WHOLE_WORDS_FIRST,
    check_digits,
    prepends_space,
    recognise,
    steps_of,
)
from edgevlm.converters.sections import invalid, unsupported
from edgevlm.converters.tokens import Tokens, check_texts


def read_tokenizer_json(data: Mapping[str, Any]) -> Tokens:
    """Read a tokenizer.json that was parsed.

    Raises:
        CheckpointError: `checkpoint.invalid` or `checkpoint.unsupported`.
    """
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise unsupported(
            f"the tokenizer is {model.get('type') if isinstance(model, dict) else model!r}, only BPE is supported"
        )
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list) or not model["vocab"]:
        raise invalid("tokenizer.json has no vocab or no merges")
    texts, added = _collect(data)
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
    return Tokens(
        model="gpt2" if byte_level else "llama",
        pre=pre,
        texts=texts,
        added=added,
        unknown=model.get("unk_token"),
        merges=merges if byte_level else [],
        scores={} if byte_level else _scores(texts, plain, merges),
        roles={},
        add_space_prefix=not byte_level and prepends_space(normalizer, pre_steps),
        around=_around(data),
    )


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
    check_texts("tokenizer.json", texts)
    return texts, added


def _merge_pair(merge: Any, plain: set[str]) -> tuple[str, str]:
    """`"a b"` in old files, `["a", "b"]` in new ones; both and their joint text are tokens."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise invalid(f"tokenizer.json has the odd merge {str(merge)[:80]}")
    if not {pair[0], pair[1], pair[0] + pair[1]} <= plain:
        raise invalid(f"tokenizer.json has the merge {str(merge)[:80]} of texts that are no tokens")
    return pair[0], pair[1]


def _scores(texts: Mapping[int, str], plain: set[str], merges: list[tuple[str, str]]) -> dict[int, float]:
    """Scores that make llama.cpp join texts in the same order as the merge list.

    llama.cpp joins the neighbours whose joint text has the best score, so a text's score is the negative rank of the
    first merge that makes it. A text that no merge makes, such as a control token's, gets -1e9 and must not be two
    tokens in a row: llama.cpp would join them all the same.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    for text in texts.values():
        if text not in rank and any(text[:cut] in plain and text[cut:] in plain for cut in range(1, len(text))):
            raise unsupported(f"no merge makes the token {text!r}, but llama.cpp would join its halves")
    return {index: -float(rank.get(text, 1e9)) for index, text in texts.items()}


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


def _around(data: Mapping[str, Any]) -> list[str | None]:
    """What the post-processor makes of a text: tokens, and None for the text itself."""
    # ByteLevel as a post-processor only moves offsets.
    steps = [step for step in steps_of(data.get("post_processor")) if step.get("type") != "ByteLevel"]
    if not steps:
        return [None]
    pieces = steps[0].get("single")
    if len(steps) > 1 or steps[0].get("type") != "TemplateProcessing" or not isinstance(pieces, list):
        raise unsupported(f"an unknown post-processor: {str(steps)[:200]}")
    return [_piece(piece, steps[0].get("special_tokens")) for piece in pieces]


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
