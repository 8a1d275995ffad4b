"""From token bytes to text that may be shown: whole characters only, and nothing of a stop text."""

from __future__ import annotations

import codecs


class TextStream:
    """Assembles the bytes of tokens into text.

    A character may be spread over several tokens, and so may a stop text: bytes are held back until they are a whole
    character, and text is held back while it could still become a stop text.

    Example::

        stream = TextStream(stop=("END",))
        stream.feed(b"caf\\xc3")   # "caf"
        stream.feed(b"\\xa9 E")    # "é ": the E might begin END
        stream.feed(b"ND more")   # "", and stream.stopped is True
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._stop = stop
        self._held = ""
        # "replace": a model may emit bytes that never become a character; they show as U+FFFD, not as an exception.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Take the bytes of one token; returns the text that may be shown now."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The text that was held back and turned out not to be a stop text."""
        shown = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = ("" if self.stopped else self._held), ""
        return shown + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            # The one that is whole first, whichever begins first: how the text is cut into tokens makes no difference.
            _, at = min(found)
            shown, self._held, self.stopped = self._held[:at], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that ends `text`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
