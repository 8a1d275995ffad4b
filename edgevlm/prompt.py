"""Messages to prompt pieces, through the model's own chat template.

The template comes from the model file and runs in a sandbox (`template.py`). What the user wrote must stay text:
literals of control tokens inside it are shielded before rendering and never become control tokens or pictures.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.errors import CapabilityError, EdgeVLMError, UsageError
from edgevlm.gguf import GGUFHeader
from edgevlm.spec import PromptSpec
from edgevlm.template import render_template

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
        between_parts: What joins a message's parts for a template that takes plain texts alone; None if it takes parts.
    """

    template: str
    bos: str
    eos: str
    control_tokens: tuple[str, ...]
    image_token: str | None = None
    between_parts: str | None = None


def prompt_format(name: str, header: GGUFHeader, control_tokens: tuple[str, ...], literals: PromptSpec) -> PromptFormat:
    """The format of a model that is called `name`; template and special tokens are in its GGUF file.

    Raises:
        CapabilityError: `capability.no_template`.
    """
    template = header.chat_template
    if template is None:
        raise CapabilityError(
            f"{name} carries no chat template; use a model that was trained for conversation",
            code="capability.no_template",
        )
    return PromptFormat(
        template=template,
        bos=header.token("bos"),
        eos=header.token("eos"),
        control_tokens=control_tokens,
        image_token=literals.image_token,
        between_parts=literals.between_parts,
    )


def render(messages: list[Message], form: PromptFormat, tools: Sequence[Mapping[str, Any]] = ()) -> list[Piece]:
    """Render messages into pieces, in order.

    Args:
        messages: `{"role", "content"}`; content is a text or a list of `{"type": "image"}` and
            `{"type": "text", "text"}` parts.
        form: The model's template and literals.
        tools: What the model may call.

    Returns:
        Text pieces and image slots; the slots are numbered as the pictures were given.

    Raises:
        UsageError: a text holds NUL or a lone surrogate.
        CapabilityError: `capability.no_template`, the template fails or does not place every picture;
            `capability.no_tools`, it does not print the tools.
    """
    shield = _Shield(form)
    n_images = sum(part["type"] == "image" for message in messages for part in _parts(message))
    shielded = [shield.message(message) for message in messages]
    if form.between_parts is not None:
        shielded = [{**message, "content": _joined(message, form)} for message in shielded]
    parts_only = _ignores_strings(form.template, form.bos, form.eos)
    if parts_only:
        shielded = [{**message, "content": _parts(message)} for message in shielded]
    offered = [shield.hidden(tool) for tool in tools] or None
    try:
        rendered = render_template(form.template, shielded, bos=form.bos, eos=form.eos, tools=offered)
        if offered and not (_prints(rendered, tools) and _takes_tools(form.template, form.bos, form.eos, parts_only)):
            raise CapabilityError(
                "the model's chat template has no place for tools; describe them in the prompt, or use another model",
                code="capability.no_tools",
            )
        pieces = shield.split(rendered)
    except EdgeVLMError:
        raise
    except Exception as error:  # whatever the template's own code provokes
        raise CapabilityError(
            f"the model's chat template cannot render this conversation: {error or type(error).__name__}",
            code="capability.no_template",
        ) from error
    slots = sum(isinstance(piece, ImageSlot) for piece in pieces)
    if slots != n_images:
        raise CapabilityError(
            f"the model's chat template placed {slots} of {n_images} pictures; it is not a vision template",
            code="capability.no_template",
        )
    return pieces


