"""JSON Schema to a grammar: a bounded subset, of which every document that is written is valid; the rest is refused.

What is understood is listed in docs/generation.md. Keywords are those of draft 2020-12 and, where they mean the same,
of draft 7 and OpenAPI.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from edgevlm import grammar
from edgevlm.errors import SchemaError

_LONGEST_TEXT = 1 << 20  # characters
_MOST_VALUES = 20_000  # in the schema, whatever they are
_DEEPEST = 128  # nesting of the schema's own arrays and objects
_LONGEST_CHAIN = 32  # of choices within choices and references to references, without an array or object between
_MOST_CHOICES = 64
_MOST = 1 << 31  # of any count

#: Keywords that say nothing about what is valid.
_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
    "$comment", "$schema", "$defs", "definitions",
})  # fmt: skip
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
#: Type -> the keywords that go with it.
_OF_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "number": _BOUNDS,
    "integer": _BOUNDS,
    "boolean": frozenset(),
    "null": frozenset(),
}
#: Patterns that every text matches; no other is understood.
_TRIVIAL_PATTERNS = ("", "^", ".*", "^.*")

Json = Any
Schema = dict[str, Any]


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

    def start(self) -> grammar.State:
        """The state before the first byte of a document."""
        return grammar.start(self._root)


def _refuse(pointer: str, message: str, code: str = "schema.unsupported") -> NoReturn:
    raise SchemaError(f"the schema at `{pointer or '/'}`: {message}", code=code, pointer=pointer)


def _parse(text: str) -> Json:
    def pairs(found: list[tuple[str, Json]]) -> Schema:
        if len(dict(found)) < len(found):
            raise ValueError("a name is given twice in one object")
        return dict(found)

    if len(text) > _LONGEST_TEXT:
        _refuse("", f"it has {len(text)} characters, at most {_LONGEST_TEXT} are read", "schema.invalid")
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        _refuse("", f"it is not JSON ({reason})", "schema.invalid")


def _check_size(schema: Json) -> None:
    """Everything after this may recurse, and take what it finds for JSON."""
    stack: list[tuple[Json, int]] = [(schema, 0)]
    seen = 0
    while stack:
        value, depth = stack.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            limit = f"nested {_DEEPEST} deep" if depth > _DEEPEST else f"of {_MOST_VALUES} values"
            _refuse("", f"it is more than {limit}; make it smaller")
        if isinstance(value, Mapping):
            if not all(isinstance(name, str) for name in value):
                _refuse("", "a name in it is not a text", "schema.invalid")
            for name in value:
                _json(name, "")
            stack += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, (list, tuple)):
            stack += [(child, depth + 1) for child in value]
        elif value is None or isinstance(value, (str, bool, int, float)):
            _json(value, "")
        else:
            _refuse("", f"it holds a {type(value).__name__}, which is not JSON", "schema.invalid")


def _json(value: Json, pointer: str) -> bytes:
    """A value as documents spell it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # not a number, half of a surrogate pair, thousands of digits
        _refuse(pointer, f"a {type(value).__name__} cannot be written as JSON ({error})", "schema.invalid")


