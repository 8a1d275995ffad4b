"""Messages in protobuf's wire format, as far as SentencePiece needs them; every byte is accounted for.

Source: "Encoding" in the documentation of protocol buffers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRES = {int: _VARINT, bytes: _BYTES, float: _FIXED32}

#: The values of each field of a message, in order, with their wire types.
Message = dict[int, list[tuple[int, Any]]]
T = TypeVar("T", int, bytes, float)


@dataclass(frozen=True)
class Field(Generic[T]):
    """A field that is read: its number, and its value when absent, which also gives its type."""

    number: int
    default: T

    def of(self, message: Message) -> T:
        """The value in a message; of several the last counts.

        Raises:
            ValueError: the field has another wire type.
        """
        found = self.default
        for wire, value in message.get(self.number, ()):
            if wire != _WIRES[type(self.default)]:
                raise ValueError(f"field {self.number} has the wire type {wire}")
            found = struct.unpack("<f", value)[0] if wire == _FIXED32 else value
        return found


def repeated(message: Message, number: int) -> list[bytes]:
    """All values of a field of messages.

    Raises:
        ValueError: a value has another wire type.
    """
    if any(wire != _BYTES for wire, _ in message.get(number, ())):
        raise ValueError(f"field {number} has a value that is no message")
    return [value for _, value in message.get(number, ())]


def parse(raw: bytes) -> Message:
    """Split one message into its fields.

    Raises:
        ValueError: it ends within a field, or has a field of an unknown kind.
    """
    fields: Message = {}
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == _VARINT:
            value, position = _varint(raw, position)
        elif wire in (_FIXED64, _FIXED32, _BYTES) and number:
            length = 8 if wire == _FIXED64 else 4
            if wire == _BYTES:
                length, position = _varint(raw, position)
            if length > len(raw) - position:
                raise ValueError(f"field {number} ends behind its message")
            value, position = raw[position : position + length], position + length
        else:
            raise ValueError(f"field {number} has the wire type {wire}")
        fields.setdefault(number, []).append((wire, value))
    return fields


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        if position == len(raw):
            raise ValueError("it ends within a number")
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 and value < 1 << 64:
            return value, position
        if byte < 0x80:
            break
    raise ValueError("a number has more than 64 bits")
