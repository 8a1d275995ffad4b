"""Nothing is computed twice, and no answer shows it."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import encoded

import edgevlm
from edgevlm import messages
from edgevlm.answer import Timings
from edgevlm.decoder import Decoder
from edgevlm.errors import BackendError, ContextError, ImageError, UsageError
from edgevlm.splice import TextSegment
from edgevlm.vision import Embeddings
from panel.scenes import make_scene

QUESTIONS = ("What does the display read?", "Which lamps are on?", "Describe the panel.")
N_PICTURES = 3


@functools.cache
def picture(number: int) -> np.ndarray:
    return np.asarray(make_scene(number).image())


@pytest.fixture(scope="module")
def model() -> Iterator[edgevlm.Model]:
    with edgevlm.load() as model:
        yield model


@pytest.fixture(scope="module")
def fresh() -> Iterator[edgevlm.Model]:
    """A model that is made to forget everything before each question."""
    with edgevlm.load() as model:
        yield model


def afresh(fresh: edgevlm.Model, messages) -> tuple[str, int]:
    fresh._decoder.reset()
    fresh._vision._embeds.clear()
    fresh._vision._sources.clear()
    answer = fresh.reply(messages, max_tokens=40)
    assert answer.usage.cached_tokens == 0
    return answer.text, answer.usage.completion_tokens


def test_the_second_question_about_a_picture_costs_the_question(model: edgevlm.Model) -> None:
    first = model.ask(QUESTIONS[0], [picture(0)])
    second = model.ask(QUESTIONS[1], [picture(0)])
    assert first.timings.encode_s > 0
    assert second.timings.encode_s == second.timings.preprocess_s == 0
    assert second.usage.cached_tokens >= second.usage.image_tokens
    assert second.usage.prompt_tokens > second.usage.cached_tokens
    other = model.ask(QUESTIONS[0], [picture(1)])
    assert other.usage.cached_tokens < other.usage.image_tokens  # the twin: another picture is not the same
    assert other.timings.encode_s > 0


def test_a_file_that_was_seen_is_not_decoded_again(model: edgevlm.Model, tmp_path: Path) -> None:
    path = tmp_path / "panel.png"
    path.write_bytes(encoded(picture(2), "PNG"))
    timings = Timings()
    one = model._vision.look(path, timings)
    other = model._vision.look(path.read_bytes(), timings)
    assert one.image_HWC is not None
    assert other.image_HWC is None
    assert one.key == other.key == model._vision.look(picture(2), timings).key  # by pixels, whatever they came in
    path.write_bytes(encoded(picture(1), "PNG"))
    assert model._vision.look(path, timings).key != one.key


@pytest.mark.parametrize("damage", ["one pixel", "shape", "order"])
def test_pictures_that_differ_have_other_keys(model: edgevlm.Model, damage: str) -> None:
    image_HWC = picture(0)
    changed = {
        "one pixel": image_HWC.copy(),
        "shape": image_HWC.reshape(image_HWC.shape[1], image_HWC.shape[0], 3),
        "order": image_HWC[:, :, ::-1],
    }[damage]
    if damage == "one pixel":
        changed[-1, -1, -1] ^= 1
    keys = {model._vision.look(array, Timings()).key for array in (image_HWC, changed, image_HWC.copy())}
    assert len(keys) == 2 or (damage == "shape" and image_HWC.shape[0] == image_HWC.shape[1])


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "chat", "chat", "other chat", "choose", "forget"]),
        st.sampled_from(QUESTIONS),
        st.lists(st.integers(0, N_PICTURES - 1), max_size=2),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_any_order_of_turns_and_pictures_gives_the_answers_of_a_fresh_run(model, fresh, steps) -> None:
    chats = {"chat": model.chat(), "other chat": model.chat(system="Be brief.")}
    for kind, question, numbers in steps:
        images = [picture(number) for number in numbers]
        if kind in chats:
            before = list(chats[kind].messages)
            answer = chats[kind].ask(question, images, max_tokens=40)
            asked = [*before, chats[kind].messages[-2]]
        elif kind == "ask":
            answer = model.ask(question, images, max_tokens=40)
            asked = messages.question(question, images)
        elif kind == "choose":
            model.choose(question, ["red", "blue"], images)
            continue
        else:
            chats[kind := "chat"].reset()
            continue
        assert (answer.text, answer.usage.completion_tokens) == afresh(fresh, asked)


def test_the_same_test_sees_a_context_that_is_taken_for_another(model, monkeypatch) -> None:
    """The twin: a picture with a wrong key is answered from what the context holds."""
    first = model.ask(QUESTIONS[0], [picture(0)])
    second = model.ask(QUESTIONS[0], [picture(1)])
    assert first.text != second.text
    known = model._vision._known
    monkeypatch.setattr(model._vision, "_known", lambda image_HWC: ("always this", *known(image_HWC)[1:]))
    assert model.ask(QUESTIONS[0], [picture(0)]).text == model.ask(QUESTIONS[0], [picture(1)]).text


def test_a_long_conversation_in_words_is_that_of_a_fresh_run(smollm2: Path) -> None:
    """Of a real model that says more than a few words: the differences of kernels would show here first."""
    with edgevlm.load(smollm2, context=1024) as model, edgevlm.load(smollm2, context=1024) as fresh:
        chat = model.chat(system="You are a teacher.")
        n_cached = []
        for question in (
            "What is water made of?",
            "And why is the sky blue?",
            "Name three colours.",
            "Why those?",
            "Go on.",
        ):
            before = list(chat.messages)
            answer = chat.ask(question, max_tokens=90)
            fresh._decoder.reset()
            again = fresh.reply([*before, {"role": "user", "content": question}], max_tokens=90)
            assert answer.text == again.text
            n_cached.append(answer.usage.cached_tokens)
    assert n_cached[0] == 0
    assert all(count > 0 for count in n_cached[1:])
    assert n_cached[-1] > 256  # beyond it, single rows have other bits, and the test would see them


def test_a_row_has_the_same_bits_in_any_batch(smollm2: Path) -> None:
    tokens = tuple(range(1000, 1150))
    decoder = Decoder(smollm2, context=512)

    def logits(*cuts: int) -> np.ndarray:
        decoder.reset()
        for start, end in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
            decoder.prefill([TextSegment(tokens[start:end])])
        return decoder.logits().copy()

    whole = logits()
    for cuts in [(1,), (70,), (90, 91, 148), (147,), (10, 20, 100)]:
        assert np.array_equal(logits(*cuts), whole), cuts
    # The twin: in llama.cpp's own batches the same rows get other bits.
    decoder._n_tokens = 512
    assert not np.array_equal(logits(), whole)
    decoder.close()


def test_state_is_given_back_to_the_last_bit(smollm2: Path) -> None:
    tokens, decoder = tuple(range(1000, 1100)), Decoder(smollm2, context=512)
    decoder.prefill([TextSegment(tokens[:80])])
    state, held = decoder.state(), list(decoder.held)
    decoder.prefill([TextSegment(tokens[80:])])
    wanted = decoder.logits().copy()
    decoder.reset()
    assert decoder.restore(state, held)
    decoder.prefill([TextSegment(tokens[80:])])
    assert np.array_equal(decoder.logits(), wanted)
    # The twins: a state that is cut, is no state, or belongs to other positions is refused, and nothing stays.
    for bad, positions in ((state[:-1], held), (state[: len(state) // 2], held), (b"", held), (state, held[:-1])):
        assert not decoder.restore(bad, positions)
        assert decoder.n_past == 0
    decoder.prefill([TextSegment(tokens)])
    assert np.array_equal(decoder.logits(), wanted)
    decoder.close()


def test_truncating_goes_back_in_time(smollm2: Path) -> None:
    decoder = Decoder(smollm2, context=512)
    decoder.prefill([TextSegment((5, 6, 7, 8))])
    decoder.truncate(9)
    assert decoder.held == [5, 6, 7, 8]
    decoder.truncate(2)
    with pytest.raises(BackendError, match="no logits"):
        decoder.logits()
    decoder.prefill([TextSegment((9,))])
    found = decoder.logits().copy()
    decoder.reset()
    decoder.prefill([TextSegment((5, 6, 9))])
    assert np.abs(decoder.logits() - found).max() == 0
    decoder.truncate(0)
    assert decoder.held == []
    decoder.close()


def test_the_memory_cache_has_a_bound_and_drops_the_longest_unused() -> None:
    cache = Embeddings(limit_bytes=100)
    rows = np.zeros((2, 5), np.float32)  # 40 bytes
    cache.put("a", rows)
    cache.put("b", rows)
    assert cache.get("a") is not None
    cache.put("c", rows)
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]
    assert (len(cache), cache.nbytes) == (2, 80)
    cache.put("huge", np.zeros(26, np.float32)[None])
    assert cache.get("huge") is None


def test_what_is_there_can_be_counted_and_forgotten(tmp_path: Path) -> None:
    with edgevlm.load(state=tmp_path) as model:
        first = model.ask(QUESTIONS[0], [picture(0)])
        counted = model.cached()
        assert counted["positions"] >= first.usage.prompt_tokens
        assert (counted["pictures"], counted["files"]) == (1, 2)
        assert 0 < counted["picture_bytes"] < counted["file_bytes"]
        model.forget()
        assert set(model.cached().values()) == {0}
        again = model.ask(QUESTIONS[0], [picture(0)])
        assert (again.text, again.usage.cached_tokens) == (first.text, 0)
        assert again.timings.encode_s > 0


# ---- conversations


def test_a_conversation_decodes_only_what_is_new(model: edgevlm.Model) -> None:
    chat = model.chat()
    first = chat.ask(QUESTIONS[0], [picture(0)])
    second = chat.ask(QUESTIONS[1])
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 1
    assert second.timings.encode_s == 0
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    chat.reset()
    assert chat.messages == []


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model: edgevlm.Model) -> None:
    chat = model.chat()
    chat.ask(QUESTIONS[0], [picture(0)])
    before = list(chat.messages)
    for failing, error in (
        (lambda: chat.ask("x", [b"no picture"]), ImageError),
        (lambda: chat.ask("x " * 5000), ContextError),
        (lambda: chat.ask("x", temperature=-1), UsageError),
        (lambda: chat.ask(7), UsageError),
    ):
        with pytest.raises(error):
            failing()
        assert chat.messages == before
    assert chat.ask(QUESTIONS[1]).text == afresh(model, [*before, {"role": "user", "content": QUESTIONS[1]}])[0]


def test_a_turn_that_is_left_stays_with_what_was_said(smollm2: Path) -> None:
    with edgevlm.load(smollm2, context=256) as model:
        chat = model.chat()
        stream = chat.stream("Tell me a story.")
        said = next(stream) + next(stream)
        stream.close()
        assert stream.answer is None
        assert chat.messages[-1] == {"role": "assistant", "content": said}
        assert chat.ask("Go on.", max_tokens=5).usage.cached_tokens > 5


def test_the_oldest_turns_go_only_if_that_was_allowed(model: edgevlm.Model, smollm2: Path) -> None:
    with edgevlm.load(smollm2, context=256) as small:
        strict, lenient = small.chat(system="Be brief."), small.chat(system="Be brief.", drop_oldest=True)
        for _ in range(6):
            strict.ask("Name a colour, please.", max_tokens=12)
        with pytest.raises(ContextError, match="256"):
            strict.ask("word " * 120)
        dropped = [lenient.ask("Name a colour, please.", max_tokens=12).dropped_turns for _ in range(12)]
        assert dropped[0] == 0
        assert dropped[-1] > 0
        assert sorted(dropped) == dropped
        assert len(lenient.messages) == 25  # what was dropped is not forgotten, only not shown
        with pytest.raises(ContextError):
            lenient.ask("word " * 400)


# ---- between processes

CHILD = """
import sys, edgevlm
from edgevlm.encoder import Encoder
if sys.argv[3] == "blind":
    def refuse(*args, **options):
        raise SystemExit("the encoder was loaded")
    Encoder.__init__ = refuse
