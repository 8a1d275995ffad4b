"""What a caller says, in whichever form, as chat messages whose pictures stand where they belong.

A message is `{"role", "content"}`; its content is a text, or a list of parts: texts, pictures, and the two objects
`{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. What OpenAI's clients send is a picture too,
`{"type": "image_url", "image_url": {"url": ...}}`, if it is a `data:` URL; nothing is ever fetched.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from typing import Any

from edgevlm.errors import UsageError
from edgevlm.options import shown
from edgevlm.prompt import Message
from edgevlm.tools import check_calls

ROLES = ("system", "user", "assistant", "tool")
#: What stands for the next picture in a prompt.
IMAGE_MARK = "{image}"


def question(prompt: str | Sequence[Any], images: Sequence[Any] = (), system: str | None = None) -> list[Message]:
    """One user turn, after a system message if there is one.

    Args:
        prompt: A text; or texts and pictures in the order in which the model shall see them.
        images: Pictures that come before the prompt: what questions can share stands first.
        system: A system message.

    Raises:
        UsageError: something is not a text or not a picture.
    """
    _check_text("system", "" if system is None else system)
    if not isinstance(images, (list, tuple)):
        raise UsageError(f"images must be a list, found {type(images).__name__}; write images=[picture]")
    if isinstance(prompt, (list, tuple)):
        content: Any = [*(_picture(image) for image in images), *map(_part, prompt)]
    else:
        _check_text("prompt", prompt)
        content = [*(_picture(image) for image in images), {"type": "text", "text": prompt}] if images else prompt
    return [
        *([{"role": "system", "content": system}] if system is not None else []),
        {"role": "user", "content": content},
    ]


def marked(prompt: str, images: Sequence[Any]) -> str | list[Any]:
    """A prompt in which `{image}` stands for each picture, as parts; without any mark the pictures come first.

    Without pictures it is a plain text and no mark counts.

    Raises:
        UsageError: there are marks, but not as many as pictures.
    """
    texts = prompt.split(IMAGE_MARK)
    if not images:
        return prompt
    if len(texts) == 1:
        return [*map(_picture, images), prompt]
    if len(texts) != len(images) + 1:
        raise UsageError(
            f"the prompt has {len(texts) - 1} marks {IMAGE_MARK} for {len(images)} pictures; "
            "write one for each, or none to have the pictures first"
        )
    parts: list[Any] = [texts[0]]
    for image, text in zip(images, texts[1:], strict=True):
        parts += [_picture(image), text]
    return [part for part in parts if part != ""]


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Check a conversation of several turns; it ends with what the model shall answer.

    Besides role and content a message may have `tool_calls` (the assistant's), `tool_call_id` and `name`; whatever else
    is in it is left out.

    Raises:
        UsageError: naming the message that cannot be understood.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError("messages must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in ROLES:
            raise UsageError(f"message {number}: role must be one of {', '.join(ROLES)}, found {shown(role)}")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [*map(_part, content)]
        elif content is not None or not message.get("tool_calls"):
            _check_text(f"message {number}: content", content)
        known = {"role": role, "content": "" if content is None else content}
        if message.get("tool_calls"):
            known["tool_calls"] = check_calls(f"message {number}", message["tool_calls"])
        for name in ("name", "tool_call_id"):
            if message.get(name) is not None:
                _check_text(f"message {number}: {name}", message[name])
                known[name] = message[name]
        checked.append(known)
    if checked[-1]["role"] not in ("user", "tool"):
        raise UsageError(f"the last message must be the user's, found {checked[-1]['role']}")
    return checked


def images_of(messages: Sequence[Message]) -> list[Any]:
    """All pictures of checked messages, in order."""
    return [part["image"] for message in messages for part in _parts(message) if part["type"] == "image"]


def with_images(messages: Sequence[Message], images: Sequence[Any]) -> list[Message]:
    """The messages with other objects in the places of their pictures, in order."""
    left = iter(images)

    def placed(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": next(left)} if part["type"] == "image" else part

    return [
        {**message, "content": [placed(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _parts(message: Message) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        return _picture(part)
    kind = part.get("type")
    if kind == "text":
        _check_text("the text of a part", part.get("text"))
        return {"type": "text", "text": part["text"]}
    if kind == "image" and part.get("image") is not None:
        return _picture(part["image"])
    if kind == "image_url":
        url = part.get("image_url")
        return _picture(_data_url(url.get("url") if isinstance(url, Mapping) else url))
    raise UsageError(f"a part of a message must be text, image or image_url, found {shown(kind)}")


def _picture(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _data_url(url: Any) -> bytes:
    """The bytes of `data:image/...;base64,...`."""
    head, comma, text = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise UsageError(
            f"image_url must be data:image/...;base64,..., found {shown(url)}; nothing is fetched from anywhere"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"the data of an image_url is not base64 ({error})") from None


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        found = "a path" if isinstance(text, os.PathLike) else type(text).__name__
        raise UsageError(f"{name} must be a text, found {found}")
