"""Segments to tokens: the language model in llama.cpp, driven by its C functions.

llama.cpp aborts the process when a batch is larger than announced, a row narrower than the model, or a token id out of
range (`llama-context.cpp`, `llama-batch.cpp`), so each of these is checked here before the call.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgevlm.errors import BackendError, Cancelled, ContextError, UsageError
from edgevlm.gguf import GGUFHeader, read_header
from edgevlm.held import ALONE_DIFFERS, N_TOKENS, batches, drawn, shared
from edgevlm.llama import clear_log, last_log, library
from edgevlm.native import ContextOptions, KVType, Native, context_size
from edgevlm.splice import ImageSegment, Position, Segment, TextSegment
from edgevlm.threads import Threads, ThreadsLike, resolve_threads
from edgevlm.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Positions decoded in one call, if nothing else was asked for: the size of llama.cpp's compute buffers.
_N_BATCH = 512


class Decoder:
    """A loaded GGUF model with one context and one sequence.

    Args:
        path: A GGUF file of the `llama` architecture.
        header: Its header, if somebody has read it already.
        context: Positions to reserve; None reserves 4096, or what the model was trained for if that is fewer.
        threads: Threads for prefill and for decode (`edgevlm.threads`); None takes every core that there is for us.
        kv_type: Type of the key/value cache. f32 also turns flash attention off: slower, for comparisons with the
            reference.
        scored: Most tokens that `score` is ever given at once; llama.cpp reserves room for that many rows of logits.
        repack: Whether weights are copied into the layout of the fastest kernels. Without, they stay mapped: pages of
            the file that the system may drop, for machines with less memory than the model takes.
        batch: Most positions that are decoded in one call; fewer take less memory and more time.

    Raises:
        FileError, GGUFError: the file cannot be used (see `edgevlm.gguf`).
        UsageError: `context` or `threads` is outside its range.
        BackendError: llama.cpp could not load it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        header: GGUFHeader | None = None,
        context: int | None = None,
        threads: ThreadsLike = None,
        kv_type: KVType = "f16",
        scored: int = 1,
        repack: bool = True,
        batch: int = _N_BATCH,
    ) -> None:
        self.threads = resolve_threads(threads)
        self.header = header or read_header(path)
        self.n_context = context_size(self.header, context)
        self._llama = library()
        self._native = Native(self._llama, path, repack=repack)
        self.vocabulary = Vocabulary(self._llama, self._native.model, self.header, self.check_open)
        self.n_vocab = self.vocabulary.n_vocab
        self.n_embd = self._llama.llama_model_n_embd_inp(self._native.model)
        #: Without flash attention batches of any size are alike.
        self._exact = kv_type == "f32"
        #: But single rows are not; nor are they where weights are floating-point numbers, which have a kernel of their
        #: own for a single row.
        self._alone_always = self._exact or self.header.has_float_matrices
        self._batch = batch
        self._n_tokens = batch if self._exact else min(batch, N_TOKENS)
        self.n_scored = min(scored, self._n_tokens)
        self._native.open_context(
            ContextOptions(
                n_context=self.n_context, n_batch=batch, n_outputs=self.n_scored, threads=self.threads, kv_type=kv_type
            )
        )
        #: What the context holds: for each position the token's id, or which row of which picture.
        self.held: list[Position] = []
        self.cancelled = threading.Event()  # set, it ends `prefill` before the next batch
        #: Held while native code works on the context.
        self._busy = threading.Lock()
        _decoders.add(self)
        #: Counts resets: whoever holds an older number is reading a context that is not theirs any more.
        self.epoch = 0
        self._has_logits = False
        #: Whether native code was left before what it did was noted (Ctrl-C): nothing that the context holds is known.
        self._unknown = False

    @property
    def n_past(self) -> int:
        """Positions that the context holds."""
        return len(self.held)

    def close(self) -> None:
        """Free the native memory, after a decode that another thread may be in. Every later call raises; closing twice
        is harmless."""
        with self._busy:
            if not _exiting.is_set():
                self._native.close()

    def check_open(self) -> None:
        """Native functions would read freed memory after `close`.

        Raises:
            UsageError: the decoder is closed.
        """
        if not self._native.is_open:
            raise UsageError("the model is closed; load it again")

    @property
    def _context(self) -> Any:
        """llama.cpp's context, made anew if it was set aside."""
        return self._native.context()

    def use_threads(self, threads: Threads) -> None:
        """Change the numbers of threads from now on."""
        self.check_open()
        with self._busy:
            self._native.use_threads(threads)
        self.threads = threads

    def set_aside(self) -> None:
        """Give back cache and buffers until something is decoded, to make room for the encoder; what the context held
        is lost."""
        self.check_open()
        with self._busy:
            self._native.set_aside()
        self.held.clear()
        self.epoch += 1
        self._has_logits = False

    # ---- the context

    def reset(self) -> None:
        """Forget everything that was decoded."""
        with self._native_call() as llama:
            # False: old cells are unreachable once their metadata is gone; clearing the data would touch all of it.
            llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
            self.held.clear()
            self._unknown = self._has_logits = False
        self.epoch += 1

    def truncate(self, n_positions: int) -> None:
        """Forget all but the first `n_positions`; more than the context holds changes nothing.

        There are no logits to read until something is decoded.
        """
        self.check_open()
        if n_positions >= self.n_past:
            return
        with self._native_call() as llama:
            memory = llama.llama_get_memory(self._context)
            removed = n_positions > 0 and llama.llama_memory_seq_rm(memory, 0, n_positions, -1)
            if removed:
                del self.held[n_positions:]
                self._has_logits = False
        if not removed:
            self.reset()

    @contextlib.contextmanager
    def _native_call(self) -> Iterator[Any]:
        """The C functions, while nobody else uses or closes the context.

        An exception within, Ctrl-C above all, may come after the context has changed and before that was noted.

        Raises:
            UsageError: the decoder is closed, or the program is ending.
        """
        with self._busy:
            if _exiting.is_set():
                raise UsageError("the program is ending; nothing more can be asked")
            self.check_open()
            try:
                yield self._llama
            except BaseException:
                self._unknown = True
                raise

    def begin(self, positions: Sequence[Position]) -> int:
        """Keep what the context holds of a new prompt, forget the rest: whoever used the context has lost it.

        Args:
            positions: The whole prompt (`splice.positions`).

        Returns:
            How many of its first positions need not be decoded again: never all of them, because the last one's logits
            are needed; and not so many that one token is left of several.
        """
        if self._unknown:
            self.reset()
        self.truncate(shared(self.held, positions))
        self.epoch += 1
        return self.n_past

    def _check_room(self, n_positions: int) -> None:
        """Whether so many positions fit after what the context holds already.

        Raises:
            ContextError: they do not.
        """
        needed = self.n_past + n_positions
        if needed > self.n_context:
            raise ContextError(
                f"the prompt takes {needed} positions; the context has {self.n_context}; "
                "shorten it or ask for a larger context",
                needed=needed,
                available=self.n_context,
            )

    def prefill(self, segments: list[Segment]) -> None:
        """Decode segments after what the context holds already; the logits of the last position can be read then.

        Raises:
            ContextError: they do not fit; nothing was decoded.
            BackendError: llama.cpp failed.
            Cancelled: `cancelled` was set.
        """
        self.check_open()
        self._check_room(sum(map(len, segments)))
        last = len(segments) - 1
        for number, segment in enumerate(segments):
            if isinstance(segment, TextSegment):
                self._decode_tokens(segment.tokens, want_logits=number == last)
            elif isinstance(segment, ImageSegment):
                self._decode_rows(segment, want_logits=number == last)

    def state(self) -> memoryview:
        """What the context holds, as bytes that `restore` takes; there are no logits in it."""
        with self._native_call() as llama:
            size = llama.llama_state_seq_get_size(self._context, 0)
            buffer = (ctypes.c_uint8 * size)()
            written = llama.llama_state_seq_get_data(self._context, buffer, size, 0)
        if written != size:
            raise BackendError(f"llama.cpp gave {written} of {size} bytes of its state", code="backend.failed")
        return memoryview(buffer).cast("B")

    def restore(self, state: bytes | memoryview, held: Sequence[Position]) -> bool:
        """Replace what the context holds by what `state` returned when it held these positions.

        Returns:
            Whether it worked; if not, the context is empty.
        """
        import numpy as np

        self.reset()
        view = np.frombuffer(state, np.uint8)
        pointer = view.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        clear_log()
        with self._native_call() as llama:
            read = llama.llama_state_seq_set_data(self._context, pointer, len(view), 0)
            last = llama.llama_memory_seq_pos_max(llama.llama_get_memory(self._context), 0)
            restored: bool = read == len(view) and last == len(held) - 1
            self.held[:] = held if restored else ()
        if not restored:
            self.reset()
        return restored

    def score(self, tokens: tuple[int, ...]) -> NDArray[np.float32]:
        """Decode tokens after what the context holds already, and read the logits of each.

        Args:
            tokens: At least one, at most `n_scored`.

        Returns:
            float32 [len(tokens), n_vocab].

        Raises:
            ContextError: they do not fit; nothing was decoded.
            BackendError: llama.cpp failed.
        """
        import numpy as np

        if not 1 <= len(tokens) <= self.n_scored:
            raise ValueError(f"{len(tokens)} tokens to score, between 1 and {self.n_scored} fit")
        self.check_open()
        self._check_room(len(tokens))
        self._decode_tokens(tokens, want_logits=True, of_each=True)
        with self._native_call() as llama:
            pointer = llama.llama_get_logits(self._context)
            return np.ctypeslib.as_array(pointer, shape=(len(tokens), self.n_vocab)).copy()

    def step(self, token: int) -> None:
        """Decode one token after what the context holds already.

        Raises:
            ContextError: the context is full.
        """
        self.prefill([TextSegment((token,))])
        if self.alone_differs(self.n_past):
            self.held[-1] = drawn(token)

    def alone_differs(self, n_positions: int) -> bool:
        """Whether the last of so many positions may have other bits decoded as a single row than in a batch."""
        return self._alone_always or (n_positions > ALONE_DIFFERS and self.threads.decode > 1)

    def logits(self) -> NDArray[np.float32]:
        """Logits of the last decoded position, float32 [n_vocab].

        Raises:
            BackendError: nothing was decoded since the last reset.
        """
        import numpy as np

        with self._native_call() as llama:
            pointer = llama.llama_get_logits_ith(self._context, -1) if self._has_logits else None
            if pointer:
                # A copy, half a megabyte at most: a view would outlive the memory if another thread closed the model.
                return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy()
        raise BackendError("there are no logits to read; decode something first", code="backend.failed")

    def _decode_tokens(self, tokens: tuple[int, ...], *, want_logits: bool, of_each: bool = False) -> None:
        if not all(0 <= token < self.n_vocab for token in tokens):
            raise ValueError(f"a token id is outside the vocabulary of {self.n_vocab}")
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        stride = ctypes.sizeof(ctypes.c_int32)
        self._decode(tokens, want_logits, of_each=of_each, token=ctypes.addressof(ids), stride=stride)

    def _decode_rows(self, segment: ImageSegment, *, want_logits: bool) -> None:
        import numpy as np

        rows_ND = np.ascontiguousarray(segment.rows_ND, np.float32)
        if rows_ND.ndim != 2 or rows_ND.shape[1] != self.n_embd:
            raise BackendError(
                f"the encoder gives rows of shape {rows_ND.shape[1:]}, the decoder takes {self.n_embd}; "
                "encoder and decoder do not belong together",
                code="backend.failed",
            )
        stride = self.n_embd * rows_ND.itemsize
        self._decode(segment.positions(), want_logits, embd=rows_ND.ctypes.data, stride=stride)

    def _decode(
        self,
        positions: Sequence[Position],
        want_logits: bool,
        *,
        stride: int,
        token: int = 0,
        embd: int = 0,
        of_each: bool = False,
    ) -> None:
        """Decode rows that lie `stride` bytes apart, tokens or embeddings, in batches that llama.cpp accepts.

        The batch struct points into the caller's memory; positions continue from the context's last one.
        """
        llama, n_rows = self._llama, len(positions)
        for start, count in batches(n_rows, self._n_tokens if token else self._batch):
            outputs = (ctypes.c_int8 * count)(*[of_each] * count)
            outputs[count - 1] = want_logits and start + count == n_rows
            batch = llama.llama_batch(
                n_tokens=count,
                token=ctypes.cast(token + start * stride, ctypes.POINTER(llama.llama_token)) if token else None,
                embd=ctypes.cast(embd + start * stride, ctypes.POINTER(ctypes.c_float)) if embd else None,
                logits=ctypes.cast(outputs, ctypes.POINTER(ctypes.c_int8)),
            )
            clear_log()
            if self.cancelled.is_set():
                raise Cancelled
            with self._native_call():
                if self._unknown:
                    raise BackendError("reading was interrupted; ask again", code="backend.failed")
                status = llama.llama_decode(self._context, batch)
                if not status:
                    self.held.extend(positions[start : start + count])
                    self._has_logits = want_logits
            if status:
                # Part of the segment may be in the context already: nothing in it can be relied on.
                self.reset()
                raise BackendError(
                    f"llama.cpp failed to decode {count} positions (status {status}): {last_log()}",
                    code="backend.failed",
                )


_decoders: weakref.WeakSet[Decoder] = weakref.WeakSet()


#: Set when the interpreter exits: native objects are neither used nor freed from then on.
_exiting = threading.Event()


@atexit.register
def _wait_for_native_code() -> None:
    """Let running decodes end and no new one begin: exiting tears the native libraries down under other threads."""
    _exiting.set()
    for decoder in list(_decoders):
        with decoder._busy:
            pass
