"""Tokens of the GGUF file against those of the original tokenizer, on texts chosen to break tokenizers."""

from __future__ import annotations

import json

import pytest
import tiny
import tokenizers
import transformers
from tiny import Variant

from edgevlm import converters
from edgevlm.converters import convert
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


@pytest.fixture(scope="module", params=["llama-bpe", "smollm", "gpt-2", "deepseek-llm", "spm"])
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
    assert decoder.vocabulary.tokenize(text, True, True) == tokenizer(text)["input_ids"]


def test_the_token_comparison_can_fail(pair):
    """The twin: a text that differs in one invisible character is another list of tokens."""
    decoder, tokenizer, _ = pair
    assert decoder.vocabulary.tokenize("the lamp", True, True) != tokenizer("the\u00a0lamp")["input_ids"]


def test_bos_is_added_exactly_when_the_tokenizer_adds_it(pair):
    decoder, tokenizer, kind = pair
    assert decoder.header.metadata["tokenizer.ggml.add_bos_token"] is (kind in ("llama-bpe", "deepseek-llm", "spm"))
    assert decoder.vocabulary.tokenize("x", True, True)[:1] == tokenizer("x")["input_ids"][:1]


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


def read(folder):
    """The vocabulary, without writing anything."""
    return converters.huggingface.read(folder, "x", None).vocabulary


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
    "split that removes": _set(["pre_tokenizer", "pretokenizers", 0, "behavior"], "Removed"),
    "inverted split": _set(["pre_tokenizer", "pretokenizers", 0, "invert"], True),
    "two regexes": _set(["pre_tokenizer", "pretokenizers", 1, "use_regex"], True),
    "ending": _set(["model", "end_of_word_suffix"], "</w>"),
    "beginning": _set(["model", "continuing_subword_prefix"], "##"),
    "dropout": _set(["model", "dropout"], 0.1),
    "merge of no tokens": _set(["model", "merges", 0], ["jq", "qz"]),
    "lstrip": _set(["added_tokens", 0, "lstrip"], True),
    "rstrip": _set(["added_tokens", 0, "rstrip"], True),
    "single word": _set(["added_tokens", 0, "single_word"], True),
    "normalizer": _set(["normalizer"], {"type": "NFC"}),
    "neither kind": _set(["pre_tokenizer"], None),
}


@pytest.mark.parametrize("name", BAD)
def test_odd_tokenizers_are_refused(tmp_path, name):
    folder = changed(tmp_path, BAD[name])
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.code in ("checkpoint.invalid", "checkpoint.unsupported")


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


def test_a_vocabulary_word_without_a_merge_is_found(tmp_path):
    """`ignore_merges` takes it as it is; without, it stays in pieces."""

    def change(data):
        free = max(entry["id"] for entry in data["added_tokens"]) + 1
        data["model"]["vocab"]["zqzq"] = free
        return data

    folder = changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"ignore_merges.*'zqzq'"):
        read(folder)


def test_a_vocabulary_word_that_only_llama_cpp_would_join_is_refused(tmp_path):
    def change(data):
        free = max(entry["id"] for entry in data["added_tokens"]) + 1
        data["model"]["vocab"]["." + ","] = free
        return data

    folder = changed(tmp_path, change, kind="spm")
    with pytest.raises(CheckpointError, match=r"'\.,'.*join its halves"):
        read(folder)


@pytest.mark.parametrize(("pair", "fine"), [(("1", "2"), False), (("1", "a"), True)], ids=["digits", "not digits"])
def test_a_token_over_digits_is_refused_where_llama_cpp_does_not_split_them(tmp_path, pair, fine):
    def change(data):
        free = max(entry["id"] for entry in data["added_tokens"]) + 1
        data["model"]["vocab"] |= {"".join(pair): free}
        data["model"]["merges"].append(list(pair))
        return data

    folder = changed(tmp_path, change, kind="deepseek-llm")
    if fine:
        assert read(folder).pre == "deepseek-llm"
        return
    with pytest.raises(CheckpointError, match="'12' joins digits"):
        read(folder)


SPM_BAD = {
    "lowercase": _set(["normalizer", "normalizers"], [{"type": "Lowercase"}]),
    "one more step": lambda data: _set(
        ["normalizer", "normalizers"], [*data["normalizer"]["normalizers"], {"type": "NFKC"}]
    )(data),
    "another sign": _set(["normalizer", "normalizers", 0, "prepend"], "_"),
    "digits": _set(["pre_tokenizer"], {"type": "Digits", "individual_digits": True}),
    "metaspace, splitting": lambda data: _metaspace(data, prepend_scheme="never", split=True),
    "metaspace, first": lambda data: _metaspace(data, prepend_scheme="first", split=False),
    "metaspace, always": lambda data: _metaspace(data, prepend_scheme="always", split=False),
}


def _metaspace(data, **keys):
    return {**data, "normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", **keys}}


@pytest.mark.parametrize("name", SPM_BAD)
def test_spaces_that_llama_cpp_treats_differently_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="treat spaces"):
        read(changed(tmp_path, SPM_BAD[name], kind="spm"))


def test_metaspace_that_puts_no_space_in_front_gives_the_tokens_of_tokenizers(tmp_path):
    """And why the scheme `always` is refused: it puts none in front of a text that begins with a space."""
    folder = changed(tmp_path, lambda data: _metaspace(data, prepend_scheme="never", split=False), kind="spm")
    convert(folder, tmp_path / "out", decoder_quant="f16", encoder_quant="fp32")
    decoder = Decoder(tmp_path / "out" / "decoder.gguf", context=256)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TRICKY:
        assert decoder.vocabulary.tokenize(text, True, True) == reference.encode(text).ids, text
    decoder.close()
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    assert reference.encode(" a").ids == reference.encode("a").ids


