"""Writing that survives a power cut: a file or a folder appears complete or not at all.

Everything is written under a temporary name beside its final place (the same file system), flushed, and then renamed
once. A failed flush is final: the kernel may have dropped the pages, so trying again would lie.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgevlm.errors import StorageError

# EFBIG: a file larger than FAT32 (4 GiB - 1) or RLIMIT_FSIZE allows; to the user that is a disk without room.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def storage_errors(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn every OSError of the block into a StorageError about `path`.

    Args:
        path: What is being written.
        needed: Bytes that the whole write takes, if known, for the message.

    Raises:
        StorageError: `storage.full` or `storage.failed`.
    """
    try:
        yield
    except OSError as error:
        # numpy's `tofile` reports a short write without the reason; regular files have one only when there is no room
        if error.errno is not None and error.errno not in _FULL:
            raise StorageError(f"cannot write {path}: {error.strerror or error}", code="storage.failed") from error
        raise full(path, needed) from error


def full(path: Path, needed: int | None) -> StorageError:
    """The error for a disk without room for `path`; `needed` as in `storage_errors`."""
    wanted = "" if needed is None else f", it needs {megabytes(needed)}"
    return StorageError(
        f"no room to write {path}{wanted}, {megabytes(free_bytes(path))} are free; make room or choose another place",
        code="storage.full",
    )


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system that holds `path` (which need not exist yet)."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free(path: Path, needed: int) -> None:
    """Refuse now what would fail after minutes of work.

    Raises:
        StorageError: `storage.full`, with both sizes.
    """
    available = free_bytes(path)
    if available < needed:
        raise StorageError(
            f"writing {path} needs {megabytes(needed)}, {megabytes(available)} are free; "
            "make room or choose another place",
            code="storage.full",
        )


def atomic_write(path: Path, content: bytes) -> None:
    """Replace `path` by a file with this content: a reader sees the old content or the new, never a part.

    Raises:
        StorageError: nothing was changed, unless the flush of the folder itself failed.
    """
    temporary = _temporary_name(path)
    with storage_errors(path, needed=len(content)):
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def commit_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder under a temporary name; it becomes `out` when the block ends, and vanishes if the block raises.

    The temporary folder lies beside `out`, named `.NAME.RANDOM.tmp`, and is locked. Only a killed process leaves one
    behind; the next call for the same `out` removes it.

    Args:
        out: The final place.
        replace: Whether a folder at `out` gives way; it is exchanged in one step and removed afterwards.

    Yields:
        The temporary folder, empty.

    Raises:
        StorageError: `storage.exists`, `storage.full` or `storage.failed`.
    """
    out = out.absolute()
    building = _temporary_name(out)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        building.mkdir()
        lock = os.open(building, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield building
        with storage_errors(out):
            for file in building.iterdir():
                _sync_file(file)
            sync_folder(building)
            _move(building, out, replace=replace)
    finally:
        # After a commit this name is gone or holds the old folder; on any failure, KeyboardInterrupt included, it holds
        # what was built so far.
        shutil.rmtree(building, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(out: Path) -> None:
    """Remove temporary folders of `out` that no living process has locked."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        if not folder.is_dir():
            continue
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # somebody builds there
        finally:
            os.close(descriptor)


def _move(building: Path, out: Path, *, replace: bool) -> None:
    if not os.path.lexists(out):
        os.rename(building, out)
    elif not replace:
        raise StorageError(
            f"{out} appeared while it was being built; remove it or choose another name", code="storage.exists"
        )
    elif not _exchange(building, out):
        # Two renames, and a moment without `out` between them. The name of the old folder is not a temporary one, so
        # that nothing ever removes it unasked.
        old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
        os.rename(out, old)
        try:
            os.rename(building, out)
        except BaseException:
            os.rename(old, out)
            raise
        os.rename(old, building)
    sync_folder(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux's renameat2), or return False where system or file system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def megabytes(nbytes: int) -> str:
    """A size for messages: decimal megabytes, one digit."""
    return f"{nbytes / 1e6:,.1f} MB"
