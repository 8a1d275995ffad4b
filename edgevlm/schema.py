"""JSON Schema to a grammar: a bounded subset, of which every document that is written is valid; the rest is refused.

What is understood is listed in docs/generation.md. Keywords are those of draft 2020-12 and, where they mean the same,
of draft 7 and OpenAPI.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgevlm import automaton, grammar, scalars
from edgevlm.keywords import (
    BOUNDS,
    LONGEST_CHAIN,
    OF_TYPE,
    Comparison,
    Json,
    Schema,
    escaped,
    is_type,
    refuse,
    resolve,
    types_of,
)

_LONGEST_TEXT = 1 << 20  # characters
_MOST_VALUES = 20_000  # in the schema, whatever they are
_DEEPEST = 128  # nesting of the schema's own arrays and objects
_MOST_CHOICES = 64
_MOST = 1 << 31  # of any count

#: Keywords that say nothing about what is valid.
_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
    "$comment", "$schema", "$defs", "definitions",
})  # fmt: skip
#: Patterns that every text matches; no other is understood.
_TRIVIAL_PATTERNS = ("", "^", ".*", "^.*")


class Format:
    """The documents that an answer may be, compiled from a JSON schema.

    Args:
        schema: A schema as Python values, or as JSON text; True is any JSON document, `{"type": "object"}` any object.

    Raises:
        SchemaError: `schema.unsupported`, a keyword is not understood (the message names it and where it stands);
            `schema.invalid`, it is not a schema, or nothing satisfies it.
    """

    def __init__(self, schema: Mapping[str, Any] | str | bool) -> None:
        loaded = _parse(schema) if isinstance(schema, str) else schema
        _check_size(loaded)
        self._root = _Compiler(loaded).compiled()

    def start(self) -> automaton.State:
        """The state before the first byte of a document."""
        return automaton.start(self._root)


def _parse(text: str) -> Json:
    def pairs(found: list[tuple[str, Json]]) -> dict[str, Json]:
        if len(dict(found)) < len(found):
            raise ValueError("a name is given twice in one object")
        return dict(found)

    if len(text) > _LONGEST_TEXT:
        refuse("", f"it has {len(text)} characters, at most {_LONGEST_TEXT} are read", "schema.invalid")
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        refuse("", f"it is not JSON ({reason})", "schema.invalid")


def _check_size(schema: Json) -> None:
    """Everything after this may recurse, and take what it finds for JSON."""
    stack: list[tuple[Json, int]] = [(schema, 0)]
    seen = 0
    while stack:
        value, depth = stack.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            limit = f"nested {_DEEPEST} deep" if depth > _DEEPEST else f"of {_MOST_VALUES} values"
            refuse("", f"it is more than {limit}; make it smaller")
        if isinstance(value, Mapping):
            if not all(isinstance(name, str) for name in value):
                refuse("", "a name in it is not a text", "schema.invalid")
            for name in value:
                _json(name, "")
            stack += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, (list, tuple)):
            stack += [(child, depth + 1) for child in value]
        elif value is None or isinstance(value, (str, bool, int, float)):
            _json(value, "")
        else:
            refuse("", f"it holds a {type(value).__name__}, which is not JSON", "schema.invalid")


def _json(value: Json, pointer: str) -> bytes:
    """A value as documents spell it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:  # NaN, half of a surrogate pair, thousands of digits; a mapping, no dict
        refuse(pointer, f"a {type(value).__name__} cannot be written as JSON ({error})", "schema.invalid")


