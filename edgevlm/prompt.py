"""Messages to prompt pieces, through the model's own chat template.

The template is Jinja, as in Hugging Face tokenizers, and comes from the model file: it is untrusted code and runs in
Jinja's sandbox. What the user wrote must stay text: literals of control tokens inside it are shielded before rendering
and never become control tokens or pictures.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from edgevlm.errors import CapabilityError, UsageError

Message = dict[str, Any]


@dataclass(frozen=True)
class TextPiece:
    """Text to tokenize; `parse_special` is False where the user spelled out a control token."""

    text: str
    parse_special: bool = True


@dataclass(frozen=True)
class ImageSlot:
    """The place of the n-th picture, counted from 0 over the whole prompt."""

    index: int


Piece = TextPiece | ImageSlot


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """What rendering needs to know of a model.

    Args:
        template: The Jinja chat template.
        bos, eos: Texts that the template may print as `bos_token` and `eos_token`.
        control_tokens: Every text that tokenizes to a control token.
        image_token: What the template prints for a picture; None for a text-only model.
    """

    template: str
    bos: str
    eos: str
    control_tokens: tuple[str, ...]
    image_token: str | None = None


def user_messages(prompt: str, n_images: int, system: str | None) -> list[Message]:
    """One user turn, pictures first: everything that can be shared between questions stands before the question."""
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    content: Any = prompt
    if n_images:
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
    return [*messages, {"role": "user", "content": content}]


def render(messages: list[Message], form: PromptFormat) -> list[Piece]:
    """Render messages into pieces, in order.

    Args:
        messages: `{"role", "content"}`; content is a text or a list of `{"type": "image"}` and
            `{"type": "text", "text"}` parts.
        form: The model's template and literals.

    Returns:
        Text pieces and image slots; the slots are numbered as the pictures were given.

    Raises:
        UsageError: a text holds NUL or a lone surrogate.
        CapabilityError: `capability.no_template`, the template fails or does not place every picture.
    """
    shield = _Shield(form)
    n_images = sum(part["type"] == "image" for message in messages for part in _parts(message))
    try:
        rendered = _compile(form.template).render(
            messages=[shield.message(message) for message in messages],
            add_generation_prompt=True,
            bos_token=form.bos,
            eos_token=form.eos,
        )
    except _template_errors() as error:
        raise CapabilityError(
            f"the model's chat template cannot render this conversation: {error}", code="capability.no_template"
        ) from error
    pieces = shield.split(rendered)
    slots = sum(isinstance(piece, ImageSlot) for piece in pieces)
    if slots != n_images:
        raise CapabilityError(
            f"the model's chat template placed {slots} of {n_images} pictures; it is not a vision template",
            code="capability.no_template",
        )
    return pieces


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


class _Shield:
    """Hides control-token literals of user text from the template and from the tokenizer.

    Each literal becomes `NUL number NUL` while the template runs. NUL is refused in user text, so the marks are
    unambiguous, and templates that trim or slice text leave them whole.
    """

    def __init__(self, form: PromptFormat) -> None:
        self._image_token = form.image_token
        literals = {*form.control_tokens, *([form.image_token] if form.image_token else [])} - {""}
        # Longest first, so that a literal never hides a longer one that begins alike.
        self._literals = sorted(literals, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, self._literals))) if literals else None
        self._numbers = {text: number for number, text in enumerate(self._literals)}

    def message(self, message: Message) -> Message:
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self._hide(content)}
        return {
            **message,
            "content": [{**p, "text": self._hide(p["text"])} if p["type"] == "text" else p for p in content],
        }

    def _hide(self, text: str) -> str:
        if "\0" in text:
            raise UsageError("the prompt holds a NUL character; remove it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError("the prompt is not valid Unicode (it holds half of a surrogate pair)") from None
        return self._pattern.sub(lambda m: f"\0{self._numbers[m.group()]}\0", text) if self._pattern else text

    def split(self, rendered: str) -> list[Piece]:
        mark = r"\0(?P<number>\d+)\0"
        image = f"|(?P<image>{re.escape(self._image_token)})" if self._image_token else ""
        pieces: list[Piece] = []
        position, n_images = 0, 0
        for match in re.finditer(mark + image, rendered):
            if match.start() > position:
                pieces.append(TextPiece(rendered[position : match.start()]))
            if match["number"] is not None:
                pieces.append(TextPiece(self._literals[int(match["number"])], parse_special=False))
            else:
                pieces.append(ImageSlot(n_images))
                n_images += 1
            position = match.end()
        if position < len(rendered):
            pieces.append(TextPiece(rendered[position:]))
        return pieces


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """Compile a template in the environment that `transformers` documents for chat templates."""
    import json
    from datetime import datetime

    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise CapabilityError(f"the model's chat template refused: {message}", code="capability.no_template")

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        # Jinja's own filter escapes for HTML, which would change the prompt.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _template_errors() -> tuple[type[BaseException], ...]:
    from jinja2 import TemplateError

    # Besides Jinja's own, whatever a template provokes by treating a value as what it is not.
    return (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError, OverflowError)
