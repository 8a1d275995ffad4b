"""A text model's GGUF file, copied: every byte of it, or all but the chat template."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from edgevlm.errors import CheckpointError, FileError
from edgevlm.files import open_regular
from edgevlm.gguf import GGUFHeader
from edgevlm.storage import storage_errors

_TEMPLATE_KEY = "tokenizer.chat_template"
_STRING = 8  # enum gguf_type
_FIXED_BYTES = 24  # magic, version, number of tensors, number of keys
_CHUNK_BYTES = 8 << 20


def copy(header: GGUFHeader, out: Path, template: str | None) -> None:
    """Copy a file whose header was checked.

    Args:
        header: Of the source.
        out: Must not exist.
        template: A chat template that takes the place of the file's own; None keeps every byte.

    Raises:
        FileError: the source cannot be read.
        CheckpointError: `checkpoint.invalid`, the source became shorter.
        StorageError: the disk is full or refuses.
    """
    with open_regular(header.path) as (source, size):
        if template is None:
            pieces = _read(source, header.path, 0, size)
        else:
            pieces = _with_template(source, header, size, template)
        with storage_errors(out, needed=size), open(out, "xb") as target:
            for piece in pieces:
                target.write(piece)


def copied_bytes(header: GGUFHeader, template: str | None) -> int:
    """The size of the copy; arguments are those of `copy`.

    Raises:
        FileError: the source cannot be read.
        CheckpointError: `checkpoint.invalid`, the source became shorter.
    """
    with open_regular(header.path) as (source, size):
        if template is None:
            return size
        data = size - header.data_offset
        return sum(map(len, _head_with_template(source, header, template))) + data


def _with_template(source: BufferedReader, header: GGUFHeader, size: int, template: str) -> Iterator[bytes]:
    """The file's bytes with another template. Offsets of tensors count from the data, so nothing else changes."""
    yield from _head_with_template(source, header, template)
    yield from _read(source, header.path, header.data_offset, size)


def _head_with_template(source: BufferedReader, header: GGUFHeader, template: str) -> list[bytes]:
    """All before the data, its alignment included."""
    kept = [place for key, place in header.places.items() if key != _TEMPLATE_KEY]
    entry = _string(_TEMPLATE_KEY) + struct.pack("<I", _STRING) + _string(template)
    start = b"".join(_read(source, header.path, 0, _FIXED_BYTES))
    pieces = [start[:-8] + struct.pack("<Q", len(kept) + 1)]
    for place in kept:
        pieces += _read(source, header.path, *place)
    pieces += [entry, *_read(source, header.path, *header.infos)]
    alignment = header.metadata.get("general.alignment", 32)
    return [*pieces, b"\0" * (-sum(map(len, pieces)) % alignment)]


def _read(source: BufferedReader, path: Path, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        try:
            source.seek(start)
            piece = source.read(min(_CHUNK_BYTES, end - start))
        except OSError as error:  # not the disk that is written to
            raise FileError(f"cannot read {path}: {error.strerror}", code="file.unreadable") from error
        if not piece:
            raise CheckpointError(f"{path} became shorter while it was being read", code="checkpoint.invalid")
        start += len(piece)
        yield piece


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