class _Compiler:
    def __init__(self, schema: Json) -> None:
        self._schema = schema
        self._comparison = Comparison(schema)
        self._nodes: list[automaton.Node] = []
        self._choices: list[tuple[grammar.Choice, str]] = []
        self._targets: dict[str, grammar.Choice] = {}
        self._waiting: list[str] = []
        self._anything: tuple[automaton.Node, automaton.Node] | None = None

    def compiled(self) -> automaton.Node:
        root = self._node(self._schema, "")
        while self._waiting:
            reference = self._waiting.pop()
            found = resolve(self._schema, reference)
            self._targets[reference].alternatives.append(self._node(found, reference[1:]))
        self._check_chains()
        automaton.settle(self._nodes)
        if root.need > automaton.LEVELS:
            refuse("", "no document satisfies it: it would be nested without end", "schema.invalid")
        return root

    def _add(self, node: automaton.Node, pointer: str = "") -> automaton.Node:
        self._nodes.append(node)
        if isinstance(node, grammar.Choice):
            self._choices.append((node, pointer))
        return node

    def _any(self, *, members: bool = False) -> automaton.Node:
        if self._anything is None:
            value, nodes = grammar.anything()
            self._nodes += nodes
            self._anything = (value, nodes[-1])
        return self._anything[members]

    def _check_chains(self) -> None:
        """No choice may lead back to itself without an array or object between: it would be followed without end."""
        lengths: dict[automaton.Node, int] = {}
        for _ in range(LONGEST_CHAIN + 1):
            changed = False
            for choice, pointer in self._choices:
                length = 1 + max((lengths.get(node, 0) for node in choice.alternatives), default=0)
                if length > LONGEST_CHAIN:
                    refuse(pointer, "it refers to itself, or to a long chain, without an array or object between")
                changed = changed or lengths.get(choice) != length
                lengths[choice] = length
            if not changed:
                return

    def _node(self, schema: Json, pointer: str) -> automaton.Node:
        if schema is True:
            return self._any()
        if schema is False:
            refuse(pointer, "false allows nothing", "schema.invalid")
        if not isinstance(schema, Mapping):
            refuse(pointer, f"a schema is an object, found {type(schema).__name__}", "schema.invalid")
        keywords = set(schema) - _ANNOTATIONS - ({"$id"} if not pointer else set())
        if not keywords:
            return self._any()
        for keyword, compile_keyword in self._alone().items():
            if keyword in keywords:
                allowed = {keyword, "type"} if keyword in ("enum", "const") else {keyword}
                self._only(keywords, allowed, pointer, f"is not understood beside {keyword}")
                return compile_keyword(schema, f"{pointer}/{keyword}")
        self._only(keywords, {"type"}.union(*OF_TYPE.values()), pointer, "is not understood")
        types = types_of(schema, pointer)
        for keyword in sorted(keywords - {"type"}):
            if not any(keyword in OF_TYPE[kind] for kind in types):
                refuse(f"{pointer}/{keyword}", f"`{keyword}` does not go with type {' or '.join(types)}")
        if "number" in types and "integer" in types:
            types.remove("integer")
        nodes = [getattr(self, f"_{kind}")(schema, pointer) for kind in types]
        return nodes[0] if len(nodes) == 1 else self._add(grammar.Choice(nodes), pointer)

    def _alone(self) -> dict[str, Callable[[Schema, str], automaton.Node]]:
        return {
            "$ref": self._reference, "enum": self._values, "const": self._values, "anyOf": self._alternatives,
            "oneOf": self._alternatives, "allOf": self._single,
        }  # fmt: skip

    def _only(self, keywords: set[str], allowed: set[str], pointer: str, reason: str) -> None:
        for keyword in sorted(keywords - allowed):
            refuse(f"{pointer}/{escaped(keyword)}", f"`{keyword}` {reason}; leave it out")

    # ---- keywords that stand alone

    def _reference(self, schema: Schema, pointer: str) -> automaton.Node:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            refuse(pointer, f"only references within the schema are followed (`#/$defs/...`), found {reference!r}")
        if reference not in self._targets:
            resolve(self._schema, reference, pointer)
            self._targets[reference] = grammar.Choice()
            self._add(self._targets[reference], pointer)
            self._waiting.append(reference)
        return self._targets[reference]

    def _values(self, schema: Schema, pointer: str) -> automaton.Node:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, (list, tuple)):
            refuse(pointer, f"a list of values is needed, found {type(values).__name__}", "schema.invalid")
        types = types_of(schema, pointer.rpartition("/")[0]) if "type" in schema else list(OF_TYPE)
        words = [_json(value, pointer) for value in values if any(is_type(kind, value) for kind in types)]
        if not words:
            refuse(pointer, "none of its values is allowed", "schema.invalid")
        need = min(_levels(value) for value in values if any(is_type(kind, value) for kind in types))
        if need > automaton.LEVELS:
            refuse(pointer, "its values are nested too deeply")
        return self._add(automaton.Words(words))

    def _alternatives(self, schema: Schema, pointer: str) -> automaton.Node:
        choices = schema["anyOf"] if "anyOf" in schema else schema["oneOf"]
        if not isinstance(choices, (list, tuple)) or not choices:
            refuse(pointer, "a list of schemas is needed", "schema.invalid")
        if len(choices) > _MOST_CHOICES:
            refuse(pointer, f"it has {len(choices)} schemas, at most {_MOST_CHOICES} are followed")
        nodes = [self._node(choice, f"{pointer}/{index}") for index, choice in enumerate(choices)]
        if "oneOf" in schema:
            for index, one in enumerate(choices):
                where = f"{pointer}/{index}"
                if not all(self._comparison.disjoint(one, other, where) for other in choices[:index]):
                    refuse(where, "it may overlap with one before, and `oneOf` wants one; use `anyOf`")
        return self._add(grammar.Choice(nodes), pointer)

    def _single(self, schema: Schema, pointer: str) -> automaton.Node:
        parts = schema["allOf"]
        if not isinstance(parts, (list, tuple)) or len(parts) != 1:
            refuse(pointer, "`allOf` is understood with one schema only")
        return self._node(parts[0], f"{pointer}/0")

    # ---- types

    def _object(self, schema: Schema, pointer: str) -> automaton.Node:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        more = schema.get("additionalProperties", True)
        if not isinstance(properties, Mapping):
            refuse(f"{pointer}/properties", "an object of schemas is needed", "schema.invalid")
        if not isinstance(required, (list, tuple)) or not all(isinstance(name, str) for name in required):
            refuse(f"{pointer}/required", "a list of names is needed", "schema.invalid")
        for name in required:
            if name not in properties:
                refuse(f"{pointer}/required", f"{name!r} is not among the properties; describe it there")
        if not properties and more is not False:
            if more is True or (isinstance(more, Mapping) and not set(more) - _ANNOTATIONS):
                return self._any(members=True)
            return self._add(grammar.Map(self._node(more, f"{pointer}/additionalProperties")))
        if not isinstance(more, bool):
            refuse(f"{pointer}/additionalProperties", "a schema for others is not understood beside `properties`")
        members = [
            (name, self._node(value, f"{pointer}/properties/{escaped(name)}"), name in required)
            for name, value in properties.items()
        ]
        return self._add(grammar.Object(members, lambda name: _json(name, pointer)))

    def _array(self, schema: Schema, pointer: str) -> automaton.Node:
        least, most = _counts(schema, pointer, "minItems", "maxItems")
        items = self._node(schema.get("items", True), f"{pointer}/items")
        return self._add(grammar.Array(items, least, most))

    def _string(self, schema: Schema, pointer: str) -> automaton.Node:
        if schema.get("pattern", "") not in _TRIVIAL_PATTERNS:
            refuse(f"{pointer}/pattern", "`pattern` is not understood; list the values with `enum`")
        return self._add(scalars.String(*_counts(schema, pointer, "minLength", "maxLength")))

    def _number(self, schema: Schema, pointer: str) -> automaton.Node:
        for keyword in sorted(BOUNDS & set(schema)):
            if keyword != "minimum" or schema[keyword] != 0 or isinstance(schema[keyword], bool):
                refuse(f"{pointer}/{keyword}", f"`{keyword}` is understood for integers only (and `minimum` 0)")
        return self._add(scalars.Number(signed="minimum" not in schema))

    def _integer(self, schema: Schema, pointer: str) -> automaton.Node:
        low, high = -scalars.LARGEST, scalars.LARGEST
        for keyword in sorted(BOUNDS & set(schema)):
            bound = schema[keyword]
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                refuse(f"{pointer}/{keyword}", f"a number is needed, found {bound!r}", "schema.invalid")
            exclusive = keyword.startswith("exclusive")
            if keyword.lower().endswith("minimum"):
                low = max(low, math.floor(bound) + 1 if exclusive else math.ceil(bound))
            else:
                high = min(high, math.ceil(bound) - 1 if exclusive else math.floor(bound))
        if low > high:
            refuse(pointer, f"no integer is in range; {scalars.LARGEST} is the largest", "schema.invalid")
        return self._add(scalars.Integer(low, high))

    def _boolean(self, schema: Schema, pointer: str) -> automaton.Node:
        return self._add(automaton.Words([b"true", b"false"]))

    def _null(self, schema: Schema, pointer: str) -> automaton.Node:
        return self._add(automaton.Words([b"null"]))


def _counts(schema: Schema, pointer: str, low: str, high: str) -> tuple[int, int | None]:
    bounds: list[int | None] = []
    for keyword in (low, high):
        count = schema.get(keyword, 0 if keyword == low else None)
        if isinstance(count, float) and count.is_integer():
            count = int(count)
        if count is not None and (type(count) is not int or not 0 <= count <= _MOST):
            refuse(f"{pointer}/{keyword}", f"a count up to {_MOST} is needed, found {count!r}", "schema.invalid")
        bounds.append(count)
    least, most = bounds[0] or 0, bounds[1]
    if most is not None and least > most:
        refuse(pointer, f"`{low}` {least} is more than `{high}` {most}", "schema.invalid")
    return least, most


def _levels(value: Json) -> int:
    children: Sequence[Json] = ()
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = value
    else:
        return 0
    return 1 + max(map(_levels, children), default=0)
