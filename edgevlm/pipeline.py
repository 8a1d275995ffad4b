"""The stages in order, with a timing for each: bytes -> pixels -> embeddings -> segments -> tokens -> text."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgevlm import messages as chat_messages
from edgevlm.answer import Answer, FinishReason, Timings, Usage
from edgevlm.choose import check_choices, probabilities
from edgevlm.decoder import Decoder
from edgevlm.errors import Cancelled, UsageError
from edgevlm.generate import Generation
from edgevlm.kept import Kept
from edgevlm.machine import peak_rss_bytes
from edgevlm.options import GenerateOptions, whole
from edgevlm.prompt import Message, prompt_format
from edgevlm.reading import Prompt, Reader
from edgevlm.spec import ModelSpec, PromptSpec
from edgevlm.stream import Stream
from edgevlm.tools import parse_calls
from edgevlm.vision import Vision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.chat import Chat
    from edgevlm.memory import MemoryPlan
    from edgevlm.tuning import Tuned
    from edgevlm.vision import ImageSource


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
        decoder.vocabulary.ban(spec.prompt.placeholders() if spec else ())
        form = prompt_format(
            name, decoder.header, decoder.vocabulary.control_tokens, spec.prompt if spec else PromptSpec()
        )
        self._reader = Reader(name, decoder, form, vision, kept, identity)

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

    def cached(self) -> dict[str, int]:
        """What is there for later questions: `positions` of the context, `pictures` in memory and their
        `picture_bytes`, `files` in the state folder and their `file_bytes`."""
        self._decoder.check_open()
        return self._reader.cached()

    def forget(self) -> None:
        """Drop everything that `cached` counts, on disk as well; answers stay the same."""
        self._decoder.check_open()
        self._reader.forget()

    def tune(self, *, rounds: int = 5) -> Tuned:
        """Measure which numbers of threads are best for this model on this machine (`edgevlm.tuning`), and keep them in
        the folder for state: `load` uses them from then on. A folder that cannot be written is a warning."""
        from edgevlm import tuning

        self._decoder.check_open()
        rounds = whole("rounds", rounds, 1, 1000)
        return tuning.tune_and_keep(self._decoder, self._vision, self.tuning_identity, rounds=rounds)

    def preprocess(self, image: ImageSource) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """The tensor that the encoder would be fed: float32 [T, 3, height_px, width_px].

        For a model that cuts pictures into slices of their own shape (`spec.image.policy` is `slices`) a list: the
        whole picture, and the slices if there are any, float32 [T, 3, H, W] each.
        """
        vision = self._reader.eyes()
        batches = vision.pixels(image)
        return batches if vision.image_spec.policy == "slices" else batches[0]

    def embed_image(self, image: ImageSource) -> NDArray[np.float32]:
        """What the decoder would be fed for a picture: float32 [n_tokens, n_embd], read-only."""
        vision = self._reader.eyes()
        timings = Timings()
        try:
            return vision.embed(vision.look(image, timings), timings)
        finally:
            vision.done()

    # ---- the stages

    def _stream(self, messages: list[Message], options: dict[str, Any], *, dropped_turns: int = 0) -> Stream:
        if chat_messages.images_of(messages):
            self._reader.eyes()
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
            prompt = self._reader.read(messages, options.tools)
        except Cancelled:
            read = Prompt(Timings(), self._decoder.n_past, 0, 0, None)
            return self._answer(read, "", "cancelled", completion_tokens=0, dropped_turns=dropped_turns)
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
        whole = generation.whole and reason != "cancelled"
        calls = parse_calls(text, options.tools) if options.tools and reason == "stop" else ()
        return self._answer(
            prompt,
            text,
            "tool_calls" if calls else reason,
            completion_tokens=len(generation.tokens),
            forced_tokens=generation.forced,
            data=json.loads(text) if whole else None,
            tool_calls=calls,
            dropped_turns=dropped_turns,
            warnings=(_CUT,) if options.format and reason == "length" and not whole else (),
            logprobs=None if options.logprobs is None else tuple(generation.logprobs),
        )

    def _answer(
        self,
        prompt: Prompt,
        text: str,
        reason: FinishReason,
        *,
        completion_tokens: int,
        forced_tokens: int = 0,
        warnings: tuple[str, ...] = (),
        **more: Any,
    ) -> Answer:
        prompt.timings.load_s += self.load_s
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
            warnings=(*warnings, *self._reader.finish(prompt)),
            **more,
        )

    def _choose(self, messages: list[Message], choices: Sequence[str]) -> Answer:
        """An answer whose text is the likeliest choice, and whose `choices` has all probabilities."""
        checked = check_choices(choices)
        started = time.perf_counter()
        prompt = self._reader.read(messages)
        scoring = time.perf_counter()
        found = probabilities(self._decoder, checked)
        prompt.timings.first_token_s = time.perf_counter() - started
        prompt.timings.generate_s = time.perf_counter() - scoring
        best = max(checked, key=lambda choice: found[choice])
        return self._answer(prompt, best, "stop", completion_tokens=0, choices=found)
