"""Whole answers of a real model: options, log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from edgevlm import Model, load

QUESTION = "Name three colours of the rainbow."


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Generator[Model]:
    with load(smollm2, context=1024, threads=1) as loaded:
        yield loaded


def test_logprobs_of_each_drawn_token(model: Model) -> None:
    plain = model.ask(QUESTION, max_tokens=12)
    answer = model.ask(QUESTION, max_tokens=12, logprobs=3)
    assert (answer.text, answer.finish_reason) == (plain.text, plain.finish_reason)
    assert plain.logprobs is None
    assert "logprobs" not in plain.to_json()
    assert answer.logprobs is not None
    assert len(answer.logprobs) == answer.usage.completion_tokens == 12
    assert b"".join(entry.bytes for entry in answer.logprobs).decode() == answer.text
    for entry in answer.logprobs:
        assert len(entry.top) == 3
        assert (entry.token, entry.logprob) == (entry.top[0].token, entry.top[0].logprob)  # greedy
        assert 0 >= entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob
    document = json.loads(json.dumps(answer.to_json()))["logprobs"]
    assert [bytes(entry["bytes"]) for entry in document] == [entry.bytes for entry in answer.logprobs]
    assert [entry.top for entry in model.ask(QUESTION, max_tokens=2, logprobs=0).logprobs or ()] == [(), ()]


def test_logprobs_are_raw_whatever_steers_the_draw(model: Model) -> None:
    raw = (model.ask(QUESTION, max_tokens=1, logprobs=20).logprobs or ())[0]
    for seed in range(3):
        options = {"temperature": 3.0, "min_p": 0.01, "repetition_penalty": 1.5, "seed": seed}
        steered = (model.ask(QUESTION, max_tokens=1, logprobs=20, **options).logprobs or ())[0]
        assert steered.top == raw.top
        known = {other.token: other.logprob for other in raw.top}
        assert steered.logprob == known.get(steered.token, steered.logprob)


def test_a_penalty_changes_the_answer_and_a_seed_repeats_it(model: Model) -> None:
    options = {"max_tokens": 24, "repetition_penalty": 1.3}
    assert model.ask(QUESTION, **options).text == model.ask(QUESTION, **options).text
    assert model.ask(QUESTION, **options).text != model.ask(QUESTION, max_tokens=24).text
    lively = {"max_tokens": 24, "temperature": 1.5, "min_p": 0.05, "seed": 7}
    assert model.ask(QUESTION, **lively).text == model.ask(QUESTION, **lively).text
    assert model.ask(QUESTION, **{**lively, "min_p": 1.0}).text == model.ask(QUESTION, max_tokens=24).text
