"""Checkpoints that are wrong in one place: each gets an error with a code that names the place."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import Variant

from edgevlm.bundle import sha256_of
from edgevlm.converters import convert
from edgevlm.errors import CheckpointError, FileError

Q0 = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return tiny.copy(Variant(), tmp_path / "model")


def refused(folder, code, *words):
    """Convert, expect an error of this code whose message has these words, and nothing left behind."""
    before = {path.name for path in folder.parent.iterdir()}
    with pytest.raises((CheckpointError, FileError)) as caught:
        convert(folder, folder.parent / "out")
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value)
    assert {path.name for path in folder.parent.iterdir()} == before


def test_a_missing_tensor_is_named(folder):
    tiny.rewrite_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if name != Q0})
    refused(folder, "checkpoint.missing_tensor", Q0)


def test_an_unexpected_tensor_is_named(folder):
    extra = "language_model.model.layers.0.self_attn.q_norm.weight"
    tiny.rewrite_tensors(folder, lambda tensors: {**tensors, extra: torch.zeros(4)})
    refused(folder, "checkpoint.unexpected_tensor", extra)


def test_a_block_beyond_the_last_is_unexpected(folder):
    extra = Q0.replace("layers.0", "layers.2")
    tiny.rewrite_tensors(folder, lambda tensors: {**tensors, extra: tensors[Q0].clone()})
    refused(folder, "checkpoint.unexpected_tensor", extra)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    tiny.rewrite_tensors(folder, lambda tensors: {**tensors, Q0: tensors[Q0][:-1].clone()})
    refused(folder, "checkpoint.shape", Q0, "[63, 64]", "[64, 64]", "q_rows x n_embd")


@pytest.mark.parametrize("name", [Q0, "multi_modal_projector.linear_1.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, name, value):
    def change(tensors):
        tensors[name][3, 4] = value
        return tensors

    tiny.rewrite_tensors(folder, change)
    refused(folder, "checkpoint.invalid", name, "NaN or infinity")


def test_weights_of_another_type_are_refused(folder):
    tiny.rewrite_tensors(folder, lambda tensors: {**tensors, Q0: tensors[Q0].to(torch.int64)})
    refused(folder, "checkpoint.unsupported", Q0, "I64")


def test_a_weight_too_large_for_float16_is_refused(folder):
    def change(tensors):
        tensors[Q0][0, 0] = 70_000.0
        return tensors

    tiny.rewrite_tensors(folder, change)
    with pytest.raises(CheckpointError, match="70000") as caught:
        convert(folder, folder.parent / "out", decoder_quant="f16")
    assert caught.value.code == "checkpoint.overflow"
    convert(folder, folder.parent / "out", decoder_quant="bf16")


def test_a_head_without_tying_is_needed_and_a_tied_one_is_dropped(folder):
    head = "language_model.lm_head.weight"
    tiny.rewrite_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if name != head})
    refused(folder, "checkpoint.missing_tensor", "lm_head.weight")
    tiny.rewrite_json(folder / "config.json", lambda config: {**config, "tie_word_embeddings": True})
    tied = convert(folder, folder.parent / "tied", decoder_quant="f32")
    embedding = "language_model.model.embed_tokens.weight"
    tiny.rewrite_tensors(folder, lambda tensors: {**tensors, head: tensors[embedding].clone()})
    tiny.rewrite_json(folder / "config.json", lambda config: {**config, "tie_word_embeddings": False})
    stored_twice = convert(folder, folder.parent / "twice", decoder_quant="f32")
    assert tied.files[0].sha256 == stored_twice.files[0].sha256


SPELLINGS = {
    "released": {"vision_tower.": "vision_tower.vision_model."},
    "in memory": {
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_names_gives_the_same_files(folder, spelling):
    wanted = convert(folder, folder.parent / "a", decoder_quant="q8_0")

    def change(tensors):
        return {_respelled(name, SPELLINGS[spelling]): tensor for name, tensor in tensors.items()}

    tiny.rewrite_tensors(folder, change)
    assert convert(folder, folder.parent / "b", decoder_quant="q8_0").files == wanted.files


def _respelled(name, spelling):
    old = next((old for old in spelling if name.startswith(old)), "")
    return spelling.get(old, "") + name.removeprefix(old)


def test_buffers_of_old_releases_are_unused(folder):
    buffers = {
        "vision_tower.embeddings.position_ids": torch.arange(16)[None],
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    tiny.rewrite_tensors(folder, lambda tensors: {**tensors, **buffers})
    unused = convert(folder, folder.parent / "out").provenance["unused_tensors"]
    assert set(buffers) <= set(unused)
    assert "vision_tower.post_layernorm.weight" in unused


# shards


def shard(folder):
    """Split model.safetensors in two, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in halves.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, chosen in halves.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_give_the_same_files(folder):
    wanted = convert(folder, folder.parent / "a")
    shard(folder)
    assert convert(folder, folder.parent / "b").files == wanted.files


def _outside(index):
    index["weight_map"][Q0] = "../x.safetensors"


def _absolute(index):
    index["weight_map"][Q0] = "/etc/passwd"


def _elsewhere(index):
    index["weight_map"][Q0] = next(file for file in index["weight_map"].values() if file != index["weight_map"][Q0])


def _unlisted(index):
    del index["weight_map"][Q0]


def _absent(index):
    index["weight_map"][Q0] = "model-00003-of-00002.safetensors"


def _ghost(index):
    index["weight_map"]["ghost"] = index["weight_map"][Q0]


def _no_map(index):
    index["weight_map"] = []


@pytest.mark.parametrize("damage", [_outside, _absolute, _elsewhere, _unlisted, _absent, _ghost, _no_map])
def test_an_index_that_lies_is_refused(folder, damage):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    refused(folder, "checkpoint.missing_tensor" if damage is _ghost else "checkpoint.invalid")


# folders


def test_pickles_of_other_kinds_are_refused_and_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "model.pt")
    refused(folder, "checkpoint.unsupported", "pickle", "safetensors")


def test_odd_folders_are_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", "file.not_found")
    refused(folder / "config.json", "file.not_regular")
    (folder / "model.safetensors").unlink()
    refused(folder, "checkpoint.invalid", "model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, "checkpoint.invalid", "config.json")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', "\udcff"])
def test_json_that_cannot_be_trusted_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "checkpoint.invalid", "config.json")


def test_remote_code_is_ignored(folder):
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    tiny.rewrite_json(folder / "config.json", lambda config: {**config, "auto_map": {"AutoModel": "evil.Model"}})
    convert(folder, folder.parent / "out")


def test_a_file_that_changes_meanwhile_is_noticed(folder):
    def meddle(step):
        if step.startswith("encoder"):
            (folder / "config.json").write_text((folder / "config.json").read_text() + " ")

    with pytest.raises(CheckpointError, match="changed while"):
        convert(folder, folder.parent / "out", report=meddle)
    assert not (folder.parent / "out").exists()


def test_the_recorded_hashes_are_those_of_the_source(folder):
    manifest = convert(folder, folder.parent / "out")
    for name, digest in manifest.provenance["source_files"].items():
        assert sha256_of(folder / name) == digest
