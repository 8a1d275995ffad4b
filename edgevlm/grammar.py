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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: Arrays and objects that may be open at once.
LEVELS = 64
#: Alternatives that are followed at once; beyond, the last ones are given up, which no sensible schema meets.
_MOST_STACKS = 256
_MOST_FORCED = 1 << 16
_NEVER = LEVELS + 1

_INTEGER_DIGITS, _FRACTION_DIGITS, _EXPONENT_DIGITS = 18, 24, 2
#: The largest integer that is written, and the smallest if negative.
LARGEST = 10**_INTEGER_DIGITS - 1

#: (node, place, level, rest); None is the empty stack: the document may end here.
Frame = tuple["Node", Any, int, Any]
Stack = Frame | None


@functools.cache
def _mask(accepted: bytes) -> int:
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


def _follow(rest: Stack) -> Iterator[Stack]:
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

    __slots__ = ("_following", "may_end", "next_bytes", "stacks")

    def __init__(self, stacks: Sequence[Stack]) -> None:
        distinct = dict.fromkeys(stacks) if len(stacks) > 1 else stacks
        self.may_end = None in distinct
        self.stacks: tuple[Frame, ...] = tuple(stack for stack in distinct if stack is not None)[:_MOST_STACKS]
        self.next_bytes = 0
        for node, place, _, _ in self.stacks:
            self.next_bytes |= node.mask(place)
        self._following: dict[int, State] = {}

    def advance(self, data: bytes) -> State | None:
        """The state after some bytes, or None if they do not fit."""
        state = self
        for byte in data:
            if not state.next_bytes >> byte & 1:
                return None
            state = state._following.get(byte) or state._step(byte)
        return state

    def _step(self, byte: int) -> State:
        stacks: list[Stack] = []
        for node, place, level, rest in self.stacks:
            stacks += node.step(place, byte, level, rest)
        following = State(stacks)
        # Inside a text most bytes lead back to where they came from: remembered, they cost next to nothing.
        if following.stacks == self.stacks and following.may_end == self.may_end:
            following = self
        self._following[byte] = following
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


def never_ends(node: Node) -> bool:
    """Whether every document of this node would be infinitely deep, or there is none."""
    return node.need > LEVELS


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
            yield from _follow(rest)
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
        self.masks = [_mask(bytes(branch)) for branch in self.branches]


class Choice(Node):
    """Any of several nodes; they may be filled in later."""

    def __init__(self, alternatives: Sequence[Node] = ()) -> None:
        self.alternatives = list(alternatives)
        self.need = _NEVER

    def update_need(self) -> bool:
        need = min((node.need for node in self.alternatives), default=_NEVER)
        changed, self.need = need != self.need, need
        return changed

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        for node in self.alternatives:
            if level + node.need <= LEVELS:
                yield from node.enter(level, rest)


