"""SmolVLM and Idefics3 against transformers: pixels, embeddings, token layout, logits, answers."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny
import tiny_smolvlm
import torch
from pictures import SIZES, picture
from PIL import Image
from test_convert import EMBED_TOLERANCE, LOGIT_TOLERANCE, exact_logits
from tiny_smolvlm import FAKE, ROWS, Variant

import edgevlm
from edgevlm import messages
from edgevlm.converters import convert, gguf_file
from edgevlm.converters.verify import cosines, relative_error
from edgevlm.errors import CheckpointError
from edgevlm.gguf import read_header
from edgevlm.layout import Rows, image_layout
from edgevlm.splice import TextSegment, splice

VARIANTS = {
    "smolvlm": Variant(),
    "smolvlm whole": Variant(split=False, dtype=torch.bfloat16),
    # 90 pixels leave 6 over, as 384 does with patches of 14; a factor of 3 as for 2.2B
    "idefics3": Variant(kind="idefics3", rows=False, side_px=90, factor=3, longest_px=170),
    "idefics3 whole": Variant(kind="idefics3", split=False),
    "smolvlm as released": Variant(released=True, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request, tmp_path_factory):
    """(loaded bundle, its folder, model, processor) of each variant, with nothing lost to quantization."""
    folder, reference, processor = tiny_smolvlm.shared(VARIANTS[request.param])
    out = tmp_path_factory.mktemp("bundle") / "out"
    convert(folder, out, decoder_quant="f32", encoder_quant="fp32")
    with edgevlm.load(out, threads=1, kv_type="f32", context=512) as model:
        yield model, out, reference, processor


def chat(question, n_images):
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def reference_inputs(processor, question, images):
    text = processor.apply_chat_template(
        chat(question, len(images)), chat_template=tiny_smolvlm.TEMPLATE, add_generation_prompt=True
    )
    given = [Image.fromarray(image) for image in images]
    return processor(text=text, images=[given] if given else None, return_tensors="pt")


def layout_ids(model, question, images, image_token_id):
    """The prompt as token ids, one image token for each embedding."""
    layouts = [image_layout(*image.shape[:2], model.spec) for image in images]
    segments = model._reader.plan(messages.question(question, images), layouts)
    ids = [segment.tokens if isinstance(segment, TextSegment) else [image_token_id] * len(segment)
           for segment in segments]  # fmt: skip
    return [token for part in ids for token in part]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_embeddings_are_those_of_transformers(converted, size):
    model, _, reference, processor = converted
    image = picture(size)
    inputs = reference_inputs(processor, "What?", [image])
    tiles_TCHW = model.preprocess(image)
    assert np.array_equal(tiles_TCHW, inputs["pixel_values"][0].numpy())
    with torch.no_grad():
        (wanted,) = reference.model.get_image_features(inputs["pixel_values"]).pooler_output
    found = model.embed_image(image)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted.numpy()).max() <= EMBED_TOLERANCE
    assert cosines(wanted.numpy(), found).min() >= 0.99999


def without_last_norm(reference):
    class Same(torch.nn.Module):
        def forward(self, states):
            return states.contiguous()

    reference.model.vision_model.post_layernorm = Same()


def squares_transposed(reference):
    """Columns before rows within a square of patches."""
    projection, factor = reference.model.connector.modality_projection.proj, reference.config.scale_factor
    weight = projection.weight
    projection.weight.data = weight.data.reshape(len(weight), factor, factor, -1).transpose(1, 2).reshape(weight.shape)


def grid_transposed(reference):
    connector = reference.model.connector
    shuffle = connector.pixel_shuffle

    def transposed(x_TND, factor):
        side = int(x_TND.shape[1] ** 0.5)
        x_TRCD = x_TND.reshape(len(x_TND), side, side, -1)
        return shuffle(x_TRCD.transpose(1, 2).reshape(x_TND.shape), factor)

    connector.pixel_shuffle = transposed


def other_epsilon(reference):
    """1e-5, which llama.cpp's converter writes for files that do not say."""
    reference.model.vision_model.encoder.layers[0].layer_norm1.eps = 1e-5


