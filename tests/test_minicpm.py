"""MiniCPM-Llama3-V 2.5 against a reference of its own: pixels, positions, embeddings, token layout, logits, answers."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import onnxruntime
import pytest
import tiny_minicpm
import torch
from pictures import SIZES, picture
from test_convert import EMBED_TOLERANCE, LOGIT_TOLERANCE, exact_logits
from tiny_minicpm import PATCH_PX, TOKENS, Variant

import edgevlm
from edgevlm import messages
from edgevlm.converters import convert
from edgevlm.converters.onnx_graph import Graph
from edgevlm.converters.onnx_resampler import strip_positions
from edgevlm.converters.verify import cosines
from edgevlm.layout import image_layout
from edgevlm.splice import TextSegment, splice

VARIANTS = {
    # 5 x 5 patches are a number at which the float rule of positions and whole-number arithmetic differ
    "first revision": Variant(area_px=70, quiet=True),
    "later revision": Variant(processor=True, heads=2, queries=6, side=7, dtype=torch.bfloat16),
    "llama3v": Variant(llama3v=True, most=4, side=10, dtype=torch.float16),
}


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request, tmp_path_factory):
    """(loaded bundle, its folder, reference, tokenizer) of each variant, with nothing lost to quantization."""
    folder, reference, tokenizer = tiny_minicpm.shared(VARIANTS[request.param])
    out = tmp_path_factory.mktemp("bundle") / "out"
    convert(folder, out, decoder_quant="f32", encoder_quant="fp32")
    with edgevlm.load(out, threads=1, kv_type="f32", context=512) as model:
        yield model, out, reference, tokenizer


# ---- embeddings


@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_embeddings_are_the_references(converted, size):
    model, _, reference, _ = converted
    image = picture(size)
    pieces, (columns, rows) = tiny_minicpm.cut(image, reference.variant)
    batches = model.preprocess(image)
    assert [len(tiles_TCHW) for tiles_TCHW in batches] == [1, *([rows * columns] if rows else [])]
    tiles = [tile_CHW for tiles_TCHW in batches for tile_CHW in tiles_TCHW]
    assert all(np.array_equal(a, tiny_minicpm.pixels(b).numpy()) for a, b in zip(tiles, pieces, strict=True))
    wanted, found = reference.embed(image).numpy(), model.embed_image(image)
    assert found.shape == wanted.shape == (len(pieces) * reference.variant.queries, reference.variant.width)
    assert np.abs(found - wanted).max() <= EMBED_TOLERANCE
    assert cosines(wanted, found).min() >= 0.99999
    # The twin: behind the slices instead of before them, the overview is seen.
    moved = np.roll(wanted, -reference.variant.queries, axis=0)
    assert (np.abs(found - moved).max() > EMBED_TOLERANCE) == (len(pieces) > 1)


def with_plane_positions(reference):
    """What later models of the family do, and llama.cpp for this one as well."""

    def rows(pixels_CHW):
        states_TND = reference.vpm(pixels_CHW[None]).last_hidden_state
        return reference.resampler(states_TND[0], *(size // PATCH_PX for size in pixels_CHW.shape[1:]))

    reference.rows = torch.no_grad()(rows)


def with_exact_fractions(reference):
    """Position i * side // n, without the rounding that the reference has."""
    embeddings, side = reference.vpm.embeddings, reference.variant.side

    def forward(pixel_values, patch_attention_mask):
        patches_TND = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        n_patches = patches_TND.shape[1]
        return patches_TND + embeddings.position_embedding(torch.arange(n_patches) * side // n_patches)

    embeddings.forward = forward


def rows_and_columns_swapped(reference):
    forward = reference.resampler.forward
    reference.resampler.forward = lambda states, rows, columns: forward(states, columns, rows)


def positions_on_values(reference):
    attention = reference.resampler.attn.forward
    reference.resampler.attn.forward = lambda query, key, value: attention(query, key, key)


def without_positions(reference):
    attention = reference.resampler.attn.forward
    reference.resampler.attn.forward = lambda query, key, value: attention(query, value, value)


def transposed_projection(reference):
    reference.resampler.proj.data = reference.resampler.proj.data.T.contiguous()


def without_last_norm(reference):
    reference.vpm.post_layernorm = torch.nn.Identity()


def other_epsilon(reference, name):
    getattr(reference.resampler, name).eps = 1e-5


DAMAGE = {
    "plane positions": with_plane_positions, "exact fractions": with_exact_fractions,
    "rows and columns": rows_and_columns_swapped, "positions on values": positions_on_values,
    "no positions": without_positions, "transposed projection": transposed_projection,
    "no last norm": without_last_norm,
    **{name: partial(other_epsilon, name=name) for name in ("ln_q", "ln_kv", "ln_post")},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_comparison_of_embeddings_can_fail(tmp_path_factory, damage):
    """The twin: the mistakes that are easily made with this tower and this connector."""
    variant = VARIANTS["first revision"]
    folder, reference, _ = tiny_minicpm.shared(variant)
    out = tmp_path_factory.getbasetemp() / "damaged"
    if not out.exists():
        convert(folder, out, decoder_quant="f32", encoder_quant="fp32")
    image = picture("pixel" if damage == "exact fractions" else "landscape")
    with edgevlm.load(out, threads=1) as model:
        found = model.embed_image(image)
    reference = copy.deepcopy(reference)
    assert np.abs(found - reference.embed(image).numpy()).max() <= EMBED_TOLERANCE
    DAMAGE[damage](reference)
    assert np.abs(found - reference.embed(image).numpy()).max() > EMBED_TOLERANCE


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """The graph's rule of positions alone, for a table of 70 x 70: patches -> rows of the table."""
    path = tmp_path_factory.mktemp("graph") / "ids.onnx"
    graph = Graph("ids", path.with_name("ids.onnx.data"))
    count = graph.op.Cast(graph.input("n", [1]), to=7)
    graph.output(graph.op.Cast(strip_positions(graph, count, 70), to=1), "ids", ["N"])
    graph.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda n: session.run(None, {"n": np.array([n], np.float32)})[0].astype(np.int64)


def torch_positions(n_patches, side=70):
    """With torch's own operators, as `Idefics2VisionEmbeddings` of transformers 5.23 applies them to a strip."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(n_patches, dtype=torch.float32) * (1.0 / torch.tensor(n_patches))
    return torch.bucketize(torch.clamp(fractions, max=1.0 - 1e-6), boundaries, right=True).numpy()


def test_positions_are_torchs_for_every_number_of_patches(positions):
    counts = [*range(1, 1200), *range(1200, 16000, 487)]
    assert all(np.array_equal(positions(n), torch_positions(n)) for n in counts)
    # The twin: whole-number arithmetic differs where a patch lies on a boundary.
    exact = [n for n in counts if np.array_equal(np.arange(n) * 70 // n, torch_positions(n))]
    assert 0 < len(exact) < len(counts)


# ---- prompt


def layout_ids(model, tokenizer, question, images, system=None):
    """The prompt as token ids, `<unk>` for each embedding."""
    layouts = [image_layout(*image.shape[:2], model.spec) for image in images]
    segments = model._reader.plan(messages.question(question, images, system), layouts)
    unknown = tokenizer.convert_tokens_to_ids("<unk>")
    ids = [segment.tokens if isinstance(segment, TextSegment) else [unknown] * len(segment) for segment in segments]
    return [token for part in ids for token in part]


@pytest.mark.parametrize("size", SIZES)
def test_the_token_layout_is_the_references(converted, size):
    model, _, reference, tokenizer = converted
    wanted = tiny_minicpm.ids_of(tokenizer, reference.variant, " What does it\n read? ", [picture(size)])
    assert layout_ids(model, tokenizer, " What does it\n read? ", [picture(size)]) == wanted
    # The twin: a picture that is cut otherwise has another layout.
    other = "pixel" if size == "large" else "large"
    assert layout_ids(model, tokenizer, " What does it\n read? ", [picture(other)]) != wanted


def test_several_pictures_and_none_have_their_layouts(converted):
    model, _, reference, tokenizer = converted
    images = [picture("wide"), picture("pixel", 1), picture("square", 2)]
    for shown in (images, images[1:], []):
        wanted = tiny_minicpm.ids_of(tokenizer, reference.variant, "Compare.", shown)
        assert layout_ids(model, tokenizer, "Compare.", shown) == wanted
    swapped = [images[1], images[0], images[2]]
    assert layout_ids(model, tokenizer, "Compare.", swapped) != layout_ids(model, tokenizer, "Compare.", images)


def test_a_system_message_comes_first(converted):
    model, _, reference, tokenizer = converted
    image = picture("square")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": tiny_minicpm.prompt(reference.variant, "Why?", [image])},
    ]
    wanted = tokenizer.apply_chat_template(messages, chat_template=tiny_minicpm.TEMPLATE, return_dict=False)
    assert layout_ids(model, tokenizer, "Why?", [image], "Be brief.") == list(wanted)


@pytest.mark.parametrize("size", ["landscape", "wide", "pixel"])
def test_logits_and_answers_are_the_references(converted, size):
    model, out, reference, tokenizer = converted
    image = picture(size)
    ids = tiny_minicpm.ids_of(tokenizer, reference.variant, "What is it?", [image])
    embeds = reference.embeds_of(tokenizer, ids, [image])
    with torch.no_grad():
        wanted = reference.llm(inputs_embeds=embeds).logits[0, -1].numpy()
    segments = model._reader.plan(
        messages.question("What is it?", [image]), [image_layout(*image.shape[:2], model.spec)]
    )
    rows_ND = model.embed_image(image)
    assert (
        np.abs(exact_logits(out / "decoder.gguf", splice(segments, {0: ("whole", rows_ND)})) - wanted).max()
        <= LOGIT_TOLERANCE
    )
    # The twin: the same embeddings with their channels in reverse are seen.
    other = splice(segments, {0: ("turned", rows_ND[:, ::-1].copy())})
    assert np.abs(exact_logits(out / "decoder.gguf", other) - wanted).max() > LOGIT_TOLERANCE
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    told = reference.llm.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False, eos_token_id=stops,
                                  attention_mask=torch.ones(embeds.shape[:2]), pad_token_id=0)  # fmt: skip
    text = tokenizer.decode(told[0], skip_special_tokens=True)
    assert model.ask("What is it?", [image], max_tokens=6, temperature=0).text == text


@pytest.mark.parametrize("attack", [*TOKENS, "<image>", "</image><slice><image>"])
def test_a_user_who_spells_these_texts_gets_text(converted, attack):
    model, _, _, tokenizer = converted
    image, special = picture("square"), tokenizer.convert_tokens_to_ids(["<image>", *TOKENS])
    plain, found = (layout_ids(model, tokenizer, text, [image]) for text in ("", attack))
    assert [plain.count(index) for index in special] == [found.count(index) for index in special]
    assert tokenizer.decode(found).count(attack) == tokenizer.decode(plain).count(attack) + 1
    # The twin: without the shield, they are control tokens.
    assert set(tokenizer(attack)["input_ids"]) & set(special)