class Object(Node):
    """An object with known properties, written in their order; only required ones must be there.

    Args:
        properties: (name, value, whether it is required).
        quote: JSON text of a name.
    """

    def __init__(self, properties: Sequence[tuple[str, Node, bool]], quote: Callable[[str], bytes]) -> None:
        self._keys = [quote(name) for name, _, _ in properties]
        self.values = [value for _, value, _ in properties]
        self.required = [required for _, _, required in properties]
        self.need = _NEVER
        self._tables: dict[tuple[int, bool, int], Trie] = {}

    def update_need(self) -> bool:
        needs = [value.need for value, required in zip(self.values, self.required, strict=True) if required]
        need = min(1 + max(needs, default=0), _NEVER)
        changed, self.need = need != self.need, need
        return changed

    def _table(self, first: int, level: int, opening: bool) -> Trie:
        """What may be written when the properties before `first` are dealt with: a key, or the end."""
        spare = LEVELS - level - 1
        fits = [value.need <= spare for value in self.values[first:]]
        key = (first, opening, sum(1 << index for index, fit in enumerate(fits) if fit))
        if key not in self._tables:
            words = {}
            for index in range(first, len(self._keys)):
                if fits[index - first]:
                    words[(b"{" if opening else b", ") + self._keys[index] + b": "] = index
                if self.required[index]:
                    break
            else:
                words[b"{}" if opening else b"}"] = -1
            self._tables[key] = Trie(words)
        return self._tables[key]

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, (self._table(0, level, True), 0), level, rest)

    def step(self, place: tuple[Trie, int], byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        trie, at = place
        following = trie.branches[at].get(byte)
        if following is None:
            return
        index = trie.leaves.get(following)
        if index is None:
            yield (self, (trie, following), level, rest)
        elif index < 0:
            yield from _follow(rest)
        else:
            yield from self.values[index].enter(level + 1, (self, index + 1, level, rest))

    def mask(self, place: tuple[Trie, int]) -> int:
        return place[0].masks[place[1]]

    def resume(self, place: int, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, (self._table(place, level, False), 0), level, rest)


class Array(Node):
    """From `least` to `most` documents of one node; no `most` is no bound."""

    def __init__(self, items: Node, least: int = 0, most: int | None = None) -> None:
        self.items, self.least, self.most = items, least, most
        self.need = _NEVER

    def update_need(self) -> bool:
        need = min(1 + (self.items.need if self.least else 0), _NEVER)
        changed, self.need = need != self.need, need
        return changed

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, ("[", 0), level, rest)

    def step(self, place: tuple[str, int], byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        expected, count = place
        if byte == 0x5D and "]" in expected:
            yield from _follow(rest)
        elif byte == 0x2C and "," in expected:
            yield (self, (" ", count), level, rest)
        elif byte == 0x5B and expected == "[":
            if not self.least:
                yield (self, ("]", 0), level, rest)
            if self._has_room(0, level):
                yield from self._item(0, level, rest)
        elif byte == 0x20 and expected == " ":
            yield from self._item(count, level, rest)

    def _has_room(self, count: int, level: int) -> bool:
        return (self.most is None or count < self.most) and level + 1 + self.items.need <= LEVELS

    def _item(self, count: int, level: int, rest: Stack) -> Iterator[Stack]:
        # Without an upper bound, counts above the lower one make no difference.
        count = count + 1 if self.most is not None else min(count + 1, self.least)
        yield from self.items.enter(level + 1, (self, count, level, rest))

    def mask(self, place: tuple[str, int]) -> int:
        return _mask(place[0].encode())

    def resume(self, place: int, level: int, rest: Stack) -> Iterator[Stack]:
        expected = ("]" if place >= self.least else "") + ("," if self._has_room(place, level) else "")
        yield (self, (expected, place), level, rest)


class Map(Node):
    """An object with any keys, whose values are documents of one node."""

    def __init__(self, values: Node) -> None:
        self.values = values
        self._key = String()
        self.need = _NEVER

    def update_need(self) -> bool:
        changed, self.need = self.need != 1, 1
        return changed

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, "{", level, rest)

    def step(self, place: str, byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        if chr(byte) not in place:
            return
        if byte == 0x7D:
            yield from _follow(rest)
        elif byte == 0x7B:
            yield (self, "}", level, rest)
            if level + 1 + self.values.need <= LEVELS:
                yield from self._key.enter(level, (self, ":", level, rest))
        elif byte == 0x3A:
            yield (self, " ", level, (self, "value", level, rest))
        elif byte == 0x2C:
            yield (self, " ", level, (self, "key", level, rest))
        else:  # the space after a colon or a comma
            yield from _follow(rest)

    def mask(self, place: str) -> int:
        return _mask(place.encode())

    def resume(self, place: str, level: int, rest: Stack) -> Iterator[Stack]:
        if place == "key":
            yield from self._key.enter(level, (self, ":", level, rest))
        elif place == "value":
            yield from self.values.enter(level + 1, (self, ",}", level, rest))
        else:
            yield (self, place, level, rest)


_PLAIN = sum(1 << byte for byte in range(0x20, 0x80)) & ~_mask(b'"\\')
_ESCAPES = _mask(b'"\\/bfnrt')
_DIGITS = _mask(b"0123456789")
_HEX = _mask(b"0123456789abcdefABCDEF")
#: First byte of a character in UTF-8 -> (lowest and highest second byte, how many follow): RFC 3629, section 4.
_LEADS = {
    **dict.fromkeys(range(0xC2, 0xE0), (0x80, 0xBF, 1)),
    **dict.fromkeys(range(0xE1, 0xF0), (0x80, 0xBF, 2)),
    **dict.fromkeys(range(0xF1, 0xF4), (0x80, 0xBF, 3)),
    0xE0: (0xA0, 0xBF, 2), 0xED: (0x80, 0x9F, 2), 0xF0: (0x90, 0xBF, 3), 0xF4: (0x80, 0x8F, 3),
}  # fmt: skip
_CHARACTERS = _PLAIN | _mask(b"\\") | _mask(bytes(_LEADS))
_QUOTE = _mask(b'"')


class String(Node):
    """A text of `least` to `most` characters (code points, as JSON Schema counts), in valid UTF-8.

    Places are `(what is expected, count of whole characters, more)`. Escapes are allowed, halves of surrogate pairs
    only as whole pairs.
    """

    def __init__(self, least: int = 0, most: int | None = None) -> None:
        self.least, self.most = least, most

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, ("open", 0, None), level, rest)

    def step(self, place: tuple[str, int, Any], byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        if not self.mask(place) >> byte & 1:
            return
        expected, count, more = place
        if expected == "body" and byte == 0x22:
            yield from _follow(rest)
            return
        if expected == "open":
            after: tuple[str, int, Any] = ("body", 0, None)
        elif expected == "body":
            after = self._character(count, byte)
        elif expected == "utf8":
            _, _, left = more
            after = self._whole(count) if left == 1 else ("utf8", count, (0x80, 0xBF, left - 1))
        elif expected == "escape":
            after = ("hex", count, ("", "")) if byte == 0x75 else self._whole(count)
        elif expected == "hex":
            after = self._hex(count, more[0] + chr(byte).lower(), more[1])
        else:  # the backslash and the u between the halves of a surrogate pair
            after = ("low u", count, None) if expected == "low" else ("hex", count, ("", "low"))
        yield (self, after, level, rest)

    def _character(self, count: int, byte: int) -> tuple[str, int, Any]:
        if byte == 0x5C:
            return ("escape", count, None)
        return ("utf8", count, _LEADS[byte]) if byte >= 0x80 else self._whole(count)

    def _whole(self, count: int) -> tuple[str, int, Any]:
        return ("body", count + 1 if self.most is not None else min(count + 1, self.least), None)

    def _hex(self, count: int, digits: str, half: str) -> tuple[str, int, Any]:
        if len(digits) < 4:
            return ("hex", count, (digits, half))
        is_high = not half and digits[0] == "d" and digits[1] in "89ab"
        return ("low", count, None) if is_high else self._whole(count)

    def mask(self, place: tuple[str, int, Any]) -> int:
        expected, count, more = place
        if expected == "body":
            return (_QUOTE if count >= self.least else 0) | (
                _CHARACTERS if self.most is None or count < self.most else 0
            )
        if expected == "utf8":
            return ((1 << more[1] + 1) - 1) & ~((1 << more[0]) - 1)
        if expected == "hex":
            digits, half = more
            if half and len(digits) < 2:
                return _mask(b"cdefCDEF") if digits else _mask(b"dD")
            # A low half never comes first.
            return _mask(b"0123456789abAB") if digits == "d" else _HEX
        return {"open": _QUOTE, "escape": _ESCAPES | _mask(b"u"), "low": _mask(b"\\"), "low u": _mask(b"u")}[expected]


class Number(Node):
    """A number with optional fraction and exponent. Places are `(part, digits of it)`.

    Args:
        signed: Whether it may be negative.
    """

    #: part -> (most digits, what may follow besides digits)
    _PARTS = {  # noqa: RUF012 - never written
        "integer": (_INTEGER_DIGITS, b".eE"),
        "fraction": (_FRACTION_DIGITS, b"eE"),
        "exponent": (_EXPONENT_DIGITS, b""),
    }

    def __init__(self, *, signed: bool = True) -> None:
        self._signed = signed

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, ("start", 0), level, rest)

    def mask(self, place: tuple[str, int]) -> int:
        part, digits = place
        if part == "start":
            return _DIGITS | (_mask(b"-") if self._signed else 0)
        if part == "zero":
            return _mask(b".eE")
        if part == "sign":  # of the exponent
            return _DIGITS | _mask(b"+-")
        if part not in self._PARTS:  # after a minus or the exponent's sign
            return _DIGITS
        most, others = self._PARTS[part]
        return (_DIGITS if digits < most else 0) | (_mask(others) if digits else 0)

    def step(self, place: tuple[str, int], byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        if not self.mask(place) >> byte & 1:
            return
        part, digits = place
        if byte in b"0123456789":
            if part in ("start", "minus"):
                after = ("zero", 1) if byte == 0x30 else ("integer", 1)
            else:
                after = ("exponent" if part in ("sign", "signed") else part, digits + 1)
            yield from _follow(rest)
        else:
            after = {0x2E: ("fraction", 0), 0x65: ("sign", 0), 0x45: ("sign", 0)}.get(
                byte, ("minus" if part == "start" else "signed", 0)
            )
        if self.mask(after):
            yield (self, after, level, rest)


class Integer(Node):
    """A whole number from `low` to `high`, both within `LARGEST`; -0 is not written.

    Places are the text so far: `(sign, magnitude, digits)`, None before the first byte.
    """

    def __init__(self, low: int = -LARGEST, high: int = LARGEST) -> None:
        self.low, self.high = low, high

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, None, level, rest)

    def _can_reach(self, sign: int, magnitude: int, digits: int) -> bool:
        """Whether some number in range begins with these digits."""
        low, high = (self.low, self.high) if sign > 0 else (-self.high, -self.low)
        if magnitude == 0 and digits:
            return sign > 0 and low <= 0 <= high
        low = max(low, 1) if sign < 0 else max(low, 0)
        for more in range(_INTEGER_DIGITS - digits + 1):
            if magnitude * 10**more <= high and (magnitude + 1) * 10**more - 1 >= low:
                return True
        return False

    def _after(self, place: tuple[int, int, int] | None, byte: int) -> tuple[int, int, int] | None:
        sign, magnitude, digits = place or (1, 0, 0)
        if byte == 0x2D:
            return (-1, 0, 0) if place is None and self._can_reach(-1, 0, 0) else None
        if not 0x30 <= byte <= 0x39 or (digits and not magnitude):
            return None
        after = (sign, magnitude * 10 + byte - 0x30, digits + 1)
        return after if self._can_reach(*after) else None

    def mask(self, place: tuple[int, int, int] | None) -> int:
        return _mask(bytes(byte for byte in b"-0123456789" if self._after(place, byte)))

    def step(self, place: tuple[int, int, int] | None, byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        after = self._after(place, byte)
        if after is None:
            return
        sign, magnitude, digits = after
        if digits and self.low <= sign * magnitude <= self.high:
            yield from _follow(rest)
        if self.mask(after):
            yield (self, after, level, rest)


def anything() -> tuple[Node, list[Node]]:
    """Any JSON document, with its nodes; and as their last one, any object."""
    value = Choice()
    members = Map(value)
    value.alternatives = [Words([b"true", b"false", b"null"]), String(), Number(), Array(value), members]
    return value, [*value.alternatives[:-1], value, members]
