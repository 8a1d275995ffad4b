"""Chat templates: Jinja programs from a model file, hence untrusted, in a sandbox with limits.

The globals, filters and tags are those that `transformers` offers to templates (`utils/chat_template_utils.py`). The
sandbox keeps a template from Python's internals, the limits from filling the memory; a template that loops for hours
can still do so, as it could anywhere else.
"""

from __future__ import annotations

import functools
import json
import re
from datetime import datetime
from typing import Any, NoReturn

from edgevlm.errors import CapabilityError

_LONGEST_OUTPUT = 8 << 20  # characters; far beyond any context
_LONGEST_VALUE = 1 << 20  # of one computed text or list


def render_template(
    template: str, messages: list[dict[str, Any]], *, bos: str, eos: str, tools: list[dict[str, Any]] | None = None
) -> str:
    """Run a chat template.

    Args:
        template: The Jinja source.
        messages: What it calls `messages`.
        bos, eos: What it calls `bos_token` and `eos_token`.
        tools: What it calls `tools`.

    Raises:
        CapabilityError: the template refused, or made too much text.
        Exception: whatever else the template's code provokes; the caller words it.
    """
    chunks, length = [], 0
    for chunk in _compile(template).generate(
        messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos, tools=tools, documents=None
    ):
        length += len(chunk)
        if length > _LONGEST_OUTPUT:
            raise CapabilityError(
                f"the model's chat template makes more than {_LONGEST_OUTPUT} characters; shorten the prompt",
                code="capability.no_template",
            )
        chunks.append(chunk)
    rendered = "".join(chunks)
    rendered.encode("utf-8")  # half of a surrogate pair would fail later, in the tokenizer
    return rendered


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    try:
        return _environment().from_string(template)
    except (MemoryError, RecursionError, SyntaxError) as error:  # of the Python code that Jinja makes of it
        raise ValueError(f"it cannot be compiled ({type(error).__name__})") from error


@functools.cache
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks what to train on; here its body is simply printed."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        """Refuses arithmetic that makes huge values out of small ones; Jinja would even fold it while compiling."""

        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*" and _repeated_length(left, right) > _LONGEST_VALUE:
                raise SecurityError("a repetition is too long")
            if operator == "**" and not (abs(left) <= 1 << 16 and abs(right) <= 64):
                raise SecurityError("a power is too large")
            if operator == "%" and isinstance(left, str) and re.search(r"[0-9]{4}|\*", left):
                raise SecurityError("a format is too wide")
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _repeated_length(left: Any, right: Any) -> int:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            return len(sequence) * count
    return 0


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes for HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise CapabilityError(f"the model's chat template refused: {message}", code="capability.no_template")
