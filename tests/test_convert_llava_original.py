"""LLaVA in the layout of its own code, tower apart: the same files as from the Hugging Face layout, and its prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_convert import EMBED_TOLERANCE, pixels
from tiny import Variant

from edgevlm.converters import convert
from edgevlm.encoder import Encoder
from edgevlm.errors import CheckpointError, UsageError
from edgevlm.gguf import read_header
from edgevlm.prompt import ImageSlot, PromptFormat, render

CLIP = Variant(tower="clip", feature_layer=-2, strategy="default", tokenizer="spm")
MM = {"mm_vision_tower": "example/clip", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
      "mm_hidden_size": 48, "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
      "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "image_grid_pinpoints": None}  # fmt: skip
V15 = MM | {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
V1 = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions."  # noqa: E501
LLAMA3 = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."  # noqa: E501


def original(tmp_path, variant=CLIP, config=None, *, linear=False, architecture="LlavaLlamaForCausalLM"):
    """(checkpoint, tower) in two folders, rewritten from a tiny llava-hf checkpoint."""
    folder = tiny.copy(variant, tmp_path / "model")
    tower = tmp_path / "tower"
    tower.mkdir()
    found = load_file(folder / "model.safetensors")
    spelled = {"multi_modal_projector.linear_1.": "model.mm_projector.0.", "language_model.model.": "model.",
               "multi_modal_projector.linear_2.": "model.mm_projector.2.", "language_model.lm_head.": "lm_head.",
               }  # fmt: skip
    ours, theirs = {}, {}
    for name, tensor in found.items():
        old = next((old for old in spelled if name.startswith(old)), None)
        if old is None:
            theirs["vision_model." + name.removeprefix("vision_tower.")] = tensor
        elif not linear or ".mm_projector." not in spelled[old]:
            ours[spelled[old] + name.removeprefix(old)] = tensor
        elif ".0." in spelled[old]:
            ours[spelled[old].replace("0.", "") + name.removeprefix(old)] = tensor
    theirs |= {
        "text_model.final_layer_norm.weight": torch.ones(3),
        "logit_scale": torch.tensor(1.0),
        "visual_projection.weight": torch.ones(2, 2),
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    save_file(ours, folder / "model.safetensors")
    save_file(theirs, tower / "model.safetensors")
    whole = json.loads((folder / "config.json").read_text())
    text = whole["text_config"] | (V15 if config is None else config)
    (folder / "config.json").write_text(json.dumps({**text, "architectures": [architecture]}))
    (tower / "config.json").write_text(
        json.dumps({"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {}, "projection_dim": 2,
                    "vision_config": {**whole["vision_config"], "top_k": 50, "pruned_heads": {}}})
    )  # fmt: skip
    (folder / "preprocessor_config.json").rename(tower / "preprocessor_config.json")
    (folder / "chat_template.jinja").unlink()
    return folder, tower


def test_it_gives_the_files_of_the_hugging_face_layout(tmp_path):
    """The decoders differ by their chat template alone, so the original gets the same one."""
    wanted = convert(tiny.shared(CLIP)[0], tmp_path / "a", decoder_quant="q8_0", name="x")
    folder, tower = original(tmp_path)
    (folder / "chat_template.jinja").write_text(tiny.TEMPLATE, encoding="utf-8")
    found = convert(folder, tmp_path / "b", decoder_quant="q8_0", name="x", tower=tower)
    assert found.files == wanted.files
    assert found.spec.encoder == wanted.spec.encoder
    assert found.spec.family == "llava_mlp"
    assert (found.spec.image.policy, found.spec.image.pad_rgb) == ("pad_square", (122, 116, 104))
    assert (wanted.spec.image.policy, wanted.spec.prompt, found.spec.prompt) == (
        "shortest_crop", wanted.spec.prompt, wanted.spec.prompt
    )  # fmt: skip
    assert set(found.provenance["tower"]["source_files"]) >= {"config.json", "model.safetensors"}
    assert "tower:text_model.final_layer_norm.weight" in found.provenance["unused_tensors"]


@pytest.mark.parametrize("architecture", ["LlavaLlamaForCausalLM", "LlamaForCausalLM"])
def test_a_linear_projector_against_transformers(tmp_path, architecture):
    """LLaVA 1.0: CLIPVisionModel and one product."""
    config = {key: value for key, value in MM.items() if key != "mm_vision_select_feature"}
    folder, tower = original(tmp_path, config=config, linear=True, architecture=architecture)
    manifest = convert(folder, tmp_path / "out", encoder_quant="fp32", tower=tower)
    assert manifest.spec.family == "llava_linear"
    assert (manifest.spec.image.policy, manifest.spec.encoder.connector) == ("shortest_crop", "linear")
    tiles_TCHW = pixels()
    found = Encoder(tmp_path / "out" / "encoder.onnx", manifest.spec.encoder).encode(tiles_TCHW)
    model = tiny.shared(CLIP)[1].model
    linear = model.multi_modal_projector.linear_1
    with torch.no_grad():
        states = model.vision_tower(torch.from_numpy(tiles_TCHW), output_hidden_states=True).hidden_states
        wanted = (states[-2][:, 1:] @ linear.weight.T + linear.bias).numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= EMBED_TOLERANCE
    with torch.no_grad():  # the twin: the next state
        other = (states[-1][:, 1:] @ linear.weight.T + linear.bias).numpy()
    assert np.abs(found - other).max() > EMBED_TOLERANCE


def test_a_tower_saved_by_itself(tmp_path):
    """`CLIPVisionModel.save_pretrained` writes a flat config.json."""
    folder, tower = original(tmp_path)
    wanted = convert(folder, tmp_path / "a", tower=tower)
    (tower / "model.safetensors").unlink()
    tiny.shared(CLIP)[1].model.vision_tower.save_pretrained(tower)
    assert convert(folder, tmp_path / "b", tower=tower).files == wanted.files


def prompt(out, content="What is this?", system=None):
    """The rendered text; `[0]` is the first picture."""
    header = read_header(out / "decoder.gguf")
    form = PromptFormat(template=header.chat_template, bos="<s>", eos="</s>", control_tokens=(), image_token="<image>")
    parts = [{"type": "image"}, {"type": "text", "text": content}]
    messages = [{"role": "system", "content": system}] if system else []
    pieces = render([*messages, {"role": "user", "content": parts}], form)
    return "".join(f"[{piece.index}]" if isinstance(piece, ImageSlot) else piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (None, f"{V1} USER: [0]\nWhat is this? ASSISTANT:"),
        ("v1", f"{V1} USER: [0]\nWhat is this? ASSISTANT:"),
        ("v0", f"{V1}###Human: [0]\nWhat is this?###Assistant:"),
    ],
)
def test_prompts_of_vicuna(tmp_path, template, wanted):
    folder, tower = original(tmp_path)
    convert(folder, tmp_path / "out", tower=tower, template=template)
    assert prompt(tmp_path / "out") == wanted
    assert prompt(tmp_path / "out", system="Be brief.") == wanted.replace(V1, "Be brief.")


def test_prompt_of_llama_3(tmp_path):
    folder, tower = original(tmp_path, Variant(tower="clip", feature_layer=-2, strategy="default"))

    def rename(data):
        return json.loads(json.dumps(data).replace("<|start|>", "<|start_header_id|>"))

    tiny.rewrite_json(folder / "tokenizer.json", rename)
    convert(folder, tmp_path / "out", tower=tower)
    assert prompt(tmp_path / "out") == (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA3}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n[0]\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_earlier_turns(tmp_path):
    folder, tower = original(tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for template, wanted in (
        ("v1", f"{V1} USER: a ASSISTANT: b</s>USER: c ASSISTANT:"),
        ("v0", f"{V1}###Human: a###Assistant: b###Human: c###Assistant:"),
    ):
        convert(folder, tmp_path / template, tower=tower, template=template)
        source = read_header(tmp_path / template / "decoder.gguf").chat_template
        form = PromptFormat(template=source, bos="", eos="", control_tokens=(), image_token="<image>")
        assert "".join(piece.text for piece in render(turns, form)) == wanted


def test_tokens_around_a_picture(tmp_path):
    config = MM | {"mm_use_im_start_end": True}
    folder, tower = original(tmp_path, config=config, linear=True)
    with pytest.raises(CheckpointError, match="<im_start>"):
        convert(folder, tmp_path / "out", tower=tower)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("<|start|>", "<im_start>").replace("[extra]", "<im_end>"))
    convert(folder, tmp_path / "out", tower=tower)
    assert " USER: <im_start>[0]<im_end>\nWhat is this? ASSISTANT:" in prompt(tmp_path / "out")


@pytest.mark.parametrize(
    ("said", "policy"), [("pad", "pad_square"), ("square", "shortest_crop"), (None, "shortest_crop")]
)
def test_the_aspect_ratio_decides_on_padding(tmp_path, said, policy):
    folder, tower = original(tmp_path, config=V15 | {"image_aspect_ratio": said})
    assert convert(folder, tmp_path / "out", tower=tower).spec.image.policy == policy


@pytest.mark.parametrize(
    "change",
    [{"image_aspect_ratio": "anyres"}, {"mm_projector_type": "mlp3x_gelu"}, {"mm_projector_type": "linear"},
     {"mm_hidden_size": 1024}, {"mm_vision_select_feature": "cls"}, {"mm_patch_merge_type": "spatial"}, {"s2": True},
     {"mm_resampler_type": "x"}, {"mm_vision_select_layer": 9}, {"use_mm_proj": False}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_run_is_refused(tmp_path, change):
    folder, tower = original(tmp_path, config=V15 | change)
    with pytest.raises(CheckpointError):
        convert(folder, tmp_path / "out", tower=tower)
    assert not (tmp_path / "out").exists()


def test_the_tower_is_asked_for_exactly_where_it_lies_apart(tmp_path):
    folder, tower = original(tmp_path)
    with pytest.raises(UsageError, match=r"example/clip.*--tower"):
        convert(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="leave --tower out"):
        convert(tiny.shared(CLIP)[0], tmp_path / "out", tower=tower)
    with pytest.raises(UsageError, match="it has llama3, v1, v0"):
        convert(folder, tmp_path / "out", tower=tower, template="v9")


def test_the_wrong_ids_of_llava_1_0(tmp_path):
    """config.json and generation_config.json name 0 and 1; the tokenizer knows that bos is 1 and eos 2."""
    config = MM | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    folder, tower = original(tmp_path, config=config, linear=True)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    convert(folder, tmp_path / "out", tower=tower)
    header = read_header(tmp_path / "out" / "decoder.gguf")
    assert (header.token("bos"), header.token("eos")) == ("<s>", "</s>")
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
