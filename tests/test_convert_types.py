"""Values of the wrong type anywhere in a checkpoint's JSON files: an error of ours, or a reading that makes sense."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import tiny
from tiny import Variant

from edgevlm import converters
from edgevlm.errors import CheckpointError, EdgeVLMError

WRONG = ([1], {}, 5, "x", None)


def paths(data, prefix=()):
    """Every place of a JSON document; of a list or a long object only the first."""
    children = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())
    for key, child in children[: 1 if len(children) > 60 or isinstance(data, list) else None]:
        yield (*prefix, key)
        yield from paths(child, (*prefix, key))


def with_value(data, path, value):
    data = copy.copy(data)
    data[path[0]] = value if len(path) == 1 else with_value(data[path[0]], path[1:], value)
    return data


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("llama-bpe", "config.json"), ("llama-bpe", "generation_config.json"), ("llama-bpe", "tokenizer.json"),
        ("spm", "tokenizer.json"), ("llama-bpe", "tokenizer_config.json"), ("llama-bpe", "preprocessor_config.json"),
        ("llama-bpe", "chat_template.json"), ("llama-bpe", "model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_no_value_of_the_wrong_type_escapes(tmp_path, kind, file):
    """Only our own errors, whatever stands at any place; and most places do refuse."""
    folder = tiny.copy(Variant(tokenizer=kind, rope="llama3"), tmp_path / "model")
    if file == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
        (folder / file).write_text(json.dumps({"chat_template": [{"name": "default", "template": "x"}]}))
    if file == "model.safetensors.index.json":
        names = converters.checkpoint.open_checkpoint(folder).tensors
        (folder / file).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    data = json.loads((folder / file).read_text())
    places, refused = list(paths(data)), set()
    for path in places:
        for value in WRONG:
            (folder / file).write_text(json.dumps(with_value(data, path, value)))
            try:
                converters.huggingface.read(folder, "x", None)
            except EdgeVLMError:
                refused.add(path)
    assert places
    assert refused
    (folder / file).write_text(json.dumps(data))
    converters.huggingface.read(folder, "x", None)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("preprocessor_config.json", {"resample": True}),
        ("preprocessor_config.json", {"do_center_crop": "yes"}),
        ("config.json", {"multimodal_projector_bias": "false"}),
        ("config.json", {"image_token_index": 10**400}),
        ("config.json", {"tie_word_embeddings": "false"}),
        ("generation_config.json", {"eos_token_id": [5, "x"]}),
        ("tokenizer_config.json", {"bos_token": 5}),
    ],
)
def test_values_that_only_look_right_are_refused(tmp_path, file, change):
    folder = tiny.copy(Variant(), tmp_path / "model")
    tiny.rewrite_json(folder / file, lambda data: {**data, **change})
    with pytest.raises(CheckpointError, match=next(iter(change))):
        converters.huggingface.read(folder, "x", None)


@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (5 << 20)])
def test_texts_that_cannot_be_read_are_refused(tmp_path, name, content):
    folder = tiny.copy(Variant(), tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        converters.convert(folder, tmp_path / "out")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    folder = tiny.copy(Variant(), tmp_path / "model")
    tiny.rewrite_json(folder / "tokenizer_config.json", lambda data: {**data, "chat_template": "\ud800"})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        converters.huggingface.read(folder, "x", None)


# links


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "README.md", "config.json"])
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path, name):
    """A bundle is given away: a link must not carry another file of this machine into it."""
    folder = tiny.copy(Variant(), tmp_path / "model")
    shutil.move(folder / name, tmp_path / "secret")
    (folder / name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match=rf"{name} is a link out of the checkpoint") as caught:
        converters.huggingface.read(folder, "x", None)
    assert caught.value.code == "checkpoint.unsupported"


def test_links_of_a_hugging_face_cache_are_followed(tmp_path):
    """`snapshots/REVISION/config.json -> ../../blobs/SHA`, and a link to the whole folder."""
    snapshot = tiny.copy(Variant(), tmp_path / "models--x" / "snapshots" / "abc")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    (tmp_path / "model").symlink_to(snapshot)
    assert (
        converters.huggingface.read(tmp_path / "model", "x", None).checkpoint.text("chat_template.jinja")
        == tiny.TEMPLATE
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.json"])
def test_a_file_that_changes_while_the_checkpoint_is_opened_is_noticed(tmp_path, monkeypatch, name):
    """Changed, or made, after the first file was parsed and before the tensors are listed."""
    folder = tiny.copy(Variant(), tmp_path / "model")
    opened = converters.checkpoint.open_checkpoint.__globals__["_join_shards"]

    def meddle(*arguments):
        (folder / name).write_text((folder / name).read_text() + " " if (folder / name).exists() else "{}")
        return opened(*arguments)

    monkeypatch.setitem(converters.checkpoint.open_checkpoint.__globals__, "_join_shards", meddle)
    with pytest.raises(CheckpointError, match="changed while"):
        converters.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
