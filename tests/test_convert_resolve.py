"""config.json and the image processor, resolved: what is read, what is refused, and that nothing is guessed."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import transformers
from tiny import Variant

from edgevlm import families
from edgevlm.converters.resolve import resolve
from edgevlm.errors import CheckpointError

FAMILY = families.find(["LlavaForConditionalGeneration"])
TOKENS = {32000: "<image>", 463: "<image>"}

# what llava-hf/llava-1.5-7b-hf publishes: a sparse text_config
LLAVA_15 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}  # fmt: skip
CLIP_PROCESSOR = {
    "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor", "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}  # fmt: skip


def resolved(config=LLAVA_15, processor=CLIP_PROCESSOR):
    return resolve(FAMILY, config, processor, TOKENS, name="x")


def changed(data, path, value):
    """A copy with one value replaced (or removed, for None) at a dotted path."""
    data = copy.deepcopy(data)
    *parents, last = path.split(".")
    inner = data
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return data


def test_llava_1_5_resolves_to_its_published_numbers():
    found = resolved()
    encoder, decoder, image = found.spec.encoder, found.spec.decoder, found.spec.image
    assert (encoder.tower, encoder.connector, encoder.layers, encoder.n_tokens) == ("clip", "mlp", 23, 576)
    assert (encoder.activation, encoder.connector_activation, encoder.layer_norm_eps) == ("quick_gelu", "gelu", 1e-5)
    assert (decoder.layers, decoder.n_embd, decoder.vocab, decoder.context_length) == (32, 4096, 32064, 4096)
    assert (found.llama.n_ff, found.llama.heads, found.llama.heads_kv, found.llama.head_dim) == (11008, 32, 32, 128)
    assert (found.llama.rope, found.llama.rms_eps) == ({"rope_type": "default", "rope_theta": 10000.0}, 1e-5)
    assert (image.policy, image.shortest_px, image.height_px, image.resample) == ("shortest_crop", 336, 336, "bicubic")
    assert (image.pad_rgb, found.spec.prompt.image_token, found.llama.pad) == (None, "<image>", 32001)


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_defaults_are_those_of_transformers(tower):
    """A sparse section means what the classes of Hugging Face say; 7 numbers of each are compared."""
    declared = next(part for part in FAMILY.vision.towers if part.kind == tower)
    classes = {"siglip": transformers.SiglipVisionConfig, "clip": transformers.CLIPVisionConfig}
    for keys, config in ((declared.keys, classes[tower]()), (FAMILY.decoder.keys, transformers.LlamaConfig())):
        for key, default in keys.read.items():
            # absent means "derived" for these, which transformers does when it is constructed
            if key not in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters"):
                assert getattr(config, key) == default, key
        for key, values in keys.fixed.items():
            assert getattr(config, key, None) in values, key


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"])
def test_processor_defaults_are_those_of_transformers(name):
    declared = next(processor for processor in FAMILY.vision.processors if name in processor.names)
    reference = json.loads(getattr(transformers, name)().to_json_string())
    for key, default in declared.keys.read.items():
        if key in reference:
            assert reference[key] == pytest.approx(default), key


@pytest.mark.parametrize(("layer", "layers"), [(-1, 24), (-2, 23), (-25, 0), (0, 0), (1, 1), (24, 24), ([-2], 23)])
def test_a_selected_state_needs_the_blocks_before_it(layer, layers):
    assert resolved(changed(LLAVA_15, "vision_feature_layer", layer)).spec.encoder.layers == layers


def test_both_spellings_of_rope_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = changed(LLAVA_15, "text_config.rope_theta", 500000.0)
    old = changed(old, "text_config.rope_scaling", {"rope_type": "llama3", **scaling})
    new = changed(LLAVA_15, "text_config.rope_parameters", {"rope_type": "llama3", "rope_theta": 500000, **scaling})
    oldest = changed(LLAVA_15, "text_config.rope_scaling", {"type": "linear", "factor": 2})
    assert resolved(old).llama.rope == resolved(new).llama.rope
    assert resolved(new).llama.rope["factor"] == 8.0
    assert resolved(oldest).llama.rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


UNSUPPORTED = {
    "text_config.hidden_act": "gelu",
    "text_config.attention_bias": True,
    "text_config.mlp_bias": True,
    "text_config.model_type": "mistral",
    "text_config.rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "text_config.sliding_window": 4096,
    "vision_config.model_type": "pixtral",
    "vision_config.hidden_act": "relu",
    "vision_config.num_channels": 4,
    "vision_config.tie_last_hidden_states": True,
    "vision_config.new_attention": 1,
    "projector_hidden_act": "silu",
    "vision_feature_layer": [-2, -5],
    "vision_feature_select_strategy": "cls",
    "brand_new_key": 1,
}
INVALID = {
    "text_config": [],
    "vision_config": None,
    "text_config.vocab_size": "32064",
    "text_config.hidden_size": 4095,
    "text_config.num_hidden_layers": 10**9,
    "text_config.num_attention_heads": True,
    "text_config.num_key_value_heads": 5,
    "text_config.head_dim": 127,
    "text_config.rms_norm_eps": 0,
    "text_config.rope_theta": float("nan"),
    "text_config.rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "vision_config.num_attention_heads": 15,
    "vision_config.image_size": -336,
    "vision_config.patch_size": 14.0,
    "vision_config.layer_norm_eps": "1e-5",
    "vision_feature_layer": 25,
    "image_seq_length": 575,
    "image_token_index": 7,
}


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_what_cannot_be_run_is_refused(path):
    with pytest.raises(CheckpointError) as caught:
        resolved(changed(LLAVA_15, path, UNSUPPORTED[path]))
    assert caught.value.code in ("checkpoint.unsupported",), caught.value
    key = path.rpartition(".")[2]
    assert {"rope_scaling": "rope_type"}.get(key, key) in str(caught.value)


@pytest.mark.parametrize("path", INVALID)
def test_contradictions_are_refused(path):
    with pytest.raises(CheckpointError) as caught:
        resolved(changed(LLAVA_15, path, INVALID[path]))
    assert caught.value.code in ("checkpoint.invalid", "checkpoint.unsupported")


def test_no_image_token_is_refused():
    with pytest.raises(CheckpointError, match="image_token_index"):
        resolved(changed(LLAVA_15, "image_token_index", None))


# image processors

SIGLIP = changed(
    changed(LLAVA_15, "vision_config.model_type", "siglip_vision_model"), "vision_feature_select_strategy", "full"
)
SIGLIP_PROCESSOR = {
    "image_processor_type": "SiglipImageProcessorFast", "size": {"height": 336, "width": 336}, "resample": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_convert_rgb": None,
}  # fmt: skip


def test_siglip_stretches_and_keeps_every_patch():
    found = resolved(SIGLIP, SIGLIP_PROCESSOR)
    assert (found.spec.image.policy, found.spec.image.shortest_px) == ("stretch", None)
    assert (found.spec.image.resample, found.spec.image.mean) == ("bilinear", (0.5, 0.5, 0.5))
    assert (found.spec.encoder.n_tokens, found.spec.encoder.layers) == (576, 23)


def test_llava_pads_only_when_told():
    padding = {**CLIP_PROCESSOR, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    found = resolved(processor=padding).spec.image
    assert (found.policy, found.pad_rgb, found.shortest_px) == ("pad_square", (122, 116, 104), 336)
    assert resolved(processor={**padding, "do_pad": False}).spec.image.policy == "shortest_crop"


def test_old_files_give_sizes_as_numbers():
    old = {**CLIP_PROCESSOR, "size": 336, "crop_size": 336, "feature_extractor_type": "CLIPFeatureExtractor"}
    del old["image_processor_type"]
    assert resolved(processor=old).spec.image == resolved().spec.image
    assert resolved(SIGLIP, {**SIGLIP_PROCESSOR, "size": 336}).spec.image.policy == "stretch"


BAD_PROCESSORS = [
    {"image_processor_type": "PixtralImageProcessor"}, {"image_processor_type": None}, {"do_resize": False},
    {"do_resize": "yes"}, {"do_normalize": False}, {"resample": 0}, {"resample": "bicubic"}, {"image_mean": [0.5, 0.5]},
    {"image_std": [0.5, 0, 0.5]}, {"image_mean": 0.5}, {"size": {}}, {"size": {"longest_edge": 336}},
    {"size": {"shortest_edge": 224}}, {"size": {"shortest_edge": "336"}}, {"crop_size": {"height": 224, "width": 224}},
    {"do_center_crop": False}, {"do_pad": True}, {"rescale_factor": 0}, {"crop_pct": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_PROCESSORS, ids=str)
def test_odd_image_processors_are_refused(change):
    with pytest.raises(CheckpointError):
        resolved(processor={**CLIP_PROCESSOR, **change})


def test_an_image_processor_can_live_in_processor_config(tmp_path):
    from edgevlm.converters.checkpoint import open_checkpoint

    folder = tiny.copy(Variant(), tmp_path / "model")
    alone = open_checkpoint(folder).image_processor()
    (folder / "preprocessor_config.json").rename(folder / "gone")
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        open_checkpoint(folder).image_processor()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": alone, "processor_class": "x"}))
    assert open_checkpoint(folder).image_processor() == alone
