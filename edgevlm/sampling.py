"""From logits to the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgevlm.options import GenerateOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Sampler:
    """Draws tokens: greedy at temperature 0, else temperature, then top-k, then top-p (nucleus).

    The same options with the same seed draw the same tokens from the same logits.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._options = options
        self._random: np.random.Generator | None = None

    def sample(self, logits_V: NDArray[np.float32]) -> int:
        """The next token id, from float32 logits [n_vocab]; the view is not kept."""
        import numpy as np

        options = self._options
        if options.temperature == 0:
            return int(np.argmax(logits_V))
        if self._random is None:
            self._random = np.random.default_rng(options.seed)
        # Sorted by descending logit, ties by token id: the order must not depend on a partition's internals.
        candidates = np.arange(len(logits_V))
        if 0 < options.top_k < len(logits_V):
            candidates = np.sort(np.argpartition(-logits_V, options.top_k - 1)[: options.top_k])
        candidates = candidates[np.argsort(-logits_V[candidates], kind="stable")]
        scaled = logits_V[candidates].astype(np.float64) / options.temperature
        probabilities = np.exp(scaled - scaled[0])
        probabilities /= probabilities.sum()
        # Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019): the smallest set whose sum reaches p.
        kept = int(np.searchsorted(np.cumsum(probabilities), options.top_p)) + 1
        cumulative = np.cumsum(probabilities[:kept])
        drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        # Rounding may put a draw on the last edge.
        return int(candidates[min(drawn, len(cumulative) - 1)])
