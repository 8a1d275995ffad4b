"""An answer on its way."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

from edgevlm.answer import Answer
from edgevlm.errors import UsageError


class Stream:
    """An answer on its way: iterate over its pieces of text, once; `answer` is set when they are exhausted.

    Leaving the loop early ends the generation; `cancel` does so from another thread, or from within the loop.

    Args:
        pieces: Yields the text, returns the answer.
        cancelled: What `cancel` sets.
    """

    def __init__(self, pieces: Generator[str, None, Answer], cancelled: threading.Event | None = None) -> None:
        self.answer: Answer | None = None
        self.cancelled = cancelled or threading.Event()
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return self

    def finish(self) -> Answer:
        """Draw what is left, and return the answer.

        Raises:
            UsageError: it was closed, or failed, before its end.
        """
        for _ in self:
            pass
        if self.answer is None:
            raise UsageError("there is no answer: it was left before its end, or failed")
        return self.answer

    def cancel(self) -> None:
        """End the answer before its next token, from any thread; the loop ends, and `answer` has what was said.

        Its `finish_reason` is `cancelled`. A prompt that is being read ends before its next batch, a picture after
        it was encoded.
        """
        self.cancelled.set()

    def close(self) -> None:
        """End the generation; `answer` stays None if it was not finished."""
        self._pieces.close()

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.answer = self.answer or end.value
            raise StopIteration from None
