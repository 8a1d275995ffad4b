"""Where the weights come from and how they were converted: the section `provenance`, and GGUF's `general` keys."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from edgevlm.converters.checkpoint import Checkpoint
from edgevlm.families.schema import Origin

#: Keys of a model card's front matter that we carry along.
_CARD_KEYS = ("license", "license_name", "license_link", "base_model")
_TOOLS = ("edgevlm", "llama-cpp-python", "gguf", "onnx-ir", "onnxruntime", "numpy")


def provenance(checkpoint: Checkpoint, *, source: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The section; it holds no date, and of the path only the folder's name: converting twice gives the same bytes."""
    return {
        "source": source,
        "source_files": checkpoint.hashes(),
        "model_card": _model_card(checkpoint),
        "arguments": arguments,
        "tools": tool_versions(),
    }


def is_unicode(text: str) -> bool:
    """Whether a text from a file or a file's name was text there: a record in JSON can hold nothing else."""
    return all(not 0xD800 <= ord(letter) <= 0xDFFF for letter in text)


def tool_versions() -> dict[str, str]:
    """Versions of what a conversion depends on."""
    return {name: _version(name) for name in _TOOLS}


def general_keys(checkpoint: Checkpoint, name: str, origin: Origin | None) -> dict[str, str]:
    """`general.*` keys of the GGUF file; whose model it is goes where the file goes."""
    card = _model_card(checkpoint)
    keys = {"general.name": name}
    if origin:
        keys["general.description"] = "; ".join(filter(None, (f"{origin.model}, {origin.repository}", origin.notice)))
    for ours, theirs in (("license", "license"), ("license.name", "license_name"), ("license.link", "license_link")):
        if theirs in card:
            keys[f"general.{ours}"] = card[theirs]
    return keys


def _model_card(checkpoint: Checkpoint) -> dict[str, str]:
    """Plain `key: value` lines of README.md's front matter, or a plain list below `key:`; nothing else is parsed."""
    text = checkpoint.text("README.md") or ""
    front = re.match(r"---\n(.*?)\n---\s*\n", text, re.DOTALL)
    if front is None:
        return {}
    found = dict(re.findall(r"^([a-z_]+):[ \t]+(\S.*?)[ \t]*$", front[1], re.MULTILINE))
    for key, lines in re.findall(r"^([a-z_]+):[ \t]*\n((?:[ \t]*- .*(?:\n|$))+)", front[1], re.MULTILINE):
        found[key] = ", ".join(line.strip().removeprefix("- ").strip(" '\"") for line in lines.splitlines())
    return {key: value.strip("'\"") for key, value in found.items() if key in _CARD_KEYS}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
