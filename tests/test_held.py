"""Which positions of a context can be reused, and in which batches rows are decoded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgevlm.held import batches, drawn, shared

POSITIONS = st.lists(st.one_of(st.integers(0, 3), st.tuples(st.sampled_from("ab"), st.integers(0, 2))), max_size=12)


def common(one, other):
    """Length of the longest common beginning, counted in the plainest way."""
    return next((n for n, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))


@given(POSITIONS, POSITIONS.filter(bool))
def test_what_is_reused_is_a_common_beginning_and_something_is_left(held, wanted) -> None:
    kept = shared(held, wanted)
    longest = min(common(held, wanted), len(wanted) - 1)
    assert kept in (longest, longest - 1)
    run = [isinstance(position, int) for position in wanted]
    alone = run[kept] and (kept + 1 == len(wanted) or not run[kept + 1])
    assert not (alone and kept and run[kept - 1])  # one token of several is never left
    if kept < longest:
        assert run[longest]
        assert run[longest - 1]
        assert longest + 1 == len(wanted) or not run[longest + 1]


def test_a_drawn_token_equals_no_token_of_a_prompt() -> None:
    assert shared([1, 2, drawn(3), 4], [1, 2, 3, 4, 5]) == 2
    assert shared([1, 2, 3, 4], [1, 2, 3, 4, 5, 6]) == 4


@given(st.integers(0, 2000), st.integers(1, 512))
def test_batches_are_alike_and_together_the_whole(n_rows: int, limit: int) -> None:
    made = list(batches(n_rows, limit))
    assert [start for start, _ in made] == [sum(count for _, count in made[:i]) for i in range(len(made))]
    sizes = [count for _, count in made]
    assert sum(sizes) == n_rows
    assert all(1 <= size <= limit for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    # What a picture needs: rows enough for the kernel of 64 get it in every batch.
    assert limit < 512 or n_rows < 64 or min(sizes) >= 64
