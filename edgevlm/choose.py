"""How likely each of a few answers is: for small models far more reliable than what they say freely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgevlm.decoder import Decoder
from edgevlm.errors import BackendError, UsageError
from edgevlm.options import shown
from edgevlm.prompt import check_unicode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_CHOICES = 1000


def check_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """The choices without white space around them.

    Raises:
        UsageError: fewer than two, or too many, or one that is empty, no text, or there twice.
    """
    if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
        raise UsageError(f"choices must be a list of texts, found {shown(choices)}")
    stripped = tuple(choice.strip() for choice in choices)
    if not 2 <= len(stripped) <= _MOST_CHOICES or "" in stripped or len(set(stripped)) != len(stripped):
        raise UsageError(
            f"choices must be 2 to {_MOST_CHOICES} different texts, none empty, found {list(choices)!r:.80}"
        )
    for choice in stripped:
        check_unicode("a choice", choice)
    return stripped


def probabilities(decoder: Decoder, choices: Sequence[str]) -> dict[str, float]:
    """Probability of each choice as the whole answer, given that the answer is one of them.

    The context holds the prompt, has its logits, and is left as it was, without logits. An answer's likelihood is the
    product of its tokens' probabilities and of the turn's end after it, without which "red" would always be likelier
    than "red and blue". Some templates leave a space to the model, so a choice counts with and without one before it.

    Raises:
        ContextError: a choice does not fit behind the prompt.
        BackendError: the logits are not numbers.
    """
    import numpy as np

    n_prompt, first_V = decoder.n_past, _log_softmax(decoder.logits())
    likelihoods = []
    for choice in choices:
        ways = {tuple(decoder.vocabulary.tokenize(text, False, False)) for text in (choice, f" {choice}")}
        likelihoods.append(np.logaddexp.reduce([_likelihood(decoder, first_V, way) for way in sorted(ways)]))
        decoder.truncate(n_prompt)
    if not any(map(math.isfinite, likelihoods)):
        raise BackendError("the model computed numbers that are not finite; its file is damaged", code="backend.failed")
    weights = np.exp(np.array(likelihoods) - max(likelihoods))
    return dict(zip(choices, (float(weight) for weight in weights / weights.sum()), strict=True))


def _likelihood(decoder: Decoder, first_V: NDArray[np.float64], tokens: tuple[int, ...]) -> float:
    """Logarithm of the probability that the answer is these tokens and then ends."""
    import numpy as np

    n_prompt, total, logs_V = decoder.n_past, 0.0, first_V
    at_once = decoder.n_scored
    for start in range(0, len(tokens), at_once):
        part = tokens[start : start + at_once]
        rows_NV = decoder.score(part)
        for token, row_V in zip(part, rows_NV, strict=True):
            total += float(logs_V[token])
            logs_V = _log_softmax(row_V)
    total += float(np.logaddexp.reduce(logs_V[decoder.vocabulary.end_tokens()]))
    decoder.truncate(n_prompt)
    return total if math.isfinite(total) else -math.inf


def _log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    if not np.isfinite(logits_V).any() or np.isnan(logits_V).any():
        return np.full(logits_V.shape, -np.inf)
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    result_V: NDArray[np.float64] = shifted_V - np.log(np.exp(shifted_V).sum())
    return result_V
