"""What the commands share: reading stdin, writing stdout. The only place that writes to stdout."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from edgevlm.errors import UsageError

_LONGEST_SCHEMA = 1 << 20


def inputs(prompt: str, images: list[str]) -> tuple[str, list[str | bytes]]:
    """Resolve `-`: stdin can be the prompt or one picture, not both."""
    if [prompt, *images].count("-") > 1:
        raise UsageError("stdin was asked for more than once; give `-` for the prompt or for one picture")
    question = prompt
    if prompt == "-":
        try:
            question = stdin().decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError("the prompt on stdin is not UTF-8 text") from None
    return question, [stdin() if image == "-" else image for image in images]


def schema_text(path: Path | None) -> str | None:
    """What a schema file holds."""
    if path is None:
        return None
    from edgevlm.files import open_regular

    with open_regular(path) as (file, _):
        data = file.read(_LONGEST_SCHEMA + 1)
    if len(data) > _LONGEST_SCHEMA:
        raise UsageError(f"{path} has more than {_LONGEST_SCHEMA} bytes; --schema takes a JSON schema")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; --schema takes a JSON schema") from None


def stdin() -> bytes:
    """All of stdin, up to what a picture may have: `< /dev/zero` must not fill the memory."""
    from edgevlm.image import DEFAULT_LIMITS

    if sys.stdin is None:
        raise UsageError("`-` was given but stdin is closed")
    data = sys.stdin.buffer.read(DEFAULT_LIMITS.encoded_bytes + 1)
    if len(data) > DEFAULT_LIMITS.encoded_bytes:
        raise UsageError(f"stdin gives more than {DEFAULT_LIMITS.encoded_bytes} bytes")
    return data


def write(text: str) -> None:
    """Write to stdout at once; a full disk or a closed stdout is an error of ours."""
    from edgevlm.storage import storage_errors

    if sys.stdout is None:
        raise UsageError("stdout is closed; there is nowhere to write the answer")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader went away (`| head`): typer ends quietly
    except OSError as error:
        sys.stdout = io.StringIO()  # or the interpreter would try to flush the old one once more
        with storage_errors(Path("the answer")):
            raise error


def print_result(document: dict[str, Any], text: str, json_output: bool) -> None:
    """One JSON object for programs, or a text for people."""
    import json

    write((json.dumps(document, ensure_ascii=False) if json_output else text) + "\n")
