"""Which bytes may come next in a JSON document: a pushdown automaton that reads byte by byte.

A document is written in one way only: no white space but one space after each `:` and `,`, as `json.dumps` writes by
default. A model can therefore not lose itself in white space, and as much as possible is forced: bytes that have no
alternative need no model. Numbers have at most 18 digits before the point, 24 after it and 2 in the exponent; without
a bound, "1.000000..." is where constrained models get stuck.

A state is immutable, so trying a continuation costs nothing to undo. It is a tuple of stacks, because alternatives may
begin alike; a stack is a linked list of frames `(node, place in the node, level, rest)`. Levels count open arrays and
objects. Each node knows how many more levels its shallowest document needs, and none is begun that could not be ended
within `LEVELS`: from every state that can be reached some document can be completed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

#: Arrays and objects that may be open at once.
LEVELS = 64
#: Alternatives that are followed at once; beyond, the last ones are given up, which no sensible schema meets.
MOST_STACKS = 256
_MOST_FORCED = 1 << 16
#: `need` of a node that no document satisfies.
NEVER = LEVELS + 1

#: (node, place, level, rest); None is the empty stack: the document may end here.
Frame = tuple["Node", Any, int, Any]
Stack = Frame | None


@functools.cache
def bits(accepted: bytes) -> int:
    """A set of bytes as an integer."""
    return sum(1 << byte for byte in set(accepted))


class Node:
    """A part of a grammar."""

    #: Levels that the shallowest document of this node opens.
    need: int = 0

    def update_need(self) -> bool:
        """Compute `need` from the children's; True if it changed."""
        return False

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        """Stacks that begin this node and go on with `rest`; each waits for a byte or is empty."""
        raise NotImplementedError

    def step(self, place: Any, byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        """Stacks after a byte; none if it does not fit."""
        raise NotImplementedError

    def mask(self, place: Any) -> int:
        """The bytes that `step` takes, as a bit set."""
        raise NotImplementedError

    def resume(self, place: Any, level: int, rest: Stack) -> Iterator[Stack]:
        """Go on after a child has ended."""
        raise NotImplementedError


def follow(rest: Stack) -> Iterator[Stack]:
    """Go on after a node has ended."""
    if rest is None:
        yield None
    else:
        node, place, level, below = rest
        yield from node.resume(place, level, below)


class State:
    """What has been read so far, as far as it matters.

    Attributes:
        may_end: Whether the document is whole here.
        next_bytes: Bit set of the bytes that may come next; 0 if the document cannot go on.
    """

    __slots__ = ("following", "may_end", "next_bytes", "stacks")

    def __init__(self, stacks: Sequence[Stack]) -> None:
        distinct = dict.fromkeys(stacks) if len(stacks) > 1 else stacks
        self.may_end = None in distinct
        self.stacks: tuple[Frame, ...] = tuple(stack for stack in distinct if stack is not None)[:MOST_STACKS]
        self.next_bytes = 0
        for node, place, _, _ in self.stacks:
            self.next_bytes |= node.mask(place)
        self.following: dict[int, State] = {}

    def advance(self, data: bytes) -> State | None:
        """The state after some bytes, or None if they do not fit."""
        state = self
        for byte in data:
            if not state.next_bytes >> byte & 1:
                return None
            state = state.following.get(byte) or state._step(byte)
        return state

    def _step(self, byte: int) -> State:
        stacks: list[Stack] = []
        for node, place, level, rest in self.stacks:
            stacks += node.step(place, byte, level, rest)
            if len(stacks) > MOST_STACKS:
                stacks = list(dict.fromkeys(stacks))
                if len(stacks) > MOST_STACKS:  # what else there is would be given up
                    break
        following = State(stacks)
        # Inside a text most bytes lead back to where they came from: remembered, they cost next to nothing.
        if following.stacks == self.stacks and following.may_end == self.may_end:
            following = self
        self.following[byte] = following
        return following

    def forced(self) -> bytes:
        """The bytes that must come next, as far as there is one continuation only."""
        forced, state = bytearray(), self
        while len(forced) < _MOST_FORCED and not state.may_end and state.next_bytes.bit_count() == 1:
            byte = bytes([state.next_bytes.bit_length() - 1])
            following = state.advance(byte)
            assert following is not None
            forced += byte
            state = following
        return bytes(forced)


def start(root: Node) -> State:
    """The state before the first byte."""
    return State(tuple(root.enter(0, None)))


def settle(nodes: Sequence[Node]) -> None:
    """Compute how deep each node needs to nest: the least fixed point, children before parents where possible."""
    while sum(node.update_need() for node in nodes):  # all of them each time
        pass


class Words(Node):
    """One of a number of fixed byte strings."""

    def __init__(self, words: Sequence[bytes]) -> None:
        self._trie = Trie(dict.fromkeys(words, 0))

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, 0, level, rest)

    def step(self, place: int, byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        following = self._trie.branches[place].get(byte)
        if following is None:
            return
        if following in self._trie.leaves:
            yield from follow(rest)
        if self._trie.branches[following]:
            yield (self, following, level, rest)

    def mask(self, place: int) -> int:
        return self._trie.masks[place]


class Trie:
    """Words and what each stands for."""

    def __init__(self, words: dict[bytes, int]) -> None:
        self.branches: list[dict[int, int]] = [{}]
        self.leaves: dict[int, int] = {}
        for word, meaning in words.items():
            at = 0
            for byte in word:
                if byte not in self.branches[at]:
                    self.branches[at][byte] = len(self.branches)
                    self.branches.append({})
                at = self.branches[at][byte]
            self.leaves[at] = meaning
        self.masks = [bits(bytes(branch)) for branch in self.branches]
