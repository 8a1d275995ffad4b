"""Tokens of the GGUF file against those of the original tokenizer, on texts chosen to break tokenizers."""

from __future__ import annotations

import json

import pytest
import tiny
from tiny import Variant

from edgevlm.converters import convert
from edgevlm.converters.tokenizer import _recognise
from edgevlm.decoder import Decoder
from edgevlm.errors import CheckpointError
from edgevlm.gguf import read_header

TRICKY = [
    *tiny.CORPUS,
    " ", "  ", "\n", "\n\n", "\t", " \n ", "a ", " a", "a  b", "a   b ", "\r\n", "x\r\n\r\ny", "   \n   x",
    "don't DON'T we'LL I'd've", "12345678901", "1,234.56", "v1.2.3", "ａｂｃ", "ﬁ", "e\u0301", "\u00a0x\u00a0",
    "東京は日本の首都です。", "مرحبا بالعالم", "नमस्ते", "🏳️‍🌈", "𝔘𝔫𝔦", "\u200b", "\ufeff", "ÿ", "\x7f", "\x01",
    "<", "<image", "<image>", "a<image>b", " <image> ", "<|begin|>", "<|start|>user\nhi<|end|>", "[extra]", "x[extra]y",
    "</s", "<0x41>", "▁", "a▁b", "!!!???...", "`code` **bold**", "if (x<0) { y += 1; } // end", "https://a.b/c?d=e",
]  # fmt: skip


@pytest.fixture(scope="module", params=["llama-bpe", "smollm", "gpt-2", "spm"])
def pair(request, tmp_path_factory):
    """(our decoder, the tokenizer of transformers, kind)."""
    folder, _ = tiny.shared(Variant(tokenizer=request.param))
    out = tmp_path_factory.mktemp("bundle") / "out"
    convert(folder, out, decoder_quant="f16", encoder_quant="fp32")
    decoder = Decoder(out / "decoder.gguf", context=256)
    yield decoder, tiny.make_tokenizer(request.param), request.param
    decoder.close()


@pytest.mark.parametrize("text", TRICKY, ids=ascii)
def test_texts_give_the_tokens_of_transformers(pair, text):
    decoder, tokenizer, _ = pair
    assert decoder.tokenize(text, True, True) == tokenizer(text)["input_ids"]


def test_the_token_comparison_can_fail(pair):
    """The twin: a text that differs in one invisible character is another list of tokens."""
    decoder, tokenizer, _ = pair
    assert decoder.tokenize("the lamp", True, True) != tokenizer("the\u00a0lamp")["input_ids"]


def test_bos_is_added_exactly_when_the_tokenizer_adds_it(pair):
    decoder, tokenizer, kind = pair
    assert decoder.header.metadata["tokenizer.ggml.add_bos_token"] is (kind in ("llama-bpe", "spm"))
    assert decoder.tokenize("x", True, True)[:1] == tokenizer("x")["input_ids"][:1]


def test_the_header_says_what_each_token_is(pair):
    decoder, tokenizer, kind = pair
    metadata = decoder.header.metadata
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    rows = len(types)
    assert rows == len(tokenizer) + 3
    assert [types[f"[PAD{index}]"] for index in range(rows - 3, rows)] == [5, 5, 5]
    assert (types["<image>"], types["<|start|>"], types["[extra]"]) == (3, 3, 4)
    assert metadata["tokenizer.ggml.pre"] == ("default" if kind == "spm" else kind)
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    if kind == "spm":
        assert (types["<unk>"], types["<0x41>"], types["▁"]) == (2, 6, 1)


# files that are wrong in one place


def changed(tmp_path, change, kind="llama-bpe", file="tokenizer.json"):
    folder = tiny.copy(Variant(tokenizer=kind), tmp_path / "model")
    tiny.rewrite_json(folder / file, change)
    return folder


def _set(path, value):
    def change(data):
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return data

    return change