# post-processors and special tokens


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", ["smollm", "llama-bpe"])
def test_bos_is_what_the_post_processor_says_whatever_the_flag_says(tmp_path, kind, flag):
    """As in transformers 5.23: `smollm` has no post-processor here, `llama-bpe` one that adds bos."""
    folder = changed(tmp_path, lambda data: {**data, "add_bos_token": flag}, kind=kind, file="tokenizer_config.json")
    ids = transformers.AutoTokenizer.from_pretrained(folder)("x")["input_ids"]
    found = read(folder)
    assert found.add_bos is (ids[0] == found.special["bos"]) is (kind == "llama-bpe")


def _template(*pieces):
    named = {name: {"id": name, "ids": [0], "tokens": [name]} for name in ("<|begin|>", "<|end|>", "<|start|>")}
    single = [
        {"Sequence": {"id": piece, "type_id": 0}} if piece in "AB" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": named}


@pytest.mark.parametrize(
    ("pieces", "wanted"), [("A", (False, False)), (["<|begin|>", "A"], (True, False)),
                           (["<|begin|>", "A", "<|end|>"], (True, True)), (["A", "<|end|>"], (False, True))]
)  # fmt: skip
def test_brackets_of_bos_and_eos_are_understood(tmp_path, pieces, wanted):
    found = read(changed(tmp_path, _set(["post_processor"], _template(*pieces))))
    assert (found.add_bos, found.add_eos) == wanted


@pytest.mark.parametrize(
    "processor",
    [_template("<|start|>", "A"), _template("<|begin|>", "<|begin|>", "A"), _template("A", "B"), _template("<|begin|>"),
     {"type": "BertProcessing", "sep": ["<|end|>", 1], "cls": ["<|begin|>", 0]}],
)  # fmt: skip
def test_other_brackets_are_refused(tmp_path, processor):
    with pytest.raises(CheckpointError, match="post-processor"):
        read(changed(tmp_path, _set(["post_processor"], processor)))


def stops(tmp_path, ids):
    """What generation_config.json with these ids gives; the ids are texts."""
    folder = tiny.copy(Variant(), tmp_path / "model")
    index_of = tiny.make_tokenizer("llama-bpe").get_vocab()
    numbers = [index_of[text] for text in ids]
    tiny.rewrite_json(folder / "generation_config.json", lambda data: {**data, "eos_token_id": numbers})
    return folder, numbers


def test_every_token_that_ends_an_answer_reaches_llama_cpp(tmp_path):
    """<|end|> is known to llama.cpp by its text, the others need a key; the tokenizer's own eos stays first."""
    folder, numbers = stops(tmp_path, ["<|start|>", "<|end|>", "[extra]"])
    found = read(folder)
    assert found.stops == tuple(numbers)
    assert (found.special["eos"], found.special["eot"], found.special["eom"]) == (numbers[1], numbers[0], numbers[2])
    convert(folder, tmp_path / "out", encoder_quant="fp32")
    metadata = read_header(tmp_path / "out" / "decoder.gguf").metadata
    assert metadata["tokenizer.ggml.eot_token_id"] == numbers[0]


def test_generation_config_wins_over_the_tokenizer(tmp_path):
    folder, numbers = stops(tmp_path, ["<|start|>"])
    found = read(folder)
    assert (found.special["eos"], found.stops) == (numbers[0], tuple(numbers))


@pytest.mark.parametrize("same", [True, False])
def test_bos_ends_an_answer_only_where_it_is_eos_too(tmp_path, same):
    """GPT-2's relatives have one token for both; the first conversions of Llama named bos by mistake."""
    folder, (bos, start) = stops(tmp_path, ["<|begin|>", "<|start|>"])
    if same:
        tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "eos_token": "<|begin|>"})
    assert read(folder).stops == ((bos, start) if same else (start,))


def test_more_ends_than_llama_cpp_can_be_told_are_refused(tmp_path):
    folder, _ = stops(tmp_path, ["<|end|>", "[extra]", "<|start|>", "<image>"])
    with pytest.raises(CheckpointError, match="run past"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    (folder / "generation_config.json").unlink()
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "eos_token": {"content": "<|start|>"}})
    convert(folder, tmp_path / "out")
    assert read_header(tmp_path / "out" / "decoder.gguf").token("eos") == "<|start|>"
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "eos_token": "<nowhere>"})
    with pytest.raises(CheckpointError, match="<nowhere>"):
        convert(folder, tmp_path / "again")


# what converts must load


def _no_bytes(data):
    vocab = data["model"]["vocab"]
    return _set(["model", "vocab"], {f"<{text}" if text == "<0x41>" else text: i for text, i in vocab.items()})(data)


@pytest.mark.parametrize(("kind", "change"), [("spm", _no_bytes), ("llama-bpe", _set(["model", "merges"], []))])
def test_a_vocabulary_that_llama_cpp_does_not_load_is_refused(tmp_path, kind, change):
    folder = changed(tmp_path, change, kind=kind)
    if kind == "llama-bpe":  # only single bytes are words now, so that nothing else is wrong
        tiny.rewrite_json(folder / "tokenizer.json", _set(["model", "ignore_merges"], True))
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.code == "checkpoint.unsupported", caught.value
    assert not (tmp_path / "out").exists()


def test_a_template_that_the_runtime_refuses_is_refused(tmp_path):
    folder = tiny.copy(Variant(), tmp_path / "model")
    (folder / "chat_template.jinja").write_text("x" * (257 << 10))
    with pytest.raises(CheckpointError, match="chat_template") as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.code == "checkpoint.unsupported"
    assert not (tmp_path / "out").exists()
