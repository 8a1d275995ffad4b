"""Writing that survives a power cut: a file or a folder appears complete or not at all.

Everything is written under a temporary name beside its final place (the same file system), flushed, and then renamed
once. A failed flush is final: the kernel may have dropped the pages, so trying again would lie.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
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


def atomic_write(path: Path, *content: bytes | memoryview, mode: int = 0o666) -> None:
    """Replace `path` by a file with these contents, one after the other; a reader sees the old file or the new.

    `mode` holds the permissions that the umask may take away from.

    Raises:
        StorageError: nothing was changed, unless the flush of the folder itself failed.
    """
    temporary = _temporary_name(path)
    with storage_errors(path, needed=sum(map(len, content))):
        try:
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.writelines(content)
                file.flush()
                _flush(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def commit_folder(out: Path, *, may_replace: Callable[[Path], bool] | None = None, key: str = "") -> Iterator[Path]:
    """Build a folder under a temporary name; it becomes `out` when the block ends, and vanishes if the block raises.

    The temporary folder lies beside `out`, named `.NAME.RANDOM.tmp`, with a lock beside it, `.NAME.RANDOM.lock`. Only
    a killed process leaves them behind; the next call for the same `out` removes them, or goes on with the folder if
    both have the same key. The lock holds that key, and what `journal.py` writes behind it.

    Args:
        out: The final place.
        may_replace: Whether the folder given to it may be removed. It is asked about what is at `out` in the end, and
            again once that lies aside; None keeps everything.
        key: One line that says what is built; equal keys must lead to equal folders. Empty if nothing is to be
            continued.

    Yields:
        The temporary folder: empty, or what a killed process with this key made of it.

    Raises:
        StorageError: `storage.exists`, `storage.full` or `storage.failed`.
    """
    out = out.absolute()
    with contextlib.ExitStack() as stack:
        with storage_errors(out):
            stack.callback(_remove_empty, _make_parents(out.parent))
            building, lock = remove_abandoned(out, key) or _reserve(out)
            stack.callback(_release, lock, building.with_suffix(".lock"))
            # After a commit this name is gone or holds the old folder; on any failure, KeyboardInterrupt included, it
            # holds what was built so far.
            stack.callback(shutil.rmtree, building, ignore_errors=True)
            if not building.exists():
                os.write(lock, f"{key}\n".encode())
                sync_folder(out.parent)  # or a power cut may leave a folder without a lock, which nobody removes
                building.mkdir(mode=0o755)
        yield building
        with storage_errors(out):
            for file in building.iterdir():
                _sync_file(file)
            sync_folder(building)
            os.ftruncate(lock, 0)  # from here on the folder may hold what was at `out`: nothing to go on with
            _move(building, out, may_replace)


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder with its parents, durably; returns those that were made, the deepest first."""
    made = [] if folder.exists() else [folder, *(parent for parent in folder.parents if not parent.exists())]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in made:
        sync_folder(parent.parent)
    return made


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _reserve(out: Path) -> tuple[Path, int]:
    """A temporary name that nobody has, and the descriptor of its lock, held.

    The lock is taken before the folder exists, so no other process ever sees an unlocked folder of a living one. It is
    a regular file opened for writing: network file systems give no exclusive lock on anything else.
    """
    while True:
        building = _temporary_name(out)
        path = building.with_suffix(".lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except BaseException:
            _release(lock, path)
            raise
        # Between the two calls, somebody may have taken the new file for an abandoned one.
        if _is_open_as(lock, path) and not os.path.lexists(building):
            return building, lock
        os.close(lock)


def _release(lock: int, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(lock)


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def remove_abandoned(out: Path, key: str = "", *, committed: bool = False) -> tuple[Path, int] | None:
    """Remove what killed processes left for `out`: locks that nobody holds, with their folders.

    A folder of that name without a lock is not ours. What we may not open or remove is somebody else's, and stays.

    Args:
        out: The final place.
        key: Of the folder to keep.
        committed: Whether only leftovers of processes that were killed after their commit are removed: there is
            nothing to go on with in them.

    Returns:
        One folder with this key, with its lock held: it is kept. None if there is none, or the key is empty. A folder
        that another user owns or may write to is never kept: anybody can compute the key of a public checkpoint.
    """
    ours = re.compile(re.escape(f".{out.name}.") + r"[0-9a-f]{8}\.lock")
    kept = None
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
        if not ours.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        with contextlib.suppress(OSError):  # BlockingIOError above all: somebody builds there
            lock = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder = path.with_suffix(".tmp")
                if not _is_open_as(lock, path) or folder.is_symlink():
                    continue
                if committed and os.fstat(lock).st_size:
                    continue
                if kept is None and key and _key(lock) == key and _is_private(lock, folder):
                    kept, lock = (folder, lock), -1
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                path.unlink()
            finally:
                if lock >= 0:
                    os.close(lock)
    return kept


def _is_private(lock: int, folder: Path) -> bool:
    """Whether a lock and its folder are this user's, and nobody else may write to them."""
    try:
        found = [os.fstat(lock), folder.lstat()]
    except OSError:
        return False
    ours = all(status.st_uid == os.geteuid() and not status.st_mode & 0o022 for status in found)
    return ours and stat.S_ISDIR(found[1].st_mode)


def _key(lock: int) -> str:
    """What a lock file says is built: its first line, if that is whole."""
    line, newline, _ = os.pread(lock, 1 << 12, 0).partition(b"\n")
    return line.decode("utf-8", "replace") if newline else ""


def _move(building: Path, out: Path, may_replace: Callable[[Path], bool] | None) -> None:
    if may_replace is None or not os.path.lexists(out):
        if not _rename_to_new(building, out):
            raise _exists(out)
    elif not may_replace(out):
        raise _exists(out)
    elif _renameat2(building, out, _EXCHANGE):
        _refuse_foreign(building, out, may_replace, lambda: _renameat2(building, out, _EXCHANGE))
    else:
        # Two renames, and a moment without `out` between them. The name of the old folder is not a temporary one, so
        # that nothing ever removes it unasked.
        old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
        os.rename(out, old)
        try:
            if not may_replace(old) or not _rename_to_new(building, out):
                raise _exists(out)
        except BaseException:
            _rename_to_new(old, out)
            raise
        os.rename(old, building)
    sync_folder(out.parent)


def _refuse_foreign(building: Path, out: Path, may_replace: Callable[[Path], bool], undo: Callable[[], bool]) -> None:
    """After an exchange: if `out` had become something else since it was asked about, put it back."""
    if may_replace(building):
        return
    if not undo():
        # `building` is removed at the end; what came there by mistake must not be.
        os.rename(building, out.with_name(f".{out.name}.{secrets.token_hex(4)}.old"))
    raise _exists(out)


def _exists(out: Path) -> StorageError:
    return StorageError(
        f"{out} appeared or changed while it was being built; remove it or choose another name", code="storage.exists"
    )


def _rename_to_new(one: Path, new: Path) -> bool:
    """Rename to a name that does not exist; returns False if it does."""
    if _renameat2(one, new, _NOREPLACE):
        return True
    # Either the name exists, or the system cannot check and rename in one step: plain rename replaces empty folders.
    if os.path.lexists(new):
        return False
    os.rename(one, new)
    return True


_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of Linux's renameat2


def _renameat2(one: Path, other: Path, flag: int) -> bool:
    """Linux's renameat2; returns False where system or file system cannot, or the flag forbids."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag) == 0


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Bring a file or folder to the disk; macOS's fsync stops at the disk's own cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        _flush(file.fileno())


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def megabytes(nbytes: int) -> str:
    """A size for messages: decimal megabytes, one digit."""
    return f"{nbytes / 1e6:,.1f} MB"
