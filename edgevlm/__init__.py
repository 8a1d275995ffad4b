"""edgevlm: vision-language models on the device itself.

    import edgevlm

    with edgevlm.load() as model:
        print(model.ask("What does the display read?", images=["panel.jpg"]).text)

Names are resolved on first use: importing edgevlm loads no native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgevlm import frames, kernels
    from edgevlm.answer import Answer, Timings, Usage
    from edgevlm.chat import Chat
    from edgevlm.converters import convert
    from edgevlm.errors import EdgeVLMError
    from edgevlm.loading import load
    from edgevlm.options import GenerateOptions
    from edgevlm.pipeline import Model
    from edgevlm.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Chat",
    "EdgeVLMError",
    "GenerateOptions",
    "Model",
    "Stream",
    "Timings",
    "Usage",
    "convert",
    "frames",
    "kernels",
    "load",
]

_HOMES = {
    "Answer": "answer",
    "Chat": "chat",
    "EdgeVLMError": "errors",
    "GenerateOptions": "options",
    "Model": "pipeline",
    "Stream": "stream",
    "Timings": "answer",
    "Usage": "answer",
    "convert": "converters",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"edgevlm.{_HOMES[name]}"), name)
    elif name in ("frames", "kernels"):
        value = importlib.import_module(f"edgevlm.{name}")
    else:
        raise AttributeError(f"module 'edgevlm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
