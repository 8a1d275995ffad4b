"""Where a picture's embeddings stand among the tokens: known from its size alone, before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgevlm.budget import Budget, row_counts
from edgevlm.spec import ModelSpec, TileTexts
from edgevlm.tiling import grid_of


@dataclass(frozen=True)
class Rows:
    """So many embeddings, the next ones in the order in which the encoder gives them."""

    count: int


#: What replaces a picture's slot in the prompt, in order: texts, in which control tokens count, and embeddings.
ImageLayout = tuple[str | Rows, ...]


def image_layout(height: int, width: int, spec: ModelSpec, budget: Budget | None = None) -> ImageLayout:
    """The layout of a picture of `height` x `width` pixels, for a model that sees; with a budget, of what it leaves.

    Raises:
        BundleError: `bundle.invalid`, the spec lacks a number that its policy needs.
        UsageError: the budget has fewer tokens than the picture has tiles.

    Example:
        >>> from edgevlm.bundle import BUILTIN, read_manifest
        >>> image_layout(3000, 4000, read_manifest(BUILTIN).spec)
        (Rows(count=64),)
    """
    assert spec.image is not None
    rows, columns = grid_of(height, width, spec.image)
    counts, texts = row_counts(rows * columns + 1, spec, budget), spec.prompt.tile_texts
    if texts is None:
        return (Rows(sum(counts)),)
    tiles = map(Rows, counts)  # in the order in which they are taken below
    if texts.whole_first:
        return _joined([*_whole(tiles, texts), *_grid(rows, columns, tiles, texts)])
    return _joined([*_grid(rows, columns, tiles, texts), *_whole(tiles, texts)])


def _whole(tiles: Iterator[Rows], texts: TileTexts) -> list[str | Rows]:
    return [texts.whole, next(tiles), texts.end]


def _grid(rows: int, columns: int, tiles: Iterator[Rows], texts: TileTexts) -> list[str | Rows]:
    """The tiles of a picture that was cut, and all texts around them."""
    if not rows:
        return []
    parts: list[str | Rows] = [texts.grid_start]
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            tile = texts.tile.replace("{row}", str(row)).replace("{column}", str(column))
            parts += [tile, next(tiles), texts.tile_end]
        parts += [texts.row_end, texts.between_rows if row < rows else ""]
    return [*parts, texts.grid_end]


def _joined(parts: list[str | Rows]) -> ImageLayout:
    """Neighbouring texts as one: tokenized apart, the newlines between two of them would not become one token."""
    joined: list[str | Rows] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(part for part in joined if part)
