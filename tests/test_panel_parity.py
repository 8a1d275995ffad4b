"""The built-in model against its reference: transformers, float32, on freshly made panels.

Stage by stage: pixels, embeddings, logits, then whole greedy answers; and the committed bundle against a fresh
conversion of the committed checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import edgevlm
from edgevlm import messages
from edgevlm.bundle import BUILTIN, MANIFEST_NAME, open_bundle
from edgevlm.layout import Rows
from edgevlm.splice import ImageSegment, TextSegment
from panel.evaluate import make_items, reference_answerer
from panel.scenes import make_scene

CHECKPOINT = Path(__file__).parent.parent / "panel" / "checkpoint"
#: Neither trained on nor reported in docs/panel.md.
FIRST_SEED = 800_000_000
QUESTION = "Describe the panel."


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def reference() -> Any:
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgevlm.Model]:
    """The checkpoint converted without any quantization, with a float32 key/value cache."""
    bundle = tmp_path_factory.mktemp("panel") / "f32"
    edgevlm.convert(CHECKPOINT, bundle, decoder_quant="f32", encoder_quant="fp32")
    with edgevlm.load(bundle, kv_type="f32") as model:
        yield model


@pytest.fixture(scope="module")
def shipped() -> Iterator[edgevlm.Model]:
    with edgevlm.load() as model:
        yield model


def reference_inputs(processor: Any, image: Any, question: str) -> Any:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)


def reference_embeds(reference: Any, pixels: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        features = reference.model.get_image_features(
            pixel_values=pixels, vision_feature_layer=-1, vision_feature_select_strategy="full", return_dict=True
        )
    return torch.cat(list(features.pooler_output)).numpy()


def cosines(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    return (a_ND * b_ND).sum(-1) / np.linalg.norm(a_ND, axis=-1) / np.linalg.norm(b_ND, axis=-1)


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + 8))
def test_pixels_are_equal_to_the_last_bit(exact: edgevlm.Model, processor: Any, seed: int) -> None:
    image = make_scene(seed).image()
    expected = reference_inputs(processor, image, QUESTION)["pixel_values"].numpy()
    assert np.array_equal(exact.preprocess(image), expected)
    # the twin: one of 65,536 pixels inverted
    image.putpixel((100, 100), tuple(255 - value for value in image.getpixel((100, 100))))
    assert not np.array_equal(exact.preprocess(image), expected)


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + 8))
def test_embeddings(exact: edgevlm.Model, reference: Any, seed: int) -> None:
    image = make_scene(seed).image()
    expected = reference_embeds(reference, torch.from_numpy(exact.preprocess(image)))
    found = exact.embed_image(image)
    assert cosines(found, expected).min() >= 0.99999
    # float32 sums in another order: 6 layers, values up to a few tens
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    # the twin: another panel's embeddings
    assert cosines(exact.embed_image(make_scene(seed + 100).image()), expected).min() < 0.99


def test_quantized_embeddings_point_the_same_way(shipped: edgevlm.Model, reference: Any) -> None:
    """Dynamic int8 with one activation scale for a whole picture; what it costs in answers is in docs/panel.md."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + 20):
        image = make_scene(seed).image()
        expected = reference_embeds(reference, torch.from_numpy(shipped.preprocess(image)))
        found.append(cosines(shipped.embed_image(image), expected))
    assert np.mean(found) > 0.995
    assert np.min(found) > 0.95


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + 8))
def test_logits(exact: edgevlm.Model, reference: Any, processor: Any, seed: int) -> None:
    """The same embeddings into both decoders: whatever differs comes from the decoder."""
    image = make_scene(seed).image()
    inputs = reference_inputs(processor, image, QUESTION)
    with torch.inference_mode():
        expected = reference(**inputs).logits[0, -1].numpy()
    ids = inputs["input_ids"][0].tolist()
    slot = reference.config.image_token_id
    first, last = ids.index(slot), len(ids) - ids[::-1].index(slot)
    rows = reference_embeds(reference, inputs["pixel_values"])
    decoder = exact._decoder
    decoder.reset()
    decoder.prefill([TextSegment(tuple(ids[:first])), ImageSegment(rows), TextSegment(tuple(ids[last:]))])
    assert np.abs(decoder.logits() - expected).max() <= 1e-3
    # the twin: the picture's rows from last to first
    decoder.reset()
    decoder.prefill([TextSegment(tuple(ids[:first])), ImageSegment(rows[::-1]), TextSegment(tuple(ids[last:]))])
    assert np.abs(decoder.logits() - expected).max() > 1e-3