with edgevlm.load(state=sys.argv[1]) as model:
    for question in ("Which lamps are on?", "What does the display read?"):
        answer = model.ask(question, [sys.argv[2]])
        print(answer.text, answer.usage.cached_tokens, *answer.warnings, sep=" | ")
"""


def in_a_new_process(state: Path, image: Path, mode: str) -> list[list[str]]:
    command = [sys.executable, "-c", CHILD, str(state), str(image), mode]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [line.split(" | ") for line in result.stdout.splitlines()]


def test_a_new_process_neither_loads_nor_runs_the_encoder(tmp_path: Path) -> None:
    image = tmp_path / "panel.png"
    image.write_bytes(encoded(picture(0), "PNG"))
    first = in_a_new_process(tmp_path / "state", image, "seeing")
    second = in_a_new_process(tmp_path / "state", image, "blind")
    assert [line[0] for line in first] == [line[0] for line in second]
    assert int(first[0][1]) == 0
    assert int(second[0][1]) >= 64  # the decoder's state behind the picture came back as well
    for path in (tmp_path / "state" / "kept").glob("*.state"):
        path.unlink()
    assert [line[0] for line in in_a_new_process(tmp_path / "state", image, "blind")] == [line[0] for line in first]
    # The twin: without the embeddings the encoder is needed.
    for path in (tmp_path / "state" / "kept").glob("[!.]*"):
        path.unlink()
    with pytest.raises(subprocess.CalledProcessError):
        in_a_new_process(tmp_path / "state", image, "blind")


@pytest.mark.parametrize("damage", ["cut", "flip", "swap", "zero"])
def test_damaged_files_are_as_if_they_were_not_there(tmp_path: Path, damage: str) -> None:
    def answers() -> list[str]:
        with edgevlm.load(state=tmp_path) as model:
            return [model.ask(QUESTIONS[0], [picture(number)]).text for number in range(2)]

    wanted = answers()
    kept = sorted((tmp_path / "kept").glob("[!.]*"))
    assert len(kept) == 4
    contents = [path.read_bytes() for path in kept]
    if damage == "swap":
        contents = [contents[1], contents[0], contents[3], contents[2]]
    for path, data in zip(kept, contents, strict=True):
        changed = bytearray(data)
        if damage == "flip":
            changed[len(changed) // 2] ^= 16
        elif damage == "zero":
            changed[4096:8192] = bytes(4096)
        path.write_bytes(changed[:-1] if damage == "cut" else changed)
    assert answers() == wanted


def test_what_cannot_be_kept_is_a_warning_and_the_answer_comes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with edgevlm.load(state=tmp_path / "file") as model, edgevlm.load() as other:
        answer = model.ask(QUESTIONS[0], [picture(0)])
        assert answer.text == other.ask(QUESTIONS[0], [picture(0)]).text
    assert "kept" in answer.warnings[0]
    assert answer.to_json()["warnings"]


FULL = """
import resource, signal, sys, edgevlm
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with edgevlm.load(state=sys.argv[1]) as model:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    answer = model.ask("Which lamps are on?", [sys.argv[2]])
    print(answer.text, "|", len(answer.warnings))
"""


@pytest.mark.parametrize("limit", [0, 1000, 70_000])
def test_a_full_disk_is_a_warning_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    image = tmp_path / "panel.png"
    image.write_bytes(encoded(picture(0), "PNG"))
    command = [sys.executable, "-c", FULL, str(tmp_path / "state"), str(image), str(limit)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    with edgevlm.load() as model:
        assert out.split(" | ")[0] == model.ask("Which lamps are on?", [picture(0)]).text
    assert int(out.split(" | ")[1]) >= 1
    left = [path.name for path in (tmp_path / "state" / "kept").iterdir() if path.name != ".lock"]
    assert len(left) == (1 if limit == 70_000 else 0)  # the embeddings fit, the state does not
