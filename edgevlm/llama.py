"""llama.cpp's C functions, ready to call: the only import of `llama_cpp`.

The Python binding's structs follow llama.cpp's memory layout by hand, so the version is pinned and checked before the
first call. llama.cpp's log never reaches the terminal; its latest warnings and errors are kept to explain failures.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from edgevlm.errors import DependencyError

#: The binding whose struct layouts this code was checked against.
LLAMA_CPP_PYTHON = "0.3.36"

# enum ggml_log_level of the pinned version; the comment in the binding's own _logger.py is of an older one
_LEVEL_WARN, _LEVEL_ERROR, _LEVEL_CONTINUE = 3, 4, 5
_log: collections.deque[str] = collections.deque(maxlen=50)
_recorders: list[list[str]] = []
#: One recording at a time: the log does not say which thread it speaks of.
_recording = threading.Lock()


@functools.cache
def library() -> ModuleType:
    """The module `llama_cpp.llama_cpp`, version-checked, with the backend initialised and the log captured.

    Raises:
        DependencyError: llama-cpp-python is missing, broken, or of another version.
    """
    # A failed assertion in ggml would fork and look for a debugger before it aborts; on a small board that is slow,
    # and the child maps the weights a second time. It is read by the native library only, at abort time.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    # OpenMP's threads wait at several hundred barriers a token. To sleep at once costs a wake-up at each; to spin until
    # it is over keeps the processor, on a machine that does anything else, from the very thread one waits for. So they
    # spin for a moment (libgomp; about 0.1 ms) and then sleep (docs/threads.md has the figures).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        import llama_cpp
        from llama_cpp import llama_cpp as native
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            f"llama-cpp-python cannot be loaded ({error}); "
            f"install it with `pip install llama-cpp-python=={LLAMA_CPP_PYTHON}`",
            code="dependency.missing",
        ) from error
    if llama_cpp.__version__ != LLAMA_CPP_PYTHON:
        raise DependencyError(
            f"llama-cpp-python {LLAMA_CPP_PYTHON} is needed, found {llama_cpp.__version__}; "
            f"install it with `pip install llama-cpp-python=={LLAMA_CPP_PYTHON}`",
            code="dependency.version",
        )
    native.llama_log_set(_log_callback(native), None)
    native.llama_backend_init()
    return native


def cpu_features() -> frozenset[str]:
    """Features of the CPU that this build of llama.cpp makes use of, by its own names: `AVX2`, `DOTPROD`, `REPACK`."""
    return enabled_features(library().llama_print_system_info().decode())


def enabled_features(system_info: str) -> frozenset[str]:
    """What stands as `NAME = 1` in llama.cpp's line "CPU : SSE3 = 1 | AVX2 = 1 | ...", where others are 0 or absent."""
    return frozenset(re.findall(r"(\w+) = 1\b", system_info))


@functools.cache
def _log_callback(native: ModuleType) -> Any:
    """The C callback; cached because llama.cpp keeps the pointer for the life of the process."""
    previous = 0

    @native.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        nonlocal previous
        level = previous if level == _LEVEL_CONTINUE else level
        previous = level
        for recorder in _recorders:
            recorder.append(text.decode("utf-8", "replace"))
        line = text.decode("utf-8", "replace").strip()
        if level in (_LEVEL_WARN, _LEVEL_ERROR) and line:
            _log.append(line)

    return keep


def clear_log() -> None:
    """Forget the log, so that a failure is not explained by an older one. Call it before what may fail."""
    _log.clear()


def last_log(lines: int = 3) -> str:
    """The latest warnings and errors since `clear_log`, newest last, joined by "; "; says so if there are none."""
    return "; ".join(list(_log)[-lines:]) or "llama.cpp gave no reason"


@contextlib.contextmanager
def recorded_log() -> Iterator[list[str]]:
    """Everything that llama.cpp says during the block, in pieces: they end where llama.cpp ended them, not at lines."""
    pieces: list[str] = []
    with _recording:
        clear_log()
        _recorders.append(pieces)
        try:
            yield pieces
        finally:
            _recorders.remove(pieces)
