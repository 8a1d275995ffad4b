"""Pages of mapped files that this process holds, given back as soon as they were read.

A mapped file is no memory that is taken for good, the system may drop its pages at any time. It does so late, though,
counts them to the process until then, and first takes the pages of everybody else. A conversion reads each byte of a
checkpoint once or twice: without this, all of it would be resident in the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHECK_S = 0.004  # llama.cpp reads a whole file at once when it maps it: gigabytes a second
#: Pages of files that llama.cpp maps may stay up to here; less would read them from the disk more often.
LIMIT_BYTES = 192 << 20
# address range, permissions, offset, device, inode, path
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r--[sp] [0-9a-f]+ \S+ \d+\s+(.*)")


def release(view: NDArray[Any]) -> None:
    """Give back the pages of a view of a mapped file; what it holds stays readable. Other arrays are left alone."""
    owner: Any = view
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is None or not view.flags.c_contiguous or not view.nbytes:
        return
    begin = _address(view) - _address(np.frombuffer(owner, np.uint8))
    start = begin & -mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED, start, begin + view.nbytes - start)


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


@contextlib.contextmanager
def bounded(*paths: Path) -> Iterator[None]:
    """Give back the pages of files that native code maps, whenever the process holds more than `LIMIT_BYTES` of files.

    Only Linux tells where a file is mapped; elsewhere nothing is done.
    """
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(paths, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(paths: tuple[Path, ...], done: threading.Event) -> None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    names = {os.path.realpath(path) for path in paths}
    with contextlib.suppress(OSError, ValueError, IndexError):  # no /proc, or one without these figures
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        while not done.wait(_CHECK_S):
            if _resident_files() > LIMIT_BYTES:
                for begin, end in _mappings(names):
                    advise(begin, end - begin, mmap.MADV_DONTNEED)


def _resident_files() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0]) * 1024


def _mappings(names: set[str]) -> Iterator[tuple[int, int]]:
    """Where these files are mapped for reading only: nothing that was written could be lost with such a page."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = _MAPPING.fullmatch(line)
        if found and found[3] in names:
            yield int(found[1], 16), int(found[2], 16)
