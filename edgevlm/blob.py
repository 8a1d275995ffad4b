"""A file that says what it belongs to, and shows when it is not whole: the form of everything that is kept on disk.

    magic, 8 bytes | length of the header, u32 | header, JSON | payload | BLAKE2b-256 of all before

Such files are caches: whoever reads one recomputes on any doubt, so reading never fails, it only finds nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgevlm.errors import EdgeVLMError, StorageError
from edgevlm.files import open_regular
from edgevlm.state_folder import make_private
from edgevlm.storage import atomic_write, storage_errors

_MAGIC = b"EVLMBLB1"
_DIGEST_BYTES = 32
#: A header names tokens and pictures; a longer one is not ours.
_HEADER_LIMIT_BYTES = 1 << 20


def write_blob(path: Path, header: dict[str, Any], payload: bytes | memoryview) -> None:
    """Write atomically; readable by this user alone, because it tells of pictures.

    Raises:
        StorageError: the disk is full, the folder cannot be written, and so on; nothing is left behind.
    """
    text = json.dumps(header, sort_keys=True).encode()
    if len(text) > _HEADER_LIMIT_BYTES:
        raise ValueError(f"a header of {len(text)} bytes would not be read back")
    parts = [_MAGIC, len(text).to_bytes(4, "little"), text, payload]
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    atomic_write(path, *parts, digest.digest(), mode=0o600)


def read_blob(
    path: Path, identity: dict[str, Any], *, limit_bytes: int = 1 << 32
) -> tuple[dict[str, Any], memoryview] | None:
    """The header and payload of a file that is whole and whose header holds all of `identity`; else None.

    A file of more than `limit_bytes` is not looked at.

    The payload is a view of memory that nobody else holds.
    """
    try:
        with open_regular(path) as (file, size):
            if size > limit_bytes:
                return None
            data = file.read(size + 1)
    except (EdgeVLMError, OSError, ValueError, MemoryError):
        return None
    body = memoryview(data)[:-_DIGEST_BYTES]
    if bytes(body[:8]) != _MAGIC or len(body) < 12:
        return None
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != data[-_DIGEST_BYTES:]:
        return None
    n_header = int.from_bytes(body[8:12], "little")
    if n_header > min(_HEADER_LIMIT_BYTES, len(body) - 12):
        return None
    try:
        header = json.loads(bytes(body[12 : 12 + n_header]))
    except (ValueError, RecursionError):
        return None
    if not isinstance(header, dict) or any(header.get(name) != value for name, value in identity.items()):
        return None
    return header, body[12 + n_header :]


#: How often, and after how long each time, a shelf that somebody else writes to is tried again.
_LOCK_TRIES, _LOCK_WAIT_S = 20, 0.05


class Shelf:
    """A folder of blobs with a bound on its size; the ones that were not used for the longest time go first.

    Args:
        folder: Made on the first write, for this user alone.
        limit_bytes: Most bytes of all files together; a larger one is not kept.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def put(self, name: str, header: dict[str, Any], payload: bytes | memoryview) -> None:
        """Keep a blob under a plain name.

        Raises:
            StorageError: it could not be written; what was there is unchanged.
        """
        needed = len(payload) + _HEADER_LIMIT_BYTES
        if needed > self.limit_bytes:
            return
        make_private(self.folder)
        with self._alone():
            self._make_room(needed)
            write_blob(self.folder / name, header, payload)

    def get(self, name: str, identity: dict[str, Any]) -> tuple[dict[str, Any], memoryview] | None:
        """A blob that is whole and belongs to `identity`. What is found but cannot be used is removed."""
        path = self.folder / name
        found = read_blob(path, identity, limit_bytes=self.limit_bytes)
        with contextlib.suppress(OSError):
            if found is None:
                path.unlink(missing_ok=True)
            else:
                os.utime(path)  # the order of eviction; a clock that jumps costs a recomputation at most
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process writes at a time; what another one left unfinished when it was killed is removed."""
        with storage_errors(self.folder):
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait_for(lock)
            for path in self.folder.glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()
            yield
        finally:
            os.close(lock)

    def _wait_for(self, lock: int) -> None:
        """Whoever writes takes milliseconds; one that was stopped while it wrote must not stop the others."""
        for _ in range(_LOCK_TRIES):
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_WAIT_S)
        raise StorageError(
            f"{self.folder} is being written by another process that does not end", code="storage.failed"
        )

    def entries(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, last use as seconds since 1970) of each file, the longest unused first."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as scan:
            for entry in scan:
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((Path(entry.path), status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (entry[2], entry[0]))

    def clear(self) -> int:
        """Remove everything; returns the bytes that were freed."""
        freed = 0
        for path, size, _used in self.entries():
            with contextlib.suppress(OSError):
                path.unlink()
                freed += size
        return freed

    def _make_room(self, needed: int) -> None:
        entries = self.entries()
        total = sum(size for _path, size, _used in entries)
        for path, size, _used in entries:
            if total + needed <= self.limit_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size
