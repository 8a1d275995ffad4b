"""From logits to the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgevlm.errors import BackendError
from edgevlm.options import GenerateOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


#: Candidates that top-p looks at before it sorts the whole vocabulary.
_SHORT_LIST = 512


class Sampler:
    """Draws tokens: greedy at temperature 0, else temperature, then top-k, then top-p (nucleus).

    The same options with the same seed draw the same tokens from the same logits.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._options = options
        self._random: np.random.Generator | None = None

    def sample(self, logits_V: NDArray[np.float32]) -> int:
        """The next token id, from float32 logits [n_vocab]; the view is not kept.

        Raises:
            BackendError: the logits are not numbers: the model file is damaged or its scaling is.
        """
        import numpy as np

        best = int(np.argmax(logits_V))  # a NaN counts as the largest
        if not np.isfinite(logits_V[best]):
            raise BackendError(
                "the model computed numbers that are not finite; its file is damaged", code="backend.failed"
            )
        if self._options.temperature == 0:
            return best
        if self._random is None:
            self._random = np.random.default_rng(self._options.seed)
        candidates, weights = self._candidates(logits_V, float(logits_V[best]))
        cumulative = np.cumsum(weights)
        drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        # Rounding may put a draw on the last edge.
        return int(candidates[min(drawn, len(cumulative) - 1)])

    def _candidates(self, logits_V: NDArray[np.float32], best: float) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Token ids that may be drawn, and their unnormalized probabilities."""
        import numpy as np

        options = self._options
        # The maximum is taken off before the division, so that no temperature overflows.
        weights_V = np.exp((logits_V.astype(np.float64) - best) / options.temperature)
        total = float(weights_V.sum())
        candidates = np.arange(len(logits_V))
        if 0 < options.top_k < len(candidates):
            candidates = _largest(weights_V, options.top_k)
            total = float(weights_V[candidates].sum())
        if options.top_p < 1:
            # Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019): the smallest set of the most
            # probable tokens whose sum reaches p. It is nearly always among the first few.
            if len(candidates) > _SHORT_LIST:
                short = _largest(weights_V, _SHORT_LIST)
                enough = float(weights_V[short].sum()) >= options.top_p * total
                candidates = short if enough else _largest(weights_V, len(weights_V))
            kept = int(np.searchsorted(np.cumsum(weights_V[candidates]), options.top_p * total)) + 1
            candidates = candidates[:kept]
        return candidates, weights_V[candidates]


def _largest(weights_V: NDArray[np.float64], count: int) -> NDArray[Any]:
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
