"""Opening files that somebody else named: regular files only, never waiting for a pipe or reading a device."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader

from edgevlm.errors import FileError


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file for reading; yields it with its size in bytes.

    Raises:
        FileError: `file.not_found`, `file.not_regular` or `file.unreadable`, also for errors inside the block.
    """
    name = f"`{os.fspath(path)}`"
    try:
        # A FIFO would block in open() until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _not_regular(name)
            file = os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
        with file:
            yield file, status.st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        code = getattr(error, "errno", None) or errno.ENOENT
        if code in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise FileError(f"{name} does not exist; check the path", code="file.not_found") from error
        if code in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a loop of links, a socket, a folder
            raise _not_regular(name) from error
        raise FileError(f"{name} cannot be read: {os.strerror(code)}", code="file.unreadable") from error


def _not_regular(name: str) -> FileError:
    return FileError(f"{name} is not a regular file; give the path of a file", code="file.not_regular")
