"""Normalizers and pre-tokenizers of tokenizer.json that llama.cpp repeats: every key of every step must agree.

One that differs anywhere splits other words; the model then reads other tokens than it learned, and only answers worse.
"""

from __future__ import annotations

import functools
import itertools
import json
import unicodedata
from collections.abc import Iterable
from typing import Any

from edgevlm.converters.sections import invalid, unsupported

_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek-LLM's letters with case, its punctuation (also of full width), and Chinese, Japanese and Korean signs.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_SYLLABLES = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"
DIGITS_TOGETHER = {"deepseek-llm"}  # names for which llama.cpp keeps runs of digits whole, tokenizers splits them
WHOLE_WORDS_FIRST = {"llama-bpe"}  # names for which llama.cpp looks a whole word up before it merges


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


#: llama.cpp's name of a byte-level pre-tokenizer, and all of its steps; `trim_offsets` does not change tokens.
_PRE_TOKENIZERS: tuple[tuple[str, list[dict[str, Any]]], ...] = (
    ("llama-bpe", [_split(_LLAMA3_REGEX), _byte_level(use_regex=False)]),
    ("smollm", [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]),
    (
        "deepseek-llm",
        [
            _split("[\r\n]"),
            _split(rf"\s?[{_CASED}]+"),
            _split(rf"\s?[{_PUNCTUATION}]+"),
            _split(r"\s+$"),
            _split(f"[{_SYLLABLES}]+"),
            {"type": "Digits", "individual_digits": True},
            _byte_level(use_regex=False),
        ],
    ),
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


def check_digits(texts: Iterable[str]) -> None:
    """Refuse tokens over two digits (\\p{N}): where llama.cpp does not split between digits, no token may join them.

    Tokens of parts of characters are not looked at: they could only join runs of rare numerals.

    Args:
        texts: What merges make, in the byte-level alphabet.
    """
    bytes_of = _byte_of()
    for text in texts:
        plain = bytes(bytes_of.get(sign, 0) for sign in text).decode("utf-8", "replace")
        if any(unicodedata.category(a)[0] == unicodedata.category(b)[0] == "N" for a, b in itertools.pairwise(plain)):
            raise unsupported(f"the token {text!r} joins digits, which tokenizers splits and llama.cpp does not")


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, every other byte for a sign from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
