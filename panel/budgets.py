"""What budgets of image tokens cost and gain: `python -m panel.evaluate --image-tokens full 36 36:pool`.

`N` is what `edgevlm.load(image_tokens=N)` does. `N:pool` is its rival: averages over the cells of a coarser grid.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgevlm
from edgevlm.budget import Budget

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.answer import Answer
    from panel.evaluate import Item


class Pooled(Budget):
    """Budgets that are square numbers, for a square grid."""

    method = "pool"

    def keep(self, tile_ND: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """Averages, weighted by area: what lies in two cells counts in each by its part of it."""
        side, cells = math.isqrt(len(tile_ND)), math.isqrt(count)
        assert (side**2, cells**2) == (len(tile_ND), count)
        # each row and column `cells` times, so that a cell is a whole number of them
        fine_RCD = tile_ND.reshape(side, side, -1).repeat(cells, axis=0).repeat(cells, axis=1)
        return fine_RCD.reshape(cells, side, cells, side, -1).mean(axis=(1, 3)).reshape(count, -1)


def load(bundle: Path | None, budget: str) -> edgevlm.Model:
    """The bundle under a budget, `full`, `N` or `N:pool`."""
    number, _, method = budget.partition(":")
    model = edgevlm.load(bundle, image_tokens=number)
    if method:
        assert method == Pooled.method
        assert model._vision is not None
        model._vision._budget = Pooled(int(number))
    return model


def compare(
    bundle: Path | None, budgets: Sequence[str], items: Sequence[Item], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each budget the share of right answers per metric, the picture's tokens, and seconds to the first token.

    All budgets answer a question before the next one is asked, so that whatever else the machine does hits all alike.
    The times are medians over the first questions about each panel: for the others, the context holds the picture.
    """
    from panel.evaluate import MAX_TOKENS, score

    models = {budget: load(bundle, budget) for budget in budgets}
    rights: dict[str, dict[str, list[bool]]] = {budget: {metric: [] for metric in metrics} for budget in budgets}
    first: dict[str, list[Answer]] = {budget: [] for budget in budgets}
    for item in items:
        for budget, model in models.items():
            answer = model.ask(item.question.text, images=[item.image], max_tokens=MAX_TOKENS)
            if answer.timings.encode_s:
                first[budget].append(answer)
            for metric, right in score(item.question, answer.text).items():
                rights[budget][metric].append(right)
    return {
        budget: {
            "image_tokens": first[budget][0].usage.image_tokens,
            "first_token_s": statistics.median(answer.timings.first_token_s for answer in first[budget]),
            "prefill_s": statistics.median(answer.timings.prefill_s for answer in first[budget]),
            "accuracy": {metric: sum(values) / len(values) for metric, values in rights[budget].items()},
        }
        for budget in budgets
    }


def markdown(rows: dict[str, dict[str, Any]], metrics: Sequence[str]) -> str:
    """The table: percent, and milliseconds."""
    names = ["tokens", "first token, ms", "of it prefill, ms", *(metric.replace("_", " ") for metric in metrics)]
    lines = ["| budget | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for budget, row in rows.items():
        cells = [f"{row['image_tokens']}", f"{1e3 * row['first_token_s']:.0f}", f"{1e3 * row['prefill_s']:.0f}"]
        cells += [f"{100 * row['accuracy'][metric]:.1f}" for metric in metrics]
        lines.append(f"| {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
