"""What comes back from a question: the text, why it ended, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgevlm.tools import ToolCall

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Positions of the context.

    `prompt_tokens` counts everything that was fed, `image_tokens` the part that pictures took, `cached_tokens` the
    part that was still in the context, `completion_tokens` every token of the answer, the one that ended it included,
    `forced_tokens` those of them that a schema left no choice about.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    forced_tokens: int = 0


@dataclass(kw_only=True)
class Timings:
    """Wall-clock seconds of each stage.

    `load_s` is spent once for a model and reported with each answer; `first_token_s` runs from the call to the first
    token, pictures included; `generate_s` from there to the end; `tokens_per_s` is the rate after the first token.
    """

    load_s: float = 0.0
    decode_image_s: float = 0.0
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    generate_s: float = 0.0
    tokens_per_s: float = 0.0

    @contextmanager
    def measure(self, stage: str) -> Generator[None]:
        """Add the duration of a block to the field `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)


@dataclass(frozen=True)
class Alternative:
    """A token that might have come: its id, its bytes, and its log-probability."""

    token: int
    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The bytes as text; U+FFFD where they are not whole characters."""
        return self.bytes.decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        """The object of one token in `to_json` of an answer."""
        return {"token": self.token, "text": self.text, "bytes": list(self.bytes), "logprob": round(self.logprob, 6)}


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A token that was drawn, and the likeliest ones at its place, likeliest first; it need not be among them.

    Log-probabilities (natural logarithm) are the model's own: before penalty, temperature, filters and schema.
    """

    top: tuple[Alternative, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As of an alternative, with the list."""
        return {**super().to_json(), "top": [other.to_json() for other in self.top]}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer. `finish_reason` is `length` if `max_tokens` or a full context cut it, `cancelled` if the
    caller did, `tool_calls` if it consists of these, else `stop`. `text` is what the model wrote in any case.

    `data` is the document that a schema asked for, parsed; None without a schema, and if the answer was cut
    before it was whole.
    `logprobs`, if they were asked for, has an entry for each token that was drawn, the one that ended the answer
    included.

    `dropped_turns` counts the oldest turns of a conversation that the model did not see any more, because its context
    is full and the caller allowed it. `choices` has the probability of each, if the answer was chosen among them.
    `warnings` says in words what did not work without touching the answer.
    """

    text: str
    finish_reason: FinishReason
    model: str
    usage: Usage
    timings: Timings
    peak_rss_bytes: int
    data: Any = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    dropped_turns: int = 0
    choices: dict[str, float] | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `edgevlm ask --json` prints; seconds are rounded to the microsecond.

        `data`, `tool_calls`, `logprobs`, `choices`, `dropped_turns` and `warnings` are in it if there are any.
        """
        rare = {
            "tool_calls": [call.to_json() for call in self.tool_calls],
            "logprobs": [entry.to_json() for entry in self.logprobs or ()],
            "choices": self.choices,
            "dropped_turns": self.dropped_turns,
            "warnings": list(self.warnings),
        }
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "model": self.model,
            "usage": asdict(self.usage),
            "timings": {name: round(seconds, 6) for name, seconds in asdict(self.timings).items()},
            "memory": {"peak_rss_bytes": self.peak_rss_bytes},
            **({} if self.data is None else {"data": self.data}),
            **{name: value for name, value in rare.items() if value},
        }