class _Compiler:
    def __init__(self, schema: Json) -> None:
        self._schema = schema
        self._nodes: list[grammar.Node] = []
        self._choices: list[tuple[grammar.Choice, str]] = []
        self._targets: dict[str, grammar.Choice] = {}
        self._waiting: list[str] = []
        self._anything: tuple[grammar.Node, grammar.Node] | None = None

    def compiled(self) -> grammar.Node:
        root = self._node(self._schema, "")
        while self._waiting:
            reference = self._waiting.pop()
            found = resolve(self._schema, reference)
            self._targets[reference].alternatives.append(self._node(found, reference[1:]))
        self._check_chains()
        grammar.settle(self._nodes)
        if grammar.never_ends(root):
            _refuse("", "no document satisfies it: it would be nested without end", "schema.invalid")
        return root

    def _add(self, node: grammar.Node, pointer: str = "") -> grammar.Node:
        self._nodes.append(node)
        if isinstance(node, grammar.Choice):
            self._choices.append((node, pointer))
        return node

    def _any(self, *, members: bool = False) -> grammar.Node:
        if self._anything is None:
            value, nodes = grammar.anything()
            self._nodes += nodes
            self._anything = (value, nodes[-1])
        return self._anything[members]

    def _check_chains(self) -> None:
        """No choice may lead back to itself without an array or object between: it would be followed without end."""
        lengths: dict[grammar.Node, int] = {}
        for _ in range(_LONGEST_CHAIN + 1):
            changed = False
            for choice, pointer in self._choices:
                length = 1 + max((lengths.get(node, 0) for node in choice.alternatives), default=0)
                if length > _LONGEST_CHAIN:
                    _refuse(pointer, "it refers to itself, or to a long chain, without an array or object between")
                changed = changed or lengths.get(choice) != length
                lengths[choice] = length
            if not changed:
                return

    def _node(self, schema: Json, pointer: str) -> grammar.Node:
        if schema is True:
            return self._any()
        if schema is False:
            _refuse(pointer, "false allows nothing", "schema.invalid")
        if not isinstance(schema, Mapping):
            _refuse(pointer, f"a schema is an object, found {type(schema).__name__}", "schema.invalid")
        keywords = set(schema) - _ANNOTATIONS - ({"$id"} if not pointer else set())
        if not keywords:
            return self._any()
        for keyword, compile_keyword in self._alone().items():
            if keyword in keywords:
                allowed = {keyword, "type"} if keyword in ("enum", "const") else {keyword}
                self._only(keywords, allowed, pointer, f"is not understood beside {keyword}")
                return compile_keyword(schema, f"{pointer}/{keyword}")
        self._only(keywords, {"type"}.union(*_OF_TYPE.values()), pointer, "is not understood")
        types = _types(schema, pointer)
        for keyword in sorted(keywords - {"type"}):
            if not any(keyword in _OF_TYPE[kind] for kind in types):
                _refuse(f"{pointer}/{keyword}", f"`{keyword}` does not go with type {' or '.join(types)}")
        if "number" in types and "integer" in types:
            types.remove("integer")
        nodes = [getattr(self, f"_{kind}")(schema, pointer) for kind in types]
        return nodes[0] if len(nodes) == 1 else self._add(grammar.Choice(nodes), pointer)

    def _alone(self) -> dict[str, Callable[[Schema, str], grammar.Node]]:
        return {
            "$ref": self._reference, "enum": self._values, "const": self._values, "anyOf": self._alternatives,
            "oneOf": self._alternatives, "allOf": self._single,
        }  # fmt: skip

    def _only(self, keywords: set[str], allowed: set[str], pointer: str, reason: str) -> None:
        for keyword in sorted(keywords - allowed):
            _refuse(f"{pointer}/{_escaped(keyword)}", f"`{keyword}` {reason}; leave it out")

    # ---- keywords that stand alone

    def _reference(self, schema: Schema, pointer: str) -> grammar.Node:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            _refuse(pointer, f"only references within the schema are followed (`#/$defs/...`), found {reference!r}")
        if reference not in self._targets:
            resolve(self._schema, reference, pointer)
            self._targets[reference] = grammar.Choice()
            self._add(self._targets[reference], pointer)
            self._waiting.append(reference)
        return self._targets[reference]

    def _values(self, schema: Schema, pointer: str) -> grammar.Node:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, (list, tuple)):
            _refuse(pointer, f"a list of values is needed, found {type(values).__name__}", "schema.invalid")
        types = _types(schema, pointer.rpartition("/")[0]) if "type" in schema else list(_OF_TYPE)
        words = [_json(value, pointer) for value in values if any(_is(kind, value) for kind in types)]
        if not words:
            _refuse(pointer, "none of its values is allowed", "schema.invalid")
        need = min(_levels(value) for value in values if any(_is(kind, value) for kind in types))
        if need > grammar.LEVELS:
            _refuse(pointer, "its values are nested too deeply")
        return self._add(grammar.Words(words))

    def _alternatives(self, schema: Schema, pointer: str) -> grammar.Node:
        choices = schema["anyOf"] if "anyOf" in schema else schema["oneOf"]
        if not isinstance(choices, (list, tuple)) or not choices:
            _refuse(pointer, "a list of schemas is needed", "schema.invalid")
        if len(choices) > _MOST_CHOICES:
            _refuse(pointer, f"it has {len(choices)} schemas, at most {_MOST_CHOICES} are followed")
        if "oneOf" in schema:
            for index, one in enumerate(choices):
                if not all(_disjoint(self._schema, one, other) for other in choices[:index]):
                    _refuse(f"{pointer}/{index}", "it may overlap with one before, and `oneOf` wants one; use `anyOf`")
        nodes = [self._node(choice, f"{pointer}/{index}") for index, choice in enumerate(choices)]
        return self._add(grammar.Choice(nodes), pointer)

    def _single(self, schema: Schema, pointer: str) -> grammar.Node:
        parts = schema["allOf"]
        if not isinstance(parts, (list, tuple)) or len(parts) != 1:
            _refuse(pointer, "`allOf` is understood with one schema only")
        return self._node(parts[0], f"{pointer}/0")

    # ---- types

    def _object(self, schema: Schema, pointer: str) -> grammar.Node:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        more = schema.get("additionalProperties", True)
        if not isinstance(properties, Mapping):
            _refuse(f"{pointer}/properties", "an object of schemas is needed", "schema.invalid")
        if not isinstance(required, (list, tuple)) or not all(isinstance(name, str) for name in required):
            _refuse(f"{pointer}/required", "a list of names is needed", "schema.invalid")
        for name in required:
            if name not in properties:
                _refuse(f"{pointer}/required", f"{name!r} is not among the properties; describe it there")
        if not properties and more is not False:
            if more is True or (isinstance(more, Mapping) and not set(more) - _ANNOTATIONS):
                return self._any(members=True)
            return self._add(grammar.Map(self._node(more, f"{pointer}/additionalProperties")))
        if not isinstance(more, bool):
            _refuse(f"{pointer}/additionalProperties", "a schema for others is not understood beside `properties`")
        members = [
            (name, self._node(value, f"{pointer}/properties/{_escaped(name)}"), name in required)
            for name, value in properties.items()
        ]
        return self._add(grammar.Object(members, lambda name: _json(name, pointer)))

    def _array(self, schema: Schema, pointer: str) -> grammar.Node:
        least, most = _counts(schema, pointer, "minItems", "maxItems")
        items = self._node(schema.get("items", True), f"{pointer}/items")
        return self._add(grammar.Array(items, least, most))

    def _string(self, schema: Schema, pointer: str) -> grammar.Node:
        if schema.get("pattern", "") not in _TRIVIAL_PATTERNS:
            _refuse(f"{pointer}/pattern", "`pattern` is not understood; list the values with `enum`")
        return self._add(grammar.String(*_counts(schema, pointer, "minLength", "maxLength")))

    def _number(self, schema: Schema, pointer: str) -> grammar.Node:
        for keyword in sorted(_BOUNDS & set(schema)):
            if keyword != "minimum" or schema[keyword] != 0 or isinstance(schema[keyword], bool):
                _refuse(f"{pointer}/{keyword}", f"`{keyword}` is understood for integers only (and `minimum` 0)")
        return self._add(grammar.Number(signed="minimum" not in schema))

    def _integer(self, schema: Schema, pointer: str) -> grammar.Node:
        low, high = -grammar.LARGEST, grammar.LARGEST
        for keyword in sorted(_BOUNDS & set(schema)):
            bound = schema[keyword]
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                _refuse(f"{pointer}/{keyword}", f"a number is needed, found {bound!r}", "schema.invalid")
            exclusive = keyword.startswith("exclusive")
            if keyword.lower().endswith("minimum"):
                low = max(low, math.floor(bound) + 1 if exclusive else math.ceil(bound))
            else:
                high = min(high, math.ceil(bound) - 1 if exclusive else math.floor(bound))
        if low > high:
            _refuse(pointer, f"no integer is in range; {grammar.LARGEST} is the largest", "schema.invalid")
        return self._add(grammar.Integer(low, high))

    def _boolean(self, schema: Schema, pointer: str) -> grammar.Node:
        return self._add(grammar.Words([b"true", b"false"]))

    def _null(self, schema: Schema, pointer: str) -> grammar.Node:
        return self._add(grammar.Words([b"null"]))


