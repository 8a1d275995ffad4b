"""Tools: what a caller offers, and the calls that an answer consists of.

Nothing is ever evaluated, and nothing is guessed: an answer is a call if it is one from its first character to its
last, in one of three forms, of a tool that was offered; everything else is text.

- Llama 3.x: `{"name": ..., "parameters": {...}}`, which `<|python_tag|>` may introduce;
- Hermes, Qwen, SmolLM2: one or more `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`;
- a JSON list of such objects.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from edgevlm.errors import UsageError

_MOST_TOOLS = 128
_LONGEST = 1 << 18  # characters of JSON, of all tools or of an answer
_DEEPEST = 64
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BLOCK = re.compile(r"<tool_call>((?:(?!</?tool_call>).)*)</tool_call>\s*", re.DOTALL)
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer asks for.

    Attributes:
        id: Unlike that of any other call; the tool's message repeats it as `tool_call_id`.
        name: One of the tools that were offered.
        arguments: As the model gave them; they need not be what the tool's parameters demand.
    """

    id: str
    name: str
    arguments: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As an entry of `tool_calls` in an assistant's message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def check_tools(tools: object) -> tuple[dict[str, Any], ...]:
    """Copies of tools in the form `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Raises:
        UsageError: naming the tool that is something else.
    """
    if not isinstance(tools, (list, tuple)) or not 1 <= len(tools) <= _MOST_TOOLS:
        raise UsageError(f"tools must be a list of 1 to {_MOST_TOOLS} tools")
    checked, names = [], set()
    for number, tool in enumerate(_copy("tools", list(tools))):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise UsageError(f'tool {number}: it must be {{"type": "function", "function": {{"name": ...}}}}')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in names:
            raise UsageError(f"tool {number}: name must be 1 to 64 of A-Z a-z 0-9 _ . - and new, found {name!r:.80}")
        if not isinstance(function.get("description", ""), str):
            raise UsageError(f"tool {number}: description must be a text")
        if not isinstance(function.get("parameters", {}), dict):
            raise UsageError(f"tool {number}: parameters must be a JSON schema of an object")
        names.add(name)
        checked.append(tool)
    return tuple(checked)


def check_calls(where: str, calls: object) -> list[dict[str, Any]]:
    """The `tool_calls` of an assistant's message, with arguments as objects, which is what chat templates print.

    Raises:
        UsageError: they are something else; `where` names the message.
    """
    if not isinstance(calls, (list, tuple)):
        raise UsageError(f"{where}: tool_calls must be a list")
    checked = []
    for call in calls:
        given = _copy(where, call.to_json() if isinstance(call, ToolCall) else call)
        function = given.get("function") if isinstance(given, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if isinstance(arguments, str):
            arguments = _strict(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise UsageError(f'{where}: a tool call must be {{"function": {{"name": ..., "arguments": {{...}}}}}}')
        checked.append({**given, "type": "function", "function": {"name": name, "arguments": arguments}})
    return checked


def parse_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """The calls that an answer consists of; none if it is text.

    Args:
        text: The whole answer.
        tools: What was offered (`check_tools`).
    """
    text = text.strip().removeprefix(_PYTHON_TAG).strip()
    if len(text) > _LONGEST:
        return ()
    if text.startswith("<tool_call>"):
        blocks = [match.group(1) for match in _BLOCK.finditer(text)]
        if _BLOCK.sub("", text):
            return ()
        found = [_strict(block) for block in blocks]
    else:
        document = _strict(text)
        found = document if isinstance(document, list) else [document]
    names = {tool["function"]["name"] for tool in tools}
    calls = [_call(given, names) for given in found]
    return tuple(call for call in calls if call) if all(calls) else ()


def _call(given: Any, names: set[str]) -> ToolCall | None:
    if not isinstance(given, dict) or given.get("type", "function") != "function":
        return None
    rest = set(given) - {"type", "id", "name"}
    if rest not in ({"parameters"}, {"arguments"}):
        return None
    name, arguments = given.get("name"), given[rest.pop()]
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(f"call_{secrets.token_hex(8)}", name, arguments)


def _strict(text: str) -> Any:
    """JSON of which nothing is doubtful: no name twice, no NaN, no infinity, not deep; None for everything else."""

    def refuse(found: str) -> NoReturn:
        raise ValueError(found)

    def number(found: str) -> float:
        value = float(found)
        return value if math.isfinite(value) else refuse(found)

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(found) if len(dict(found)) == len(found) else refuse("a name is given twice")

    try:
        document = json.loads(text, object_pairs_hook=pairs, parse_constant=refuse, parse_float=number)
        json.dumps(document, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    return document if _is_shallow(document) else None


def _is_shallow(document: Any) -> bool:
    level: list[Any] = [document]
    for _ in range(_DEEPEST):
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    return not level


def _copy(where: str, value: Any) -> Any:
    """A copy of JSON values that nobody else can change; by way of its text, which also says that they are JSON."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{where} must be JSON values ({error})") from None
    document = _strict(text) if len(text) <= _LONGEST else None
    if document is None:
        raise UsageError(f"{where} must be JSON of at most {_LONGEST} characters, {_DEEPEST} deep, and no name twice")
    return document
