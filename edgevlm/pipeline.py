"""The stages in order, with a timing for each: bytes -> pixels -> embeddings -> segments -> tokens -> text."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgevlm import messages as chat_messages
from edgevlm import prompt as prompts
from edgevlm.answer import Answer, FinishReason, Timings, Usage
from edgevlm.choose import check_choices, probabilities
from edgevlm.decoder import Decoder
from edgevlm.errors import Cancelled, CapabilityError, ContextError, UsageError
from edgevlm.generate import Generation
from edgevlm.kept import Kept
from edgevlm.layout import ImageLayout
from edgevlm.machine import peak_rss_bytes
from edgevlm.options import GenerateOptions
from edgevlm.prompt import Message
from edgevlm.spec import ModelSpec, PromptSpec
from edgevlm.splice import Plan, PlannedImage, Position, plan, positions, skip, splice
from edgevlm.stream import Stream
from edgevlm.tools import parse_calls
from edgevlm.vision import Picture, Vision, embeds_of, no_vision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.chat import Chat
    from edgevlm.memory import MemoryPlan
    from edgevlm.tuning import Tuned
    from edgevlm.vision import ImageSource


@dataclass(frozen=True)
class _Prompt:
    """A prompt that the context holds: its size in positions, what was there already, and what to keep on disk."""

    timings: Timings
    n_positions: int
    n_image_rows: int
    cached: int
    state: tuple[list[Position], bytes] | None


_CUT = "the answer was cut before its JSON was whole; allow more tokens or a larger context"


class Model:
    """A loaded model, made by `edgevlm.load()`. Use it as a context manager, or call `close()`.

    It answers one question at a time and must not be used from several threads at once.

    Args:
        name: What answers call it.
        decoder: The language model.
        spec: The bundle's spec; None for a plain GGUF file.
        vision: The half that sees, or None.
        kept: What lies on disk between processes, or None.
        identity: What the decoder's state belongs to; None if it is not kept.
    """

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        spec: ModelSpec | None = None,
        vision: Vision | None = None,
        *,
        kept: Kept | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.spec = spec
        self.load_s = 0.0
        #: How it was fitted into memory; None if it was not made by `load`.
        self.memory: MemoryPlan | None = None
        #: What a tuning of it belongs to (`edgevlm.tuning`); empty if it was not made by `load`.
        self.tuning_identity: dict[str, Any] = {}
        self._decoder = decoder
        self._vision = vision
        self._kept = kept
        self._identity = identity
        decoder.vocabulary.ban(spec.prompt.placeholders() if spec else ())
        self._format = prompts.prompt_format(
            name, decoder.header, decoder.vocabulary.control_tokens, spec.prompt if spec else PromptSpec()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory. Closing twice is harmless."""
        self._decoder.close()
        if self._vision:
            self._vision.close()

    def ask(
        self,
        prompt: str | Sequence[Any],
        images: Sequence[ImageSource] = (),
        *,
        system: str | None = None,
        **options: Any,
    ) -> Answer:
        """Answer one question about any number of pictures.

        Args:
            prompt: The question; or texts and pictures in any order: `["Compare", one, "with", other]`.
            images: Paths, encoded bytes, PIL images or uint8 arrays (HW or HWC); they come before the prompt.
            system: A system message.
            options: Fields of `GenerateOptions`: `max_tokens`, `temperature`, `stop` and so on.

        Raises:
            EdgeVLMError: one of the classes in `edgevlm.errors`.
        """
        return self.stream(prompt, images, system=system, **options).finish()

    def stream(
        self,
        prompt: str | Sequence[Any],
        images: Sequence[ImageSource] = (),
        *,
        system: str | None = None,
        **options: Any,
    ) -> Stream:
        """As `ask`, but yields the answer's text piece by piece; arguments are checked before the first piece."""
        self._decoder.check_open()
        return self._stream(chat_messages.question(prompt, images, system), options)

    def reply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """Answer the last of several messages; `edgevlm.messages` describes their form, OpenAI's among others.

        Raises:
            EdgeVLMError: one of the classes in `edgevlm.errors`.
        """
        return self.stream_reply(messages, **options).finish()

    def stream_reply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Stream:
        """As `reply`, but yields the answer's text piece by piece."""
        self._decoder.check_open()
        return self._stream(chat_messages.conversation(messages), options)

    def choose(
        self,
        prompt: str | Sequence[Any],
        choices: Sequence[str],
        images: Sequence[ImageSource] = (),
        *,
        system: str | None = None,
    ) -> dict[str, float]:
        """The probability of each choice, given that the answer is one of them; they sum up to 1.

        By likelihood and not by free text (`edgevlm.choose`), which small models are far better at. The prompt is read
        once. Arguments as for `ask`.

        Raises:
            EdgeVLMError: one of the classes in `edgevlm.errors`.

        Example::

            model.choose("Is the red lamp on?", ["yes", "no"], images=["panel.jpg"])  # {"yes": 0.98, "no": 0.02}
        """
        found = self.pick(prompt, choices, images, system=system).choices
        assert found is not None
        return found

    def pick(
        self,
        prompt: str | Sequence[Any],
        choices: Sequence[str],
        images: Sequence[ImageSource] = (),
        *,
        system: str | None = None,
    ) -> Answer:
        """As `choose`, but as an answer: its text is the likeliest choice, its `choices` has the probabilities."""
        self._decoder.check_open()
        return self._choose(chat_messages.question(prompt, images, system), choices)

    def chat(self, *, system: str | None = None, drop_oldest: bool = False) -> Chat:
        """Begin a conversation that remembers its turns; see `edgevlm.chat.Chat`."""
        from edgevlm.chat import Chat

        return Chat(self, system=system, drop_oldest=drop_oldest)

    def tune(self, *, rounds: int = 5) -> Tuned:
        """Measure which numbers of threads are best for this model on this machine (`edgevlm.tuning`), and keep them in
        the folder for state: `load` uses them from then on. A folder that cannot be written is a warning."""
        from edgevlm import tuning

        self._decoder.check_open()
        return tuning.tune_and_keep(self._decoder, self._vision, self.tuning_identity, rounds=rounds)

    def preprocess(self, image: ImageSource) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """The tensor that the encoder would be fed: float32 [T, 3, height_px, width_px].

        For a model that cuts pictures into slices of their own shape (`spec.image.policy` is `slices`) a list: the
        whole picture, and the slices if there are any, float32 [T, 3, H, W] each.
        """
        vision = self._eyes()
        batches = vision.pixels(image)
        return batches if vision.image_spec.policy == "slices" else batches[0]

    def embed_image(self, image: ImageSource) -> NDArray[np.float32]:
        """What the decoder would be fed for a picture: float32 [n_tokens, n_embd], read-only."""
        vision = self._eyes()
        timings = Timings()
        try:
            return vision.embed(vision.look(image, timings), timings)
        finally:
            vision.done()

    # ---- the stages

    def _stream(self, messages: list[Message], options: dict[str, Any], *, dropped_turns: int = 0) -> Stream:
        if chat_messages.images_of(messages):
            self._eyes()
        try:
            checked = GenerateOptions(**options)
        except TypeError as error:
            raise UsageError(str(error).replace("GenerateOptions.__init__()", "ask()")) from None
        cancelled = threading.Event()
        return Stream(self._run(messages, checked, dropped_turns, cancelled), cancelled)

    def _run(
        self, messages: list[Message], options: GenerateOptions, dropped_turns: int, cancelled: threading.Event
    ) -> Generator[str, None, Answer]:
        started = time.perf_counter()
        self._decoder.cancelled = cancelled
        try:
            prompt = self._read(messages, options.tools)
        except Cancelled:
            read = _Prompt(Timings(load_s=self.load_s), self._decoder.n_past, 0, 0, None)
            return self._answer(read, "", "cancelled", completion_tokens=0)
        finally:
            self._decoder.cancelled = threading.Event()
        generation = Generation(self._decoder, options, cancelled)
        pieces = []
        for piece in generation:
            pieces.append(piece)
            yield piece
        timings = prompt.timings
        timings.first_token_s = generation.first_token_at - started
        timings.generate_s = generation.seconds
        timings.tokens_per_s = generation.tokens_per_s
        text, reason = "".join(pieces), generation.finish_reason
        calls = parse_calls(text, options.tools) if options.tools and reason == "stop" else ()
        return self._answer(
            prompt,
            text,
            "tool_calls" if calls else reason,
            completion_tokens=len(generation.tokens),
            forced_tokens=generation.forced,
            data=json.loads(text) if options.format and reason == "stop" else None,
            tool_calls=calls,
            dropped_turns=dropped_turns,
            warnings=(_CUT,) if options.format and reason != "stop" else (),
            logprobs=None if options.logprobs is None else tuple(generation.logprobs),
        )

    def _answer(
        self,
        prompt: _Prompt,
        text: str,
        reason: FinishReason,
        *,
        completion_tokens: int,
        forced_tokens: int = 0,
        warnings: tuple[str, ...] = (),
        **more: Any,
    ) -> Answer:
        if self._kept and self._identity and prompt.state:
            self._kept.put_state(self._identity, *prompt.state)
        return Answer(
            text=text,
            finish_reason=reason,
            model=self.name,
            usage=Usage(
                prompt_tokens=prompt.n_positions,
                image_tokens=prompt.n_image_rows,
                completion_tokens=completion_tokens,
                cached_tokens=prompt.cached,
                forced_tokens=forced_tokens,
            ),
            timings=prompt.timings,
            peak_rss_bytes=peak_rss_bytes(),
            warnings=(*warnings, *(self._kept.take_warnings() if self._kept else ())),
            **more,
        )

    def _choose(self, messages: list[Message], choices: Sequence[str]) -> Answer:
        """An answer whose text is the likeliest choice, and whose `choices` has all probabilities."""
        checked = check_choices(choices)
        started = time.perf_counter()
        prompt = self._read(messages)
        scoring = time.perf_counter()
        found = probabilities(self._decoder, checked)
        prompt.timings.first_token_s = time.perf_counter() - started
        prompt.timings.generate_s = time.perf_counter() - scoring
        best = max(checked, key=lambda choice: found[choice])
        return self._answer(prompt, best, "stop", completion_tokens=0, choices=found)

    def _read(self, messages: list[Message], tools: Sequence[Mapping[str, Any]] = ()) -> _Prompt:
        """Everything up to the prompt's last logits."""
        timings = Timings(load_s=self.load_s)
        pictures = self._look(messages, timings)
        # Counted before anything is encoded: a prompt that does not fit costs next to nothing.
        segments = self._plan(messages, [picture.layout for picture in pictures], tools)
        self._check_room(segments)
        cached, state = self._prefill(segments, pictures, timings)
        return _Prompt(timings, sum(map(len, segments)), _n_image_rows(segments), cached, state)

    def _look(self, messages: list[Message], timings: Timings) -> list[Picture]:
        """The messages' pictures; those of a conversation have been looked at."""
        images = chat_messages.images_of(messages)
        return [image if isinstance(image, Picture) else self._eyes().look(image, timings) for image in images]

    def _plan(
        self, messages: list[Message], layouts: Sequence[ImageLayout], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Plan:
        pieces = prompts.render(messages, self._format, tools)
        segments = plan(pieces, self._decoder.vocabulary.tokenize, bos=self._format.bos, layouts=layouts)
        if not segments:
            raise CapabilityError(
                f"the chat template of {self.name} makes nothing of this prompt", code="capability.no_template"
            )
        return segments

    def _check_room(self, segments: Plan) -> None:
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
        self, segments: Plan, pictures: Sequence[Picture], timings: Timings
    ) -> tuple[int, tuple[list[Position], bytes] | None]:
        """Decode what the context does not hold already.

        Returns:
            How many positions it held, and what to keep on disk: positions, and the decoder's state behind them.
        """
        wanted = positions(segments, [picture.key for picture in pictures])
        cached = self._decoder.begin(wanted)
        n_shared = _end_of_images(segments) if self._kept and self._identity else 0
        if cached < n_shared and self._restore(wanted[:n_shared]):
            cached = self._decoder.begin(wanted)
        left = skip(segments, cached)
        embeds = embeds_of(self._eyes, left, pictures, timings)
        if self._decoder.n_past < cached:  # what it held was given up to make room for the encoder
            cached, left = 0, list(segments)
            embeds |= embeds_of(self._eyes, left, pictures, timings)
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

    def _eyes(self) -> Vision:
        self._decoder.check_open()
        if self._vision is None:
            raise no_vision(self.name)
        return self._vision


def _n_image_rows(segments: Plan) -> int:
    return sum(len(segment) for segment in segments if isinstance(segment, PlannedImage))


def _end_of_images(segments: Plan) -> int:
    """Positions up to the end of the last picture; what can be shared by all questions about these pictures."""
    ends = [n + 1 for n, segment in enumerate(segments) if isinstance(segment, PlannedImage)]
    return sum(map(len, segments[: ends[-1]])) if ends else 0
