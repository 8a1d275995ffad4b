"""llama.cpp's two objects behind a decoder: the model (weights, vocabulary) and its context (cache, buffers).

The context can be set aside, to make room for the encoder: then its memory is given back, and the weights' pages as far
as they are mapped from the file. It is made anew when it is needed; what it held is lost.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgevlm.errors import BackendError, UsageError
from edgevlm.gguf import GGUFHeader
from edgevlm.llama import clear_log, last_log
from edgevlm.options import shown
from edgevlm.threads import Threads

KVType = Literal["f16", "f32"]
#: Without `context`, this many positions are reserved (or as many as the model was trained for, if fewer).
_DEFAULT_CONTEXT = 4096
#: The most that can be asked for: llama.cpp rounds up to 256 in 32 bits and would wrap near 2^32.
_MAX_CONTEXT = 1 << 24
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r--[ps] [0-9a-f]+ [0-9a-f:]+ \d+ +(/.*)")


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """Sizes of a context: positions, positions in one call, rows of logits that are read at once."""

    n_context: int
    n_batch: int
    n_outputs: int
    threads: Threads
    kv_type: KVType


class Native:
    """A loaded model with at most one context.

    Args:
        llama: The module of C functions.
        path: The checked GGUF file.
        repack: Whether weights are copied into the layout of the fastest kernels.

    Raises:
        BackendError: llama.cpp could not load it.
    """

    def __init__(self, llama: Any, path: str | os.PathLike[str], *, repack: bool) -> None:
        self._llama, self._path = llama, path
        params = llama.llama_model_default_params()
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        clear_log()
        self.model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise BackendError(f"llama.cpp cannot load {os.fspath(path)}: {last_log()}", code="backend.load")
        self._close_model = self._free_later(llama.llama_model_free, self.model)
        self._close_context: Callable[[], Any] | None = None
        self._context: Any = None
        self._options: ContextOptions | None = None

    @property
    def is_open(self) -> bool:
        return self._close_model.alive

    def open_context(self, options: ContextOptions) -> None:
        """Make the context; the same is made again after `set_aside`.

        Raises:
            BackendError: llama.cpp cannot.
        """
        self._options = options
        self._context = self._new_context(options)
        self._close_context = self._free_later(self._llama.llama_free, self._context)

    def context(self) -> Any:
        """The context's handle.

        Raises:
            BackendError: it had been set aside and cannot be made again.
        """
        if self._close_context is None:
            assert self._options is not None
            self.open_context(self._options)
        return self._context

    def use_threads(self, threads: Threads) -> None:
        """Change the numbers of threads from now on."""
        assert self._options is not None
        self._options = replace(self._options, threads=threads)
        if self._close_context is not None:
            self._llama.llama_set_n_threads(self._context, threads.decode, threads.prefill)

    def set_aside(self) -> None:
        """Give back the context, and the pages of the weights' file."""
        if self._close_context is not None:
            self._close_context()
            self._close_context = self._context = None
        drop_pages(Path(self._path))
        trim()

    def close(self) -> None:
        """Free everything; twice is harmless."""
        if self._close_context is not None:
            self._close_context()
        self._close_model()

    def _free_later(self, free: Any, handle: Any) -> weakref.finalize[[Any], Native]:
        """Free a native object with its owner, but not when the interpreter exits: a thread may still be decoding then,
        and the process's memory goes back to the system anyway. What was made last is freed first."""
        finalizer = weakref.finalize(self, free, handle)
        finalizer.atexit = False
        return finalizer

    def _new_context(self, options: ContextOptions) -> Any:
        llama = self._llama
        params = llama.llama_context_default_params()
        params.n_ctx = options.n_context
        params.n_batch = params.n_ubatch = options.n_batch
        params.n_seq_max = 1
        # Only the last row of a batch is read, except by `score`: without this, llama.cpp reserves logits for a whole
        # batch, which for a vocabulary of 128k is 263 MB.
        params.n_outputs_max = options.n_outputs
        params.n_threads, params.n_threads_batch = options.threads.decode, options.threads.prefill
        # llama.cpp's flash attention works in float16 whatever the cache holds: measured against the reference, logits
        # are off by 2e-4 to 7e-4 with it and by 7e-7 without (float32 cache, tiny random model).
        exact = options.kv_type == "f32"
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = {"f16": llama.GGML_TYPE_F16, "f32": llama.GGML_TYPE_F32}[options.kv_type]
        params.no_perf = True
        clear_log()
        context = llama.llama_init_from_model(self.model, params)
        if not context:
            raise BackendError(
                f"llama.cpp cannot make a context of {options.n_context} positions for {os.fspath(self._path)}: "
                f"{last_log()}; ask for a smaller context",
                code="backend.load",
            )
        return context


def context_size(header: GGUFHeader, context: int | None) -> int:
    """Positions to reserve for a model.

    Raises:
        UsageError: `context` is not between 1 and what the model was trained for.
    """
    trained = header.context_length
    if context is None:
        return min(_DEFAULT_CONTEXT, trained)
    if type(context) is not int or not 1 <= context <= min(trained, _MAX_CONTEXT):
        raise UsageError(
            f"context must be between 1 and {trained}, what the model was trained for; found {shown(context)}"
        )
    return context


def drop_pages(path: Path) -> None:
    """Take a file's pages out of this process; they are read again when they are touched. Only Linux tells where."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end in _mappings(os.path.realpath(path)):
        advise(begin, end - begin, mmap.MADV_DONTNEED)


def trim() -> None:
    """Give freed memory back to the system; glibc keeps much of what small allocations leave."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def _mappings(name: str) -> Iterator[tuple[int, int]]:
    """Where a file is mapped for reading only: nothing that was written could be lost with such a page."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        found = _MAPPING.fullmatch(line)
        if found and found[3] == name:
            yield int(found[1], 16), int(found[2], 16)
