"""What a caller may ask of a generation: one frozen, checked value."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgevlm.errors import UsageError
from edgevlm.schema import Format
from edgevlm.tools import check_tools

#: Most tokens that are guessed ahead.
MOST_LOOKUP = 8


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How an answer is drawn and where it ends.

    Args:
        max_tokens: Most tokens that are drawn, at least 1; None draws until the model stops or the context is full.
        temperature: 0 is greedy; up to 10. Logits are divided by it.
        top_k: Only the k most probable tokens may be drawn; 0 allows all.
        top_p: Only the most probable tokens whose probabilities sum up to this may be drawn, in (0, 1].
        min_p: Only tokens with at least this part of the likeliest token's probability may be drawn, 0 to 1; 0 allows
            all. Probabilities are those at temperature 1, as in llama.cpp's order of samplers.
        repetition_penalty: Makes tokens of the prompt and of the answer less likely (above 1) or more (below), 0.1 to
            10; 1 changes nothing.
        seed: Seed of the random numbers, 0 to 2^63-1; None draws a fresh one. Greedy answers need none.
        stop: Texts that end the answer; they are not part of it.
        logprobs: How many alternatives to report for each drawn token, 0 to 20, with the log-probabilities that the
            model itself computed: before penalty, temperature and any filter. None reports nothing.
        schema: A JSON schema, as Python values or JSON text; the answer is a document that satisfies it. True asks for
            any JSON document, None for free text. docs/generation.md says which keywords are understood.
        lookup: How many tokens to guess ahead from what the prompt and the answer hold already, 0 to 8. It changes the
            time that an answer takes, not the answer. Beyond 256 positions of prompt and answer it guesses only with
            one decode thread (`threads={"decode": 1}`); with more, a row's bits depend on how many are decoded. Nor
            does it guess with weights in floating point or a float32 cache, for the same reason.
        tools: What the model may ask to be called, as `{"type": "function", "function": {"name", "description",
            "parameters"}}`; `Answer.tool_calls` has what it asks for.

    Raises:
        UsageError: a value is outside its range, or two exclude each other.
        SchemaError: the schema cannot be compiled.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    schema: Mapping[str, Any] | str | bool | None = None
    lookup: int = 0
    tools: Sequence[Mapping[str, Any]] = ()
    #: The schema, compiled.
    format: Format | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # frozen for everybody else
        if self.max_tokens is not None:
            put("max_tokens", whole("max_tokens", self.max_tokens, 1, 1 << 24))
        put("temperature", _number("temperature", self.temperature, 0, 10))
        put("top_k", whole("top_k", self.top_k, 0, 1 << 24))
        put("top_p", _number("top_p", self.top_p, 0, 1))
        _check(self.top_p > 0, "top_p", "above 0 and at most 1", self.top_p)
        put("min_p", _number("min_p", self.min_p, 0, 1))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.1, 10))
        if self.logprobs is not None:
            put("logprobs", whole("logprobs", self.logprobs, 0, 20))
        if self.seed is not None:
            put("seed", whole("seed", self.seed, 0, (1 << 63) - 1))
        stops = self.stop
        _check(isinstance(stops, Sequence) and not isinstance(stops, (str, bytes)), "stop", "a list of texts", stops)
        _check(all(isinstance(stop, str) and stop for stop in stops), "stop", "a list of texts, none empty", stops)
        put("stop", tuple(stops))
        put("lookup", whole("lookup", self.lookup, 0, MOST_LOOKUP))
        put("tools", check_tools(self.tools) if self.tools else ())
        if self.schema is not None:
            _check(not stops, "stop", "empty beside schema, which says itself where the answer ends", stops)
            put("format", Format(self.schema))


def whole(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int; whole numbers of other libraries, such as numpy's, are welcome, truth values are not.

    Raises:
        UsageError: it is none, or outside its range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    _check(number is not None and low <= number <= high, name, f"a whole number from {low} to {high}", value)
    return number  # type: ignore[return-value]


def _number(name: str, value: object, low: float, high: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        number = math.inf
    _check(low <= number <= high, name, f"between {low} and {high}", value)
    return number


def shown(value: object) -> str:
    """A caller's value for a message: cut if it is long, and a number of more digits than Python prints by its size."""
    if isinstance(value, int) and value.bit_length() > 99:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # whatever a stranger's object does when it is printed
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check(ok: bool, name: str, rule: str, found: object) -> None:
    if not ok:
        raise UsageError(f"{name} must be {rule}, found {shown(found)}")


def pairs(options: list[str]) -> dict[str, str]:
    """`PATTERN=TYPE` options in their order; a pattern may hold `=` itself."""
    found: dict[str, str] = {}
    for option in options:
        pattern, equals, kind = option.rpartition("=")
        if not equals or pattern in found:
            raise UsageError(
                f"--decoder-type {option} is not PATTERN=TYPE"
                if not equals
                else f"--decoder-type {pattern} is given twice"
            )
        found[pattern] = kind
    return found
