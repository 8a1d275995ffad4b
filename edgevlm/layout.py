"""Where a picture's embeddings stand among the tokens: known from its size alone, before anything is encoded."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.spec import ModelSpec


@dataclass(frozen=True)
class Rows:
    """So many embeddings, the next ones in the order in which the encoder gives them."""

    count: int


#: What replaces a picture's slot in the prompt, in order: texts, in which control tokens count, and embeddings.
ImageLayout = tuple[str | Rows, ...]


def image_layout(height: int, width: int, spec: ModelSpec) -> ImageLayout:
    """The layout of a picture of `height` x `width` pixels, for a model that sees.

    Example:
        >>> from edgevlm.bundle import BUILTIN, read_manifest
        >>> image_layout(3000, 4000, read_manifest(BUILTIN).spec)
        (Rows(count=64),)
    """
    assert spec.encoder is not None
    return (Rows(spec.encoder.n_tokens),)
