"""The tokenizer of a checkpoint, as the tokenizer keys of a GGUF file. No tokenizer library is needed.

Rules after llama.cpp's `conversion/base.py` and `llama-vocab.cpp`. The reference is tokenizer.json as the `tokenizers`
library runs it (`tokenizer_json.py`); only where there is none, SentencePiece's tokenizer.model (`sentencepiece.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.converters.checkpoint import Checkpoint
from edgevlm.converters.sections import invalid, unsupported
from edgevlm.converters.sentencepiece import read_sentencepiece
from edgevlm.converters.tokenizer_json import read_tokenizer_json
from edgevlm.converters.tokens import Tokens, lay_out
from edgevlm.errors import UsageError
from edgevlm.families.schema import Family

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


def read_tokens(checkpoint: Checkpoint) -> Tokens:
    """Read the tokenizer file of a checkpoint.

    Raises:
        CheckpointError: `checkpoint.invalid` or `checkpoint.unsupported`.
    """
    data = checkpoint.json("tokenizer.json")
    if data is not None:
        return read_tokenizer_json(data)
    model = checkpoint.binary("tokenizer.model")
    if model is None:
        raise invalid(
            f"{checkpoint.folder} has neither tokenizer.json nor tokenizer.model; save the tokenizer with "
            "`save_pretrained`"
        )
    settings = checkpoint.json("tokenizer_config.json") or {}
    return read_sentencepiece(model, settings, checkpoint.json("added_tokens.json") or {})


def read_vocabulary(
    checkpoint: Checkpoint, tokens: Tokens, *, rows: int, ids: Mapping[str, int | None], template: str | None = None
) -> Vocabulary:
    """What a GGUF file stores of a checkpoint's tokenizer.

    Args:
        checkpoint: The opened checkpoint.
        tokens: Its tokenizer file, read by `read_tokens`.
        rows: Rows of the embedding matrix; the token list is padded to that length.
        ids: Special ids by role as config.json has them (`bos`, `eos`, `padding`).
        template: The chat template of a checkpoint that carries none.

    Raises:
        CheckpointError: `checkpoint.invalid` or `checkpoint.unsupported`.
    """
    settings = checkpoint.json("tokenizer_config.json") or {}
    if max(tokens.texts) >= rows:
        raise invalid(f"the tokenizer has the id {max(tokens.texts)}, the embedding has {rows} rows")
    names, types, scores = lay_out(tokens, rows)
    special, stops = _special_ids(checkpoint, settings, tokens, {**ids, **tokens.roles})
    add_bos, add_eos = _bracketing(tokens, special)
    found = _chat_template(checkpoint, settings)
    return Vocabulary(
        model=tokens.model,
        pre=tokens.pre,
        tokens=names,
        types=types,
        merges=[" ".join(part.replace(" ", "\u0120") for part in pair) for pair in tokens.merges],
        scores=scores,
        special=special,
        stops=stops,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=tokens.add_space_prefix,
        chat_template=template if found is None else found,
    )


def choose_template(family: Family, texts: Collection[str], name: str | None, *, wraps: bool) -> str | None:
    """The family's chat template for a model that carries none: the named one, or the first that fits.

    Args:
        family: The model's.
        texts: Its tokens.
        name: Of the template, or None for any.
        wraps: Whether the two tokens of `Vision.wrap` stand around a picture.

    Raises:
        UsageError: there is none of that name.
        CheckpointError: `checkpoint.invalid`, tokens that stand around a picture are missing.
    """
    known = {*texts, ""}
    fitting = [one for one in family.templates if (one.name == name if name else one.token in known)]
    if name and not fitting:
        names = ", ".join(one.name for one in family.templates) or "none"
        raise UsageError(f"the family {family.name} has no template {name!r}; it has {names}")
    source = fitting[0].source if fitting else None
    wrap = family.vision.wrap if family.vision else None
    if source is None or wrap is None or not wraps:
        return source
    _, before, after = wrap
    if not {before, after} <= known:
        raise invalid(f"{wrap[0]} is true, but the tokenizer lacks {before} or {after}")
    # llava/train/train.py: the two tokens enclose the picture, the line break follows
    return source.replace("<image>", f"{before}<image>{after}")


def _bracketing(tokens: Tokens, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether bos is put before and eos after a text; nothing else may be."""
    text_of = {role: tokens.texts[index] for role, index in special.items()}
    for before, after in itertools.product((True, False), repeat=2):
        wanted = [text_of.get("bos")] * before + [None] + [text_of.get("eos")] * after
        if tokens.around == wanted and (not before or "bos" in special) and (not after or "eos" in special):
            return before, after
    raise unsupported(f"the post-processor puts {tokens.around} around a text, llama.cpp only bos and eos")


def _special_ids(
    checkpoint: Checkpoint, settings: Mapping[str, Any], tokens: Tokens, ids: Mapping[str, int | None]
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Ids by role (the tokenizer's own tokens first, then config.json), and every id that ends an answer."""
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    index_of = {text: index for index, text in tokens.texts.items()}
    known = set(tokens.texts)
    found: dict[str, int] = {}
    for role, key in names.items():
        text = settings.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        text = None if text == "" else text  # so the first conversions of Llama say of every role
        if text is not None and not isinstance(text, str):
            raise invalid(f"tokenizer_config.json: {key} is {str(text)[:80]!r}, a text is needed")
        index = ids.get(role) if text is None else index_of.get(text)
        if text is not None and index is None:
            raise invalid(f"tokenizer_config.json: {key} {text!r} is not a token")
        if index is not None and index in known:
            found[role] = index
    # The first conversions of Llama name bos as the end of an answer, in config.json as well.
    wrong = {found.get("bos")} - {found.get("eos")}
    said = tuple(index for index in _stops(checkpoint, known) if index not in wrong)
    stops = said or ((found["eos"],) if "eos" in found else ())
    if stops and found.get("eos") not in stops:  # `generate` asks generation_config.json alone
        found["eos"] = stops[0]
    others = [index for index in stops if index != found["eos"] and tokens.texts[index] not in _STOPS_BY_TEXT]
    return {**found, **dict(zip(("eot", "eom"), others, strict=False))}, stops


def _stops(checkpoint: Checkpoint, known: set[int]) -> tuple[int, ...]:
    """Tokens at which generation_config.json ends an answer; none if it is silent."""
    value = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    stops = value if isinstance(value, list) else [] if value is None or value == -1 else [value]
    if not all(type(index) is int and index in known for index in stops):
        raise invalid(f"generation_config.json: eos_token_id {str(value)[:80]} is not a token")
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
