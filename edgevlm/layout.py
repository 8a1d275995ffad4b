"""Where a picture's embeddings stand among the tokens: known from its size alone, before anything is encoded."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.spec import ModelSpec, TileTexts
from edgevlm.tiling import grid_of


@dataclass(frozen=True)
class Rows:
    """So many embeddings, the next ones in the order in which the encoder gives them."""

    count: int


#: What replaces a picture's slot in the prompt, in order: texts, in which control tokens count, and embeddings.
ImageLayout = tuple[str | Rows, ...]


def image_layout(height: int, width: int, spec: ModelSpec) -> ImageLayout:
    """The layout of a picture of `height` x `width` pixels, for a model that sees.

    Raises:
        BundleError: `bundle.invalid`, the spec lacks a number that its policy needs.

    Example:
        >>> from edgevlm.bundle import BUILTIN, read_manifest
        >>> image_layout(3000, 4000, read_manifest(BUILTIN).spec)
        (Rows(count=64),)
    """
    assert spec.encoder is not None
    assert spec.image is not None
    rows, columns = grid_of(height, width, spec.image)
    n_tokens, texts = spec.encoder.n_tokens, spec.prompt.tile_texts
    if texts is None:
        return (Rows(n_tokens * (rows * columns + 1)),)
    grid = _grid(rows, columns, n_tokens, texts) if rows else []
    whole: list[str | Rows] = [texts.whole, Rows(n_tokens), texts.end]
    return _joined(whole + grid if texts.whole_first else grid + whole)


def _grid(rows: int, columns: int, n_tokens: int, texts: TileTexts) -> list[str | Rows]:
    """The tiles of a picture that was cut, and all texts around them."""
    parts: list[str | Rows] = [texts.grid_start]
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            tile = texts.tile.replace("{row}", str(row)).replace("{column}", str(column))
            parts += [tile, Rows(n_tokens), texts.tile_end]
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
