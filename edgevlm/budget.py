"""Fewer embeddings for a picture than its encoder gives, without retraining: the image token budget.

A budget of N is shared by the tiles of a picture: each keeps N // tiles rows, and what is left over goes to the whole
picture (what that cannot use, one each to the first tiles). A tile keeps the rows that are least alike, as the encoder
gave them and in raster order, so that the positions that the decoder gives them stay natural. Nothing is averaged:
docs/image-tokens.md has what that would cost.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, SupportsIndex

from edgevlm.errors import UsageError
from edgevlm.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Budget:
    """At most `n_tokens` embeddings for each picture."""

    n_tokens: int
    method: ClassVar[str] = "select"

    def key(self, known_as: str) -> str:
        """The key of what is left of a picture whose embeddings have the key `known_as`."""
        return f"{known_as}-{self.method}-{self.n_tokens}"

    def keep(self, tile_ND: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """`count` rows for a tile's, float32 [n, n_embd] to [count, n_embd]."""
        return tile_ND[farthest_first(tile_ND, count)]


def parse_budget(value: object) -> Budget | None:
    """What a caller says: `"full"`, which is no budget, or a whole number from 1 to 2^24, as an int or written out.

    Raises:
        UsageError: it is something else.

    Example:
        >>> parse_budget("full"), parse_budget("144")
        (None, Budget(n_tokens=144))
    """
    if isinstance(value, str):
        if value == "full":
            return None
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    else:
        number = 0 if isinstance(value, bool) or not isinstance(value, SupportsIndex) else operator.index(value)
    if 1 <= number <= _MOST_TOKENS:
        return Budget(number)
    # Python refuses to write out an int of thousands of digits
    found = f"a number of {number.bit_length()} bits" if number.bit_length() > 99 else f"{value!r:.40}"
    raise UsageError(f"image_tokens must be full or a whole number from 1 to {_MOST_TOKENS}, found {found}")


def row_counts(n_tiles: int, spec: ModelSpec, budget: Budget | None) -> list[int]:
    """How many embeddings each tile of a picture keeps, in the order in which the encoder gives the tiles.

    Args:
        n_tiles: Tiles of the picture, the whole picture included.
        spec: A model that sees.
        budget: None keeps all, and so does a budget of more than the picture has.

    Raises:
        UsageError: the budget has fewer tokens than there are tiles.
    """
    assert spec.encoder is not None
    assert spec.image is not None
    n_full = spec.encoder.n_tokens
    if budget is None or budget.n_tokens >= n_tiles * n_full:
        return [n_full] * n_tiles
    share, left = divmod(budget.n_tokens, n_tiles)
    if not share:
        raise UsageError(
            f"image_tokens is {budget.n_tokens}, but the picture is cut into {n_tiles} tiles; "
            f"give at least {n_tiles}, or full"
        )
    for_whole = min(left, n_full - share)
    whole = [share + for_whole]
    tiles = [share + (i < left - for_whole) for i in range(n_tiles - 1)]
    return whole + tiles if spec.image.policy == "slices" else tiles + whole


def reduce_rows(rows_ND: NDArray[np.float32], spec: ModelSpec, budget: Budget) -> NDArray[np.float32]:
    """What a budget leaves of a picture's embeddings.

    Args:
        rows_ND: float32 [n_tiles * n_tokens, n_embd], all of them.
        spec: The model whose encoder gave them.
        budget: No less than the number of tiles.

    Returns:
        float32 [sum(row_counts(...)), n_embd], read-only; `rows_ND` itself if the budget is large enough for it.

    Raises:
        UsageError: as `row_counts`.
    """
    import numpy as np

    assert spec.encoder is not None
    tiles_TND = rows_ND.reshape(-1, spec.encoder.n_tokens, rows_ND.shape[-1])
    counts = row_counts(len(tiles_TND), spec, budget)
    if sum(counts) == len(rows_ND):
        return rows_ND
    kept = [
        tile_ND if count == len(tile_ND) else budget.keep(tile_ND, count)
        for tile_ND, count in zip(tiles_TND, counts, strict=True)
    ]
    reduced_ND = np.concatenate(kept)
    reduced_ND.flags.writeable = False  # as the embeddings themselves
    return reduced_ND


def farthest_first(rows_ND: NDArray[np.float32], count: int) -> list[int]:
    """Which `count` rows are least alike, ascending: the farthest-first traversal of Gonzalez (1985).

    The first one is the row most like the mean of all: what many rows say. Each further one is the row whose nearest
    among those found is the farthest. Nearness is the cosine; of equals the first counts, so that equal rows give equal
    answers.

    Args:
        rows_ND: float32 [n, n_embd].
        count: From 1 to n.
    """
    import numpy as np

    unit_ND = rows_ND.astype(np.float64)
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), np.finfo(np.float32).tiny)

    def likeness_N(one_D: NDArray[np.float64]) -> NDArray[np.float64]:
        # not by BLAS, whose sums depend on a row's place: equal rows would differ
        made_N: NDArray[np.float64] = np.einsum("nd,d->n", unit_ND, one_D, optimize=False)
        return made_N

    found = [int(np.argmax(likeness_N(unit_ND.mean(axis=0))))]
    nearest_N = likeness_N(unit_ND[found[0]])
    while len(found) < count:
        nearest_N[found[-1]] = np.inf
        found.append(int(np.argmin(nearest_N)))
        np.maximum(nearest_N, likeness_N(unit_ND[found[-1]]), out=nearest_N)
    return sorted(found)
