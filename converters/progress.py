"""How far a conversion is, for whoever wants to know."""

from __future__ import annotations

from collections.abc import Callable

#: Called with one line as each step begins.
Report = Callable[[str], None]
#: Called as a step goes on, with (done, total, unit): how much of it is done, and what is counted.
Advance = Callable[[int, int, str], None]


class Progress:
    """The two callbacks of a conversion; any thread may count.

    Args:
        report: See `Report`; None for nobody.
        advance: See `Advance`.
    """

    def __init__(self, report: Report | None = None, advance: Advance | None = None) -> None:
        self._report, self._advance = report, advance
        self._done, self._total, self._unit = 0, 0, ""

    def step(self, line: str) -> None:
        """A step begins."""
        self._total = 0
        if self._report:
            self._report(line)

    def expect(self, total: int, unit: str) -> None:
        """The step will have done `total` of `unit` in the end; it has done nothing yet."""
        self._done, self._total, self._unit = 0, total, unit
        self.add(0)

    def add(self, amount: int) -> None:
        """So much more of the step is done. Steps of unknown size say nothing."""
        self._done += amount
        if self._advance and self._total:
            self._advance(min(self._done, self._total), self._total, self._unit)
