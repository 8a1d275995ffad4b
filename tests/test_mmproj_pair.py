"""What surrounds the weights of a pair: the text model's file, chat templates, folders, options, the record."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import tiny_mmproj
import tiny_smolvlm
from test_convert_llava_original import CLIP, LLAMA3, V1, original, prompt
from test_mmproj import SMOLVLM, bundle, paired
from typer.testing import CliRunner

import edgevlm
from edgevlm.bundle import sha256_of
from edgevlm.cli import app
from edgevlm.converters import convert, gguf_copy
from edgevlm.describe import describe
from edgevlm.errors import CheckpointError, GGUFError, UsageError
from edgevlm.gguf import read_header
from edgevlm.messages import question
from edgevlm.prompt import PromptFormat, render

TEXT_ONLY = "{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """(text model, mmproj, checkpoint)."""
    root = tmp_path_factory.mktemp("smolvlm")
    folder, _, text = bundle(tiny_smolvlm.shared(SMOLVLM)[0], root)
    return text, tiny_mmproj.modern(folder).save(root / "mmproj.gguf"), folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    folder, tower = original(root)
    (folder / "chat_template.jinja").write_text(TEXT_ONLY, encoding="utf-8")
    _, _, text = bundle(folder, root, tower)
    return text, tiny_mmproj.legacy(folder, tower).save(root / "mmproj.gguf"), folder


def without_template(text, path):
    """The same file without a chat template: its key gets another name of the same length."""
    path.write_bytes(text.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.other_template"[:23]))
    return path


# chat templates


def test_a_template_that_places_pictures_stays(smolvlm, tmp_path):
    text, mmproj, _ = smolvlm
    manifest = convert(text, tmp_path / "out", mmproj=mmproj)
    assert (tmp_path / "out" / "decoder.gguf").read_bytes() == text.read_bytes()
    assert manifest.provenance["notes"] == []


@pytest.mark.parametrize("own", [TEXT_ONLY, None], ids=["text only", "none"])
def test_llava_gets_its_familys_template(llava, tmp_path, own):
    text, mmproj, _ = llava
    source = text if own else without_template(text, tmp_path / "text.gguf")
    manifest = convert(source, tmp_path / "out", mmproj=mmproj, name="x")
    assert prompt(tmp_path / "out") == f"{V1} USER: [0]\nWhat is this? ASSISTANT:"
    assert manifest.provenance["notes"] == ["the chat template is the family's own"]
    convert(source, tmp_path / "v0", mmproj=mmproj, template="v0")
    assert prompt(tmp_path / "v0") == f"{V1}###Human: [0]\nWhat is this?###Assistant:"
    with pytest.raises(UsageError, match="it has llama3, v1, v0"):
        convert(source, tmp_path / "other", mmproj=mmproj, template="v9")


def test_only_the_template_of_a_text_model_changes(llava, tmp_path):
    text, mmproj, _ = llava
    convert(text, tmp_path / "out", mmproj=mmproj)
    before, after = read_header(text), read_header(tmp_path / "out" / "decoder.gguf")
    keys = {"tokenizer.chat_template"}
    assert {key for key in before.metadata if before.metadata[key] != after.metadata[key]} == keys
    assert set(before.metadata) == set(after.metadata)
    assert before.tensors == after.tensors
    assert text.read_bytes()[before.data_offset :] == after.path.read_bytes()[after.data_offset :]
    merges = [[*one.path.read_bytes()[slice(*place)]] for one in (before, after)
              for key, place in one.places.items() if key == "tokenizer.ggml.scores"]  # fmt: skip
    assert merges[0] == merges[1]
    gguf_copy.copy(after, tmp_path / "again.gguf", before.chat_template)  # and back
    again = read_header(tmp_path / "again.gguf")
    assert (again.metadata, again.tensors) == (before.metadata, before.tensors)


def test_a_real_file_gets_another_template(smollm2, tmp_path):
    header = read_header(smollm2)
    gguf_copy.copy(header, tmp_path / "copy.gguf", None)
    assert sha256_of(tmp_path / "copy.gguf") == sha256_of(smollm2)
    gguf_copy.copy(header, tmp_path / "new.gguf", "{{ messages }}" * 9)
    found = read_header(tmp_path / "new.gguf")
    assert found.chat_template == "{{ messages }}" * 9
    assert found.tensors == header.tensors
    assert found.path.read_bytes()[found.data_offset :] == smollm2.read_bytes()[header.data_offset :]


@pytest.mark.parametrize(
    ("tokenizer", "renamed", "wanted"),
    [
        ("llama-bpe", {"<|start|>": "<|start_header_id|>"}, f"<|end_header_id|>\n\n{LLAMA3}<|eot_id|>"),
        # LLaVA adds these two to the models that it trains with them, and to no other
        ("spm", {"<|start|>": "<im_start>", "[extra]": "<im_end>"}, " USER: <im_start>[0]<im_end>\nWhat is this? ASS"),
    ],
    ids=["LLaVA++", "tokens around a picture"],
)
def test_the_vocabulary_chooses_the_template(tmp_path, tokenizer, renamed, wanted):
    folder, tower = original(tmp_path, variant=dataclasses.replace(CLIP, tokenizer=tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        words = (folder / name).read_text()
        for old, new in renamed.items():
            words = words.replace(old, new)
        (folder / name).write_text(words)
    _, _, text = bundle(folder, tmp_path, tower)
    mmproj = tiny_mmproj.legacy(folder, tower).save(tmp_path / "mmproj.gguf")
    convert(without_template(text, tmp_path / "text.gguf"), tmp_path / "out", mmproj=mmproj)
    assert wanted in prompt(tmp_path / "out")


def test_smolvlm_gets_the_template_of_its_repositories(smolvlm, tmp_path):
    text, mmproj, _ = smolvlm
    convert(without_template(text, tmp_path / "text.gguf"), tmp_path / "out", mmproj=mmproj)
    header = read_header(tmp_path / "out" / "decoder.gguf")
    said = [{"role": role, "content": [{"type": "text", "text": "a"}]} for role in ("user", "assistant")]
    turns = [*said, *question("c", [None])]
    released = tiny_smolvlm.TEMPLATE.replace("<|start|>", "<|im_start|>").replace("<|end|>", "<end_of_utterance>")
    found, wanted = (
        render(turns, PromptFormat(template=source, bos="", eos="", control_tokens=(), image_token="<image>"))
        for source in (header.chat_template, released)
    )
    assert found == wanted


def test_a_vocabulary_without_the_tokens_of_pictures_is_refused(smolvlm, smollm2, tmp_path):
    text, mmproj, folder = smolvlm
    raw = text.read_bytes()
    (tmp_path / "text.gguf").write_bytes(raw.replace(b"<fake_token_around_image>", b"<fake_token_around_imagE>"))
    with pytest.raises(CheckpointError, match="lacks the control tokens <fake_token_around_image>"):
        convert(tmp_path / "text.gguf", tmp_path / "out", mmproj=mmproj)
    # A real text model of the same architecture: SmolLM2.
    file = tiny_mmproj.modern(folder)
    file.tensors["mm.model.fc.weight"] = np.zeros((576, 192), np.float32)
    with pytest.raises(CheckpointError, match="lacks the control tokens <image>, <fake_token_around_image>"):
        paired(smollm2, file, tmp_path)
    assert not (tmp_path / "out").exists()


# folders and options


def test_a_folder_with_one_pair(smolvlm, tmp_path):
    text, mmproj, _ = smolvlm
    folder = tmp_path / "Tiny-SmolVLM"
    folder.mkdir()
    shutil.copy(mmproj, folder / "a.gguf")  # which is which, the files say
    shutil.copy(text, folder / "b.gguf")
    found = convert(folder, tmp_path / "out", encoder_quant="fp32")
    wanted = convert(text, tmp_path / "wanted", mmproj=mmproj, encoder_quant="fp32", name="Tiny-SmolVLM")
    assert (found.spec, found.files) == (wanted.spec, wanted.files)
    shutil.copy(mmproj, folder / "c.gguf")
    with pytest.raises(UsageError, match="1 text models and 2 mmproj"):
        convert(folder, tmp_path / "other")
    with pytest.raises(UsageError, match=r"name the text model's \.gguf itself"):
        convert(folder, tmp_path / "other", mmproj=mmproj)
    for name in "ac":
        (folder / f"{name}.gguf").unlink()
    os.symlink(mmproj, folder / "a.gguf")
    with pytest.raises(CheckpointError, match="link out of the checkpoint"):
        convert(folder, tmp_path / "other")


@pytest.mark.parametrize(
    "option",
    [{"decoder_quant": "q4_k_m"}, {"device": "pi5"}, {"decoder_types": {"x": "q8_0"}}, {"imatrix": "x"},
     {"tower": "x"}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused(smolvlm, tmp_path, option):
    text, mmproj, _ = smolvlm
    with pytest.raises(UsageError, match=f"{next(iter(option))} cannot be obeyed"):
        convert(text, tmp_path / "out", mmproj=mmproj, **option)


def test_files_in_the_wrong_place(smolvlm, tmp_path):
    text, mmproj, folder = smolvlm
    with pytest.raises(CheckpointError, match="give the text model first"):
        convert(mmproj, tmp_path / "out", mmproj=text)
    with pytest.raises(CheckpointError, match="no mmproj file"):
        convert(text, tmp_path / "out", mmproj=text)
    with pytest.raises(UsageError, match="with --mmproj"):
        convert(text, tmp_path / "out")
    with pytest.raises(UsageError, match="itself"):
        convert(folder, tmp_path / "out", mmproj=mmproj)
    raw = text.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", 1)
    (tmp_path / "qwen2.gguf").write_bytes(raw)
    with pytest.raises(GGUFError, match="only `llama` is supported"):
        convert(tmp_path / "qwen2.gguf", tmp_path / "out", mmproj=mmproj)
    assert not (tmp_path / "out").exists()


def test_the_record_of_a_pair(smolvlm, tmp_path):
    text, mmproj, _ = smolvlm
    lines = []
    manifest = convert(text, tmp_path / "out", mmproj=mmproj, name="tiny", source="somebody/tiny", report=lines.append)
    assert manifest.provenance["source_files"] == {path.name: sha256_of(path) for path in (text, mmproj)}
    assert manifest.provenance["source"] == "somebody/tiny"
    assert manifest.provenance["arguments"] == {"decoder_quant": "as the source", "encoder_quant": "int8"}
    assert manifest.fidelity["decoder"]["kept"] == "as the source"
    assert manifest.fidelity["decoder"]["types"]["Q8_0"]["tensors"] == 16
    assert 0.99 <= manifest.fidelity["encoder"]["cosine_min"] < 1
    shown = describe(tmp_path / "out").text()
    assert "decoder as the source (5 F32, 16 Q8_0)" in shown
    assert "decoder's weights: as the source" in shown
    assert "decoder as the source" in lines
    again = convert(text, tmp_path / "again", mmproj=mmproj, name="tiny", source="somebody/tiny")
    assert again == manifest
    assert manifest.provenance["model_card"] == {}


def test_the_licence_of_the_text_model_is_the_bundles(llava, tmp_path):
    text, mmproj, _ = llava
    manifest = convert(text, tmp_path / "out", mmproj=mmproj)
    assert manifest.provenance["model_card"] == {"license": "apache-2.0"}


def test_the_command(smolvlm, tmp_path):
    text, mmproj, _ = smolvlm
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", str(text), str(out), "--mmproj", str(mmproj)])
    assert result.exit_code == 0
    assert json.loads((out / "bundle.json").read_text())["spec"]["family"] == "smolvlm"
    with edgevlm.load(out, threads=1) as model:
        assert model.spec.name == "decoder"


def test_a_file_that_changes_meanwhile_is_noticed(smolvlm, tmp_path):
    text, mmproj, _ = smolvlm
    shutil.copy(mmproj, tmp_path / "mmproj.gguf")

    def meddle(step):
        if step.startswith("encoder"):
            os.utime(tmp_path / "mmproj.gguf", ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while"):
        convert(text, tmp_path / "out", mmproj=tmp_path / "mmproj.gguf", report=meddle)
    assert not (tmp_path / "out").exists()
