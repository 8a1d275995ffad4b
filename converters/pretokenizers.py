"""Normalizers and pre-tokenizers of tokenizer.json that llama.cpp repeats: every key of every step must agree.

One that differs anywhere splits other words; the model then reads other tokens than it learned, and only answers worse.
"""

from __future__ import annotations

import json
from typing import Any

from edgevlm.converters.sections import invalid, unsupported

_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WHOLE_WORDS_FIRST = {"llama-bpe"}  # names for which llama.cpp looks a whole word up before it merges


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


#: llama.cpp's name of a byte-level pre-tokenizer, and all of its steps; `trim_offsets` does not change tokens.
_PRE_TOKENIZERS: tuple[tuple[str, list[dict[str, Any]]], ...] = (
    ("llama-bpe", [_split(_LLAMA3_REGEX), _byte_level(use_regex=False)]),
    ("smollm", [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]),
    ("gpt-2", [_byte_level(use_regex=True)]),
    ("gpt-2", [_split(_GPT2_REGEX), _byte_level(use_regex=False)]),
)
#: (normalizer, pre-tokenizer, whether a space is put in front): the ways to turn spaces into `\u2581` that llama.cpp
#: repeats. Metaspace's other schemes put none in front of a text that begins with one, llama.cpp always does.
_SPACES: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]], bool], ...] = (
    (
        [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
        [],
        True,
    ),
    ([], [{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}], False),
)


def steps_of(component: Any) -> list[dict[str, Any]]:
    """A component of tokenizer.json as the list of its steps, sequences unfolded."""
    if component is None:
        return []
    if not isinstance(component, dict):
        raise invalid(f"tokenizer.json has the odd component {str(component)[:80]}")
    if component.get("type") != "Sequence":
        return [component]
    keys = [key for key in ("pretokenizers", "normalizers", "processors") if key in component]
    children = component[keys[0]] if len(keys) == 1 else None
    if not isinstance(children, list) or None in children:
        raise invalid(f"tokenizer.json has the odd sequence {str(component)[:80]}")
    return [step for child in children for step in steps_of(child)]


def recognise(steps: list[dict[str, Any]]) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer: every key of every step must agree."""
    found = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for step in found:
        if step.get("type") == "ByteLevel":
            step.setdefault("use_regex", True)
    for name, wanted in _PRE_TOKENIZERS:
        if _canonical(found) == _canonical(wanted):
            return name
    raise unsupported(f"an unknown pre-tokenizer, llama.cpp would split other words: {str(found)[:400]}")


def _canonical(steps: list[dict[str, Any]]) -> str:
    """A text that is equal for equal steps only: True is not 1 in it."""
    return json.dumps(steps, sort_keys=True)


def prepends_space(normalizer: list[dict[str, Any]], pre_steps: list[dict[str, Any]]) -> bool:
    """Whether a text gets a leading `\u2581`; refuses every way to treat spaces that llama.cpp does not repeat."""
    for wanted_normalizer, wanted_pre, prepends in _SPACES:
        if _canonical([*normalizer, {}, *pre_steps]) == _canonical([*wanted_normalizer, {}, *wanted_pre]):
            return prepends
    raise unsupported(f"llama.cpp would treat spaces in another way than {str([*normalizer, *pre_steps])[:400]}")
