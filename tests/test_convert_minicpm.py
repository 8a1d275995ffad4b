"""Conversion of MiniCPM-Llama3-V 2.5 and of Llama 3-V, which is the same: what is recorded, kept and refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import tiny
import tiny_minicpm
from pictures import picture
from PIL import Image
from test_minicpm import VARIANTS
from tiny_minicpm import LLAMA3V, RELEASED, TOKENS, Variant

import edgevlm
from edgevlm import families
from edgevlm.converters import convert, dry_run
from edgevlm.converters.resolve import resolve
from edgevlm.converters.verify import cosines, relative_error
from edgevlm.describe import describe
from edgevlm.encoder import Encoder
from edgevlm.errors import CheckpointError
from edgevlm.gguf import read_header
from edgevlm.layout import Rows, image_layout

#: config.json as published: MiniCPM-Llama3-V 2.5, and what Llama 3-V leaves out of it.
MINICPM = {
    **RELEASED, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "patch_size": 14, "query_num": 96, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
    "vision_config": {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "idefics2",
                      "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
}  # fmt: skip
LLAMA_3_V = {key: value for key, value in (MINICPM | LLAMA3V).items()
             if value is not None and key not in ("slice_config", "vision_config")}  # fmt: skip
VOCABULARY = dict(enumerate(["<image>", *TOKENS]))


def test_the_published_configurations_are_one_model():
    specs = {}
    for name, config, architecture in (("minicpmv", MINICPM, "MiniCPMV"), ("llama3v", LLAMA_3_V, "Llama3v")):
        family = families.find([architecture], config=config)
        assert family.name == name
        specs[name] = resolve(family, config, {}, VOCABULARY, name="x").spec
    spec = specs["minicpmv"]
    encoder = spec.encoder
    assert (encoder.layers, encoder.hidden, encoder.heads, encoder.intermediate) == (27, 1152, 16, 4304)
    assert (encoder.n_tokens, encoder.n_embd, encoder.activation, encoder.post_norm) == (96, 4096, "gelu_tanh", True)
    assert (spec.image.policy, spec.image.height_px, spec.image.multiple_px, spec.image.most_tiles) == (
        "slices", 448, 14, 9,
    )  # fmt: skip
    assert (specs["llama3v"].image, specs["llama3v"].encoder, specs["llama3v"].prompt) == (
        spec.image, encoder, spec.prompt,
    )  # fmt: skip
    rows = sum(part.count for part in image_layout(720, 1280, spec) if isinstance(part, Rows))
    assert rows == 672
    # The twin: without its section of slices, MiniCPM's own class cuts nothing.
    whole = resolve(families.find(["MiniCPMV"]), {k: v for k, v in MINICPM.items() if k != "slice_config"}, {},
                    VOCABULARY, name="x").spec  # fmt: skip
    assert whole.image.most_tiles == 1
    assert image_layout(720, 1280, whole) == ("<image>", Rows(96), "</image>")


def test_the_texts_around_slices():
    spec = resolve(families.find(["MiniCPMV"]), MINICPM, {}, VOCABULARY, name="x").spec
    rows = Rows(96)
    assert image_layout(720, 1280, spec) == (
        "<image>", rows, "</image><slice><image>", rows, "</image><image>", rows, "</image><image>", rows,
        "</image>\n<image>", rows, "</image><image>", rows, "</image><image>", rows, "</image></slice>",
    )  # fmt: skip


def as_llama3v_says(config):
    return {key: value for key, value in (config | LLAMA3V).items() if value is not None or key == "rope_scaling"}


def as_llama3v(folder):
    """Rewrite a checkpoint of MiniCPM as Llama 3-V was published, with a model card of its own."""
    names = {"vpm.": "vison.", "resampler.": "projection."}

    def renamed(name):
        return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)

    tiny.rewrite_tensors(folder, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    tiny.rewrite_json(folder / "config.json", as_llama3v_says)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: our/own-work\n---\n# Ours\n")


def test_llama3v_is_minicpm_and_says_so_whatever_its_files_claim(tmp_path):
    folder = tiny_minicpm.copy(Variant(), tmp_path / "model")
    convert(folder, tmp_path / "original", decoder_quant="f32", name="x")
    as_llama3v(folder)
    lines = []
    manifest = convert(folder, tmp_path / "alias", decoder_quant="f32", name="x", report=lines.append)
    assert manifest.spec.family == "llama3v"
    for name in ("encoder.onnx", "encoder.onnx.data"):
        assert (tmp_path / "original" / name).read_bytes() == (tmp_path / "alias" / name).read_bytes()
    origin = manifest.provenance["origin"]
    assert origin["repository"] == "openbmb/MiniCPM-Llama3-V-2_5"
    assert "MiniCPM-Llama3-V 2.5 by OpenBMB" in origin["notice"]
    assert origin["notice"] in lines
    assert manifest.provenance["model_card"]["license"] == "mit"  # what the files claim stays on record, as a claim
    shown = describe(tmp_path / "alias").text()
    assert "openbmb/MiniCPM-Llama3-V-2_5" in shown
    assert "withdrew" in shown
    assert "mit (the checkpoint's own claim)" in shown
    assert origin["notice"] in read_header(tmp_path / "alias" / "decoder.gguf").metadata["general.description"]
    own = json.loads((tmp_path / "original" / "bundle.json").read_text())["provenance"]["origin"]
    assert own == {key: origin[key] for key in ("model", "repository")}


def test_either_name_of_the_tensors_is_found_under_either_configuration(tmp_path):
    """Renaming one half of a checkpoint hides nothing."""
    folder = tiny_minicpm.copy(Variant(), tmp_path / "model")
    config = (folder / "config.json").read_text()
    as_llama3v(folder)
    (folder / "config.json").write_text(config)
    manifest = convert(folder, tmp_path / "out")
    assert manifest.provenance["origin"]["repository"] == "openbmb/MiniCPM-Llama3-V-2_5"


def test_a_processor_file_of_a_later_revision_changes_nothing(tmp_path):
    for name, processor in (("before", False), ("after", True)):
        convert(tiny_minicpm.shared(Variant(processor=processor))[0], tmp_path / name, decoder_quant="f32", name="x")
    for name in ("encoder.onnx.data", "decoder.gguf"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_int8_loses_little_and_spares_the_resampler(tmp_path):
    folder, _, _ = tiny_minicpm.shared(VARIANTS["later revision"])
    for quant in ("fp32", "int8"):
        manifest = convert(folder, tmp_path / quant, encoder_quant=quant)
    graph = onnx.load(tmp_path / "int8" / "encoder.onnx", load_external_data=False).graph
    products = [node.name for node in graph.node if node.op_type == "DynamicQuantizeMatMul"]
    assert len(products) == 4 * 3
    assert all(name.startswith("tower.blk.") for name in products)
    onnx.checker.check_model(tmp_path / "int8" / "encoder.onnx")
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert dims == [["T", 3, "H", "W"], ["T", 6, 256]]
    with edgevlm.load(tmp_path / "int8", threads=1) as model, edgevlm.load(tmp_path / "fp32", threads=1) as exact:
        for size in ("large", "strip"):
            found, wanted = model.embed_image(picture(size)), exact.embed_image(picture(size))
            # Random weights have no redundancy; a trained tower loses less.
            assert cosines(wanted, found).min() >= 0.99
            assert 0 < relative_error(wanted, found) < 0.05
        assert relative_error(wanted, np.roll(wanted, 1, axis=1)) > 0.05
    assert 0.99 <= manifest.fidelity["encoder"]["cosine_min"] < 1


def test_a_forecast_names_where_the_resampler_s_weights_come_from(tmp_path):
    folder, *_ = tiny_minicpm.shared(VARIANTS["later revision"])
    forecast = dry_run(folder, encoder_quant="fp32")
    found = {f.name: [name.removeprefix("resampler.") for name in f.sources] for f in forecast.tensors if f.file}
    assert found["connector.kv.weight"] == ["kv_proj.weight"]
    for name in ("connector.k.weight", "connector.v.weight"):
        assert found[name] == ["attn.in_proj_weight"]
    assert found["connector.kv.bias"] == ["attn.in_proj_bias"] * 2
    assert found["connector.proj.weight"] == ["proj"]
    convert(folder, tmp_path / "out", encoder_quant="fp32", decoder_quant="f16", fidelity_tokens=0)
    graph = onnx.load(tmp_path / "out" / "encoder.onnx", load_external_data=False).graph
    large = {tensor.name for tensor in graph.initializer if tensor.external_data and "connector" in tensor.name}
    assert {name for name in large if name.endswith(("weight", "bias"))} <= set(found)


@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
def test_calibration_pictures_of_any_shape_are_taken(tmp_path, quant):
    folder, _, _ = tiny_minicpm.shared(VARIANTS["later revision"])
    (tmp_path / "pictures").mkdir()
    for size in ("landscape", "portrait", "large"):
        Image.fromarray(picture(size)).save(tmp_path / "pictures" / f"{size}.png")
    manifest = convert(
        folder, tmp_path / "out", encoder_quant=quant, calibration=tmp_path / "pictures", force=quant == "int4"
    )
    assert set(manifest.provenance["arguments"]["calibration"]["files"]) == {
        "landscape.png", "portrait.png", "large.png",
    }  # fmt: skip
    cost = manifest.fidelity["encoder"]
    assert cost["pictures"] == "3 pictures of pictures"
    assert 0 < cost["relative_error"] < (0.3 if quant == "int4" else 0.05)


def test_slices_of_one_size_do_not_influence_each_other(tmp_path):
    folder, _, _ = tiny_minicpm.shared(Variant())
    manifest = convert(folder, tmp_path / "out", encoder_quant="fp32")
    encoder = Encoder(tmp_path / "out" / "encoder.onnx", manifest.spec.encoder, threads=1)
    tiles_TCHW = np.random.default_rng(3).normal(size=(3, 3, 42, 70)).astype(np.float32)
    together = encoder.encode(tiles_TCHW)
    assert np.abs(together - encoder.encode_each(tiles_TCHW)).max() <= 1e-4
    assert np.abs(together - encoder.encode_each(tiles_TCHW[::-1].copy())).max() > 1e-4


def in_config(**change):
    return lambda folder: tiny.rewrite_json(folder / "config.json", lambda config: config | change)


def in_section(section, **change):
    return lambda folder: tiny.rewrite_json(
        folder / "config.json", lambda config: config | {section: config[section] | change}
    )


def in_processor(**change):
    return lambda folder: tiny.rewrite_json(folder / "preprocessor_config.json", lambda data: data | change)


def in_tensors(change):
    return lambda folder: tiny.rewrite_tensors(folder, change)


def without(*names):
    return in_tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names})


def without_token(folder):
    tiny.rewrite_json(folder / "tokenizer.json", lambda data: json.loads(json.dumps(data).replace("<slice>", "<cut>")))


BROKEN = {
    "no query": (without("resampler.query"), r"lacks resampler\.query"),
    "no block": (without("vpm.encoder.layers.1.mlp.fc1.weight"), r"lacks vpm\.encoder\.layers\.1\.mlp\.fc1\.weight"),
    "no last norm": (without("vpm.post_layernorm.weight"), r"lacks vpm\.post_layernorm\.weight"),
    "a tensor too many": (in_tensors(lambda t: t | {"resampler.ln_extra.weight": t["resampler.ln_q.weight"].clone()}),
                          r"does not use: resampler\.ln_extra"),
    "projection of another width": (in_tensors(lambda t: t | {"resampler.proj": t["resampler.proj"][:, :64]}),
                                    r"resampler\.proj has the shape \[128, 64\]"),
    "a table of other positions": (in_section("vision_config", image_size=56), r"position_embedding\.weight has"),
    "other queries": (in_config(query_num=5), r"resampler\.query has the shape"),
    "a width without heads": (in_config(hidden_size=192), "heads of 128"),
    "another tower": (in_section("vision_config", model_type="siglip"), "supports idefics2"),
    "a version with other mathematics": (in_config(version="2.6"), "2.6"),
    "the last layer dropped": (in_config(drop_vision_last_layer=True), "drop_vision_last_layer"),
    "pictures with numbers": (in_config(use_image_id=True), "use_image_id"),
    "no slices": (in_config(slice_mode=False), "slice_mode"),
    "an unknown key": (in_section("slice_config", overlap=3), "unknown key overlap"),
    "slices without number": (in_section("slice_config", max_slice_nums=0), "max_slice_nums"),
    "more slices than can be": (in_section("slice_config", max_slice_nums=999), "most_tiles"),
    "slices smaller than a patch": (in_section("slice_config", scale_resolution=9), "makes slices of 9"),
    "other patches of slices": (in_section("slice_config", patch_size=16), "patches of 14 for the tower, 16 in"),
    "other patches at the top": (in_config(patch_size=16), "16 at its top"),
    "no tower": (in_config(vision_config=None), "vision_config"),
    "no token around slices": (without_token, "lacks <slice>"),
    "a processor of another kind": (in_processor(image_processor_type="CLIPImageProcessor"), "CLIPImageProcessor"),
    "a processor that cuts otherwise": (in_processor(max_slice_nums=4), "says 4 slices of 56"),
    "a processor with other rows": (in_processor(image_feature_size=64), "64 rows, config.json says 9 of 56"),
    "a processor with other texts": (in_processor(im_start="<img>"), "im_start"),
    "a deviation of zero": (in_processor(norm_std=[0.5, 0, 0.5]), "norm_std"),
    "a damaged processor": (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_run_is_refused(tmp_path, case):
    damage, words = BROKEN[case]
    folder = tiny_minicpm.copy(Variant(processor="processor" in case or "deviation" in case), tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
