"""Texts that break tokenizers, tokenizers that learned from them, and SentencePiece's own form of a vocabulary."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import unicodedata

import tiny
import tokenizers
import transformers
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_pb2


def _scripts() -> dict[str, str]:
    """For each run of 128 code points that holds letters or signs of any script, three of them, in three spellings."""
    found = {}
    for start in range(0, sys.maxunicode, 128):
        signs = [
            sign for sign in map(chr, range(start, start + 128)) if unicodedata.category(sign)[0] not in ("C",)
        ]  # no control, private, surrogate or unassigned
        if signs:
            a, b, c = signs[0], signs[len(signs) // 2], signs[-1]
            found[f"U+{start:04X}"] = f"{a}{b}{c} {c}{a} {b}1{b}, x{a}{c}{c} {b}\n{c}"
    return found


#: Signs of every script together, by the first code point of their run.
SCRIPTS = _scripts()
SENTENCES = [
    "The quick brown fox can't jump over 13 lazy dogs; it's 10.5% too slow!",
    "Größe, café, naïve, Ärger, ŻÓŁW",
    "Съешь ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "نص حكيم له سر قاطع وذو شأن",
    "דג סקרן שט בים מאוכזב",
    "ऋषियों को सताने वाले दुष्ट",
    "วันนี้อากาศดีมาก",
    "東京都は日本の首都です。カタカナ",
    "天地玄黃，宇宙洪荒。日月盈昃",
    "키스의 고유조건은 입술끼리",
    "ქართული ანბანი",
    "Հայերեն այբուբեն",
    "አማርኛ ፊደል",
    "ខ្មែរ",
    "ᏣᎳᎩ",
    "தமிழ் எழுத்து",
    "Tiếng Việt có dấu",
]
EMOJI = [
    "🙂",
    "👍🏽",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇩🇪🇫🇷",
    "❤️‍🔥",
    "☎️ 5️⃣",
    "👩🏾‍🚀🚀",
    "🧑‍🤝‍🧑",
    "\u200d",
    "a\u200db",
    "\ufe0f",
    "\U000e0067",
    "🙂🙂🙂🙂",
]
DIGITS = [
    "0",
    "12345678901234567890",
    "3.14159",
    "1,234,567.89",
    "0x1F",
    "1e-9",
    "²³¹",
    "½¾",
    "٣٤٥٦",
    "४५६",
    "一二三",
    "Ⅷ",
    "①②③",
    "１２３",
    "7 8  9",
    "a1b22c333",
    "2026-11-23T04:05:06Z",
    "½½²²",
]
SPACES = [
    " ",
    "  ",
    "   ",
    " " * 7,
    " " * 16,
    " " * 17,
    " " * 33,
    "\t",
    "\t\t\t",
    "\n",
    "\n\n",
    "\n \n  \n",
    "\r",
    "\r\n",
    "\r\n\r\n",
    " \t\n\r\x0b\x0c ",
    "a ",
    " a",
    "  a  ",
    "a  b",
    "a   b    c",
    "x\n",
    "\nx",
    "\n\nx",
    "x \n y",
    "x\t\ty",
    "   x",
    "x   ",
    "\u00a0",
    "\u00a0\u00a0x",
    "\u3000",
    "東\u3000京",
    "\u2003x\u2009y",
    "\u1680",
    "\u2028\u2029",
    "\u0085",
    "\u200b\ufeff",
    "x\u00a0 y",
]
CODE = [
    'def f(x: int) -> str:\n    return f"{x!r}"\n\n\nclass A(B):\n\tpass\n',
    "for(int i=0;i<n;++i){a[i]+=b[i]<<2;}//end",
    "SELECT * FROM t WHERE a >= 1 AND b != 'x''y';",
    '<div class="a">&nbsp;</div><!-- c -->',
    "#!/bin/sh\nset -eu\necho \"$@\" | sed 's/\\//_/g'",
    '{"a": [1, 2.5, null, true], "b": {}}',
    "\\begin{align} x^2 &= y_{i,j} \\\\ \\end{align}",
    "`a` ```b``` ~~c~~ **d** __e__ ###",
    "a->b::c<d>&e|f^g%h@i?j:k",
    "________",
    "--------",
    "========",
    "........",
    "!!!???",
    "((((([[[[[{{{{{",
    "'s 'S 're 'LL don't 'tis",
]
CONTROL = [
    "".join(map(chr, range(1, 32))),
    "\x7f\x80\x9f",
    "a\x01b\x02c",
    "\x1b[31mred\x1b[0m",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "e\u0301\u0327",
]
#: Texts of tokens, which the user may write without meaning them.
SPELLED_OUT = [
    "<|begin|>",
    "<|end|>",
    "<|begin|>user\nhi<|end|>",
    "<image>",
    "a<image>b",
    " <image> ",
    "<s>",
    "</s>",
    "<unk>",
    "x</s>y",
    "<s",
    "<0x41>",
    "<0x0A>",
    "▁",
    "a▁b",
    "▁▁",
    "[PAD1]",
    "<|im_end|>",
    "<|eot_id|>",
    "Ġ",
    "ĠĠ",
    "Ċ",
    "âĢĻ",
]
LONG = ("a", " ", "1", "\n", "!", "é", "東", "🙂", "\x01", "▁")
TEXTS = [
    *SENTENCES,
    *EMOJI,
    *DIGITS,
    *SPACES,
    *CODE,
    *CONTROL,
    *tiny.CORPUS,
    "".join(SENTENCES),
    " ".join(EMOJI + DIGITS),
]


@functools.cache
def make_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with many merges: `tiny`'s, trained on the texts; `spm` is brought into SentencePiece's form."""
    # The signs of all scripts would leave SentencePiece's form no room for merges; there they are bytes.
    corpus = TEXTS * 3 if kind == "spm" else [*TEXTS, *SCRIPTS.values()] * 2
    trained = tiny.make_tokenizer(kind, corpus, 3000)
    if kind != "spm":
        return trained
    data = json.loads(trained.backend_tokenizer.to_str())
    data["model"]["merges"] = _all_merges(pieces_of(trained))
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pieces_of(tokenizer: transformers.PreTrainedTokenizerFast) -> list[tuple[str, float, int]]:
    """(text, score, type) as SentencePiece stores a vocabulary: ids in the order of its merges, spaces alone last."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {entry["content"] for entry in data["added_tokens"]}
    pieces = []
    for text, index in sorted(data["model"]["vocab"].items(), key=lambda item: item[1]):
        if text == "<unk>":
            pieces.append((text, 0.0, 2))
        elif text in special:
            pieces.append((text, 0.0, 3))
        elif len(text) == 6 and text.startswith("<0x"):
            pieces.append((text, 0.0, 6))
        else:
            pieces.append((text, -1e9 if set(text) == {"▁"} else 259.0 - index, 1))
    return pieces


def _all_merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Every pair whose joint text is a piece, the best scores first: how published tokenizer.json files were made."""
    score_of = {text: score for text, score, kind in pieces if kind == 1}
    cuts = ((text, cut) for text in score_of for cut in range(1, len(text)))
    pairs = [(text[:cut], text[cut:]) for text, cut in cuts if text[:cut] in score_of and text[cut:] in score_of]
    return sorted(map(list, pairs), key=lambda p: (score_of[p[0] + p[1]], len(p[0]), len(p[1])), reverse=True)


def sentencepiece_model(pieces: list[tuple[str, float, int]], **changes: object) -> bytes:
    """tokenizer.model as SentencePiece writes it for Llama; `changes` are fields `trainer_spec__x=...`."""
    model = sentencepiece_pb2.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(pieces)
    index_of = {text: i for i, (text, _, _) in enumerate(pieces)}
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = *map(index_of.get, ("<unk>", "<s>", "</s>")), -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", True, False
    for path, value in changes.items():
        part, _, name = path.partition("__")
        setattr(getattr(model, part), name, value)
    return model.SerializeToString()


assert len(list(itertools.chain(TEXTS, SCRIPTS))) > 400
