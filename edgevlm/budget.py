"""Fewer embeddings for a picture than its encoder gives, without retraining: the image token budget.

A budget of N is shared by the tiles of a picture: each may keep N // tiles rows, and what is left over goes to the
whole picture (what that cannot use, one each to the first tiles). A tile whose share is too small for all of its rows
keeps averages over the cells of a coarser grid, or, where an encoder gives rows without a grid, those that are least
alike. All stay in raster order, so that the positions that the decoder gives them stay natural.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsIndex

from edgevlm.errors import UsageError
from edgevlm.spec import EncoderSpec, ImageSpec, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: `pool` averages over cells of the grid; `select` keeps rows that are far from each other.
Method = Literal["pool", "select"]
_MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Budget:
    """At most `n_tokens` embeddings for each picture; without a `method`, `pool` where rows have a grid."""

    n_tokens: int
    method: Method | None = None

    def method_for(self, spec: ModelSpec) -> Method:
        return self.method or ("pool" if token_grid(spec) else "select")

    def key(self, key: str, spec: ModelSpec) -> str:
        """The key of what is left of embeddings that have the key `key`."""
        return f"{key}-{self.method_for(spec)}-{self.n_tokens}"


def parse_budget(value: object) -> Budget | None:
    """What a caller says: `"full"`, which is no budget, or a whole number from 1 to 2^24, as an int or written out.

    Raises:
        UsageError: it is something else.

    Example:
        >>> parse_budget("full"), parse_budget("144")
        (None, Budget(n_tokens=144, method=None))
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


