"""Draws against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgevlm.errors import BackendError, UsageError
from edgevlm.options import GenerateOptions
from edgevlm.sampling import Sampler

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
N = 4000


def frequencies(**options: object) -> np.ndarray:
    sampler = Sampler(GenerateOptions(seed=1, **options))  # type: ignore[arg-type]
    drawn = [sampler.sample(LOGITS) for _ in range(N)]
    return np.bincount(drawn, minlength=4) / N


# 4 standard errors of a frequency near 0.5 at N draws: sqrt(0.25 / 4000) * 4
TOLERANCE = 0.032


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert Sampler(GenerateOptions()).sample(LOGITS) == 0
    assert Sampler(GenerateOptions()).sample(np.array([1, 2, 2], np.float32)) == 1


def test_temperature() -> None:
    np.testing.assert_allclose(frequencies(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=TOLERANCE)
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), squared / squared.sum(), atol=TOLERANCE)
    # the twin: another temperature is outside the tolerance
    assert np.abs(frequencies(temperature=2.0) - [0.5, 0.3, 0.15, 0.05]).max() > TOLERANCE


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-300])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    for more in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert frequencies(temperature=temperature, **more)[0] == 1
    sampler = Sampler(GenerateOptions(temperature=temperature, seed=1), banned=[0])
    assert sampler.sample(LOGITS.copy()) == 1  # the banned one is at minus infinity


def test_top_k() -> None:
    np.testing.assert_allclose(frequencies(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=TOLERANCE)
    assert frequencies(temperature=5.0, top_k=1)[0] == 1


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.79), [0.625, 0.375, 0, 0], atol=TOLERANCE)
    np.testing.assert_allclose(
        frequencies(temperature=1.0, top_p=0.81), np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=TOLERANCE
    )
    assert frequencies(temperature=1.0, top_p=0.01)[0] == 1


def test_a_seed_repeats_and_another_does_not() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(GenerateOptions(temperature=1.0, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 1.5}, {"temperature": -0.1}, {"temperature": math.nan},
        {"temperature": 11}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}, {"seed": 1 << 63},
        {"stop": ("",)}, {"stop": [1]}, {"stop": "a"},
        {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan}, {"repetition_penalty": 0}, {"repetition_penalty": 11},
        {"logprobs": -1}, {"logprobs": 21}, {"logprobs": 1.5}, {"logprobs": True},
    ],
)  # fmt: skip
def test_options_outside_their_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        GenerateOptions(**wrong)  # type: ignore[arg-type]


class Only:
    """A rule that allows some tokens, counts its questions, and rules out nothing in advance."""

    def __init__(self, tokens: set[int], n_vocab: int) -> None:
        self.tokens, self.asked, self.n_vocab = tokens, 0, n_vocab

    def allows(self, token: int) -> bool:
        self.asked += 1
        return token in self.tokens

    def possible(self) -> np.ndarray:
        return np.ones(self.n_vocab, bool)

    def allowed(self) -> np.ndarray:
        return np.isin(np.arange(self.n_vocab), list(self.tokens))


def test_draws_under_a_rule_are_draws_from_what_it_allows() -> None:
    rule = Only({1, 2, 3}, 4)
    sampler = Sampler(GenerateOptions(temperature=1.0, seed=1))
    drawn = np.bincount([sampler.sample(LOGITS, rule) for _ in range(N)], minlength=4) / N
    np.testing.assert_allclose(drawn, np.array([0, 0.3, 0.15, 0.05]) / 0.5, atol=TOLERANCE)


def test_draws_under_a_rule_that_refuses_nearly_everything() -> None:
    logits_V = np.linspace(5, 0, 3000).astype(np.float32)
    rule = Only({2900, 2990}, 3000)
    sampler = Sampler(GenerateOptions(temperature=1.0, seed=1))
    drawn = [sampler.sample(logits_V, rule) for _ in range(100)]
    assert rule.asked < 100 * 70  # not one question for each token of the vocabulary
    weights = np.exp(logits_V[[2900, 2990]].astype(float))
    # 4 standard errors of a frequency near 0.5 at 100 draws
    assert drawn.count(2900) / 100 == pytest.approx(weights[0] / weights.sum(), abs=0.2)
    assert set(drawn) == {2900, 2990}
    # beyond the filters the likeliest allowed one is taken, which is what greedy takes
    assert Sampler(GenerateOptions(temperature=1.0, top_k=5, seed=1)).sample(logits_V, rule) == 2900
    assert Sampler(GenerateOptions()).sample(logits_V, rule) == 2900


def test_a_rule_that_refuses_everything_is_an_error() -> None:
    for temperature in (0, 1):
        with pytest.raises(BackendError, match="vocabulary"):
            Sampler(GenerateOptions(temperature=temperature)).sample(LOGITS, Only(set(), 4))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.5}])
def test_a_banned_token_is_never_drawn_and_the_logits_are_left_alone(options) -> None:
    logits_V = np.array([1.0, 9.0, 2.0, 8.0], np.float32)
    before = logits_V.copy()
    drawn = {Sampler(GenerateOptions(**options), seen=[1, 2], banned=[1, 3]).sample(logits_V) for _ in range(20)}
    assert drawn <= {0, 2}
    assert np.array_equal(logits_V, before)
    assert Sampler(GenerateOptions()).sample(logits_V) == 1  # the twin
