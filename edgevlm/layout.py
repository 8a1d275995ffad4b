"""Where a picture's embeddings stand among the tokens: known from its size alone, before anything is encoded."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.spec import ModelSpec, TileTexts
from edgevlm.tiling import TilePlan, plan_tiles


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
    n_tokens, texts = spec.encoder.n_tokens, spec.prompt.tile_texts
    plan = plan_tiles(height, width, spec.image) if spec.image.policy == "tiles" else None
    if texts is None:
        return (Rows(n_tokens * (plan.n_tiles if plan else 1)),)
    before, grid = _grid(plan, n_tokens, texts) if plan and plan.rows else ("", ())
    return tuple(part for part in (*grid, before + texts.whole, Rows(n_tokens), texts.end) if part)


def _grid(plan: TilePlan, n_tokens: int, texts: TileTexts) -> tuple[str, ImageLayout]:
    """The tiles of a picture that was cut, and the text behind the last of them.

    Neighbouring texts are joined: tokenized apart, the newlines between them would not become one token.
    """
    parts: list[str | Rows] = []
    before = ""
    for row in range(1, plan.rows + 1):
        for column in range(1, plan.columns + 1):
            tile = texts.tile.replace("{row}", str(row)).replace("{column}", str(column))
            parts += [before + tile, Rows(n_tokens)]
            before = ""
        before = texts.row_end
    return before + texts.grid_end, tuple(parts)
