"""tokenizer.json and its companions, as the tokenizer keys of a GGUF file. No tokenizer library is needed.

Rules after llama.cpp's `conversion/base.py` and `llama-vocab.cpp`. Two kinds exist: byte-level BPE (`gpt2`) with a
pre-tokenizer that llama.cpp knows by name, and SentencePiece-like BPE with byte fallback (`llama`).

Known difference: where a normalizer exists, Hugging Face looks for added tokens with `normalized: true` in the
normalized text, llama.cpp always in the original one. Control tokens of published vocabularies are `normalized: false`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.converters.checkpoint import Checkpoint
from edgevlm.converters.sections import invalid, unsupported

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type

_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHOLE_WORDS_FIRST = {"llama-bpe"}  # names for which llama.cpp looks a whole word up before it merges
# How the five splits of DeepSeek LLM begin; the second lists some hundred ranges of letters.
_DEEPSEEK_SPLITS = ("[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ", r"\s?[!-/:-~！-／：-～", r"\s+$", "[一-龥ࠀ-一가-\ud7ff]+")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file stores about text.

    Attributes:
        model: `gpt2` or `llama`.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: By id, padded to the rows of the embedding.
        merges: `"left right"`, best first; empty for `llama`.
        scores: By id, for `llama` only.
        special: Ids by role: bos, eos, padding, unknown.
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
    byte_level = _uses(data.get("pre_tokenizer"), "ByteLevel")
    if byte_level == bool(model.get("byte_fallback")):
        raise unsupported("the tokenizer is neither byte-level BPE nor BPE with byte fallback")
    if byte_level and data.get("normalizer") is not None:
        raise unsupported("a byte-level tokenizer with a normalizer, which llama.cpp cannot apply")
    merges = [_merge_pair(merge) for merge in model["merges"]]
    pre = _recognise(data["pre_tokenizer"]) if byte_level else "default"
    if byte_level:
        _check_whole_words(texts, merges, wanted=pre in _WHOLE_WORDS_FIRST, found=model.get("ignore_merges") is True)
    tokens, types = _lay_out(texts, added, rows, unknown=model.get("unk_token"), bytes_are_tokens=not byte_level)
    bos, eos = _bracketing(data)
    special = _special_ids(checkpoint, settings, {text: index for index, text in texts.items()}, ids)
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges] if byte_level else [],
        scores=[] if byte_level else _scores(texts, merges, rows),
        special=special,
        add_bos=_switch(settings, "add_bos_token", bos) and "bos" in special,
        add_eos=_switch(settings, "add_eos_token", eos) and "eos" in special,
        add_space_prefix=not byte_level and _prepends_space(data),
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


def _collect(data: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, bool]]:
    """Texts by id, and of the added tokens whether they are special."""
    texts: dict[int, str] = {}
    pairs = [(text, index) for text, index in data["model"]["vocab"].items()]
    added: dict[int, bool] = {}
    for entry in data.get("added_tokens") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise invalid(f"tokenizer.json has the odd added token {str(entry)[:80]}")
        pairs.append((entry["content"], entry.get("id")))
        added[entry.get("id")] = entry.get("special") is True  # type: ignore[index]
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


def _merge_pair(merge: Any) -> tuple[str, str]:
    """`"a b"` in old files, `["a", "b"]` in new ones."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise invalid(f"tokenizer.json has the odd merge {str(merge)[:80]}")
    return pair[0], pair[1]


