"""Guesses at the next tokens: what followed the last time that the same tokens stood here.

Prompt lookup (A. Saxena, "Prompt Lookup Decoding", 2023): an answer that quotes its prompt, or itself, is guessed
without another model. The guesses are only ever checked, never believed.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Lengths of the runs of tokens that are looked for, longest first.
_RUNS = (3, 2)


class Lookup:
    """The tokens so far, and where each short run of them last went on.

    Args:
        tokens: The prompt; None stands for what is no token, such as a picture.
    """

    def __init__(self, tokens: Iterable[int | None]) -> None:
        self._tokens: list[int | None] = []
        self._after: dict[tuple[int | None, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int | None) -> None:
        """Append a token."""
        at = len(self._tokens)
        for length in _RUNS:
            if at >= length:
                self._after[tuple(self._tokens[at - length :])] = at
        self._tokens.append(token)

    def guess(self, count: int) -> tuple[int, ...]:
        """Up to `count` tokens that may come next; none if the last ones are new."""
        for length in _RUNS:
            start = self._after.get(tuple(self._tokens[-length:]))
            if start is not None and len(self._tokens) >= length:
                found = []
                for token in self._tokens[start : start + count]:
                    if token is None:
                        break
                    found.append(token)
                return tuple(found)
        return ()
