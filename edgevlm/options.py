"""What a caller may ask of a generation: one frozen, checked value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgevlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How an answer is drawn and where it ends.

    Args:
        max_tokens: Most tokens that are drawn, at least 1; None draws until the model stops or the context is full.
        temperature: 0 is greedy; up to 10. Logits are divided by it.
        top_k: Only the k most probable tokens may be drawn; 0 allows all.
        top_p: Only the most probable tokens whose probabilities sum up to this may be drawn, in (0, 1].
        seed: Seed of the random numbers, 0 to 2^63-1; None draws a fresh one. Greedy answers need none.
        stop: Texts that end the answer; they are not part of it.

    Raises:
        UsageError: a value is outside its range.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(
            self.max_tokens is None or _whole(self.max_tokens, 1, 1 << 24),
            "max_tokens",
            "a whole number from 1 up",
            self.max_tokens,
        )
        _check(_number(self.temperature, 0, 10), "temperature", "between 0 and 10", self.temperature)
        _check(_whole(self.top_k, 0, 1 << 24), "top_k", "a whole number from 0 up", self.top_k)
        _check(_number(self.top_p, 0, 1) and self.top_p > 0, "top_p", "above 0 and at most 1", self.top_p)
        _check(self.seed is None or _whole(self.seed, 0, (1 << 63) - 1), "seed", "between 0 and 2^63-1", self.seed)
        stops = self.stop
        _check(
            isinstance(stops, tuple) and all(isinstance(s, str) and s for s in stops),
            "stop",
            "texts that are not empty",
            stops,
        )


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float, high: float) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )


def _check(ok: bool, name: str, rule: str, found: object) -> None:
    if not ok:
        raise UsageError(f"{name} must be {rule}, found {found!r}")
