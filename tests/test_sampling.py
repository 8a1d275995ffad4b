"""Draws against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgevlm.errors import UsageError
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
    ],
)  # fmt: skip
def test_options_outside_their_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        GenerateOptions(**wrong)  # type: ignore[arg-type]
