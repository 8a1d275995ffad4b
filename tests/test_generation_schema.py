"""Answers under a schema, by lookup, and cancelled: whole generations of real models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import Model, load
from edgevlm.constraint import Constraint
from edgevlm.decoder import Decoder
from edgevlm.errors import UsageError
from edgevlm.generate import Generation
from edgevlm.lookup import Lookup
from edgevlm.options import GenerateOptions
from edgevlm.schema import Format
from edgevlm.splice import TextSegment

QUESTION = "Describe the panel."
RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "level": {"type": "integer", "minimum": -5, "maximum": 120},
        "colour": {"enum": ["red", "green", "café", "cafè", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["name", "level", "colour"],
}


@pytest.fixture(scope="module")
def panel() -> Generator[Model]:
    with load(threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Generator[Model]:
    with load(smollm2, context=512, threads=1) as loaded:
        yield loaded


def is_record(data: Any) -> bool:
    return (
        list(data)[:3] == ["name", "level", "colour"]
        and len(data["name"]) <= 8
        and -5 <= data["level"] <= 120
        and data["colour"] in RECORD["properties"]["colour"]["enum"]
        and len(data.get("tags", [])) <= 2
        and all(len(tag) <= 3 for tag in data.get("tags", []))
    )


def test_answers_satisfy_the_schema_however_they_are_drawn(panel: Model) -> None:
    texts = set()
    for seed in range(8):
        answer = panel.ask(QUESTION, schema=RECORD, temperature=seed / 3, seed=seed, max_tokens=400)
        assert answer.finish_reason == "stop"
        assert is_record(answer.data)
        assert json.loads(answer.text) == answer.data == json.loads(json.dumps(answer.to_json()))["data"]
        assert 0 < answer.usage.forced_tokens < answer.usage.completion_tokens
        texts.add(answer.text)
    assert len(texts) > 4
    free = panel.ask(QUESTION)  # the twin: nothing but the schema makes it JSON
    assert free.data is None
    assert free.usage.forced_tokens == 0
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(free.text)


def test_a_real_vocabulary(smol: Model) -> None:
    answer = smol.ask("Tom is 42. Describe him as JSON.", schema=json.dumps(RECORD), max_tokens=60)
    assert is_record(answer.data)
    assert answer.data["level"] == 42
    assert answer.usage.forced_tokens > 8


def test_a_document_without_a_choice_costs_no_decode(panel: Model) -> None:
    answer = panel.ask(QUESTION, schema={"const": {"a": [1, "é"], "b": None}}, logprobs=1)
    assert answer.text == '{"a": [1, "é"], "b": null}'
    assert answer.usage.forced_tokens == answer.usage.completion_tokens
    assert answer.logprobs == ()


def test_numbers_end_where_the_model_ends_them(panel: Model) -> None:
    for seed in range(4):
        answer = panel.ask(QUESTION, schema={"type": "integer"}, temperature=1.0, seed=seed)
        assert answer.finish_reason == "stop"
        assert type(answer.data) is int


def test_a_cut_document_is_marked_as_cut(panel: Model) -> None:
    whole = panel.ask(QUESTION, schema=RECORD)
    for most in (1, 2, 5, whole.usage.completion_tokens - 1):
        cut = panel.ask(QUESTION, schema=RECORD, max_tokens=most)
        assert (cut.finish_reason, cut.usage.completion_tokens, cut.data) == ("length", most, None)
        assert whole.text.startswith(cut.text)
        assert any("cut" in warning for warning in cut.warnings)
    assert panel.ask(QUESTION, schema=RECORD, max_tokens=whole.usage.completion_tokens).text == whole.text
    assert whole.warnings == ()


def test_a_document_that_is_whole_where_it_is_cut_has_data(panel: Model) -> None:
    cut = panel.ask(QUESTION, schema={"type": "integer"}, max_tokens=1)
    assert cut.finish_reason == "length"
    assert (cut.data, cut.warnings) == (int(cut.text), ())


def test_a_full_context_cuts_as_well() -> None:
    with load(context=48, threads=1) as model:
        answer = model.ask(QUESTION, schema={"type": "array", "items": RECORD, "minItems": 9}, max_tokens=None)
        assert answer.finish_reason == "length"
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 49  # the last one is not decoded
        forced = model.ask(QUESTION, schema={"const": "x" * 500}, max_tokens=None)
        assert forced.usage.prompt_tokens + forced.usage.completion_tokens == 49
        assert model.ask(QUESTION, schema={"const": [1]}).data == [1]


def test_stop_texts_contradict_a_schema(panel: Model) -> None:
    with pytest.raises(UsageError, match="stop"):
        panel.ask(QUESTION, schema=RECORD, stop=["}"])


@pytest.mark.parametrize("path", ["builtin", "smollm2"])
def test_the_rule_over_tokens_is_the_automaton_over_their_bytes(panel: Model, smol: Model, path: str) -> None:
    vocabulary = (panel if path == "builtin" else smol)._decoder.vocabulary
    for prefix in (
        b"",
        b'{"name": "',
        b'{"name": "ab\xc3',
        b'{"name": "a", "level": 1',
        b'{"name": "a", "level": 1, "colour": "caf',
    ):
        rule = Constraint(Format(RECORD), vocabulary)
        rule.take(prefix)
        allowed_V, possible_V = rule.allowed(), rule.possible()
        asked_V = np.array([rule.allows(token) for token in range(vocabulary.n_vocab)])
        np.testing.assert_array_equal(allowed_V, asked_V)
        assert allowed_V.any()
        assert not (allowed_V & ~possible_V).any()
        forced = b"".join(map(vocabulary.piece, rule.forced()))
        assert (rule._state.forced()).startswith(forced)
    whole = Constraint(Format({"type": "integer"}), vocabulary)
    whole.take(b"12")
    assert whole.allowed()[vocabulary.end_tokens()].all()


def test_forced_bytes_that_the_tokenizer_would_spell_otherwise(panel: Model) -> None:
    rule = Constraint(Format({"const": "naïve ☃"}), panel._decoder.vocabulary)
    table = rule._tables()
    for data in (b'"na\xc3', '"naïve ☃"'.encode(), b" \n{"):
        assert b"".join(map(panel._decoder.vocabulary.piece, table.split(data))) in (data, b"")
    assert table.split(b'{"') != []


# ---- lookup


def test_guesses_are_what_followed_last_time() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3, 5])
    assert lookup.guess(3) == ()
    for token in (2, 3):
        lookup.add(token)
    assert lookup.guess(3) == (5, 2, 3)  # the last place, and on into what was just said
    assert lookup.guess(1) == (5,)
    lookup.add(4)
    assert lookup.guess(2) == (9, 2)
    lookup.add(77)
    assert lookup.guess(8) == ()
    longer = Lookup([1, 2, 3, 7, 8, 2, 3, None, 6, 1, 2, 3])
    assert longer.guess(2) == (7, 8)  # three tokens that match count more than two that stand later
    assert Lookup([2, 3, None, 6, 2, 3]).guess(4) == ()
    assert Lookup([]).guess(4) == Lookup([1]).guess(4) == ()


COPY = "Repeat this list exactly: 1. apple pie 2. banana bread 3. cherry cake 4. apple pie 5. banana bread"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.6, "repetition_penalty": 1.01, "seed": 4}])
def test_lookup_gives_the_same_answer(smol: Model, options: dict[str, Any]) -> None:
    guessed = 0
    for number, prompt in enumerate((COPY, "a b c a b c a b c a b c a b c")):
        decoder = smol._decoder
        tokens = []
        for lookup in (0, 8):
            decoder.reset()
            decoder.prefill([TextSegment(tuple(decoder.vocabulary.tokenize(prompt, True, False)))])
            most = 16
            generation = Generation(decoder, GenerateOptions(max_tokens=most, lookup=lookup, **options))
            text = "".join(generation)
            tokens.append((text, generation.tokens, generation.finish_reason))
            assert decoder.held[-1] in generation.tokens
            guessed += generation.guessed
            assert lookup or not generation.guessed
        assert tokens[0] == tokens[1], number
    assert guessed > 5  # the twin: guesses were made, and right


def test_lookup_guesses_nothing_where_batches_have_other_bits(smollm2: Path) -> None:
    prompt = TextSegment((1, 2, 3, 4) * 8)
    for threads, kv_type, guesses in ((1, "f16", True), (2, "f16", False), (1, "f32", False)):
        decoder = Decoder(smollm2, context=512, threads=threads, kv_type=kv_type, scored=9)
        assert decoder.alone_differs(257) != guesses
        decoder.prefill([prompt])
        generation = Generation(decoder, GenerateOptions(max_tokens=9, lookup=4))
        generation._take(1)
        assert generation._guesses() == (() if kv_type == "f32" else (2, 3, 4, 1))
        decoder.close()


def test_lookup_under_a_schema_and_near_every_end(panel: Model) -> None:
    numbers = {"type": "array", "items": {"enum": ["aa", "bb"]}, "minItems": 12, "maxItems": 12}
    for options in ({}, {"temperature": 1.0, "seed": 2}):
        plain = panel.ask(QUESTION, schema=numbers, **options)
        assert panel.ask(QUESTION, schema=numbers, lookup=8, **options).text == plain.text
    text = panel.ask("aa bb aa bb", temperature=0.7, seed=1, max_tokens=40).text
    for most in (1, 2, 7, 40):
        plain = panel.ask("aa bb aa bb", temperature=0.7, seed=1, max_tokens=most)
        looked = panel.ask("aa bb aa bb", temperature=0.7, seed=1, max_tokens=most, lookup=8)
        assert (looked.text, looked.finish_reason, looked.usage.completion_tokens) == (
            plain.text, plain.finish_reason, plain.usage.completion_tokens
        )  # fmt: skip
    stop = text.split()[1]
    assert panel.ask("aa bb aa bb", temperature=0.7, seed=1, stop=[stop], lookup=8).text == text[: text.index(stop)]


def test_guesses_that_are_wrong_leave_nothing_behind(panel: Model) -> None:
    decoder: Decoder = panel._decoder
    decoder.reset()
    decoder.prefill([TextSegment(tuple(decoder.vocabulary.tokenize("a b a b a b a b", True, False)))])
    prompt = list(decoder.held)
    generation = Generation(decoder, GenerateOptions(max_tokens=30, lookup=8))
    for _ in generation:
        held = [place for place in decoder.held[len(prompt) :] if isinstance(place, int)]
        assert decoder.held[: len(prompt)] == prompt
        assert generation.tokens[: len(held)] == held
        assert len(generation.tokens) - len(held) <= 1 + 8


# ---- cancelling


def test_cancelling_from_another_thread_ends_within_a_token(smol: Model) -> None:
    endless = {"type": "string", "minLength": 10_000}
    stream = smol.stream("Count to one thousand.", max_tokens=400, schema=endless)
    next(stream)
    n_then: list[int] = []

    def cancel() -> None:
        n_then.append(smol._decoder.n_past)
        stream.cancel()

    timer = threading.Timer(0.1, cancel)
    timer.start()
    text = "".join(stream)
    timer.join()
    assert stream.answer is not None
    assert stream.answer.finish_reason == "cancelled"
    assert (stream.answer.data, stream.answer.warnings) == (None, ())  # whoever cancels wants no more tokens
    assert stream.answer.text.endswith(text)
    assert smol._decoder.n_past - n_then[0] <= 1  # the token that was being decoded


def test_cancelling_while_the_prompt_is_read(smol: Model) -> None:
    smol._decoder.reset()
    stream = smol.stream("word " * 400, max_tokens=5)
    timer = threading.Timer(0.02, stream.cancel)
    timer.start()
    answer = stream.finish()
    timer.join()
    assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == ("", "cancelled", 0)
    assert answer.usage.prompt_tokens == smol._decoder.n_past < 400
    after = smol.ask("word " * 20, max_tokens=2)
    smol._decoder.reset()
    assert after.text == smol.ask("word " * 20, max_tokens=2).text


def test_a_model_goes_on_after_answers_that_were_left(panel: Model) -> None:
    whole = panel.ask(QUESTION, max_tokens=20).text
    for way in ("leave", "close", "cancel", "before"):
        stream = panel.stream(QUESTION, max_tokens=20, lookup=4)
        if way == "before":
            stream.cancel()
            assert (stream.finish().text, stream.finish().finish_reason) == ("", "cancelled")
        else:
            assert whole.startswith(next(stream))
            {"leave": lambda: None, "close": stream.close, "cancel": stream.cancel}[way]()
        assert panel.ask(QUESTION, max_tokens=20).text == whole
    chat = panel.chat()
    spoken = chat.stream(QUESTION, max_tokens=20)
    said = next(spoken)
    spoken.cancel()
    answer = spoken.finish()
    assert (answer.text, answer.finish_reason) == (said, "cancelled")
    assert chat.messages[-1]["content"] == said


def test_the_grammar_costs_little(smol: Model) -> None:
    vocabulary = smol._decoder.vocabulary
    document = json.dumps({"name": "Thomas", "level": 42, "colour": "green", "tags": ["a", "b"]})
    tokens = vocabulary.tokenize(document, False, False)

    def run() -> float:
        rule = Constraint(Format(RECORD), vocabulary)
        started = time.thread_time()
        for token in tokens:
            assert rule.allows(token)
            rule.take(vocabulary.piece(token))
            rule._state.forced()
        return (time.thread_time() - started) / len(tokens)

    decoder = smol._decoder
    decoder.reset()

    def step() -> float:
        started = time.thread_time()  # one thread decodes, this one
        decoder.step(tokens[0])
        return time.thread_time() - started

    assert min(run() for _ in range(10)) < 0.05 * min(step() for _ in range(10))
