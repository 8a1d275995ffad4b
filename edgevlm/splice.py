"""Prompt pieces and embeddings to the segments that the decoder is fed, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevlm.prompt import ImageSlot, Piece, TextPiece

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TextSegment:
    """Consecutive token ids; each takes one position."""

    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """One picture as rows of the decoder's input, float32 [n_rows, n_embd]; each row takes one position."""

    rows_ND: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows_ND)


Segment = TextSegment | ImageSegment

#: `(text, add_bos, parse_special) -> token ids`
Tokenize = Callable[[str, bool, bool], list[int]]


@dataclass(frozen=True)
class PlannedImage:
    """An image slot before anything was encoded: only its length is known."""

    index: int
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows


Plan = list["TextSegment | PlannedImage"]


def plan(pieces: Sequence[Piece], tokenize: Tokenize, *, bos: str, rows_per_image: int) -> Plan:
    """Tokenize the text and count the rows, before any picture is encoded.

    Each text between pictures is tokenized on its own, as the reference implementations do. The BOS token comes first,
    once: the tokenizer adds it (if the vocabulary wants one at all) unless the template has printed its text already.
    """
    segments: Plan = []
    tokens: list[int] = []
    head = pieces[0] if pieces else None
    printed = isinstance(head, TextPiece) and head.parse_special and bool(bos) and head.text.startswith(bos)
    if isinstance(head, ImageSlot):
        tokens += tokenize("", True, True)
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            segments += [TextSegment(tuple(tokens))] if tokens else []
            segments.append(PlannedImage(piece.index, rows_per_image))
            tokens = []
        else:
            tokens += tokenize(piece.text, piece is head and not printed, piece.parse_special)
    return segments + ([TextSegment(tuple(tokens))] if tokens else [])


def splice(segments: Plan, embeds: Sequence[NDArray[np.float32]]) -> list[Segment]:
    """Put the encoded pictures into their places.

    Args:
        segments: What `plan` returned.
        embeds: For each picture, float32 [n_rows, n_embd], in the order in which the pictures were given.

    Raises:
        ValueError: a picture has another number of rows than planned; our own bug.
    """
    spliced: list[Segment] = []
    for segment in segments:
        if isinstance(segment, TextSegment):
            spliced.append(segment)
        elif len(embeds[segment.index]) == segment.n_rows:
            spliced.append(ImageSegment(embeds[segment.index]))
        else:
            raise ValueError(f"picture {segment.index} has {len(embeds[segment.index])} rows, planned {segment.n_rows}")
    return spliced
