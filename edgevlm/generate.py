"""The token loop: sample, stop or show, decode; over a decoder whose context holds the prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator

from edgevlm.answer import Alternative, FinishReason, TokenLogprob
from edgevlm.decoder import Decoder
from edgevlm.errors import UsageError
from edgevlm.options import GenerateOptions
from edgevlm.sampling import Sampler, logprobs
from edgevlm.text import TextStream


class Generation:
    """One answer in the making: iterate over it to get pieces of text, then read the rest.

    The context must hold the prompt, and nobody else may use it until the end: a question asked meanwhile makes this
    answer fail, not wander off.

    Args:
        decoder: Holds the prompt.
        options: How to draw, and where to end.

    Attributes:
        tokens: The ids drawn so far, an end token included.
        finish_reason: Why it ended; `length` until it has ended.
        first_token_at: `time.perf_counter()` when the first token was drawn.
        seconds: Time spent on the tokens after the first, without what the caller did between them.
        logprobs: One entry for each token drawn, if the options ask for them.
    """

    def __init__(self, decoder: Decoder, options: GenerateOptions) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason = "length"
        self.first_token_at = time.perf_counter()
        self.seconds = 0.0
        self.logprobs: list[TokenLogprob] = []
        self._decoder = decoder
        self._epoch = decoder.epoch
        self._options = options
        self._sampler = Sampler(options, (place for place in decoder.held if isinstance(place, int)))

    @property
    def tokens_per_s(self) -> float:
        """The rate after the first token, which prefill has paid for; 0 for a single token."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds > 0 else 0.0

    def __iter__(self) -> Iterator[str]:
        text = TextStream(tuple(self._options.stop))
        self._draw()
        self.first_token_at = time.perf_counter()
        while not self._decoder.vocabulary.is_end(self.tokens[-1]):
            if shown := text.feed(self._decoder.vocabulary.piece(self.tokens[-1])):
                yield shown
            if text.stopped:
                self.finish_reason = "stop"
                return
            if self._is_full():
                break
            self._next()
        else:
            self.finish_reason = "stop"
        if rest := text.finish():
            yield rest

    def _is_full(self) -> bool:
        limit = self._options.max_tokens
        return len(self.tokens) == limit or self._decoder.n_past >= self._decoder.n_context

    def _next(self) -> None:
        started = time.perf_counter()
        self._check_ours()
        self._decoder.step(self.tokens[-1])
        self._draw()
        self.seconds += time.perf_counter() - started

    def _draw(self) -> None:
        self._check_ours()
        logits_V = self._decoder.logits()
        token = self._sampler.sample(logits_V)
        self.tokens.append(token)
        self._sampler.saw(token)
        if self._options.logprobs is not None:
            logprob, top = logprobs(logits_V, token, self._options.logprobs)
            piece = self._decoder.vocabulary.piece
            alternatives = tuple(Alternative(other.token, piece(other.token), other.logprob) for other in top)
            self.logprobs.append(TokenLogprob(token, piece(token), logprob, alternatives))

    def _check_ours(self) -> None:
        self._decoder.check_open()
        if self._decoder.epoch != self._epoch:
            raise UsageError(
                "this answer was interrupted by another question to the same model; "
                "finish one before the next, or load the model twice"
            )
