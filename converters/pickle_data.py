"""A pickle as data: the few instructions that a state dict needs, on values of our own. Nothing is ever called.

Names of classes and functions become `Name` objects and stay that; a call is looked up in a table of ours. Whatever
else a pickle asks for is an error that says what it was. Instructions: CPython's `pickletools.opcodes`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MARK = object()


@dataclass(frozen=True)
class Name:
    """A name that a pickle mentions, such as `torch.FloatStorage`."""

    text: str


class UnsafeError(ValueError):
    """The pickle asks for something that no state dict needs."""


#: What a call of a name makes of its arguments.
Calls = Mapping[str, Callable[..., Any]]


class Machine:
    """Carries out one pickle.

    Args:
        raw: The pickle.
        names: Names that may be mentioned.
        calls: Names that may be called, with what stands in for them.
        persistent: What stands for an object that lies outside the pickle.
    """

    def __init__(self, raw: bytes, names: frozenset[str], calls: Calls, persistent: Callable[[Any], Any]) -> None:
        self._raw, self._at = raw, 0
        self._names, self._calls, self._persistent = names, calls, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value that the pickle describes.

        Raises:
            UnsafeError: an instruction or a name that no state dict needs.
            ValueError: it is damaged.
        """
        try:
            while (code := self._take(1)) != b".":
                step = _STEPS.get(code)
                if step is None:
                    raise UnsafeError(f"the instruction {code!r}")
                step(self)
            (value,) = self._stack
        except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"its pickle is damaged at byte {self._at} ({type(error).__name__})") from error
        if self._at != len(self._raw):
            raise ValueError("its pickle ends before its entry")
        return value

    def _take(self, count: int) -> bytes:
        found = self._raw[self._at : self._at + count]
        if len(found) < count:
            raise ValueError("its pickle is cut off")
        self._at += count
        return found

    def _number(self, form: str) -> int:
        (value,) = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))
        return int(value)

    def _line(self) -> str:
        end = self._raw.index(b"\n", self._at)
        return self._take(end + 1 - self._at)[:-1].decode("ascii")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def _pop_to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:  # an IndexError if there is none
            at -= 1
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    # instructions

    def _protocol(self) -> None:
        if not 2 <= self._number("B") <= 5:
            raise ValueError("its pickle has an unknown protocol")

    def _name(self, text: str) -> None:
        if text not in self._names:
            raise UnsafeError(f"the name {text[:120]!r}")
        self._stack.append(Name(text))

    def _name_of_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self._name(f"{module}.{name}")

    def _call(self) -> None:
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, Name) or name.text not in self._calls:
            raise UnsafeError(f"a call of {name.text if isinstance(name, Name) else type(name).__name__!r}")
        if type(arguments) is not tuple:
            raise TypeError
        self._stack.append(self._calls[name.text](*arguments))

    def _attributes(self) -> None:
        """A state dict's `_metadata` is dropped, nothing else has attributes."""
        self._pop()
        if type(self._stack[-1]) is not dict:
            raise UnsafeError(f"attributes of {type(self._stack[-1]).__name__!r}")

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise TypeError
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):
                raise UnsafeError(f"a key of the type {type(key).__name__!r}")
            if key in target:
                raise ValueError(f"the key {str(key)[:80]!r} appears twice")
            target[key] = value

    def _append(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError
        self._stack[-1].extend(values)

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _remember(self, index: int) -> None:
        if self._stack[-1] is _MARK:
            raise IndexError
        self._memo[index] = self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _long(self) -> None:
        self._push(int.from_bytes(self._take(self._number("B")), "little", signed=True))


def _integer(form: str) -> Callable[[Machine], None]:
    return lambda m: m._push(m._number(form))


def _text(form: str) -> Callable[[Machine], None]:
    return lambda m: m._push(m._take(m._number(form)).decode("utf-8"))


#: By the instruction's byte, in the words of `pickletools`.
_STEPS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": Machine._protocol, b"\x95": lambda m: m._take(8),  # PROTO, FRAME
    b"c": lambda m: m._name(f"{m._line()}.{m._line()}"), b"\x93": Machine._name_of_stack,  # GLOBAL, STACK_GLOBAL
    b"R": Machine._call, b"b": Machine._attributes,  # REDUCE, BUILD
    b"Q": lambda m: m._push(m._persistent(m._pop())),  # BINPERSID
    b"(": lambda m: m._push(_MARK), b"0": lambda m: m._pop(),  # MARK, POP
    b"}": lambda m: m._push({}), b"]": lambda m: m._push([]), b")": lambda m: m._push(()),
    b"s": lambda m: m._set([m._pop() for _ in range(2)][::-1]), b"u": lambda m: m._set(m._pop_to_mark()),
    b"a": lambda m: m._append([m._pop()]), b"e": lambda m: m._append(m._pop_to_mark()),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m._tuple(1), b"\x86": lambda m: m._tuple(2), b"\x87": lambda m: m._tuple(3),
    b"N": lambda m: m._push(None), b"\x88": lambda m: m._push(True), b"\x89": lambda m: m._push(False),
    b"J": _integer("i"), b"K": _integer("B"), b"M": _integer("H"), b"\x8a": Machine._long,
    b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    b"X": _text("I"), b"\x8c": _text("B"),  # BINUNICODE, SHORT_BINUNICODE
    b"q": lambda m: m._remember(m._number("B")), b"r": lambda m: m._remember(m._number("I")),
    b"\x94": lambda m: m._remember(len(m._memo)),
    b"h": lambda m: m._push(m._memo[m._number("B")]), b"j": lambda m: m._push(m._memo[m._number("I")]),
}  # fmt: skip
