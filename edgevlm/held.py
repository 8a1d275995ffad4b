"""What of a context can serve a new prompt without changing its answer by a bit.

A row's numbers depend on the kernels that llama.cpp chooses by the number of rows in a batch, so batches are made, and
positions reused, in such a way that each row meets the same kernel as if the whole prompt were decoded afresh.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from edgevlm.splice import Position

#: Tokens decoded in one call. llama.cpp's flash attention takes another kernel from 64 rows on, whose sums round
#: differently (logits of SmolLM2-135M then differ by up to 1); below, each row gets the same bits in whatever batch it
#: comes (docs/reuse.md). A picture's rows come together or not at all, and need no such care.
N_TOKENS = 60
#: A single row differs again from this many positions on: several threads then share each of its sums
#: (`use_split_kv_path` in ggml's `ops.cpp`, and the cache's padding to 256).
ALONE_DIFFERS = 256
#: Marks a position whose token was drawn and decoded alone; no picture has this key.
_DRAWN = "drawn"


def drawn(token: int) -> Position:
    """A token that was decoded as a single row where that matters: it equals none of a prompt, decoded in a batch."""
    return _DRAWN, token


def shared(held: Sequence[Position], wanted: Sequence[Position]) -> int:
    """How many of the first positions of a prompt need not be decoded again.

    Never all of them, because the last one's logits are needed; and not so many that one token is left of several.

    Example:
        >>> shared([1, 2, 3, 4, 9], [1, 2, 3, 4, 5, 6])
        4
        >>> shared([1, 2, 3, 4, 9], [1, 2, 3, 4, 5])
        3
    """
    kept = 0
    for have, want in zip(held, wanted[:-1], strict=False):
        if have != want:
            break
        kept += 1
    left = list(itertools.takewhile(lambda position: isinstance(position, int), wanted[kept : kept + 2]))
    if len(left) == 1 and kept and isinstance(wanted[kept - 1], int):
        kept -= 1
    return kept


def batches(n_rows: int, limit: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of batches of at most `limit`, of equal sizes up to one: no small one is left at the end."""
    n_batches = -(-n_rows // limit)
    edges = [n_rows * number // max(n_batches, 1) for number in range(n_batches + 1)]
    return ((start, end - start) for start, end in itertools.pairwise(edges))
