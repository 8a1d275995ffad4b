"""The scenes, questions and tokenizer of the built-in model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from panel.camera import CAMERAS, DIFFICULTIES, VIEW
from panel.dataset import IMAGE_SIDE, TRAIN_FIRST_SEED, picture_CHW, shard_seeds
from panel.drawing import DISPLAY_COLOURS, SEGMENTS, gauge_direction, sample_style
from panel.evaluate import FIRST_SEED, GAUGE_TOLERANCE, METRICS, make_items, score
from panel.questions import KINDS, WORDINGS, Question, all_questions, answer, join_colours, sample_question
from panel.scenes import contact_sheet, find_landmarks, make_scene
from panel.truth import GAUGE_MAX, LAMP_COLOURS, Lamp, PanelTruth, sample_truth

CHECKPOINT = Path(__file__).parent.parent / "panel" / "checkpoint"
TRUTH = PanelTruth("12.5", 73, (Lamp("blue", True), Lamp("green", False), Lamp("red", True)))


def truths(count: int) -> list[PanelTruth]:
    rng = random.Random(0)
    return [sample_truth(rng) for _ in range(count)]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_same_seed_same_bytes(difficulty: str) -> None:
    assert make_scene(7, difficulty) == make_scene(7, difficulty)


def test_other_seed_other_scene() -> None:
    assert make_scene(7, "clean").jpeg != make_scene(8, "clean").jpeg


def test_truth_does_not_depend_on_difficulty() -> None:
    scenes = [make_scene(11, difficulty) for difficulty in DIFFICULTIES]
    assert len({scene.truth for scene in scenes}) == 1
    assert len({scene.jpeg for scene in scenes}) == len(DIFFICULTIES)


def test_unknown_difficulty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'foggy' is not one of clean, "):
        make_scene(0, "foggy")


def test_picture_is_rgb_of_the_stated_size() -> None:
    image = make_scene(3).image()
    assert (image.mode, image.size) == ("RGB", (VIEW, VIEW))
    pixels_CHW = picture_CHW(image)
    assert (pixels_CHW.shape, pixels_CHW.dtype) == ((3, IMAGE_SIDE, IMAGE_SIDE), np.uint8)


def _roughness(difficulty: str, seeds: range) -> float:
    """Mean absolute step between neighbouring pixels."""
    pictures_NHWC = np.stack([np.asarray(make_scene(s, difficulty).image(), np.float32) for s in seeds])
    return float(np.abs(np.diff(pictures_NHWC, axis=2)).mean())


def test_difficulties_do_what_they_say() -> None:
    seeds = range(20, 28)
    rough = {difficulty: _roughness(difficulty, seeds) for difficulty in CAMERAS}
    assert rough["blurred"] < 0.75 * rough["clean"]
    assert rough["noisy"] > 1.5 * rough["clean"]
    assert CAMERAS["tilted"].rotation[0] > CAMERAS["clean"].rotation[1]


@pytest.mark.parametrize("seed", range(30, 36))
def test_landmarks_are_where_the_parts_are(seed: int) -> None:
    scene, landmarks = make_scene(seed, "tilted"), find_landmarks(seed, "tilted")
    digits = [part for part in landmarks if part.kind == "digit"]
    text = "".join(f"{part.value}{'.' if part.point else ''}" for part in digits)
    assert text == scene.truth.display
    assert [part.x for part in digits] == sorted(part.x for part in digits)
    assert [part.value for part in landmarks if part.kind == "gauge"] == [scene.truth.gauge]

    image_HWC = np.asarray(scene.image(), int)
    lamps = [part for part in landmarks if part.kind == "lamp"]
    assert len(lamps) == len(scene.truth.lamps)
    for lamp, part in zip(scene.truth.lamps, lamps, strict=True):
        pixel_C = image_HWC[round((part.y + 1) / 2 * VIEW), round((part.x + 1) / 2 * VIEW)]
        # The core of a lit lamp is nearly white, an unlit lens dark.
        assert (pixel_C.max() > 170) == lamp.lit


def test_contact_sheet_has_a_row_per_difficulty() -> None:
    assert contact_sheet(0, columns=2).size == (2 * VIEW, len(DIFFICULTIES) * VIEW)


def test_truths_cover_everything() -> None:
    sample = truths(3000)
    assert {char for truth in sample for char in truth.display} == set("0123456789.")
    for length in range(1, 5):
        whole = [truth.display for truth in sample if len(truth.display.replace(".", "")) == length]
        assert len(whole) > 500
        # Every digit in every position, except a leading zero.
        for position in range(length):
            assert len({text.replace(".", "")[position] for text in whole}) == 10
    assert {truth.gauge for truth in sample} == set(range(GAUGE_MAX + 1))
    assert {len(truth.lamps) for truth in sample} == {1, 2, 3, 4}
    assert {lamp for truth in sample for lamp in truth.lamps} == {
        Lamp(c, on) for c in LAMP_COLOURS for on in (True, False)
    }
    assert all(len({lamp.colour for lamp in truth.lamps}) == len(truth.lamps) for truth in sample)


def test_displays_are_what_an_instrument_would_show() -> None:
    for truth in truths(2000):
        whole, _, fraction = truth.display.partition(".")
        assert whole == str(int(whole))  # no needless leading zero
        assert not truth.display.endswith(".")
        assert 1 <= len(whole + fraction) <= 4


def test_looks_cover_everything() -> None:
    rng = random.Random(0)
    styles = [sample_style(rng, truth) for truth in truths(1000)]
    assert {style.display for style in styles} == set(DISPLAY_COLOURS)
    assert {style.needle for style in styles} == {"line", "taper", "tail"}
    assert {style.dark_face for style in styles} == {True, False}
    assert {style.ghost > 0 for style in styles} == {True, False}


def test_segments_tell_digits_apart() -> None:
    assert len({frozenset(lit) for lit in SEGMENTS.values()}) == len(SEGMENTS) == 11


@pytest.mark.parametrize(
    ("value", "x", "y"),
    [(0, -0.707, 0.707), (50, 0.0, -1.0), (100, 0.707, 0.707), (100 / 6, -1.0, 0.0)],
)
def test_gauge_turns_clockwise_from_the_lower_left(value: float, x: float, y: float) -> None:
    assert gauge_direction(value) == pytest.approx((x, y), abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "colour", "expected"),
    [
        ("display", None, "12.5"),
        ("gauge", None, "73"),
        ("lamps_on", None, "red and blue"),
        ("lamp_state", "red", "yes"),
        ("lamp_state", "green", "no"),
        ("lamp_state", "yellow", "there is no yellow lamp"),
        ("lamp_count", None, "3"),
        ("lit_count", None, "2"),
        ("describe", None, "The display reads 12.5, the gauge shows 73, and the red and blue lamps are on."),
    ],
)
def test_answers_derive_from_the_truth(kind: str, colour: str | None, expected: str) -> None:
    assert answer(TRUTH, kind, colour) == expected


def test_lamp_state_needs_a_known_colour() -> None:
    with pytest.raises(ValueError, match="colour 'purple'"):
        answer(TRUTH, "lamp_state", "purple")


@pytest.mark.parametrize(
    ("colours", "expected"),
    [
        ([], "none"),
        (["red"], "red"),
        (["red", "blue"], "red and blue"),
        (["red", "green", "blue"], "red, green and blue"),
    ],
)
def test_join_colours(colours: list[str], expected: str) -> None:
    assert join_colours(colours) == expected


def test_every_wording_has_an_answer_and_belongs_to_one_kind() -> None:
    questions = all_questions(TRUTH)
    assert all(question.answer for question in questions)
    kind_of = {question.text: question.kind for question in questions}
    assert len(kind_of) == len(questions)
    assert set(kind_of.values()) == set(KINDS) == set(WORDINGS)


def test_sampled_questions_use_every_wording() -> None:
    rng = random.Random(0)
    known = {question.text for question in all_questions(TRUTH)}
    for kind in KINDS:
        sampled = {sample_question(TRUTH, kind, rng).text for _ in range(400)}
        formal = {text for text in sampled if text in known}
        assert formal == {question.text for question in all_questions(TRUTH) if question.kind == kind}
        assert all(text == text.lower().rstrip("?.") for text in sampled - formal)


def test_seeds_of_training_and_evaluation_are_apart() -> None:
    assert FIRST_SEED + 10_000_000 < TRAIN_FIRST_SEED == shard_seeds(0)[0]
    assert shard_seeds(0)[-1] + 1 == shard_seeds(1)[0]


def test_evaluation_asks_every_kind_of_every_panel() -> None:
    items = make_items(5, FIRST_SEED)
    assert {item.difficulty for item in items} == set(DIFFICULTIES)
    assert len(items) == 5 * len(KINDS)


@pytest.mark.parametrize(
    ("kind", "right", "given", "exact", "near"),
    [
        ("gauge", "73", "73", True, True),
        ("gauge", "73", str(73 + GAUGE_TOLERANCE), False, True),
        ("gauge", "73", str(74 + GAUGE_TOLERANCE), False, False),
        ("gauge", "73", "none", False, False),
        ("describe", "The display reads 5, the gauge shows 73, and no lamp is on.",
         "The display reads 5, the gauge shows 71, and no lamp is on.", False, True),
        ("describe", "The display reads 5, the gauge shows 73, and no lamp is on.",
         "The display reads 6, the gauge shows 73, and no lamp is on.", False, False),
    ],
)  # fmt: skip
def test_score(kind: str, right: str, given: str, exact: bool, near: bool) -> None:
    scores = score(Question(kind, "?", right), given)
    assert scores == {kind: exact, f"{kind} ±{GAUGE_TOLERANCE}": near}
    assert set(scores) <= set(METRICS)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def test_tokenizer_round_trip(tokenizer) -> None:
    texts = [part for truth in truths(50) for q in all_questions(truth) for part in (q.text, q.answer)]
    for text in [*set(texts), "\n\n", "Größe: 1,5 µm — 漢字 🙂"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_digits_are_tokens_of_their_own(tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    ordinary = [token for token in vocabulary if not token.startswith("<|")]
    assert [token for token in ordinary if len(token) > 1 and any(char.isdigit() for char in token)] == []
    assert len(tokenizer.encode("1234", add_special_tokens=False).ids) == 4
    assert len(vocabulary) == 512


def test_tokenizer_begins_the_text_once(tokenizer) -> None:
    assert tokenizer.encode("hello").tokens[0] == "<|begin_of_text|>"
    assert "<|begin_of_text|>" not in tokenizer.encode("hello", add_special_tokens=False).tokens


def test_packed_questions_are_what_the_chat_template_renders() -> None:
    transformers = pytest.importorskip("transformers")
    from panel.decoder_step import Packer

    chat = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    packer, rng = Packer(chat, "decoder"), random.Random(0)
    image_id = chat.convert_tokens_to_ids("<image>")
    for truth in truths(20):
        batch = packer.pack([truth], rng)
        ids, positions, allowed_TT = batch.ids_BT[0].tolist(), batch.positions_BT[0].tolist(), batch.allowed_B1TT[0, 0]
        n_prefix = len(packer.prefix_ids)
        starts = [i for i in range(n_prefix, len(ids)) if i == n_prefix or positions[i] == n_prefix]
        if len(starts) == 1:
            continue  # turns of one conversation
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            own = allowed_TT[end - 1].nonzero()[:, 0].tolist()
            if not any(ids[i] == image_id for i in own):
                continue  # the question without a picture
            assert own == [*range(n_prefix), *range(start, end)]
            text = chat.decode([ids[i] for i in own if ids[i] != image_id])
            question, answer_text = (part.split("<|eot_id|>")[0] for part in text.split("<|end_header_id|>\n\n")[1:])
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer_text}]
            assert text == chat.apply_chat_template(messages, tokenize=False).replace("<image>", "")
