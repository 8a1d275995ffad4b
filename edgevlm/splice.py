"""Prompt pieces and embeddings to the segments that the decoder is fed, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevlm.layout import ImageLayout
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
    """Rows [start, start + n_rows) of picture `index`, before anything was encoded."""

    index: int
    start: int
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows


Plan = list["TextSegment | PlannedImage"]


def plan(pieces: Sequence[Piece], tokenize: Tokenize, *, bos: str, layouts: Sequence[ImageLayout]) -> Plan:
    """Tokenize the text and count the rows, before any picture is encoded. `layouts` has one entry for each picture.

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
        if isinstance(piece, TextPiece):
            tokens += tokenize(piece.text, piece is head and not printed, piece.parse_special)
            continue
        start = 0
        for part in layouts[piece.index]:
            if isinstance(part, str):
                tokens += tokenize(part, False, True)
                continue
            segments += [TextSegment(tuple(tokens))] if tokens else []
            segments.append(PlannedImage(piece.index, start, part.count))
            start, tokens = start + part.count, []
    return segments + ([TextSegment(tuple(tokens))] if tokens else [])


def prompt_tokens(segments: Sequence[TextSegment | PlannedImage | ImageSegment]) -> list[int]:
    """The token ids of a prompt in order, with one -1 for each run of picture rows."""
    ids: list[int] = []
    for segment in segments:
        ids += segment.tokens if isinstance(segment, TextSegment) else (-1,)
    return ids


def splice(segments: Plan, embeds: Sequence[NDArray[np.float32]]) -> list[Segment]:
    """Put the encoded pictures into their places.

    Args:
        segments: What `plan` returned.
        embeds: For each picture, float32 [n_rows, n_embd], in the order in which the pictures were given.

    Raises:
        ValueError: a picture has another number of rows than planned; our own bug.
    """
    planned = [0] * len(embeds)
    for segment in segments:
        if isinstance(segment, PlannedImage):
            planned[segment.index] += segment.n_rows
    if planned != [len(rows_ND) for rows_ND in embeds]:
        raise ValueError(f"the pictures have {[len(rows_ND) for rows_ND in embeds]} rows, planned {planned}")
    return [
        segment
        if isinstance(segment, TextSegment)
        else ImageSegment(embeds[segment.index][segment.start : segment.start + segment.n_rows])
        for segment in segments
    ]
