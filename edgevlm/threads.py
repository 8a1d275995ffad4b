"""How many threads each phase gets: encoding pictures, prefill, decoding.

The first two multiply matrices with matrices and take every core; decoding streams the weights once for each token and
is often faster with fewer (on a Raspberry Pi 5 with two of four). `edgevlm.tuning` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from edgevlm.errors import UsageError
from edgevlm.machine import heavy_cores
from edgevlm.options import shown

_MOST = 1024


@dataclass(frozen=True, kw_only=True)
class Threads:
    """Threads of each phase, between 1 and 1024.

    Raises:
        UsageError: a count is outside its range: a native pool would crash on it.
    """

    encode: int
    prefill: int
    decode: int

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(getattr(self, field.name), f"threads for {field.name}")

    def __str__(self) -> str:
        """As the command line takes it: one number, or one for each phase."""
        counts = asdict(self)
        same = len(set(counts.values())) == 1
        return str(self.encode) if same else ",".join(f"{phase}={count}" for phase, count in counts.items())


#: What callers may give: one count for all phases, counts by phase (others keep the default), or None.
ThreadsLike = int | Mapping[str, int] | Threads | None
PHASES = tuple(field.name for field in fields(Threads))


def default_threads() -> Threads:
    """One thread for each core that this process may use; slow cores of a mixed processor are left out."""
    cores = heavy_cores()
    return Threads(encode=cores, prefill=cores, decode=cores)


def resolve_threads(given: ThreadsLike, default: Threads | None = None) -> Threads:
    """What was asked for, completed by a default.

    Args:
        given: See `ThreadsLike`.
        default: For phases of which nothing was said; None is `default_threads()`.

    Raises:
        UsageError: a count is not between 1 and 1024, or a phase is unknown.
    """
    if isinstance(given, Threads):
        return given
    if given is None:
        return default or default_threads()
    if isinstance(given, Mapping):
        unknown = [phase for phase in given if phase not in PHASES]
        if unknown:
            raise UsageError(f"threads are for {', '.join(PHASES)}, found {shown(unknown[0])}")
        return Threads(**{**asdict(default or default_threads()), **given})
    _check(given, "threads")
    return Threads(encode=given, prefill=given, decode=given)


def parse_threads(text: str | None) -> int | dict[str, int] | None:
    """The command line's form: `4`, or `encode=4,decode=2`.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    if "=" not in text:
        return _parse_count(text, text)
    found: dict[str, int] = {}
    for part in text.split(","):
        phase, _, count = (word.strip() for word in part.partition("="))
        if phase in found or phase not in PHASES:
            what = "twice" if phase in found else "unknown"
            raise UsageError(f"--threads {text}: {phase!r} is {what}; write N or encode=N,prefill=N,decode=N")
        found[phase] = _parse_count(count, text)
    return found


def _parse_count(word: str, text: str) -> int:
    # int() would take "1_0" and other scripts' digits, and refuses numbers of thousands of digits its own way
    if not (word.isascii() and word.isdigit() and len(word) <= 4):
        raise UsageError(
            f"--threads {text[:80]} is neither N nor encode=N,prefill=N,decode=N, with N from 1 to {_MOST}"
        )
    return int(word)


def _check(count: Any, what: str) -> None:
    if type(count) is not int or not 1 <= count <= _MOST:
        raise UsageError(f"{what} must be between 1 and {_MOST}, found {shown(count)}")
