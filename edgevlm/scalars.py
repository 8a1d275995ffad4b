"""Texts and numbers of a JSON document, for the automaton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgevlm.automaton import Node, Stack, bits, follow

_INTEGER_DIGITS, _FRACTION_DIGITS, _EXPONENT_DIGITS = 18, 24, 2
#: The largest integer that is written, and the smallest if negative.
LARGEST = 10**_INTEGER_DIGITS - 1

_PLAIN = sum(1 << byte for byte in range(0x20, 0x80)) & ~bits(b'"\\')
_ESCAPES = bits(b'"\\/bfnrt')
_DIGITS = bits(b"0123456789")
_HEX = bits(b"0123456789abcdefABCDEF")
#: First byte of a character in UTF-8 -> (lowest and highest second byte, how many follow): RFC 3629, section 4.
_LEADS = {
    **dict.fromkeys(range(0xC2, 0xE0), (0x80, 0xBF, 1)),
    **dict.fromkeys(range(0xE1, 0xF0), (0x80, 0xBF, 2)),
    **dict.fromkeys(range(0xF1, 0xF4), (0x80, 0xBF, 3)),
    0xE0: (0xA0, 0xBF, 2), 0xED: (0x80, 0x9F, 2), 0xF0: (0x90, 0xBF, 3), 0xF4: (0x80, 0x8F, 3),
}  # fmt: skip
_CHARACTERS = _PLAIN | bits(b"\\") | bits(bytes(_LEADS))
_QUOTE = bits(b'"')


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
            yield from follow(rest)
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
            low, high, _ = more
            return sum(1 << byte for byte in range(low, high + 1))
        if expected == "hex":
            digits, half = more
            if half and len(digits) < 2:
                return bits(b"cdefCDEF") if digits else bits(b"dD")
            # A low half never comes first.
            return bits(b"0123456789abAB") if digits == "d" else _HEX
        return {"open": _QUOTE, "escape": _ESCAPES | bits(b"u"), "low": bits(b"\\"), "low u": bits(b"u")}[expected]


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
            return _DIGITS | (bits(b"-") if self._signed else 0)
        if part == "zero":
            return bits(b".eE")
        if part == "sign":  # of the exponent
            return _DIGITS | bits(b"+-")
        if part not in self._PARTS:  # after a minus or the exponent's sign
            return _DIGITS
        most, others = self._PARTS[part]
        return (_DIGITS if digits < most else 0) | (bits(others) if digits else 0)

    def step(self, place: tuple[str, int], byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        if not self.mask(place) >> byte & 1:
            return
        part, digits = place
        if byte in b"0123456789":
            if part in ("start", "minus"):
                after = ("zero", 1) if byte == 0x30 else ("integer", 1)
            else:
                after = ("exponent" if part in ("sign", "signed") else part, digits + 1)
            yield from follow(rest)
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
        return bits(bytes(byte for byte in b"-0123456789" if self._after(place, byte)))

    def step(self, place: tuple[int, int, int] | None, byte: int, level: int, rest: Stack) -> Iterator[Stack]:
        after = self._after(place, byte)
        if after is None:
            return
        sign, magnitude, digits = after
        if digits and self.low <= sign * magnitude <= self.high:
            yield from follow(rest)
        if self.mask(after):
            yield (self, after, level, rest)
