"""What documents are made of: objects, arrays, and choices between them, over the automaton."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from edgevlm.automaton import LEVELS, MOST_STACKS, NEVER, Node, Stack, Trie, Words, bits, follow
from edgevlm.scalars import Number, String


class Choice(Node):
    """Any of several nodes; they may be filled in later."""

    def __init__(self, alternatives: Sequence[Node] = ()) -> None:
        self.alternatives = list(dict.fromkeys(alternatives))
        self.need = NEVER

    def update_need(self) -> bool:
        need = min((node.need for node in self.alternatives), default=NEVER)
        changed, self.need = need != self.need, need
        return changed

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        # Each node once: choices within choices have more paths than can be followed.
        seen: set[Node] = {self}
        waiting: list[Node] = self.alternatives[::-1]
        left = MOST_STACKS
        while waiting and left:
            node = waiting.pop()
            if node in seen or level + node.need > LEVELS:
                continue
            seen.add(node)
            if isinstance(node, Choice):
                waiting += node.alternatives[::-1]
            else:
                yield from node.enter(level, rest)
                left -= 1


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
        self.need = NEVER
        self._tables: dict[tuple[int, bool, int], Trie] = {}

    def update_need(self) -> bool:
        needs = [value.need for value, required in zip(self.values, self.required, strict=True) if required]
        need = min(1 + max(needs, default=0), NEVER)
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
            yield from follow(rest)
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
        self.need = NEVER

    def update_need(self) -> bool:
        need = min(1 + (self.items.need if self.least else 0), NEVER)
        changed, self.need = need != self.need, need
        return changed

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, ("[", 0), level, rest)

    def step(self, place: tuple[str, int], byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        expected, count = place
        if byte == 0x5D and "]" in expected:
            yield from follow(rest)
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
        return bits(place[0].encode())

    def resume(self, place: int, level: int, rest: Stack) -> Iterator[Stack]:
        expected = ("]" if place >= self.least else "") + ("," if self._has_room(place, level) else "")
        yield (self, (expected, place), level, rest)


class Map(Node):
    """An object with any keys, whose values are documents of one node."""

    def __init__(self, values: Node) -> None:
        self.values = values
        self._key = String()
        self.need = NEVER

    def update_need(self) -> bool:
        changed, self.need = self.need != 1, 1
        return changed

    def enter(self, level: int, rest: Stack) -> Iterator[Stack]:
        yield (self, "{", level, rest)

    def step(self, place: str, byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        if chr(byte) not in place:
            return
        if byte == 0x7D:
            yield from follow(rest)
        elif byte == 0x7B:
            yield (self, "}", level, rest)
            if level + 1 + self.values.need <= LEVELS:
                yield from self._key.enter(level, (self, ":", level, rest))
        elif byte == 0x3A:
            yield (self, " ", level, (self, "value", level, rest))
        elif byte == 0x2C:
            yield (self, " ", level, (self, "key", level, rest))
        else:  # the space after a colon or a comma
            yield from follow(rest)

    def mask(self, place: str) -> int:
        return bits(place.encode())

    def resume(self, place: str, level: int, rest: Stack) -> Iterator[Stack]:
        if place == "key":
            yield from self._key.enter(level, (self, ":", level, rest))
        elif place == "value":
            yield from self.values.enter(level + 1, (self, ",}", level, rest))
        else:
            yield (self, place, level, rest)


def anything() -> tuple[Node, list[Node]]:
    """Any JSON document, with its nodes; and as their last one, any object."""
    value = Choice()
    members = Map(value)
    value.alternatives = [Words([b"true", b"false", b"null"]), String(), Number(), Array(value), members]
    return value, [*value.alternatives[:-1], value, members]
