"""From logits to the next token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgevlm.errors import BackendError
from edgevlm.options import GenerateOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


#: Candidates that top-p looks at before it sorts the whole vocabulary.
_SHORT_LIST = 512
#: Refused draws after which the rule is asked about the whole vocabulary at once.
_FEW_REFUSALS = 64


class Rule(Protocol):
    """Which tokens may come next, beyond their probabilities: a grammar."""

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""

    def possible(self) -> NDArray[np.bool_]:
        """bool [n_vocab]: False only for tokens that may not come next; cheap, and wrong in the one direction."""

    def allowed(self) -> NDArray[np.bool_]:
        """bool [n_vocab]: exactly the tokens that may come next."""


class Sampler:
    """Draws tokens: repetition penalty, then greedy at temperature 0, else temperature, top-k, top-p (nucleus), min-p.

    The same options with the same seed draw the same tokens from the same logits.

    - The penalty is that of Keskar et al., "CTRL" (2019), in the form of transformers'
      `RepetitionPenaltyLogitsProcessor`: a logit above 0 is divided by it, one below is multiplied.
    - top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019).
    - min-p: Nguyen et al., "Min-p Sampling" (2024), over probabilities at temperature 1: the set that transformers'
      `MinPLogitsWarper` keeps of logits that no temperature has divided, which is llama.cpp's default order.

    Args:
        options: How to draw.
        seen: Tokens of the prompt, which the penalty counts.
        banned: Tokens that are never drawn.
    """

    def __init__(self, options: GenerateOptions, seen: Iterable[int] = (), banned: Iterable[int] = ()) -> None:
        import numpy as np

        self._banned_ids = np.array(sorted(banned), np.int64)
        self._options = options
        self._random: np.random.Generator | None = None
        self._seen = set(seen) if options.repetition_penalty != 1 else set()
        self._seen_ids: NDArray[np.int64] | None = None

    def saw(self, token: int) -> None:
        """Count a token of the answer for the penalty."""
        if self._options.repetition_penalty != 1 and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = None

    def sample(self, logits_V: NDArray[np.float32], rule: Rule | None = None) -> int:
        """The next token id, from float32 logits [n_vocab]; the view is not kept, its numbers are as before afterwards.

        A refused token is taken out and the draw repeated. Draws without replacement until one is allowed give each
        allowed token its share of the allowed tokens' probability (each stage of a Plackett-Luce draw is a draw from
        what is left, renormalized: Plackett, "The Analysis of Permutations", 1975), as if only these had been
        considered. If the rule refuses everything that top-k, top-p and min-p left, the likeliest token that it allows
        is taken.

        Raises:
            BackendError: the logits are not numbers: the model file is damaged or its scaling is; or the rule refuses
                the whole vocabulary.
        """
        import numpy as np

        best = int(np.argmax(logits_V))  # a NaN counts as the largest
        if not np.isfinite(logits_V[best]):
            raise BackendError(
                "the model computed numbers that are not finite; its file is damaged", code="backend.failed"
            )
        if self._seen_ids is None:
            self._seen_ids = np.fromiter(self._seen, np.int64, len(self._seen))
        ids = np.concatenate([self._seen_ids, self._banned_ids])
        if not len(ids):
            return self._draw(logits_V, best, rule)
        raw = logits_V[ids]
        logits_V[self._seen_ids] = penalized(raw[: len(self._seen_ids)], self._options.repetition_penalty)
        logits_V[self._banned_ids] = -np.inf
        try:
            return self._draw(logits_V, int(np.argmax(logits_V)), rule)
        finally:
            logits_V[ids] = raw

    def _draw(self, logits_V: NDArray[np.float32], best: int, rule: Rule | None) -> int:
        import numpy as np

        if self._options.temperature == 0:
            return best if rule is None or rule.allows(best) else _likeliest(logits_V, rule)
        if self._random is None:
            self._random = np.random.default_rng(self._options.seed)
        candidates, weights = self._candidates(logits_V, float(logits_V[best]))
        refused = 0
        while True:
            cumulative = np.cumsum(weights)
            drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
            drawn = min(drawn, len(cumulative) - 1)  # rounding may put a draw on the last edge
            token = int(candidates[drawn])
            if rule is None or rule.allows(token):
                return token
            refused += 1
            if refused in (1, _FEW_REFUSALS):
                mask_V = rule.possible() if refused == 1 else rule.allowed()
                weights = np.where(mask_V[candidates], weights, 0)
            weights[drawn] = 0
            left = np.flatnonzero(weights)
            if not len(left):
                return _likeliest(logits_V, rule)
            candidates, weights = candidates[left], weights[left]

    def _candidates(self, logits_V: NDArray[np.float32], best: float) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Token ids that may be drawn, and their unnormalized probabilities, none 0."""
        import numpy as np

        options = self._options
        # The maximum is taken off before the division: what overflows is below it, and its weight is 0.
        with np.errstate(over="ignore"):
            weights_V = np.exp((logits_V.astype(np.float64) - best) / options.temperature)
        total = float(weights_V.sum())
        candidates = np.arange(len(logits_V))
        if 0 < options.top_k < len(candidates):
            candidates = _largest(weights_V, options.top_k)
            total = float(weights_V[candidates].sum())
        if options.top_p < 1:
            # The smallest set of the most probable tokens whose sum reaches p is nearly always among the first few.
            if len(candidates) > _SHORT_LIST:
                short = _largest(weights_V, _SHORT_LIST)
                enough = float(weights_V[short].sum()) >= options.top_p * total
                candidates = short if enough else _largest(weights_V, len(weights_V))
            kept = int(np.searchsorted(np.cumsum(weights_V[candidates]), options.top_p * total)) + 1
            candidates = candidates[:kept]
        if options.min_p > 0:
            candidates = candidates[logits_V[candidates] >= best + math.log(options.min_p)]
        return candidates, weights_V[candidates]