def _scores(texts: Mapping[int, str], merges: list[tuple[str, str]], rows: int) -> list[float]:
    """Scores that make llama.cpp merge in the same order as the merge list.

    llama.cpp joins the neighbours whose joint text has the best score, so a text's score is the negative rank of the
    first merge that makes it. A text that no merge makes must never arise from a merge: it gets -1e9. For Llama 2 this
    gives the published scores up to a constant, including -1e9 for its pieces of several spaces.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    return [0.0 if index not in texts else -float(rank.get(texts[index], 1e9)) for index in range(rows)]


def _uses(component: Any, kind: str) -> bool:
    """Whether a pre-tokenizer, or a step of a sequence, is of this type."""
    return any(step.get("type") == kind for step in _steps(component))


def _steps(component: Any) -> list[dict[str, Any]]:
    if not isinstance(component, dict):
        return []
    if component.get("type") == "Sequence":
        children = [component.get(key, []) for key in ("pretokenizers", "normalizers", "processors")]
        return [step for child in itertools.chain(*children) for step in _steps(child)]
    return [component]


def _recognise(pre_tokenizer: Any) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer, by its structure: another regex would split other words."""
    steps = _steps(pre_tokenizer)
    shape = [step.get("type") for step in steps]
    regexes = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    last = steps[-1]
    if last.get("add_prefix_space") or any(step.get("invert") for step in steps):
        raise unsupported(f"a pre-tokenizer with a prefix space or an inverted split: {steps}")
    own_regex = last.get("use_regex", True)
    if shape == ["Split", "ByteLevel"] and regexes == [_LLAMA3_REGEX] and not own_regex:
        return "llama-bpe"
    if shape == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") is True and own_regex:
        return "smollm"
    if shape == ["ByteLevel"] and own_regex:
        return "gpt-2"
    if shape == ["Split", "ByteLevel"] and regexes == [_GPT2_REGEX] and not own_regex:
        return "gpt-2"
    if shape == ["Split"] * 5 + ["Digits", "ByteLevel"] and all(map(str.startswith, regexes, _DEEPSEEK_SPLITS)):
        return "deepseek-llm"
    raise unsupported(
        f"an unknown pre-tokenizer ({', '.join(map(str, shape))}; {regexes}): llama.cpp would split other words"
    )


def _check_whole_words(texts: Mapping[int, str], merges: list[tuple[str, str]], *, wanted: bool, found: bool) -> None:
    """llama.cpp ties `ignore_merges` to the pre-tokenizer's name; if the file says otherwise, it must not matter.

    It does not matter if merging a token's own text gives that token, which holds for most trained vocabularies.
    """
    if wanted == found:
        return
    rank = {pair: index for index, pair in reversed(list(enumerate(merges)))}
    words = [left + right for left, right in merges]
    known = set(texts.values())
    bad = next((word for word in words if word in known and _merge(word, rank) != [word]), None)
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


def _bracketing(data: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the post-processor puts a special token before and after a single text."""
    for step in _steps(data.get("post_processor")):
        if step.get("type") == "TemplateProcessing":
            kinds = ["Sequence" in piece for piece in step.get("single", [])]
            return bool(kinds) and not kinds[0], bool(kinds) and not kinds[-1]
    return False, False


def _prepends_space(data: Mapping[str, Any]) -> bool:
    """Whether a text gets a leading `▁`: a Prepend normalizer (legacy) or a Metaspace pre-tokenizer."""
    normalizes = any(step.get("type") == "Prepend" for step in _steps(data.get("normalizer")))
    metaspace = [step for step in _steps(data.get("pre_tokenizer")) if step.get("type") == "Metaspace"]
    return normalizes or any(step.get("prepend_scheme", "always") != "never" for step in metaspace)


def _switch(settings: Mapping[str, Any], key: str, template_says: bool) -> bool:
    """The post-processor is what really runs; the flag of tokenizer_config.json decides where there is none."""
    return template_says or settings.get(key) is True


def _special_ids(
    checkpoint: Checkpoint, settings: Mapping[str, Any], index_of: Mapping[str, int], ids: Mapping[str, int | None]
) -> dict[str, int]:
    """Ids by role: the tokenizer's own tokens first, then config.json."""
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    found: dict[str, int] = {}
    for role, key in names.items():
        text = settings.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        index = index_of.get(text) if isinstance(text, str) else ids.get(role)
        if isinstance(text, str) and index is None:
            raise invalid(f"tokenizer_config.json: {key} {text!r} is not in tokenizer.json")
        if index is not None and index in index_of.values():
            found[role] = index
    # Where several ids end a turn, llama.cpp finds the others by their text.
    generation = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    if "eos" not in found and type(generation) is int and generation in index_of.values():
        found["eos"] = generation
    return found


def _chat_template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    """The template, verbatim, from the newest of its three places: .jinja, .json, tokenizer_config.json."""
    text = checkpoint.text("chat_template.jinja")
    if text is None:
        text = (checkpoint.json("chat_template.json") or {}).get("chat_template", settings.get("chat_template"))
    if isinstance(text, list):  # named templates: [{"name": "default", "template": "..."}]
        named = {entry["name"]: entry["template"] for entry in text}
        text = named.get("default")
    if text is not None and not isinstance(text, str):
        raise invalid("the chat template is not a text")
    return text
