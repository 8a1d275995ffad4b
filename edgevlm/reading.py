"""From messages to a context that holds them, and nothing is computed that it, a cache or the disk has already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm import messages as chat_messages
from edgevlm import prompt as prompts
from edgevlm.answer import Timings
from edgevlm.decoder import Decoder
from edgevlm.errors import CapabilityError, ContextError
from edgevlm.kept import Kept
from edgevlm.layout import ImageLayout
from edgevlm.prompt import Message, PromptFormat
from edgevlm.splice import Plan, PlannedImage, Position, positions, skip, splice
from edgevlm.splice import plan as splice_plan
from edgevlm.vision import Picture, Vision, embeds_of, no_vision


@dataclass(frozen=True)
class Prompt:
    """A prompt that the context holds: its size in positions, what was there already, and what to keep on disk."""

    timings: Timings
    n_positions: int
    n_image_rows: int
    cached: int
    state: tuple[list[Position], memoryview] | None


class Reader:
    """Reads prompts into a decoder's context.

    Args:
        name: What messages call the model.
        decoder: The language model.
        form: Its template and literals.
        vision: The half that sees, or None.
        kept: What lies on disk between processes, or None.
        identity: What the decoder's state belongs to; None if it is not kept.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        form: PromptFormat,
        vision: Vision | None = None,
        kept: Kept | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._name = name
        self._decoder = decoder
        self._format = form
        self._vision = vision
        self._kept = kept
        self._identity = identity

    def read(self, messages: list[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Prompt:
        """Everything up to the prompt's last logits."""
        timings = Timings()
        pictures = self.look(messages, timings)
        # Counted before anything is encoded: a prompt that does not fit costs next to nothing.
        segments = self.plan(messages, [picture.layout for picture in pictures], tools)
        self.check_room(segments)
        n_shared = _end_of_images(segments, _n_opening(messages)) if self._kept and self._identity else 0
        cached, state = self._prefill(segments, pictures, timings, n_shared)
        return Prompt(timings, sum(map(len, segments)), _n_image_rows(segments), cached, state)

    def look(self, messages: list[Message], timings: Timings) -> list[Picture]:
        """The messages' pictures; those of a conversation have been looked at.

        Of several encoded pictures the pixels are not kept, but decoded again when their turn comes: twelve megapixels
        take 48 MB each.
        """
        pictures: list[Picture] = []
        for image in chat_messages.images_of(messages):
            pictures.append(image if isinstance(image, Picture) else self.eyes().look(image, timings))
            if len(pictures) > 1:
                pictures[-1].image_HWC = None
        return pictures

    def plan(
        self, messages: list[Message], layouts: Sequence[ImageLayout], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Plan:
        pieces = prompts.render(messages, self._format, tools)
        segments = splice_plan(pieces, self._decoder.vocabulary.tokenize, bos=self._format.bos, layouts=layouts)
        if not segments:
            raise CapabilityError(
                f"the chat template of {self._name} makes nothing of this prompt", code="capability.no_template"
            )
        return segments

    def check_room(self, segments: Plan) -> None:
        needed, available = sum(map(len, segments)), self._decoder.n_context
        if needed > available:
            of_images = _n_image_rows(segments)
            pictures = f", {of_images} of them pictures" if of_images else ""
            raise ContextError(
                f"the prompt takes {needed} positions{pictures}; the context has {available}; "
                "shorten it or ask for a larger context",
                needed=needed,
                available=available,
            )

    def _prefill(
        self, segments: Plan, pictures: Sequence[Picture], timings: Timings, n_shared: int
    ) -> tuple[int, tuple[list[Position], memoryview] | None]:
        """Decode what the context does not hold already; the state behind the first `n_shared` positions is to be kept.

        Returns:
            How many positions it held, and what to keep on disk: positions, and the decoder's state behind them.
        """
        wanted = positions(segments, [picture.key for picture in pictures])
        cached = self._decoder.begin(wanted)
        if cached < n_shared and self._restore(wanted[:n_shared]):
            cached = self._decoder.begin(wanted)
        left = skip(segments, cached)
        for picture in pictures if not any(isinstance(segment, PlannedImage) for segment in left) else ():
            picture.image_HWC = None
        embeds = embeds_of(self.eyes, left, pictures, timings)
        if self._decoder.n_past < cached:  # what it held was given up to make room for the encoder
            cached, left = 0, list(segments)
            embeds |= embeds_of(self.eyes, left, pictures, timings)
        state = None
        with timings.measure("prefill_s"):
            if cached < n_shared:
                self._decoder.prefill(splice(left[: len(left) - len(skip(segments, n_shared))], embeds))
                state = wanted[:n_shared], self._decoder.state()
                left = skip(segments, n_shared)
            self._decoder.prefill(splice(left, embeds))
        return cached, state

    def _restore(self, held: list[Position]) -> bool:
        assert self._kept is not None
        assert self._identity is not None
        found = self._kept.state(self._identity, held)
        return found is not None and self._decoder.restore(found, held)

    def eyes(self) -> Vision:
        self._decoder.check_open()
        if self._vision is None:
            raise no_vision(self._name)
        return self._vision

    def finish(self, prompt: Prompt) -> tuple[str, ...]:
        """Keep on disk what was meant to be; returns what went wrong since the last time, in words."""
        if self._kept is None:
            return ()
        if self._identity and prompt.state:
            self._kept.put_state(self._identity, *prompt.state)
        return self._kept.take_warnings()

    def cached(self) -> dict[str, int]:
        """What is there for later questions, counted."""
        pictures, nbytes = self._vision.cached if self._vision else (0, 0)
        entries = self._kept.shelf.entries() if self._kept else []
        return {
            "positions": self._decoder.n_past,
            "pictures": pictures,
            "picture_bytes": nbytes,
            "files": len(entries),
            "file_bytes": sum(size for _path, size, _used in entries),
        }

    def forget(self) -> None:
        """Drop all of it, on disk as well."""
        self._decoder.reset()
        if self._vision:
            self._vision.forget()
        if self._kept:
            self._kept.shelf.clear()


def _n_image_rows(segments: Plan) -> int:
    return sum(len(segment) for segment in segments if isinstance(segment, PlannedImage))


def _n_opening(messages: list[Message]) -> int:
    """How many pictures open the conversation: before any word but the system's, so that what is kept of them tells
    nothing that was said."""
    first = next((message for message in messages if message["role"] != "system"), None)
    parts = first["content"] if first is not None and isinstance(first["content"], list) else []
    return next((n for n, part in enumerate(parts) if part["type"] != "image"), len(parts))


def _end_of_images(segments: Plan, n_images: int) -> int:
    """Positions up to the end of the first pictures; what all questions about them share."""
    ends = [n + 1 for n, one in enumerate(segments) if isinstance(one, PlannedImage) and one.index < n_images]
    return sum(map(len, segments[: ends[-1]])) if ends else 0