def token_grid(spec: ModelSpec) -> tuple[int, int] | None:
    """(rows, columns) of a tile's embeddings; None if they have no places in the picture, as a resampler's.

    There may be one embedding more than places: the class token, which comes first.
    """
    encoder, image = _vision(spec)
    if encoder.connector == "resampler":
        return None
    rows, columns = (side // encoder.patch_px // encoder.scale_factor for side in (image.height_px, image.width_px))
    return (rows, columns) if rows * columns in (encoder.n_tokens, encoder.n_tokens - 1) else None


def pooled_grid(share: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of the largest coarser grid of the same shape, or one row or column more, of up to `share` cells.

    Of one more row and one more column, the column: what is written in pictures runs along them.

    Example:
        >>> [pooled_grid(share, 8, 8) for share in (1, 2, 6, 8, 16, 63)]
        [(1, 1), (1, 2), (2, 3), (2, 3), (4, 4), (7, 8)]
    """
    # r / rows = c / columns and r * c = share
    coarse_rows = max(1, min(rows, share, math.isqrt(share * rows // columns)))
    coarse_columns = max(1, min(columns, share // coarse_rows, math.isqrt(share * columns // rows)))
    grids = [(coarse_rows, coarse_columns), (coarse_rows, coarse_columns + 1), (coarse_rows + 1, coarse_columns)]
    fitting = [(r, c) for r, c in grids if r <= rows and c <= columns and r * c <= share]
    return max(fitting, key=lambda grid: grid[0] * grid[1])  # the first of equals


def row_counts(n_tiles: int, spec: ModelSpec, budget: Budget | None) -> list[int]:
    """How many embeddings each tile of a picture keeps, in the order in which the encoder gives them.

    Args:
        n_tiles: Tiles of the picture, the whole picture included.
        spec: A model that sees.
        budget: None keeps all.

    Raises:
        UsageError: the budget has fewer tokens than there are tiles.
    """
    return [_n_kept(share, spec, budget) for share in _shares(n_tiles, spec, budget)]


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

    encoder, _ = _vision(spec)
    tiles_TND = rows_ND.reshape(-1, encoder.n_tokens, rows_ND.shape[-1])
    shares = _shares(len(tiles_TND), spec, budget)
    if sum(shares) == len(rows_ND):
        return rows_ND
    method = budget.method_for(spec)
    kept = []
    for tile_ND, share in zip(tiles_TND, shares, strict=True):
        if share == len(tile_ND):
            kept.append(tile_ND)
        else:
            kept.append(select(tile_ND, share) if method == "select" else _pool_tile(tile_ND, share, spec))
    reduced_ND = np.concatenate(kept)
    reduced_ND.flags.writeable = False  # as the embeddings themselves
    return reduced_ND


def pool(grid_RCD: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Averages over the cells of a coarser grid; what lies in two cells counts in each by its area.

    Args:
        grid_RCD: float32 [rows of the fine grid, its columns, n_embd].
        rows, columns: Of the coarser grid.

    Returns:
        float32 [rows * columns, n_embd]. Sums are made in float64 and rounded once.
    """
    import numpy as np

    pooled_RCD = grid_RCD.astype(np.float64)
    for axis, n_cells in ((0, rows), (1, columns)):
        lines = np.moveaxis(pooled_RCD, axis, 0)
        cells = [sum(weight * lines[i] for i, weight in cell) for cell in _cells(len(lines), n_cells)]
        pooled_RCD = np.stack(cells, axis=axis)
    pooled_ND: NDArray[np.float32] = pooled_RCD.reshape(rows * columns, -1).astype(np.float32)
    return pooled_ND


def select(tile_ND: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The `count` rows found by the farthest-first traversal of Gonzalez (1985), in their own order.

    The first is the one least like the mean of all; each further one is the row whose nearest among those found is the
    farthest. Rows are compared by their cosine. Of equals the first one counts, so the result is always the same.

    Args:
        tile_ND: float32 [n, n_embd].
        count: From 1 to n.

    Returns:
        float32 [count, n_embd].
    """
    import numpy as np

    unit_ND = tile_ND.astype(np.float64)
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    found = [int(np.argmin(unit_ND @ unit_ND.mean(axis=0)))]
    nearest_N = unit_ND @ unit_ND[found[0]]
    while len(found) < count:
        nearest_N[found[-1]] = np.inf
        found.append(int(np.argmin(nearest_N)))
        np.maximum(nearest_N, unit_ND @ unit_ND[found[-1]], out=nearest_N)
    kept_ND: NDArray[np.float32] = tile_ND[sorted(found)]
    return kept_ND


def _vision(spec: ModelSpec) -> tuple[EncoderSpec, ImageSpec]:
    assert spec.encoder is not None
    assert spec.image is not None
    return spec.encoder, spec.image


def _shares(n_tiles: int, spec: ModelSpec, budget: Budget | None) -> list[int]:
    """How many rows each tile may keep; together as many as the budget has, or all."""
    encoder, image = _vision(spec)
    n_full = encoder.n_tokens
    if budget is None or budget.n_tokens >= n_tiles * n_full:
        return [n_full] * n_tiles
    share, left = divmod(budget.n_tokens, n_tiles)
    if not share:
        raise UsageError(
            f"image_tokens is {budget.n_tokens}, the picture is cut into {n_tiles} tiles; "
            f"give at least {n_tiles}, or full"
        )
    for_whole = min(left, n_full - share)
    whole = [share + for_whole]
    tiles = [share + (i < left - for_whole) for i in range(n_tiles - 1)]
    return whole + tiles if image.policy == "slices" else tiles + whole


def _n_kept(share: int, spec: ModelSpec, budget: Budget | None) -> int:
    """How many rows a tile with this share keeps: a grid often has somewhat fewer cells."""
    encoder, _ = _vision(spec)
    grid = token_grid(spec)
    if share == encoder.n_tokens or budget is None or grid is None or budget.method_for(spec) == "select":
        return share
    n_class = _n_class(share, encoder, grid)
    return n_class + math.prod(pooled_grid(share - n_class, *grid))


def _n_class(share: int, encoder: EncoderSpec, grid: tuple[int, int]) -> int:
    """1 if the class token is among the rows that are kept; the one row of a share of 1 is the mean of all places."""
    return int(share > 1 and math.prod(grid) < encoder.n_tokens)


def _pool_tile(tile_ND: NDArray[np.float32], share: int, spec: ModelSpec) -> NDArray[np.float32]:
    import numpy as np

    grid = token_grid(spec)
    assert grid is not None
    n_class = _n_class(share, _vision(spec)[0], grid)
    grid_RCD = tile_ND[len(tile_ND) - math.prod(grid) :].reshape(*grid, -1)
    return np.concatenate([tile_ND[:n_class], pool(grid_RCD, *pooled_grid(share - n_class, *grid))])


def _cells(length: int, n_cells: int) -> list[list[tuple[int, float]]]:
    """For each of `n_cells` equal parts of a line of `length` pieces, the pieces in it, each with its share of it."""
    return [
        [
            # lengths in units of 1 / n_cells of a piece are whole numbers
            (i, (min((i + 1) * n_cells, (cell + 1) * length) - max(i * n_cells, cell * length)) / length)
            for i in range(cell * length // n_cells, -(-(cell + 1) * length // n_cells))
        ]
        for cell in range(n_cells)
    ]