def penalized(logits: NDArray[np.float32], penalty: float) -> NDArray[np.float32]:
    """Logits of tokens that were seen, after the repetition penalty."""
    import numpy as np

    return np.where(logits < 0, logits * np.float32(penalty), logits / np.float32(penalty))


@dataclass(frozen=True)
class Ranked:
    """A token id and its log-probability."""

    token: int
    logprob: float


def logprobs(logits_V: NDArray[np.float32], token: int, count: int) -> tuple[float, list[Ranked]]:
    """Log-probability of a token, and the `count` likeliest tokens with theirs, from float32 logits [n_vocab]."""
    import numpy as np

    best = logits_V.max()
    total = float(best) + math.log(float(np.exp(logits_V - best).sum(dtype=np.float64)))
    top = _largest(logits_V, count) if count else ()
    return float(logits_V[token]) - total, [Ranked(int(i), float(logits_V[i]) - total) for i in top]


def _likeliest(logits_V: NDArray[np.float32], rule: Rule) -> int:
    """The likeliest token that a rule allows; of equals, the smaller index."""
    import numpy as np

    for mask_V in (rule.possible(), rule.allowed()):
        left_V = np.where(mask_V, logits_V, -np.inf)
        for _ in range(_FEW_REFUSALS):
            token = int(np.argmax(left_V))
            if not np.isfinite(left_V[token]):
                break
            if rule.allows(token):
                return token
            left_V[token] = -np.inf
    raise BackendError(
        "the model's vocabulary has no token that the schema allows here; use another model", code="backend.failed"
    )


def _largest(weights_V: NDArray[Any], count: int) -> NDArray[Any]:
    """Indices of the `count` largest weights, largest first; of equals, the smaller index first."""
    import numpy as np

    if count < len(weights_V):
        smallest = np.partition(weights_V, len(weights_V) - count)[len(weights_V) - count]
        above = np.flatnonzero(weights_V > smallest)
        # Of equals at the border the smallest indices are taken; a partition alone would choose by its internals.
        chosen = np.concatenate([above, np.flatnonzero(weights_V == smallest)[: count - len(above)]])
    else:
        chosen = np.arange(len(weights_V))
    return chosen[np.lexsort((chosen, -weights_V[chosen]))]
