"""The token loop: sample, stop or show, decode; over a decoder whose context holds the prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator

from edgevlm.answer import FinishReason
from edgevlm.decoder import Decoder
from edgevlm.options import GenerateOptions
from edgevlm.sampling import Sampler
from edgevlm.text import TextStream


class Generation:
    """One answer in the making: iterate over it to get pieces of text, then read the rest.

    Attributes:
        tokens: The ids drawn so far, an end token included.
        finish_reason: Why it ended; `length` until it has ended.
        first_token_at, ended_at: `time.perf_counter()` when the first token was drawn and when the last was done.
    """

    def __init__(self, decoder: Decoder, options: GenerateOptions) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason = "length"
        self.first_token_at = self.ended_at = time.perf_counter()
        self._decoder = decoder
        self._options = options

    def __iter__(self) -> Iterator[str]:
        text = TextStream(self._options.stop)
        for token in self._draw():
            if shown := text.feed(self._decoder.piece(token)):
                yield shown
            if text.stopped:
                self.finish_reason = "stop"
                break
        if rest := text.finish():
            yield rest
        self.ended_at = time.perf_counter()

    @property
    def tokens_per_s(self) -> float:
        """The rate after the first token, which prefill has paid for; 0 for a single token."""
        seconds = self.ended_at - self.first_token_at
        return (len(self.tokens) - 1) / seconds if seconds > 0 else 0.0

    def _draw(self) -> Iterator[int]:
        """Tokens that belong to the answer, until the model ends its turn, the limit, or the end of the context."""
        decoder, sampler = self._decoder, Sampler(self._options)
        limit = self._options.max_tokens or decoder.n_context
        while True:
            token = sampler.sample(decoder.logits())
            self.tokens.append(token)
            if len(self.tokens) == 1:
                self.first_token_at = time.perf_counter()
            if decoder.is_end(token):
                self.finish_reason = "stop"
                return
            yield token
            if len(self.tokens) >= limit or decoder.n_past >= decoder.n_context:
                return
            decoder.step(token)