BAD = {
    "another model": _set(["model", "type"], "Unigram"),
    "no model": _set(["model"], None),
    "no merges": _set(["model", "merges"], None),
    "odd merge": _set(["model", "merges", 0], ["a", "b", "c"]),
    "negative id": _set(["model", "vocab", "a"], -1),
    "id is a float": _set(["model", "vocab", "a"], 1.5),
    "huge id": _set(["model", "vocab", "a"], 1 << 30),
    "id twice": _set(["model", "vocab", "a"], 70),
    "id beyond the embedding": _set(["model", "vocab", "brand new"], 4000),
    "text with NUL": _set(["model", "vocab", "x\0y"], 466),
    "text of a padding token": _set(["model", "vocab", "[PAD467]"], 466),
    "added token without text": _set(["added_tokens", 0], {"id": 3}),
    "unknown regex": _set(["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], r"\w+"),
    "prefix space": _set(["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True),
    "normalizer": _set(["normalizer"], {"type": "NFC"}),
    "neither kind": _set(["pre_tokenizer"], None),
}


@pytest.mark.parametrize("name", BAD)
def test_odd_tokenizers_are_refused(tmp_path, name):
    folder = changed(tmp_path, BAD[name])
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.code in ("checkpoint.invalid", "checkpoint.unsupported")
    assert not (tmp_path / "out").exists()


def test_whole_words_first_must_not_matter(tmp_path):
    """llama.cpp takes whole words first for llama-bpe; a vocabulary where that changes a word is refused."""

    def change(data):
        assert data["model"]["ignore_merges"] is False
        # `jqz` is made of j + qz, but merging its letters makes jq first and then stops
        data["model"]["merges"] += [["j", "q"], ["q", "z"], ["j", "qz"]]
        free = max(entry["id"] for entry in data["added_tokens"]) + 1
        data["model"]["vocab"] |= {"jq": free, "qz": free + 1, "jqz": free + 2}
        return data

    convert(tiny.shared(Variant())[0], tmp_path / "fine")
    folder = changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"ignore_merges.*'jqz'"):
        convert(folder, tmp_path / "out")


def test_deepseek_is_recognised_by_its_five_splits():
    """Its published pre-tokenizer, with the letters shortened; the file itself is not at hand."""
    regexes = [
        "[\r\n]",
        "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓ]+",
        "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
        "\\s+$",
        "[一-龥ࠀ-一가-\ud7ff]+",
    ]
    steps = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in regexes
    ]
    steps.append({"type": "Digits", "individual_digits": True})
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    assert _recognise({"type": "Sequence", "pretokenizers": steps}) == "deepseek-llm"
    steps[1], steps[2] = steps[2], steps[1]
    with pytest.raises(CheckpointError, match="unknown pre-tokenizer"):
        _recognise({"type": "Sequence", "pretokenizers": steps})


@pytest.mark.parametrize("place", ["jinja", "json", "config", "named"])
def test_the_chat_template_is_found_in_all_its_places(tmp_path, place):
    folder = tiny.copy(Variant(), tmp_path / "model")
    template = "{{ 'ünïcode' }}\n  {% if a %}b{% endif %}\n"
    (folder / "chat_template.jinja").unlink()
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif place == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    else:
        value = (
            template
            if place == "config"
            else [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]
        )
        tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "chat_template": value})
    convert(folder, tmp_path / "out")
    assert read_header(tmp_path / "out" / "decoder.gguf").chat_template == template


def test_no_chat_template_is_no_error(tmp_path):
    folder = tiny.copy(Variant(), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    convert(folder, tmp_path / "out")
    assert read_header(tmp_path / "out" / "decoder.gguf").chat_template is None


def test_special_tokens_come_from_the_tokenizer_and_then_from_the_config(tmp_path):
    folder = tiny.copy(Variant(), tmp_path / "model")
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "eos_token": {"content": "<|start|>"}})
    convert(folder, tmp_path / "out")
    assert read_header(tmp_path / "out" / "decoder.gguf").token("eos") == "<|start|>"
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "eos_token": "<nowhere>"})
    with pytest.raises(CheckpointError, match="<nowhere>"):
        convert(folder, tmp_path / "again")