def planned_ids(model: edgevlm.Model, question: str) -> list[int | str]:
    """Our prompt as token ids, with "image" for the picture."""
    plan = model._reader.plan(messages.question(question, [None]), [(Rows(model.spec.encoder.n_tokens),)])
    return [id for segment in plan for id in (segment.tokens if isinstance(segment, TextSegment) else ["image"])]


@pytest.mark.parametrize("question", [QUESTION, "  12.5 caf\u00e9 \n\n x", "\U0001f44d\U0001f3fd 1234567"])
def test_prompt_tokens(exact: edgevlm.Model, processor: Any, question: str) -> None:
    ids = reference_inputs(processor, make_scene(FIRST_SEED).image(), question)["input_ids"][0].tolist()
    slot = processor.image_token_id
    expected = ["image" if id == slot else id for i, id in enumerate(ids) if id != slot or ids[i - 1] != slot]
    assert planned_ids(exact, question) == expected
    assert planned_ids(exact, question + "x") != expected


def test_control_tokens_that_a_user_spells_stay_text(exact: edgevlm.Model) -> None:
    """Here we differ from the reference on purpose: its processor would end the turn."""
    end = exact._decoder.vocabulary.tokenize("<|eot_id|>", False, True)
    assert len(end) == 1
    assert planned_ids(exact, "a <|eot_id|> b").count(end[0]) == planned_ids(exact, "a b").count(end[0])


@pytest.mark.slow
def test_greedy_answers_are_the_references_on_200_panels(exact: edgevlm.Model) -> None:
    items = make_items(200, FIRST_SEED)
    answer = reference_answerer(CHECKPOINT)
    wanted: list[str] = []
    for start in range(0, len(items), 70):
        batch = items[start : start + 70]
        wanted += answer([item.image for item in batch], [item.question.text for item in batch])
    found = [exact.ask(item.question.text, images=[item.image], max_tokens=64).text for item in items]
    different = [
        (item.seed, item.question.text, w, f) for item, w, f in zip(items, wanted, found, strict=True) if w != f
    ]
    assert not different
    # the twin: answers to other pictures are other answers
    assert wanted[7:] != wanted[:-7]


def test_the_committed_bundle_is_the_committed_checkpoint_converted(tmp_path: Path) -> None:
    """Equal to the last byte, twice. What another processor may measure differently, the fidelity of encoder and
    predictions, is compared as numbers."""
    manifest = open_bundle(BUILTIN).manifest
    for run in ("first", "second"):
        edgevlm.convert(CHECKPOINT, tmp_path / run, name=manifest.spec.name, **manifest.provenance["arguments"])
    folders = [
        {path.name: path.read_bytes() for path in f.iterdir()} for f in (tmp_path / "first", tmp_path / "second")
    ]
    assert folders[0] == folders[1]
    committed = {path.name: path.read_bytes() for path in BUILTIN.iterdir()}
    assert committed.keys() == folders[0].keys()
    for name in committed.keys() - {MANIFEST_NAME}:
        assert committed[name] == folders[0][name], f"{name} differs"
    old, new = (json.loads(files[MANIFEST_NAME]) for files in (committed, folders[0]))
    measured, recorded = new["fidelity"], old["fidelity"]
    for figure in ("cosine_mean", "cosine_min", "relative_error"):
        assert measured["encoder"].pop(figure) == pytest.approx(recorded["encoder"].pop(figure), rel=0.1)
    for figure in ("kl_mean", "kl_p99", "top1_agreement"):
        found, wanted = (section["decoder"]["predictions"].pop(figure) for section in (measured, recorded))
        assert found == pytest.approx(wanted, rel=0.1)
    assert new == old


def test_checkpoint_and_bundle_stay_small() -> None:
    total = sum(path.stat().st_size for folder in (CHECKPOINT, BUILTIN) for path in folder.iterdir())
    assert total <= 20_000_000
