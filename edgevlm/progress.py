"""How a long command shows its progress on stderr: the only import of `rich`, which typer brings along.

On a terminal each step is a line and, as soon as its size is known, a bar with rate and time left; without `rich`, a
line. Elsewhere nothing is said: what a script finds on stderr is a result or an error.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

_SCALES = (("G", 1e9), ("M", 1e6), ("k", 1e3))


class Display:
    """Shows steps while it is entered.

    Args:
        live: Whether anybody looks; by default on a terminal.
    """

    def __init__(self, live: bool | None = None) -> None:
        self._live = sys.stderr.isatty() if live is None else live
        self._bars: Any = None
        self._task: Any = None
        self._line = ""

    def __enter__(self) -> Self:
        if self._live:
            self._bars = _bars()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._end_step()
            self._bars.stop()

    def report(self, line: str) -> None:
        """A step begins."""
        self._line = line
        if self._bars is None:
            if self._live:
                print(_safe(line), file=sys.stderr, flush=True)
            return
        self._end_step()
        self._task = self._bars.add_task(_safe(line), total=None, unit="")

    def advance(self, done: int, total: int, unit: str) -> None:
        """The step has done so much of `total`; the unit is `bytes`, or anything that is counted."""
        if self._bars is None or self._task is None:
            return
        task = self._bars.tasks[-1]
        if task.fields["unit"] != unit or task.total != total or done < task.completed:
            self._bars.reset(self._task, total=total, unit=unit)
        self._bars.update(self._task, completed=done)

    def _end_step(self) -> None:
        """Leave the step as a line above the bars."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._bars.console.print(_safe(self._line), markup=False, highlight=False)
        self._task = None


def _bars() -> Any:
    """The bars, or None if rich is missing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
        from rich.text import Text
    except ImportError:
        return None

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(amounts(task.completed, task.total, task.speed, task.fields["unit"]))

    class Line(TextColumn):
        def render(self, task: Any) -> Text:
            return Text(task.description, overflow="ellipsis", no_wrap=True)

    return Progress(Line(""), BarColumn(), Rate(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def amounts(done: float, total: float | None, speed: float | None, unit: str) -> str:
    """`240/2,472 MB, 61.2 MB/s`; empty as long as the total is not known."""
    if not total:
        return ""
    letter, scale = "", 1.0
    if unit == "bytes":
        letter, scale = next((pair for pair in _SCALES if total >= 10 * pair[1]), ("", 1.0))
        unit = f"{letter}B"
    rate = f", {speed / scale:,.1f} {unit}/s" if speed else ""
    return f"{done / scale:,.0f}/{total / scale:,.0f} {unit}{rate}"


def _safe(text: str) -> str:
    """No text of a file reaches the terminal's control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
