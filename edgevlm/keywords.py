"""What the keywords of a JSON schema say: types, references, and whether two schemas exclude each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edgevlm.errors import SchemaError

#: Choices within choices and references to references that are followed, without an array or object between.
LONGEST_CHAIN = 32
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
        return kind == "number" or (kind == "integer" and float(value).is_integer())
    return kind == ("string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array")


def disjoint(root: Json, one: Json, other: Json, depth: int = 0) -> bool:
    """Whether no document satisfies both, as far as types, fixed values and fixed members show."""
    one, other = _target(root, one), _target(root, other)
    if depth > 8 or not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    ones, others = _fixed(one), _fixed(other)
    if ones is not None and others is not None:
        return not any(_same(a, b) for a in ones for b in others)
    try:
        if ones is not None or others is not None:
            values, kinds = (ones, types_of(other, "")) if ones is not None else (others, types_of(one, ""))
            return not any(is_type(kind, value) for kind in kinds for value in values or ())
        kinds_one, kinds_other = set(types_of(one, "")), set(types_of(other, ""))
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
    return any(disjoint(root, members[0][name], members[1][name], depth + 1) for name in shared)


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


def _same(one: Json, other: Json) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
