"""Filters, penalty and log-probabilities against transformers' processors and torch."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgevlm.decoder import Decoder
from edgevlm.options import GenerateOptions
from edgevlm.sampling import Sampler, logprobs, penalized
from edgevlm.splice import TextSegment

PROMPT = "The history of the bridge over the river begins with the bridge"


@pytest.fixture(scope="module")
def decoder(smollm2: Path) -> Generator[Decoder]:
    loaded = Decoder(smollm2, context=256, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def real(decoder: Decoder) -> tuple[list[int], np.ndarray]:
    """The tokens of a prompt and the logits after it."""
    tokens = decoder.vocabulary.tokenize(PROMPT, True, False)
    decoder.reset()
    decoder.prefill([TextSegment(tuple(tokens))])
    return tokens, decoder.logits().copy()


def cases(real: tuple[list[int], np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    random = np.random.default_rng(5)
    made = [(random.integers(0, 300, 40).tolist(), random.normal(0, 4, 300).astype(np.float32)) for _ in range(20)]
    return [*made, real]


def support(sampler: Sampler, logits_V: np.ndarray) -> set[int]:
    candidates, weights = sampler._candidates(logits_V, float(logits_V.max()))
    assert (weights > 0).all()
    return {int(token) for token in candidates}


def kept(scores: torch.Tensor) -> set[int]:
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.3, 2.0])
def test_the_penalty_is_that_of_transformers_bit_by_bit(real: tuple[list[int], np.ndarray], penalty: float) -> None:
    for tokens, logits_V in cases(real):
        seen = np.unique(tokens)
        ours = logits_V.copy()
        ours[seen] = penalized(logits_V[seen], penalty)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), torch.tensor(logits_V[None]))
        np.testing.assert_array_equal(ours, theirs[0].numpy())
        assert (ours != logits_V).any()  # the twin: no penalty is something else


def test_greedy_with_penalty_draws_what_transformers_draws(real: tuple[list[int], np.ndarray]) -> None:
    differs = 0
    for tokens, logits_V in cases(real):
        before = logits_V.copy()
        drawn = Sampler(GenerateOptions(repetition_penalty=1.5), tokens).sample(logits_V)
        theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([tokens]), torch.tensor(before[None]))
        assert drawn == int(theirs.argmax())
        np.testing.assert_array_equal(logits_V, before)  # lent, and given back as it was
        differs += drawn != int(before.argmax())
    assert differs  # the twin: the penalty mattered somewhere


def test_the_penalty_counts_what_the_answer_holds() -> None:
    logits_V = np.array([2.0, 1.9, 1.8], np.float32)
    sampler = Sampler(GenerateOptions(repetition_penalty=2.0), [0])
    assert sampler.sample(logits_V) == 1
    sampler.saw(1)
    assert sampler.sample(logits_V) == 2


@pytest.mark.parametrize("min_p", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_min_p_keeps_what_transformers_keeps_at_temperature_one(
    real: tuple[list[int], np.ndarray], min_p: float, temperature: float
) -> None:
    for tokens, logits_V in cases(real):
        options = GenerateOptions(temperature=temperature, min_p=min_p)
        theirs = kept(MinPLogitsWarper(min_p)(torch.tensor([tokens]), torch.tensor(logits_V[None])))
        assert support(Sampler(options), logits_V) == theirs
    other = MinPLogitsWarper(min_p)(torch.tensor([tokens]), torch.tensor(logits_V[None]) / 5)
    assert min_p == 1 or kept(other) != theirs  # the twin: logits that a temperature has divided keep others


def test_all_filters_together(real: tuple[list[int], np.ndarray]) -> None:
    options = GenerateOptions(temperature=1.5, top_k=40, top_p=0.9, min_p=0.03)
    for tokens, logits_V in cases(real):
        ids, scores = torch.tensor([tokens]), torch.tensor(logits_V[None]).double()
        tempered = TemperatureLogitsWarper(1.5)(ids, scores)
        nucleus = kept(TopPLogitsWarper(0.9)(ids, TopKLogitsWarper(40)(ids, tempered)))
        assert support(Sampler(options), logits_V) == nucleus & kept(MinPLogitsWarper(0.03)(ids, scores))


@pytest.mark.parametrize("count", [0, 1, 20])
def test_logprobs_are_those_of_the_raw_logits(real: tuple[list[int], np.ndarray], count: int) -> None:
    for _, logits_V in cases(real):
        reference = torch.log_softmax(torch.tensor(logits_V).double(), 0).numpy()
        token = int(logits_V.argmin())
        logprob, top = logprobs(logits_V, token, count)
        # exp in float32 is off by 1e-7 of each term, hence of their sum, hence the logarithm by 1e-7
        assert logprob == pytest.approx(reference[token], abs=1e-6)
        assert [other.token for other in top] == np.argsort(-logits_V, kind="stable")[:count].tolist()
        assert [other.logprob for other in top] == pytest.approx(reference[[o.token for o in top]], abs=1e-6)
        assert logprob != pytest.approx(reference[int(logits_V.argmax())], abs=1e-6)  # the twin: another token