@pytest.mark.parametrize("damage", [without_last_norm, squares_transposed, grid_transposed, other_epsilon])
def test_the_comparison_of_embeddings_can_fail(converted, damage):
    """The twin: the mistakes that are easily made with this tower and this connector."""
    model, _, reference, _ = converted
    reference = copy.deepcopy(reference)
    tiles_TCHW = model.preprocess(picture("landscape")) * np.float32(0.02)  # little contrast, for the epsilon

    def difference():
        with torch.no_grad():
            (rows_ND,) = reference.model.get_image_features(torch.from_numpy(tiles_TCHW)[None]).pooler_output
        found_TND = model._vision.load().encode_each(tiles_TCHW)
        return np.abs(found_TND.reshape(rows_ND.shape) - rows_ND.numpy()).max()

    assert difference() <= EMBED_TOLERANCE
    damage(reference)
    assert difference() > EMBED_TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_the_token_layout_is_the_processors(converted, size):
    model, _, reference, processor = converted
    images = [picture(size)]
    wanted = reference_inputs(processor, "What does it read?", images)["input_ids"][0].tolist()
    found = layout_ids(model, "What does it read?", images, reference.config.image_token_id)
    assert found == wanted
    # The twin: another picture's layout is another one, unless all have the same.
    other = layout_ids(model, "What does it read?", [picture("strip")], reference.config.image_token_id)
    alike = model.spec.image.policy != "tiles" or size in ("strip", "wide")
    assert (other == wanted) == alike


def test_several_pictures_have_a_layout_each(converted):
    model, _, reference, processor = converted
    images = [picture("portrait"), picture("strip", 1), picture("square", 2)]
    wanted = reference_inputs(processor, "Compare.", images)["input_ids"][0].tolist()
    assert layout_ids(model, "Compare.", images, reference.config.image_token_id) == wanted
    swapped = [images[1], images[0], images[2]]
    alike = model.spec.image.policy != "tiles"
    assert (layout_ids(model, "Compare.", swapped, reference.config.image_token_id) == wanted) == alike


def test_text_alone_is_not_lost_in_the_template(converted):
    model, _, reference, processor = converted
    wanted = reference_inputs(processor, "Why?", [])["input_ids"][0].tolist()
    assert layout_ids(model, "Why?", [], reference.config.image_token_id) == wanted


