"""What the keywords of a JSON schema say: types, references, and whether two schemas exclude each other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from edgevlm.errors import SchemaError

#: Choices within choices and references to references that are followed, without an array or object between.
LONGEST_CHAIN = 32
#: Members that are compared for all `oneOf` of a schema together.
_MOST_COMPARED = 150_000
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
#: Type -> the keywords that go with it.
OF_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "number": BOUNDS,
    "integer": BOUNDS,
    "boolean": frozenset(),
    "null": frozenset(),
}

Json = Any
Schema = Mapping[str, Any]


def refuse(pointer: str, message: str, code: str = "schema.unsupported") -> NoReturn:
    raise SchemaError(f"the schema at `{pointer or '/'}`: {message}", code=code, pointer=pointer)


def types_of(schema: Schema, pointer: str) -> list[str]:
    """The types that a schema allows; without `type`, the one that its keywords are about."""
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], (list, tuple)) else [schema["type"]]
        if not types or not all(isinstance(kind, str) and kind in OF_TYPE for kind in types):
            refuse(f"{pointer}/type", f"{schema['type']!r} is not a type of JSON", "schema.invalid")
        return list(dict.fromkeys(types))
    found = [kind for kind, keywords in OF_TYPE.items() if keywords & set(schema)]
    if len(found) != 1:
        refuse(f"{pointer}/type", "the type is missing")
    return found


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
            refuse(pointer or reference[1:], f"`{reference}` is not in the schema", "schema.invalid")
    return found


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def is_type(kind: str, value: Json) -> bool:
    """Whether a value has a type of JSON Schema."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return kind == "number" or (kind == "integer" and (isinstance(value, int) or value.is_integer()))
    return kind == ("string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array")


@dataclass(frozen=True)
class _Facts:
    """What a schema says about its documents, without following members.

    Attributes:
        schema: The schema, references followed; held, so that nothing else gets its id.
        values: The values that are allowed, if they are listed.
        kinds: The types that are allowed, where `number` is for numbers that are not whole; None if unknown.
        members: Schemas of the members that must be there.
    """

    schema: Json
    values: frozenset[Any] | None = None
    kinds: frozenset[str] | None = None
    members: Mapping[str, Json] = field(default_factory=dict)


class Comparison:
    """Compares the schemas of one root with each other; each of them is read once, each pair compared once."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._facts: dict[int, tuple[Json, _Facts]] = {}
        self._known: dict[tuple[int, int], bool] = {}
        self._n_compared = 0

    def disjoint(self, one: Json, other: Json, pointer: str, depth: int = 0) -> bool:
        """Whether no document satisfies both, as far as types, fixed values and fixed members show.

        Raises:
            SchemaError: too much would have to be compared; `pointer` is where it was asked.
        """
        ones, others = self._of(one), self._of(other)
        low, high = sorted((id(ones.schema), id(others.schema)))
        if (low, high) not in self._known:
            if depth > LONGEST_CHAIN:
                return False
            self._known[low, high] = False  # in progress: a pair that leads back to itself may overlap
            self._known[low, high] = self._apart(ones, others, pointer, depth)
        return self._known[low, high]

    def _apart(self, one: _Facts, other: _Facts, pointer: str, depth: int) -> bool:
        if one.values is not None and other.values is not None:
            return not one.values & other.values
        if one.kinds is None or other.kinds is None:
            return False
        both = one.kinds & other.kinds
        if both != {"object"} or one.values is not None or other.values is not None:
            return not both
        for name in min(one.members, other.members, key=len):
            self._n_compared += 1
            if self._n_compared > _MOST_COMPARED:
                refuse(pointer, f"more than {_MOST_COMPARED} members would have to be compared; use `anyOf`")
            if name not in one.members or name not in other.members:
                continue
            if self.disjoint(one.members[name], other.members[name], pointer, depth + 1):
                return True
        return False

    def _of(self, schema: Json) -> _Facts:
        if id(schema) not in self._facts:
            self._facts[id(schema)] = (schema, _read(_target(self._root, schema)))
        return self._facts[id(schema)][1]


def _read(schema: Json) -> _Facts:
    if not isinstance(schema, Mapping):
        return _Facts(schema)
    values = _fixed(schema)
    if values is not None:
        kinds = {kind for value in values for kind in OF_TYPE if is_type(kind, value)}
        if all(is_type("integer", value) for value in values if is_type("number", value)):
            kinds -= {"number"}
        return _Facts(schema, frozenset(map(_key, values)), frozenset(kinds))
    try:
        kinds = set(types_of(schema, ""))
    except SchemaError:
        return _Facts(schema)
    kinds |= {"integer"} if "number" in kinds else set()
    members, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(members, Mapping) or not isinstance(required, (list, tuple)):
        return _Facts(schema)
    names = dict.fromkeys(name for name in required if isinstance(name, str) and name in members)
    return _Facts(schema, None, frozenset(kinds), {name: members[name] for name in names})


def _target(root: Json, schema: Json) -> Json:
    for _ in range(LONGEST_CHAIN):
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


def _key(value: Json) -> Hashable:
    """Equal for values that JSON Schema calls equal: 1 and 1.0, but not 1 and true."""
    if isinstance(value, Mapping):
        return frozenset((name, _key(child)) for name, child in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # as text: the hashes of numbers are known, and many numbers of one hash would take quadratic time
        return ("", str(int(value)) if is_type("integer", value) else repr(value))
    return value if isinstance(value, bool) else (value,)
