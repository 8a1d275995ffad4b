"""Native code and the end of the program.

When the interpreter ends it stops daemon threads where they next want to run Python, and the native libraries are torn
down under those that do not: inside ONNX Runtime's C++ either one aborts the process. So the end waits for native calls
that have begun, and none begins after it.
"""

from __future__ import annotations

import atexit
import threading
import weakref

from edgevlm.errors import UsageError

_locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
_ending = threading.Event()


def native_lock() -> threading.Lock:
    """A lock to hold while native code works on an object; whoever has it calls `check_not_ending` first.

    It is Python's own: a class around it could be interrupted between having the lock and saying so.
    """
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def is_ending() -> bool:
    """Whether native objects are neither used nor freed any more."""
    return _ending.is_set()


def check_not_ending() -> None:
    """Begin no native call at the end of the program.

    Raises:
        UsageError: the program is ending.
        SystemExit: the same in another thread, a daemon like all that still run then: it ends without a word.
    """
    if _ending.is_set():
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit
        raise UsageError("the program is ending; nothing more can be asked")


@atexit.register
def _wait_for_native_code() -> None:
    _ending.set()
    for lock in list(_locks):
        with lock:
            pass
