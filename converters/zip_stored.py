"""Zip archives as torch writes them: entries stored as they are, one after the other, each in the mapped file.

Everything that a reader could understand in two ways is refused: other compressions, entries that overlap or appear
twice, a local header that contradicts the directory, bytes before the first entry or behind the directory.
Format: PKWARE's APPNOTE, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DIRECTORY_LIMIT_BYTES = 64 << 20
_NAME_LIMIT = 1024
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_ENTRY, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_FLAGS = 0x0808  # sizes may follow the data (bit 3; the directory has them as well), and names are UTF-8 (bit 11)


def open_zip(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The entries of an archive by name, as views of the mapped file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such an archive; the text says why.
    """
    with open(path, "rb") as file:
        if file.seek(0, 2) < _END.size:
            raise ValueError("it is too short for a zip archive")
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(raw, np.uint8)
    count, start, stop = _find_directory(raw)
    directory = raw[start:stop]
    entries: dict[str, NDArray[np.uint8]] = {}
    position, spans = 0, []
    for _ in range(count):
        name, begin, size, position = _read_entry(directory, position)
        first = _check_local(raw, name, begin)
        if name in entries:
            raise ValueError(f"the entry {name[:80]!r} appears twice")
        if first + size > start:
            raise ValueError(f"the entry {name[:80]!r} ends behind the last byte for data")
        entries[name] = data[first : first + size]
        spans.append((begin, first + size, name))
    if position != len(directory):
        raise ValueError("its directory has bytes behind the last entry")
    end = 0
    for begin, last, name in sorted(spans):
        if begin < end or (end == 0 and begin):
            raise ValueError(f"the entry {name[:80]!r} overlaps another, or does not come first")
        end = last
    return entries


def _find_directory(raw: mmap.mmap) -> tuple[int, int, int]:
    """(entries, begin, end) of the directory, which ends where its own record begins.

    torch writes the record of 64 bits always; where the last one is not full, both must agree.
    """
    record = len(raw) - _END.size
    sign, *disks, count, size, start, comment = _END.unpack(raw[record:])
    if sign != b"PK\5\6" or comment:
        raise ValueError("it is no zip archive, or is cut off")
    short = [*disks, count, size, start]
    wide = short
    place = record - _LOCATOR64.size
    if place >= _END64.size and raw[place : place + 4] == b"PK\6\7":
        _, disk, record, total = _LOCATOR64.unpack(raw[place : place + _LOCATOR64.size])
        if disk or total > 1 or record > place - _END64.size:
            raise ValueError("its zip64 record is missing")
        sign, length, _, _, *wide = _END64.unpack(raw[record : record + _END64.size])
        if sign != b"PK\6\6" or record + 12 + length != place:
            raise ValueError("its zip64 record is damaged")
    limits = (_FULL16,) * 4 + (_FULL32,) * 2
    if any(a not in (b, limit) for a, b, limit in zip(short, wide, limits, strict=True)):
        raise ValueError("its two last records contradict each other")
    *disks, count, size, start = wide
    if disks != [0, 0, count] or start + size != record:
        raise ValueError("its directory is not where its end says")
    if size > _DIRECTORY_LIMIT_BYTES or count * _ENTRY.size > size:
        raise ValueError(f"its directory has {size} bytes for {count} entries")
    return count, start, start + size


def _read_entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """(name, begin of the local header, size, position of the next entry)."""
    fields = directory[position : position + _ENTRY.size]
    if len(fields) < _ENTRY.size:
        raise ValueError("its directory is cut off")
    sign, _, _, flags, method, _, _, _, packed, size, n_name, n_extra, n_comment, disk, _, _, begin = _ENTRY.unpack(
        fields
    )
    names = position + _ENTRY.size
    raw_name, extra = directory[names : names + n_name], directory[names + n_name : names + n_name + n_extra]
    if sign != b"PK\1\2" or disk or flags & ~_FLAGS or len(raw_name) + len(extra) < n_name + n_extra:
        raise ValueError("its directory is damaged, or an entry is encrypted")
    size, packed, begin = _widen(extra, size, packed, begin)
    name = raw_name.decode("ascii", "replace")
    if not 1 <= len(name) <= _NAME_LIMIT or not (name.isascii() and name.isprintable()):
        raise ValueError(f"an entry has the unusable name {name[:80]!r}")
    if method or packed != size:
        raise ValueError(f"the entry {name[:80]!r} is compressed")
    return name, begin, size, names + n_name + n_extra + n_comment


def _widen(extra: bytes, *numbers: int) -> list[int]:
    """Size, packed size and offset, each in 64 bits where the field of 32 bits is full."""
    wide: list[int] = []
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = [*struct.unpack(f"<{length // 8}Q", extra[position + 4 :][: length // 8 * 8].ljust(length // 8 * 8))]
        position += 4 + length
    found = []
    for number in numbers:
        if number == _FULL32:
            if not wide:
                raise ValueError("an entry lacks its size in 64 bits")
            number = wide.pop(0)
        found.append(number)
    return found


def _check_local(raw: mmap.mmap, name: str, begin: int) -> int:
    """Where an entry's data begins, after its own header has been compared with the directory."""
    header: Any = raw[begin : begin + _LOCAL.size]
    if len(header) < _LOCAL.size:
        raise ValueError(f"the entry {name[:80]!r} lies outside the file")
    sign, _, flags, method, *_, n_name, n_extra = _LOCAL.unpack(header)
    names = begin + _LOCAL.size
    if sign != b"PK\3\4" or method or flags & ~_FLAGS or raw[names : names + n_name] != name.encode():
        raise ValueError(f"the entry {name[:80]!r} has a header that contradicts the directory")
    return names + int(n_name) + int(n_extra)
