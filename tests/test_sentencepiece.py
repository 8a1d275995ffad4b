"""tokenizer.model: the ids of the tokenizer.json that is made from it, and every way in which it can be wrong."""

from __future__ import annotations

import json
import shutil

import nasty
import pytest
import tiny
import tiny_text
from tiny_text import TextVariant

from edgevlm import converters
from edgevlm.converters import convert
from edgevlm.decoder import Decoder
from edgevlm.errors import CheckpointError

VARIANT = TextVariant(tokenizer="spm", nasty=True)
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>",
            "eos_token": {"content": "</s>", "special": True}, "unk_token": "<unk>", "pad_token": None}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with tokenizer.model and added_tokens.json in place of tokenizer.json."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_text.shared(VARIANT)[0], folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    write_model(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    added = {e["content"]: e["id"] for e in data["added_tokens"] if e["content"] not in data["model"]["vocab"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def pieces():
    return nasty.pieces_of(nasty.make_tokenizer("spm"))


def write_model(folder, change=lambda found: found, **changes):
    raw = nasty.sentencepiece_model(change(pieces()), **changes)
    (folder / "tokenizer.model").write_bytes(raw)


def read(folder):
    return converters.huggingface.read(folder, "x", None).vocabulary


def test_it_gives_the_ids_of_tokenizers(folder, tmp_path):
    convert(folder, tmp_path / "out", decoder_quant="q8_0")
    decoder = Decoder(tmp_path / "out" / "decoder.gguf", context=256)
    reference = nasty.make_tokenizer("spm").backend_tokenizer
    texts = [*nasty.TEXTS, *nasty.SCRIPTS.values(), *nasty.SPELLED_OUT]
    assert [text for text in texts if decoder.vocabulary.tokenize(text, True, True) != reference.encode(text).ids] == []
    decoder.close()


def test_scores_and_types_are_those_of_the_file(folder):
    found, wanted = read(folder), pieces()
    assert found.scores[: len(wanted)] == [score for _, score, _ in wanted]
    assert found.types[: len(wanted)] == [kind for _, _, kind in wanted]
    assert -1e9 in found.scores
    assert (found.model, found.pre, found.merges, found.add_space_prefix) == ("llama", "default", [], True)
    assert (found.add_bos, found.add_eos) == (True, False)
    assert {role: found.tokens[i] for role, i in found.special.items()} == {
        "bos": "<s>", "eos": "</s>", "unknown": "<unk>"
    }  # fmt: skip
    types = dict(zip(found.tokens, found.types, strict=True))
    assert (types["<image>"], types["[extra]"]) == (3, 3)  # added_tokens.json has no word on it


def test_the_ranks_of_a_merge_list_order_tokens_as_the_scores_do(folder, tmp_path):
    """Both files of one vocabulary: equal orders, never one constant for all, which would join the leftmost first."""
    from_json = read(tiny_text.shared(VARIANT)[0])
    from_model = read(folder)
    made = [text for text in from_json.tokens if len(text) > 1 and from_json.types[from_json.tokens.index(text)] == 1]
    by_rank = [dict(zip(found.tokens, found.scores, strict=True)) for found in (from_json, from_model)]
    words = [text for text in made if set(text) != {"▁"} and by_rank[0][text] > -1e9]
    assert len(words) > 500
    orders = [sorted(words, key=lambda text, scores=scores: -scores[text]) for scores in by_rank]
    assert orders[0] == orders[1]
    spaces = [text for text in made if set(text) == {"▁"}]
    assert spaces
    assert max(by_rank[0][text] for text in spaces) < min(by_rank[0][text] for text in words)


def test_config_json_does_not_overrule_the_model(folder):
    """LLaVA 1.0 says bos 0 and eos 1, Llama's own conversions say "" of every role."""
    tiny.rewrite_json(folder / "config.json", lambda config: {**config, "bos_token_id": 0, "eos_token_id": 1})
    for said in ({}, {"bos_token": "", "eos_token": "", "unk_token": ""}):
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        (folder / "generation_config.json").unlink(missing_ok=True)
        found = read(folder)
        assert (found.special["bos"], found.special["eos"], found.add_bos) == (1, 2, True)


def test_flags_of_the_settings_count(folder):
    tiny.rewrite_json(
        folder / "tokenizer_config.json", lambda data: {**data, "add_bos_token": False, "add_eos_token": True}
    )
    assert (read(folder).add_bos, read(folder).add_eos) == (False, True)
    write_model(folder, normalizer_spec__add_dummy_prefix=False)
    assert read(folder).add_space_prefix is False