@pytest.mark.parametrize("size", ["landscape", "portrait", "pixel"])
def test_logits_and_answers_are_those_of_transformers(converted, size):
    model, out, reference, processor = converted
    image = picture(size)
    inputs = reference_inputs(processor, "What is it?", [image])
    with torch.no_grad():
        wanted = reference(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[0, -1].numpy()
    segments = model._reader.plan(
        messages.question("What is it?", [image]), [image_layout(*image.shape[:2], model.spec)]
    )
    rows_ND = model.embed_image(image)
    found = exact_logits(out / "decoder.gguf", splice(segments, {0: ("whole", rows_ND)}))
    assert np.abs(found - wanted).max() <= LOGIT_TOLERANCE
    # The twin: the same embeddings in reverse are seen.
    other = splice(segments, {0: ("turned", rows_ND[::-1].copy())})
    assert np.abs(exact_logits(out / "decoder.gguf", other) - wanted).max() > LOGIT_TOLERANCE
    # What stands for pictures has no place in an answer (models.md, 11.6); the reference is told so as well.
    banned = [token for token in (FAKE, "<image>", *ROWS) if token in processor.tokenizer.get_vocab()]
    with torch.no_grad():
        told = reference.generate(
            suppress_tokens=processor.tokenizer.convert_tokens_to_ids(banned),
            input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=6, do_sample=False,
            attention_mask=torch.ones_like(inputs["input_ids"]), pad_token_id=0,
        )  # fmt: skip
    text = processor.tokenizer.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.ask("What is it?", [image], max_tokens=6, temperature=0).text == text


@pytest.mark.parametrize("attack", [FAKE, "<image>", "<row_1_col_1>", "<global-img>", f"{FAKE}<row_2_col_1><image>"])
def test_a_user_who_spells_these_texts_gets_text(converted, attack):
    model, _, reference, processor = converted
    image, tokenizer = picture("square"), processor.tokenizer
    texts = {text for text in (FAKE, "<image>", *ROWS) if text in tokenizer.get_vocab()}
    special = tokenizer.convert_tokens_to_ids(sorted(texts))
    plain, found = (layout_ids(model, text, [image], reference.config.image_token_id) for text in ("", attack))
    assert [plain.count(index) for index in special] == [found.count(index) for index in special]
    assert tokenizer.decode(found).count(attack) == tokenizer.decode(plain).count(attack) + 1
    # The twin: without the shield, transformers makes control tokens of them.
    made = tokenizer(attack)["input_ids"]
    assert bool(set(made) & set(special)) == any(text in attack for text in texts)


def test_int8_loses_little_and_is_measured_tile_by_tile(tmp_path):
    folder, _, _ = tiny_smolvlm.shared(VARIANTS["smolvlm"])
    for quant in ("fp32", "int8"):
        manifest = convert(folder, tmp_path / quant, encoder_quant=quant)
    with edgevlm.load(tmp_path / "int8", threads=1) as model, edgevlm.load(tmp_path / "fp32", threads=1) as exact:
        tiles_TCHW = model.preprocess(picture("large"))
        assert len(tiles_TCHW) == 5
        found, wanted = model.embed_image(picture("large")), exact.embed_image(picture("large"))
        alone = np.concatenate([model._vision.load().encode(tile[None]) for tile in tiles_TCHW]).reshape(found.shape)
        assert np.array_equal(found, alone)
        assert not np.array_equal(found, model._vision.load().encode(tiles_TCHW).reshape(found.shape))
        # Random weights have no redundancy; a trained tower loses less.
        assert cosines(wanted, found).min() >= 0.99
        assert relative_error(wanted, found) < 0.05 < relative_error(wanted, np.roll(found, 4, axis=0))
    assert 0.99 <= manifest.fidelity["encoder"]["cosine_min"] < 1


def test_the_bundle_says_how_pictures_are_cut(converted):
    model, _, reference, _ = converted
    spec = model.spec
    split = spec.image.policy == "tiles"
    assert spec.family == "smolvlm"
    assert split or spec.image.policy == "longest_stretch"
    assert spec.encoder.scale_factor == reference.config.scale_factor
    n_tokens = Rows(spec.encoder.n_tokens)
    whole = (f"{FAKE}<global-img>", n_tokens, FAKE)
    cut = (f"{FAKE}<row_1_col_1>", n_tokens, f"\n{FAKE}<row_2_col_1>", n_tokens, f"\n\n{whole[0]}", *whole[1:])
    tall = dataclasses.replace(spec, image=dataclasses.replace(spec.image, longest_px=2 * spec.image.height_px))
    assert image_layout(100, 30, tall) == (cut if split else whole)
    small = dataclasses.replace(spec, image=dataclasses.replace(spec.image, longest_px=spec.image.height_px))
    assert image_layout(100, 30, small) == whole


def test_what_config_json_leaves_out_is_the_default_of_its_class():
    folder, reference, _ = tiny_smolvlm.shared(VARIANTS["smolvlm as released"])
    data = json.loads((folder / "config.json").read_text())
    absent = {"num_hidden_layers", "intermediate_size", "layer_norm_eps", "hidden_act"}
    assert not absent & set(data["vision_config"])
    assert not {"num_attention_heads", "num_key_value_heads"} & set(data["text_config"])
    assert (reference.config.vision_config.num_hidden_layers, reference.config.text_config.num_attention_heads) == (
        12,
        32,
    )


def without_fake(data):
    data["added_tokens"] = [{**entry, "content": entry["content"].replace(FAKE, "<fake>")}
                            for entry in data["added_tokens"]]  # fmt: skip
    return data


BROKEN = {
    "tiles of another size": ("preprocessor_config.json", {"max_image_size": {"longest_edge": 64}}, "tiles of 64x64"),
    "a size with two sides": ("preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "only a longest_edge"),
    "no size": ("preprocessor_config.json", {"size": {"longest_edge": 0}}, "only a longest_edge"),
    "nothing is resized": ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
    "squares that do not fit": ("config.json", {"scale_factor": 3}, "scale_factor 3 does not divide"),
    "other squares": ("config.json", {"scale_factor": 4}, r"proj\.weight has the shape"),
    "a resampler": ("config.json", {"use_resampler": True}, "use_resampler"),
    "no image token": ("config.json", {"image_token_id": 99999}, "99999"),
    "no token around tiles": ("tokenizer.json", without_fake, "lacks <fake_token_around_image>"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_run_is_refused(tmp_path, case):
    name, change, words = BROKEN[case]
    folder = tmp_path / "model"
    tiny_smolvlm.copy(Variant(), folder)
    tiny.rewrite_json(folder / name, change if callable(change) else lambda data: {**data, **change})
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_padding_token_of_another_model_is_ignored(tmp_path):
    """Idefics3-8B's 128002, or any other at the top level: only the decoder's own counts."""
    folder = tmp_path / "model"
    tiny_smolvlm.copy(Variant(), folder)
    tiny.rewrite_json(folder / "config.json", lambda data: {**data, "pad_token_id": 7})
    convert(folder, tmp_path / "out", decoder_quant="f32")
    assert "tokenizer.ggml.padding_token_id" not in read_header(tmp_path / "out" / "decoder.gguf").metadata


def test_the_head_is_the_checkpoints_own(converted):
    _, out, reference, _ = converted
    names = {tensor.name for tensor in gguf_file.read_tensors(out / "decoder.gguf")}
    assert "output.weight" in names
    assert not torch.equal(reference.lm_head.weight, reference.model.text_model.embed_tokens.weight)


def full(data):
    """As transformers 4 wrote the first files: every default spelled out, and other names of the tower's class."""
    vision = {**data["vision_config"], "model_type": "siglip_vision_model", "projection_class": "none", "top_k": 50}
    text = {**data["text_config"], "max_length": 20, "transformers.js_config": {}, "perceiver_config": {"depth": 6}}
    copies = {key: text[key] for key in ("hidden_size", "vocab_size")}
    return {**data, **copies, "vision_config": vision, "text_config": text, "freeze_lm_head": True}


def nameless(data):
    return {**data, "vision_config": {key: data["vision_config"][key] for key in data["vision_config"]
                                      if key != "model_type"}}  # fmt: skip


@pytest.mark.parametrize("change", [full, nameless])
def test_other_spellings_of_the_same_model_give_the_same_bytes(tmp_path, change):
    """Of config.json, and of the tensors' names without the leading `model.`."""
    folder = tmp_path / "model"
    tiny_smolvlm.copy(Variant(), folder)
    convert(folder, tmp_path / "before", decoder_quant="f32", encoder_quant="fp32")
    tiny.rewrite_json(folder / "config.json", change)
    tiny.rewrite_tensors(folder, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    convert(folder, tmp_path / "after", decoder_quant="f32", encoder_quant="fp32")
    for name in ("decoder.gguf", "encoder.onnx", "encoder.onnx.data"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    manifests = [json.loads((tmp_path / out / "bundle.json").read_text()) for out in ("before", "after")]
    assert manifests[0]["spec"] == manifests[1]["spec"]