def _types(schema: Schema, pointer: str) -> list[str]:
    """The types that a schema allows; without `type`, the one that its keywords are about."""
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], (list, tuple)) else [schema["type"]]
        if not types or not all(isinstance(kind, str) and kind in _OF_TYPE for kind in types):
            _refuse(f"{pointer}/type", f"{schema['type']!r} is not a type of JSON", "schema.invalid")
        return list(dict.fromkeys(types))
    found = [kind for kind, keywords in _OF_TYPE.items() if keywords & set(schema)]
    if len(found) != 1:
        _refuse(f"{pointer}/type", "the type is missing")
    return found


def _counts(schema: Schema, pointer: str, low: str, high: str) -> tuple[int, int | None]:
    bounds = []
    for keyword in (low, high):
        count = schema.get(keyword, 0 if keyword == low else None)
        if isinstance(count, float) and count.is_integer():
            count = int(count)
        if count is not None and (type(count) is not int or not 0 <= count <= _MOST):
            _refuse(f"{pointer}/{keyword}", f"a count up to {_MOST} is needed, found {count!r}", "schema.invalid")
        bounds.append(count)
    least, most = bounds
    if most is not None and least > most:
        _refuse(pointer, f"`{low}` {least} is more than `{high}` {most}", "schema.invalid")
    return least, most