def test_added_tokens_of_the_settings(folder):
    free = len(pieces())
    (folder / "added_tokens.json").write_text(json.dumps({"<im_patch>": free, "<im_start>": free + 1}))
    decoder = {
        "0": {"content": "<unk>", "special": True}, str(free): {"content": "<im_patch>", "special": False},
        str(free + 2): {"content": "<pad>", "special": True, "lstrip": False},
    }  # fmt: skip
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "added_tokens_decoder": decoder})
    found = read(folder)
    assert found.tokens[free : free + 3] == ["<im_patch>", "<im_start>", "<pad>"]
    assert found.types[free : free + 3] == [4, 3, 3]


def _with(**entry):
    return {"added_tokens_decoder": {"2990": {"content": "<x>", **entry}}}


@pytest.mark.parametrize(
    "change",
    [{"tokenizer_class": "T5Tokenizer"}, {"add_bos_token": 1}, {"added_tokens_decoder": []}, _with(content=None),
     _with(lstrip=True), _with(single_word=True), {"added_tokens_decoder": {"x": {"content": "<x>"}}},
     {"added_tokens_decoder": {"1": {"content": "<x>"}}}, {"added_tokens_decoder": {"٣": {"content": "<x>"}}},
     {"added_tokens_decoder": {"4000": {"content": "a"}}}],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_followed(folder, change):
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, **change})
    with pytest.raises(CheckpointError):
        read(folder)


@pytest.mark.parametrize("index", [-1, True, 1.5, 1 << 30, "7"])
def test_odd_ids_of_added_tokens(folder, index):
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": index}))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        read(folder)


def _piece(index, **change):
    def damaged(found):
        text, score, kind = found[index]
        now = {"text": text, "score": score, "kind": kind, **change}
        return [*found[:index], (now["text"], now["score"], now["kind"]), *found[index + 1 :]]

    return {"change": damaged}


WRONG_MODELS = {
    "unigram": {"trainer_spec__model_type": 1},
    "no byte fallback": {"trainer_spec__byte_fallback": False},
    "spaces behind words": {"trainer_spec__treat_whitespace_as_suffix": True},
    "a character map": {"normalizer_spec__precompiled_charsmap": b"\1\2"},
    "removed spaces": {"normalizer_spec__remove_extra_whitespaces": True},
    "spaces as they are": {"normalizer_spec__escape_whitespaces": False},
    "bos is a word": {"trainer_spec__bos_id": 700},
    "bos beyond the end": {"trainer_spec__bos_id": 1 << 20},
    "unknown is bos": {"trainer_spec__unk_id": 1},
    "no unknown": {"trainer_spec__unk_id": -1},
    "two unknown": _piece(500, kind=2),
    "score is NaN": _piece(500, score=float("nan")),
    "a missing byte": _piece(100, text="x" * 30, kind=1),
    "a byte that is a word": _piece(100, kind=1),
    "a word that is a byte": _piece(500, kind=6),
    "an unused piece": _piece(500, kind=5),
    "an empty piece": _piece(500, text=""),
    "NUL": _piece(500, text="a\0b"),
    "one text twice": _piece(500, text="</s>"),
    "no pieces": {"change": lambda found: found[:3]},
    "a control token of two words": {"change": lambda found: [*found, ("<", 0.0, 1), ("s>", 0.0, 1)]},
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_models_that_llama_cpp_does_not_repeat(folder, name):
    write_model(folder, **WRONG_MODELS[name])
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.code in ("checkpoint.invalid", "checkpoint.unsupported")


def test_every_cut_and_flipped_bits_give_an_error_or_a_vocabulary(folder):
    raw = (folder / "tokenizer.model").read_bytes()
    path = folder / "tokenizer.model"
    for length in [*range(40), *range(40, len(raw), 997)]:
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read(folder)
    for at in range(0, len(raw), 499):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x80]) + raw[at + 1 :])
        try:
            read(folder)
        except CheckpointError:
            continue


@pytest.mark.parametrize("raw", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0b", b"\x00\x00",
                                 b"\x0a" + b"\xff" * 11, b"\x12\x05ab", b"\x15abcd", b"{}", b"GGUF"])  # fmt: skip
def test_what_is_no_model_at_all(folder, raw):
    (folder / "tokenizer.model").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read(folder)


def test_a_checkpoint_without_any_tokenizer(folder):
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read(folder)


def test_tokenizer_json_comes_first(folder):
    shutil.copy(tiny_text.shared(VARIANT)[0] / "tokenizer.json", folder)
    (folder / "tokenizer.model").write_bytes(b"not looked at")
    assert read(folder).scores[300] < 0
