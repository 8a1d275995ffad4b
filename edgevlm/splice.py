"""Prompt pieces and embeddings to the segments that the decoder is fed, in order."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgevlm.layout import ImageLayout
from edgevlm.prompt import ImageSlot, Piece, TextPiece

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


#: What one position of a context holds: a token's id, or (key of a picture's embeddings, row).
Position = int | tuple[str, int]


@dataclass(frozen=True)
class TextSegment:
    """Consecutive token ids; each takes one position."""

    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def positions(self) -> tuple[int, ...]:
        """What the context holds once this was decoded."""
        return self.tokens


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """Rows [start, start + n) of a picture, as the decoder's input, float32 [n, n_embd]; each row takes one position.

    `key` says which embeddings these are: equal keys, equal rows. Without one they equal no others.
    """

    rows_ND: NDArray[np.float32]
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    start: int = 0

    def __len__(self) -> int:
        return len(self.rows_ND)

    def positions(self) -> list[Position]:
        """What the context holds once this was decoded."""
        return [(self.key, row) for row in range(self.start, self.start + len(self))]


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


def positions(segments: Plan, keys: Sequence[str]) -> list[Position]:
    """What a context holds once the plan was decoded; `keys` has the key of each picture's embeddings."""
    found: list[Position] = []
    for segment in segments:
        if isinstance(segment, TextSegment):
            found += segment.tokens
        else:
            found += [(keys[segment.index], row) for row in range(segment.start, segment.start + segment.n_rows)]
    return found


def skip(segments: Plan, n_positions: int) -> Plan:
    """The plan without its first positions, which the context holds already."""
    left: Plan = []
    for segment in segments:
        drop, n_positions = min(len(segment), n_positions), max(0, n_positions - len(segment))
        if drop == len(segment):
            continue
        if isinstance(segment, TextSegment):
            left.append(TextSegment(segment.tokens[drop:]))
        else:
            left.append(PlannedImage(segment.index, segment.start + drop, segment.n_rows - drop))
    return left


def splice(segments: Plan, embeds: Mapping[int, tuple[str, NDArray[np.float32]]]) -> list[Segment]:
    """Put the encoded pictures into their places.

    Args:
        segments: What `plan` returned, or what `skip` left of it.
        embeds: For each picture that is in it, by its index, its key and all its embeddings, float32 [n_rows, n_embd].

    Raises:
        ValueError: a picture has fewer rows than planned; our own bug.
    """
    spliced: list[Segment] = []
    for segment in segments:
        if isinstance(segment, TextSegment):
            spliced.append(segment)
            continue
        key, rows_ND = embeds[segment.index]
        end = segment.start + segment.n_rows
        if end > len(rows_ND):
            raise ValueError(f"picture {segment.index} has {len(rows_ND)} rows, {end} were planned")
        spliced.append(ImageSegment(rows_ND[segment.start : end], key, segment.start))
    return spliced
