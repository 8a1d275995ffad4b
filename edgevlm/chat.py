"""A conversation: each turn costs what is new in it, because the model's context still holds the rest."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from edgevlm import messages as chat_messages
from edgevlm.answer import Answer, Timings
from edgevlm.errors import UsageError
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
        self._open = False
        self.messages: list[Message] = chat_messages.question("", system=system)[:-1]

    def ask(self, prompt: str | Sequence[Any], images: Sequence[ImageSource] = (), **options: Any) -> Answer:
        """Say something, and get the answer; arguments as for `Model.ask`.

        Raises:
            EdgeVLMError: one of the classes in `edgevlm.errors`.
        """
        return self.stream(prompt, images, **options).finish()

    def stream(self, prompt: str | Sequence[Any], images: Sequence[ImageSource] = (), **options: Any) -> Stream:
        """As `ask`, but yields the answer's text piece by piece.

        Raises:
            UsageError: the turn before is still being answered.
        """
        if self._open:
            raise UsageError("the last turn is still being answered; finish or close its stream first")
        reader = self._model._reader
        turn = chat_messages.question(prompt, images)
        if chat_messages.images_of(turn):
            reader.eyes()
        turn = chat_messages.with_images(turn, reader.look(turn, Timings()))
        asked = [*self.messages, *turn]
        if self._drop_oldest:
            self._drop(asked, options)
        first, rest = asked[: self._n_system], asked[self._n_system :]
        shown = [*first, *rest[2 * self._n_dropped :]]
        inner = self._model._stream(shown, options, dropped_turns=self._n_dropped)
        return Stream(self._recorded(turn, inner), inner.cancelled)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        del self.messages[self._n_system :]
        self._n_dropped = 0

    def _recorded(self, turn: list[Message], inner: Stream) -> Generator[str, None, Answer]:
        pieces: list[str] = []
        if self._open:
            raise UsageError("another turn is being answered; finish or close its stream first")
        self._open = True
        try:
            for piece in inner:
                pieces.append(piece)
                yield piece
            answer = inner.finish()
        except GeneratorExit:
            inner.close()
            self._record(turn, "".join(pieces))
            raise
        finally:
            self._open = False
        self._record(turn, answer.text)
        return answer

    def _record(self, turn: list[Message], answer: str) -> None:
        if answer:  # a turn that ended before anything was said leaves the conversation as it was
            self.messages += [*turn, {"role": "assistant", "content": answer}]

    def _drop(self, asked: list[Message], options: dict[str, Any]) -> None:
        """Drop so many of the oldest turns that prompt and answer fit, and a quarter of the context more: every turn
        that goes moves all that follow, and the context has to be read again."""
        first, rest = asked[: self._n_system], asked[self._n_system :]
        tools = check_tools(options["tools"]) if options.get("tools") else ()
        reader, limit = self._model._reader, self._model._decoder.n_context
        wanted = options.get("max_tokens") or 0
        for_answer = min(wanted if type(wanted) is int and wanted > 0 else limit, limit // 4)

        def needed(dropped: int) -> int:
            messages = [*first, *rest[2 * dropped :]]
            layouts = [picture.layout for picture in chat_messages.images_of(messages)]
            return sum(map(len, reader.plan(messages, layouts, tools)))

        if needed(self._n_dropped) + for_answer <= limit:
            return
        low, high = self._n_dropped + 1, len(rest) // 2
        while low < high:  # the fewest that must go
            middle = (low + high) // 2
            low, high = (low, middle) if needed(middle) + for_answer <= limit * 3 // 4 else (middle + 1, high)
        self._n_dropped = min(low, len(rest) // 2)