def resolve(root: Json, reference: str, pointer: str | None = None) -> Json:
    """What a `#/...` reference points at (RFC 6901)."""
    found = root
    for part in reference[2:].split("/") if len(reference) > 1 else ():
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, (list, tuple)) and part.isascii() and part.isdigit() and int(part[:9]) < len(found):
            found = found[int(part[:9])]
        else:
            _refuse(pointer or reference[1:], f"`{reference}` is not in the schema", "schema.invalid")
    return found


def _escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _is(kind: str, value: Json) -> bool:
    """Whether a value has a type of JSON Schema."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return kind == "number" or (kind == "integer" and float(value).is_integer())
    return kind == ("string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array")


def _levels(value: Json) -> int:
    children: Sequence[Json] = ()
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = value
    else:
        return 0
    return 1 + max(map(_levels, children), default=0)


def _disjoint(root: Json, one: Json, other: Json, depth: int = 0) -> bool:
    """Whether no document satisfies both, as far as types, fixed values and fixed members show."""
    one, other = _target(root, one), _target(root, other)
    if depth > 8 or not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    ones, others = _fixed(one), _fixed(other)
    if ones is not None and others is not None:
        return not any(_same(a, b) for a in ones for b in others)
    try:
        if ones is not None or others is not None:
            values, kinds = (ones, _types(other, "")) if ones is not None else (others, _types(one, ""))
            return not any(_is(kind, value) for kind in kinds for value in values or ())
        kinds_one, kinds_other = set(_types(one, "")), set(_types(other, ""))
    except SchemaError:
        return False
    kinds_one |= {"number"} if "integer" in kinds_one else set()
    kinds_other |= {"number"} if "integer" in kinds_other else set()
    both = kinds_one & kinds_other
    if both != {"object"}:
        return not both
    members = [schema.get("properties", {}) for schema in (one, other)]
    required = [schema.get("required", []) for schema in (one, other)]
    if not all(isinstance(part, (Mapping, list, tuple)) for part in (*members, *required)):
        return False
    shared = [name for name in required[0] if name in required[1] and name in members[0] and name in members[1]]
    return any(_disjoint(root, members[0][name], members[1][name], depth + 1) for name in shared)


def _target(root: Json, schema: Json) -> Json:
    for _ in range(_LONGEST_CHAIN):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            break
        if not schema["$ref"].startswith("#"):
            break
        schema = resolve(root, schema["$ref"])
    return schema


def _fixed(schema: Schema) -> Sequence[Json] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, (list, tuple)) else None


def _same(one: Json, other: Json) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