def _prints(rendered: str, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each tool's name is in the prompt; names have no character that a template would write otherwise.

    The conversation may hold it as well, so this alone does not tell that the template printed it.
    """
    return all(tool["function"]["name"] in rendered for tool in tools)


@functools.lru_cache(maxsize=8)
def _takes_tools(template: str, bos: str, eos: str, parts_only: bool) -> bool:
    """Whether a template prints the tools, seen by a name that stands nowhere else; some do beside a system message."""
    name, word = f"tool_{secrets.token_hex(8)}", "edgevlm"
    schema = {"type": "object", "properties": {"a": {"type": "string", "description": word}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": name, "description": word, "parameters": schema}}
    content = [{"type": "text", "text": word}] if parts_only else word
    messages = [{"role": role, "content": content} for role in ("system", "user")]

    def printed(conversation: list[Message]) -> bool:
        try:
            return name in render_template(template, conversation, bos=bos, eos=eos, tools=[tool])
        except Exception:  # whatever the template's own code provokes: some take no system message
            return False

    return printed(messages[1:]) or printed(messages)


@functools.lru_cache(maxsize=8)
def _ignores_strings(template: str, bos: str, eos: str) -> bool:
    """Whether a template prints texts only as parts of a list; SmolVLM's prints nothing for a plain text, silently."""
    word = "edgevlm"

    def printed(content: str | list[dict[str, str]]) -> bool:
        try:
            return word in render_template(template, [{"role": "user", "content": content}], bos=bos, eos=eos)
        except Exception:  # whatever the template's own code provokes; the real conversation meets it again
            return False

    return not printed(word) and printed([{"type": "text", "text": word}])


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _joined(message: Message, form: PromptFormat) -> str:
    """A message as one text, with the image token where a picture goes."""
    texts = [form.image_token or "" if part["type"] == "image" else part["text"] for part in _parts(message)]
    return (form.between_parts or "").join(texts)


def check_unicode(name: str, text: str) -> None:
    """Refuse what native code would cut or Python cannot encode.

    Raises:
        UsageError: a NUL or a lone surrogate.
    """
    if "\0" in text:
        raise UsageError(f"{name} holds a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not valid Unicode (it holds half of a surrogate pair)") from None


@functools.lru_cache(maxsize=8)
def _literals(
    control_tokens: tuple[str, ...], image_token: str | None
) -> tuple[list[str], dict[str, int], re.Pattern[str] | None]:
    """What to hide, its numbers, and a pattern of all: compiling Llama 3's 256 takes longer than a short turn."""
    found = {*control_tokens, *([image_token] if image_token else [])} - {""}
    # Longest first, so that a literal never hides a longer one that begins alike.
    literals = sorted(found, key=lambda text: (-len(text), text))
    numbers = {text: number for number, text in enumerate(literals)}
    return literals, numbers, re.compile("|".join(map(re.escape, literals))) if literals else None


class _Shield:
    """Hides control-token literals of user text from the template and from the tokenizer.

    Each literal becomes `NUL nonce number NUL` while the template runs. NUL is refused in user text and a template
    cannot know the nonce, so the marks are unambiguous, and templates that trim or slice text leave them whole.
    """

    def __init__(self, form: PromptFormat) -> None:
        self._image_token = form.image_token
        self._nonce = secrets.token_hex(8)
        self._literals, self._numbers, self._pattern = _literals(form.control_tokens, form.image_token)

    def message(self, message: Message) -> Message:
        content = message["content"]
        others = {name: self.hidden(value) for name, value in message.items() if name != "content"}
        if isinstance(content, str):
            return {**others, "content": self._hide(content)}
        return {
            **others,
            # of a picture the template learns that it is there, and nothing else
            "content": [
                {"type": "text", "text": self._hide(part["text"])} if part["type"] == "text" else {"type": "image"}
                for part in content
            ],
        }

    def hidden(self, value: Any) -> Any:
        """JSON values of the user with all their texts hidden."""
        if isinstance(value, str):
            return self._hide(value)
        if isinstance(value, Mapping):
            return {self._hide(name): self.hidden(child) for name, child in value.items()}
        return [self.hidden(child) for child in value] if isinstance(value, list) else value

    def _hide(self, text: str) -> str:
        check_unicode("the prompt", text)
        return self._pattern.sub(self._mark, text) if self._pattern else text

    def _mark(self, literal: re.Match[str]) -> str:
        return f"\0{self._nonce}{self._numbers[literal.group()]}\0"

    def split(self, rendered: str) -> list[Piece]:
        # A template that prints JSON escapes the NUL, and that of JSON within JSON once more.
        mark = rf"(?:\x00|(?P<slashes>\\+)u0000){self._nonce}(?P<number>[0-9]+)(?:\x00|\\+u0000)"
        image = f"|(?P<image>{re.escape(self._image_token)})" if self._image_token else ""
        pieces: list[Piece] = []
        position, n_images = 0, 0
        for match in re.finditer(mark + image, rendered):
            n_slashes = len(match["slashes"] or "")
            # Escaping n times makes 2^(n-1) of the mark's own backslash, and multiples of 2^n of those before it.
            own = n_slashes & -n_slashes
            start = match.start() + n_slashes - own
            if start > position:
                pieces.append(TextPiece(rendered[position:start]))
            if match["number"] is not None:
                literal = self._literals[int(match["number"])]
                for _ in range(own.bit_length()):
                    literal = json.dumps(literal, ensure_ascii=False)[1:-1]
                pieces.append(TextPiece(literal, parse_special=False))
            else:
                pieces.append(ImageSlot(n_images))
                n_images += 1
            position = match.end()
        if position < len(rendered):
            pieces.append(TextPiece(rendered[position:]))
        return pieces
