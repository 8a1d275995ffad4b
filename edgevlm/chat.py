"""A conversation: each turn costs what is new in it, because the model's context still holds the rest."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from edgevlm import messages as chat_messages
from edgevlm.answer import Answer, Timings
from edgevlm.errors import ContextError
from edgevlm.pipeline import Model
from edgevlm.prompt import Message
from edgevlm.stream import Stream
from edgevlm.tools import check_tools

if TYPE_CHECKING:
    from edgevlm.vision import ImageSource


class Chat:
    """A conversation with a model, made by `Model.chat()`.

    Other questions may be asked of the model in between; they only cost the time to read the conversation again. A turn
    that fails leaves it as it was. One that is left in the middle stays in it, with what had been said.

    Args:
        model: The model; it must stay open.
        system: A system message.
        drop_oldest: When the context is full, forget the oldest turns rather than refuse; `Answer.dropped_turns` says
            how many. The system message stays.

    Attributes:
        messages: What was said, as `Model.reply` takes it; pictures are `edgevlm.vision.Picture`.
    """

    def __init__(self, model: Model, *, system: str | None = None, drop_oldest: bool = False) -> None:
        self._model = model
        self._n_system = 0 if system is None else 1
        self._drop_oldest = drop_oldest
        self._n_dropped = 0
        self.messages: list[Message] = chat_messages.question("", system=system)[:-1]

    def ask(self, prompt: str | Sequence[Any], images: Sequence[ImageSource] = (), **options: Any) -> Answer:
        """Say something, and get the answer; arguments as for `Model.ask`.

        Raises:
            EdgeVLMError: one of the classes in `edgevlm.errors`.
        """
        return self.stream(prompt, images, **options).finish()

    def stream(self, prompt: str | Sequence[Any], images: Sequence[ImageSource] = (), **options: Any) -> Stream:
        """As `ask`, but yields the answer's text piece by piece."""
        model = self._model
        turn = chat_messages.question(prompt, images)
        if chat_messages.images_of(turn):
            model._reader.eyes()
        turn = chat_messages.with_images(turn, model._reader.look(turn, Timings()))
        asked = [*self.messages, *turn]
        dropped = self._fit(asked, options.get("tools") or ()) if self._drop_oldest else 0
        first, rest = asked[: self._n_system], asked[self._n_system :]
        inner = model._stream([*first, *rest[2 * dropped :]], options, dropped_turns=dropped)
        return Stream(self._recorded(turn, inner), inner.cancelled)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        del self.messages[self._n_system :]

    def _recorded(self, turn: list[Message], inner: Stream) -> Generator[str, None, Answer]:
        pieces = []
        try:
            for piece in inner:
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            inner.close()
            self._record(turn, "".join(pieces))
            raise
        assert inner.answer is not None
        self._record(turn, inner.answer.text)
        return inner.answer

    def _record(self, turn: list[Message], answer: str) -> None:
        self.messages += [*turn, {"role": "assistant", "content": answer}]

    def _fit(self, asked: list[Message], tools: Any) -> int:
        """How many of the oldest turns must go so that the prompt fits."""
        first, rest = asked[: self._n_system], asked[self._n_system :]
        n_turns = len(rest) // 2
        checked = check_tools(tools) if tools else ()
        for dropped in range(n_turns + 1):
            messages = [*first, *rest[2 * dropped :]]
            layouts = [picture.layout for picture in chat_messages.images_of(messages)]
            try:
                self._model._reader.check_room(self._model._reader.plan(messages, layouts, checked))
            except ContextError:
                if dropped == n_turns:
                    raise
                continue
            return dropped
        raise AssertionError("unreachable: the last round returns or raises")
