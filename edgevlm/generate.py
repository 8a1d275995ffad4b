"""The token loop: draw or take what is forced, stop or show, decode; over a decoder whose context holds the prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgevlm.answer import Alternative, FinishReason, TokenLogprob
from edgevlm.constraint import Constraint
from edgevlm.decoder import Decoder
from edgevlm.errors import UsageError
from edgevlm.lookup import Lookup
from edgevlm.options import GenerateOptions
from edgevlm.sampling import Sampler, logprobs
from edgevlm.splice import TextSegment
from edgevlm.text import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Generation:
    """One answer in the making: iterate over it to get pieces of text, then read the rest.

    The context must hold the prompt, and nobody else may use it until the end: a question asked meanwhile makes this
    answer fail, not wander off. It may be left at any time; the context holds the prompt and a part of the answer then.

    Args:
        decoder: Holds the prompt.
        options: How to draw, and where to end.
        cancelled: Set from any thread, it ends the answer before the next token.

    Attributes:
        tokens: The ids so far, an end token included.
        forced: How many of them the schema left no choice about: they were decoded, not drawn.
        guessed: How many were guessed rightly by lookup, and cost no decode of their own.
        finish_reason: Why it ended; `length` until it has ended.
        first_token_at: `time.perf_counter()` when the first token was there.
        seconds: Time spent on the tokens after the first, without what the caller did between them.
        logprobs: One entry for each token drawn, if the options ask for them.
    """

    def __init__(self, decoder: Decoder, options: GenerateOptions, cancelled: threading.Event | None = None) -> None:
        self.tokens: list[int] = []
        self.forced = self.guessed = 0
        self.finish_reason: FinishReason = "length"
        self.first_token_at = time.perf_counter()
        self.seconds = 0.0
        self.logprobs: list[TokenLogprob] = []
        self._decoder = decoder
        self._epoch = decoder.epoch
        self._n_prompt = decoder.n_past
        self._options = options
        self._cancelled = cancelled or threading.Event()
        self._sampler = Sampler(
            options, (place for place in decoder.held if isinstance(place, int)), decoder.vocabulary.banned
        )
        prompt = (place if isinstance(place, int) else None for place in decoder.held)
        self._lookup = Lookup(prompt) if options.lookup else None
        self._constraint = Constraint(options.format, decoder.vocabulary) if options.format else None
        self._text = TextStream(tuple(options.stop))
        self._shown = ""
        #: The last tokens, which the context does not hold yet.
        self._pending: list[int] = []
        self._n_first = 0
        self._ended = False

    @property
    def tokens_per_s(self) -> float:
        """The rate after the first token, which prefill has paid for; 0 for a single token."""
        return (len(self.tokens) - self._n_first) / self.seconds if self.seconds > 0 else 0.0

    @property
    def whole(self) -> bool:
        """Whether the answer is a whole document of the schema; False without one."""
        return self._constraint is not None and self._constraint.may_end

    def __iter__(self) -> Iterator[str]:
        while not self._ended:
            if self._cancelled.is_set():
                self.finish_reason = "cancelled"
                break
            started = time.perf_counter()
            self._check_ours()
            if not self._take_forced():
                self._draw_some()
            now = time.perf_counter()
            if self._n_first:
                self.seconds += now - started
            else:
                self.first_token_at, self._n_first = now, len(self.tokens)
            if self._shown:
                shown, self._shown = self._shown, ""
                yield shown
        if rest := self._text.finish():
            yield rest

    def _take_forced(self) -> bool:
        """Take what the schema forces, as far as it fits; the next draw decodes it in one batch."""
        tokens = self._constraint.forced() if self._constraint else []
        for token in tokens:
            self._take(token)
            self.forced += 1
            if self._ended:
                break
        return bool(tokens)

    def _draw_some(self) -> None:
        """Draw a token; and as long as it is the one that lookup guessed, another."""
        decoder, guesses = self._decoder, self._guesses()
        pending, self._pending = tuple(self._pending), []
        rows: Sequence[NDArray[np.float32]]
        if guesses:
            rows = decoder.score((*pending, *guesses))[len(pending) - 1 :]  # type: ignore[assignment]
        else:
            if len(pending) == 1:
                decoder.step(pending[0])
            elif pending:
                decoder.prefill([TextSegment(pending)])
            rows = [decoder.logits()]
        n_held = decoder.n_past - len(guesses)
        for row_V, guess in zip(rows, (*guesses, None), strict=True):
            token = self._draw(row_V)
            if self._ended or token != guess or (self._constraint and self._constraint.forced()):
                break
            n_held += 1
            self.guessed += 1
        self._pending = [token]
        decoder.truncate(n_held)

    def _guesses(self) -> tuple[int, ...]:
        """What lookup guesses to follow, as many as there is room for."""
        if self._lookup is None or not self._pending:
            return ()
        room = min(
            self._options.lookup,
            self._decoder.n_scored - len(self._pending),
            self._decoder.n_context - self._decoder.n_past - len(self._pending),
        )
        if self._options.max_tokens is not None:
            room = min(room, self._options.max_tokens - len(self.tokens) - 1)
        guesses = self._lookup.guess(room) if room > 0 else ()
        # Without lookup these would be decoded alone: the answer is the same only where that makes no difference.
        n_positions = self._decoder.n_past + len(self._pending) + len(guesses)
        return () if guesses and self._decoder.alone_differs(n_positions) else guesses

    def _draw(self, logits_V: NDArray[np.float32]) -> int:
        token = self._sampler.sample(logits_V, self._constraint)
        if self._options.logprobs is not None:
            logprob, top = logprobs(logits_V, token, self._options.logprobs)
            piece = self._decoder.vocabulary.piece
            alternatives = tuple(Alternative(other.token, piece(other.token), other.logprob) for other in top)
            self.logprobs.append(TokenLogprob(token, piece(token), logprob, alternatives))
        self._take(token)
        return token

    def _take(self, token: int) -> None:
        """Append a token to the answer, and see whether that ends it."""
        self.tokens.append(token)
        self._pending.append(token)
        self._sampler.saw(token)
        if self._lookup:
            self._lookup.add(token)
        if self._decoder.vocabulary.is_end(token):
            self._ended, self.finish_reason = True, "stop"
            return
        piece = self._decoder.vocabulary.piece(token)
        if self._constraint:
            self._constraint.take(piece)
        self._shown += self._text.feed(piece)
        if self._text.stopped or (self._constraint and self._constraint.complete):
            self._ended, self.finish_reason = True, "stop"
        elif (
            len(self.tokens) == self._options.max_tokens or self._n_prompt + len(self.tokens) > self._decoder.n_context
        ):
            self._ended = True

    def _check_ours(self) -> None:
        self._decoder.check_open()
        if self._decoder.epoch != self._epoch:
            raise UsageError(
                "this answer was interrupted by another question to the same model; "
                "finish one before the next, or load the model twice"
            )
