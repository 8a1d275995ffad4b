"""JSON schemas: documents that the automaton writes are valid, valid documents are read, others are not."""

from __future__ import annotations

import json
import random
import re
import time
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from edgevlm.automaton import LEVELS, State
from edgevlm.errors import SchemaError
from edgevlm.scalars import LARGEST
from edgevlm.schema import Format

Schema = dict[str, Any]

# ---- an independent reading of the same keywords, of values instead of bytes


def same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def is_type(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": ()}
    if kind in kinds:
        return isinstance(value, kinds[kind])
    return isinstance(value, int) if kind == "integer" else isinstance(value, (int, float))


def valid(schema: Schema | bool, value: Any, root: Schema | None = None) -> bool:
    root = root or (schema if isinstance(schema, dict) else {})
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return valid(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root)
    types = schema.get("type")
    if types and not any(is_type(kind, value) for kind in ([types] if isinstance(types, str) else types)):
        return False
    if "enum" in schema and not any(same(value, other) for other in schema["enum"]):
        return False
    if "const" in schema and not same(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(valid(other, value, root) for other in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(valid(other, value, root) for other in schema["oneOf"]) != 1:
        return False
    if isinstance(value, str):
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if isinstance(value, list):
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)) and all(
            valid(schema.get("items", True), item, root) for item in value
        )
    if isinstance(value, dict):
        known = schema.get("properties", {})
        other = schema.get("additionalProperties", True)
        return all(name in value for name in schema.get("required", [])) and all(
            valid(known.get(name, other), item, root) for name, item in value.items()
        )
    return True


# ---- schemas, and documents of them

names = st.text(st.sampled_from('ab"\\/é😀 \n'), min_size=1, max_size=3)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
small = st.integers(-(10**6), 10**6)
values = st.recursive(
    st.none() | st.booleans() | small | st.sampled_from([0.5, -1e-7, 2.25e30]) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def ranges(draw: st.DrawFn, low: str, high: str, numbers: st.SearchStrategy[int]) -> dict[str, int]:
    pair = sorted((draw(numbers), draw(numbers)))
    keywords = dict(zip((low, high), pair, strict=True))
    return {name: keywords[name] for name in draw(st.sets(st.sampled_from((low, high))))}


def tagged(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def make(parts: list[Any]) -> Schema:
        kinds = [
            {"properties": {"kind": {"const": number}, "value": part}, "required": ["kind"], "type": "object"}
            for number, part in enumerate(parts)
        ]
        return {"oneOf": kinds}

    return st.lists(inner, min_size=1, max_size=3).map(make)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Schema:
    properties = draw(st.dictionaries(names, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    if draw(st.booleans()):
        schema["additionalProperties"] = False
    return schema


leaves = st.one_of(
    st.sampled_from(
        [True, {}, {"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": ["string", "null"]}]
    ),
    ranges("minLength", "maxLength", st.integers(0, 5)).map(lambda keywords: {"type": "string", **keywords}),
    ranges("minimum", "maximum", small).map(lambda keywords: {"type": "integer", **keywords}),
    st.lists(values, min_size=1, max_size=4).map(lambda found: {"enum": found}),
    values.map(lambda value: {"const": value}),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        st.tuples(inner, ranges("minItems", "maxItems", st.integers(0, 3))).map(
            lambda parts: {"type": "array", "items": parts[0], **parts[1]}
        ),
        inner.map(lambda value: {"type": "object", "additionalProperties": value}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        tagged(inner),
    ),
    max_leaves=6,
)


def document(schema: Any, chance: random.Random) -> Any:
    """A value that satisfies a schema."""
    if schema is True or not set(schema) - {"$defs"}:
        return chance.choice([None, 1, -2.5, "é\n", [], [{}], {"x": [True]}])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return chance.choice(schema["enum"])
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return document(chance.choice(schema[keyword]), chance)
    kind = schema["type"] if isinstance(schema["type"], str) else chance.choice(schema["type"])
    if kind == "string":
        least = schema.get("minLength", 0)
        length = chance.randint(least, schema.get("maxLength", least + 4))
        return "".join(chance.choice('a"\\\x01\x7fé😀\u2028/') for _ in range(length))
    if kind == "integer":
        return chance.randint(*sorted((schema.get("minimum", -LARGEST), schema.get("maximum", LARGEST))))
    if kind == "array":
        least = schema.get("minItems", 0)
        count = chance.randint(least, schema.get("maxItems", least + 2))
        return [document(schema["items"], chance) for _ in range(count)]
    if kind == "object":
        if "properties" not in schema or not (schema["properties"] or schema.get("additionalProperties") is False):
            inner = schema.get("additionalProperties", True)
            return {key: document(inner, chance) for key in chance.sample(["", "k", 'q"', "ü"], chance.randint(0, 3))}
        return {
            name: document(value, chance)
            for name, value in schema["properties"].items()
            if name in schema["required"] or chance.random() < 0.5
        }
    return {"boolean": chance.random() < 0.5, "null": None, "number": chance.choice([0, -1.5, 1e-7, 6.02e23])}[kind]


def walk(state: State, chance: random.Random, most: int = 4000) -> bytes | None:
    """A random way through the automaton, in a hurry to end; None if it did not."""
    written = bytearray()
    while state.next_bytes and not (state.may_end and chance.random() < 0.5):
        choices = [byte for byte in range(256) if state.next_bytes >> byte & 1]
        closing = [byte for byte in choices if byte in b'"]},: '] or choices
        byte = chance.choice(closing if chance.random() < len(written) / 100 else choices)
        following = state.advance(bytes([byte]))
        assert following is not None, "a byte that the state announced was refused"
        written.append(byte)
        state = following
        if len(written) > most:
            return None
    assert state.may_end, "a dead end"
    return bytes(written)


def accepts(state: State, text: bytes) -> bool:
    after = state.advance(text)
    return after is not None and after.may_end


relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(schemas, st.integers(0, 1 << 32))
def test_whatever_the_automaton_writes_is_valid(schema: Any, seed: int) -> None:
    written = walk(Format(schema).start(), random.Random(seed))
    assume(written is not None)
    assert written is not None
    value = json.loads(written)
    assert valid(schema, value), written
    json.dumps(value, allow_nan=False).encode()
    assert not re.search(rb"\s", re.sub(rb'"(\\.|[^"\\])*"', b"", written).replace(b", ", b"").replace(b": ", b""))


@relaxed
@given(schemas, st.integers(0, 1 << 32))
def test_documents_of_json_dumps_are_read_and_damaged_ones_are_not(schema: Any, seed: int) -> None:
    chance = random.Random(seed)
    value = document(schema, chance)
    assert valid(schema, value)  # of the test itself
    state = Format(schema).start()
    written = json.dumps(value, ensure_ascii=False).encode()
    assert accepts(state, written)
    for _ in range(20):
        at = chance.randrange(len(written))
        damaged = written[:at] + chance.choice([b"", bytes([chance.randrange(256)]), b"\xff,"]) + written[at + 1 :]
        if accepts(state, damaged):
            assert valid(schema, json.loads(damaged)), damaged


@relaxed
@given(schemas, st.integers(0, 1 << 32))
def test_forced_bytes_are_the_only_ones(schema: Any, seed: int) -> None:
    chance = random.Random(seed)
    state = Format(schema).start()
    written = json.dumps(document(schema, chance), ensure_ascii=False).encode()
    for at in range(len(written)):
        forced = state.forced()
        assert written[at:].startswith(forced)
        following = state.advance(written[at : at + 1])
        assert following is not None
        assert (following.advance(forced[1:]) is not None) or not forced
        state = following


@given(st.integers(-(10**19), 10**19), st.integers(-(10**19), 10**19), st.integers(-LARGEST, LARGEST))
def test_integers_in_a_range_are_exact(one: int, other: int, value: int) -> None:
    low, high = sorted((one, other))
    assume(high >= -LARGEST and low <= LARGEST)
    state = Format({"type": "integer", "minimum": low, "maximum": high}).start()
    for number in {value, low, high, low - 1, high + 1, low + 1, 0}:
        expected = low <= number <= high and abs(number) <= LARGEST
        assert accepts(state, str(number).encode()) == expected


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "exclusiveMinimum": 2.5, "exclusiveMaximum": 11}, "3 9 10", "2 11 1 00 03 -3 1.0"),
        ({"type": "integer", "minimum": -12, "maximum": -3}, "-3 -9 -10 -12", "-2 -13 -1 3 0 -0 -03 -"),
        ({"type": "number", "minimum": 0}, "0 0.5 1e5 12.25E-3", "-0.1 -0 01 1. .5 1e 1e+ +1 NaN 1e100"),
        ({"type": "number"}, "-0 -1.5e+9 123456789012345678", "1234567890123456789 --1 Infinity"),
        ({"type": ["boolean", "null"]}, "true false null", "True tru nul 0"),
        ({"type": "string", "maxLength": 2}, r'"" "ab" "é😀" "\u00e9\ud83d\ude00" "\"\\"',
         r'"abc" "\u00e9\ud83d" ab "a'),
        ({"type": "string", "minLength": 1, "pattern": ".*"}, r'"a" "\n" "\u0000"',
         r'"" "\x" "\u00g0" "\udc00" "\ud83d\n"'),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, "[null]",
         "[] [null,null] [,null]"),
        ({"enum": ["1", 1, 12, [1]], "type": ["integer", "string"]}, '"1" 1 12', "[1] 2 123"),
        ({"allOf": [{"const": None}]}, "null", "nul"),
        ({"type": "integer", "enum": [10**400, 2.5, 3.0]}, f"1{'0' * 400} 3.0", "1 10 2.5"),
        ({"oneOf": [{"const": True}, {"const": 1}, {"const": "1"}, {"const": [1]}]}, 'true 1 "1" [1]', "[true]"),
        ({"type": "object", "properties": {}, "additionalProperties": False}, "{}", '{"a":1} { }'),
    ],
)  # fmt: skip
def test_single_documents(schema: Schema, good: str, bad: str) -> None:
    state = Format(schema).start()
    assert [text for text in good.split(" ") if not accepts(state, text.encode())] == []
    assert [text for text in bad.split(" ") if accepts(state, text.encode())] == []


@pytest.mark.parametrize(
    "raw", [b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"', b'"\n"']
)
def test_texts_are_utf8_without_control_characters(raw: bytes) -> None:
    assert not accepts(Format(True).start(), raw)
    assert accepts(Format(True).start(), b'"\xf4\x8f\xbf\xbf\x7f"')


TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "children"],
        }
    },
}


def test_recursion_ends_in_time() -> None:
    state = Format(TREE).start()
    assert accepts(state, json.dumps({"name": "a", "children": [{"name": "b", "children": []}]}).encode())
    one = b'{"name": "", "children": ['
    # each node opens two levels, and the innermost needs its own two
    deepest = state.advance(one * (LEVELS // 2))
    assert deepest is not None
    assert deepest.forced() == b"]}"  # after that, a sibling may come
    assert state.advance(one * (LEVELS // 2 + 1)) is None
    for seed in range(30):
        written = walk(state, random.Random(seed))
        assert written is None or valid(TREE, json.loads(written))
    assert Format(True).start().advance(b"[" * LEVELS) is not None
    assert Format(True).start().advance(b"[" * (LEVELS + 1)) is None


def test_forced_text_of_a_record() -> None:
    record = {"type": "object", "properties": {"name": {"type": "string"}, "ok": {"type": "boolean"}},
              "required": ["name", "ok"]}  # fmt: skip
    state = Format(json.dumps(record)).start()
    assert state.forced() == b'{"name": "'
    after = state.advance(b'{"name": "x"')
    assert after is not None
    assert after.forced() == b', "ok": '


def nested(levels: int, inner: Any = True) -> Any:
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return inner


def recursive(count: int) -> Schema:
    """Two alternatives that are one object, all of whose members are that object."""
    members = [f"m{n}" for n in range(count)]
    node = {"type": "object", "required": members, "properties": {name: {"$ref": "#/$defs/A"} for name in members}}
    return {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}], "$defs": {"A": node}}


def intertwined(ones: int, others: int) -> Schema:
    """Two alternatives whose members lead to every pair of two sets of objects."""
    definitions = {}
    for name, count in (("x", ones), ("y", others)):
        for n in range(count):
            members = {f"m{k}": {"$ref": f"#/$defs/{name}{(3 * n + 7 * k + 1) % count}"} for k in range(10)}
            definitions[f"{name}{n}"] = {"type": "object", "required": list(members), "properties": members}
    return {"oneOf": [{"$ref": "#/$defs/x0"}, {"$ref": "#/$defs/y0"}], "$defs": definitions}


PART = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
LOOP: Schema = {"type": "array"}
LOOP["items"] = LOOP

REFUSED: list[tuple[Any, str, str]] = [
    ({"type": "string", "pattern": "(a+)+$"}, "schema.unsupported", "/pattern"),
    ({"properties": {"a/b": {"type": "string", "format": "date"}}}, "schema.unsupported", "/properties/a~1b/format"),
    ({"type": "number", "maximum": 3}, "schema.unsupported", "/maximum"),
    ({"type": "integer", "multipleOf": 2}, "schema.unsupported", "/multipleOf"),
    ({"not": {}}, "schema.unsupported", "/not"),
    ({"a": 1}, "schema.unsupported", "/a"),
    ({"type": "integer", "minLength": 1}, "schema.unsupported", "/minLength"),
    ({"$ref": "http://example.org/x"}, "schema.unsupported", "/$ref"),
    ({"$ref": "#/$defs/a", "type": "object"}, "schema.unsupported", "/type"),
    ({"anyOf": [{}], "type": "object"}, "schema.unsupported", "/type"),
    ({"enum": [1], "minimum": 0}, "schema.unsupported", "/minimum"),
    ({"allOf": [{}, {}]}, "schema.unsupported", "/allOf"),
    ({"anyOf": [{"type": "null"}] * 65}, "schema.unsupported", "/anyOf"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "schema.unsupported", "/oneOf/1"),
    ({"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, "schema.unsupported", "/oneOf/1"),
    (recursive(10), "schema.unsupported", "/oneOf/1"),
    (intertwined(270, 269), "schema.unsupported", "/oneOf/1"),
    ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "schema.unsupported", "/oneOf/1"),
    ({"oneOf": [{"type": "integer"}, {"const": 10**400}]}, "schema.unsupported", "/oneOf/1"),
    ({"oneOf": [{"enum": [n * (2**61 - 1) for n in range(9_000)]}] * 2}, "schema.unsupported", "/oneOf/1"),
    ({"oneOf": [PART, {**PART, "required": [["a"]]}]}, "schema.invalid", "/oneOf/1/required"),
    ({"oneOf": [PART, {**PART, "properties": ["a"]}]}, "schema.invalid", "/oneOf/1/properties"),
    ({"const": MappingProxyType({"a": 1})}, "schema.invalid", "/const"),
    ({"type": "object", "required": ["a"]}, "schema.unsupported", "/required"),
    ({"properties": {"a": {}}, "additionalProperties": {"const": 1}}, "schema.unsupported", "/additionalProperties"),
    ({"minimum": 1}, "schema.unsupported", "/type"),
    ({"$ref": "#"}, "schema.unsupported", "/$ref"),
    ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}]}}, "$ref": "#/$defs/a"}, "schema.unsupported",
     "/$ref"),
    (nested(10_000), "schema.unsupported", ""),
    (LOOP, "schema.unsupported", ""),
    ({"enum": list(range(30_000))}, "schema.unsupported", ""),
    ({"const": nested(100)}, "schema.unsupported", "/const"),
    ({"$ref": "#/$defs/a"}, "schema.invalid", "/$ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": 3}}, "schema.invalid", "/$defs/a"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "schema.invalid", ""),
    ({"type": "array", "minItems": 2, "maxItems": 1}, "schema.invalid", ""),
    ({"type": "string", "maxLength": -1}, "schema.invalid", "/maxLength"),
    ({"type": "string", "maxLength": True}, "schema.invalid", "/maxLength"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "schema.invalid", ""),
    ({"type": "integer", "minimum": 10**30}, "schema.invalid", ""),
    ({"type": "integer", "minimum": "1"}, "schema.invalid", "/minimum"),
    ({"type": "text"}, "schema.invalid", "/type"),
    ({"type": []}, "schema.invalid", "/type"),
    ({"type": [["object"]]}, "schema.invalid", "/type"),
    ({"enum": []}, "schema.invalid", "/enum"),
    ({"enum": "a"}, "schema.invalid", "/enum"),
    ({"const": "a", "type": "integer"}, "schema.invalid", "/const"),
    ({"const": float("nan")}, "schema.invalid", ""),
    ({"const": "\ud800"}, "schema.invalid", ""),
    ({"const": 10**5000}, "schema.invalid", ""),
    ({"properties": {"\udc00": {}}}, "schema.invalid", ""),
    ({"properties": []}, "schema.invalid", "/properties"),
    ({"type": "object", "required": "a"}, "schema.invalid", "/required"),
    ({1: 2}, "schema.invalid", ""),
    ({"const": {1, 2}}, "schema.invalid", ""),
    ({"anyOf": []}, "schema.invalid", "/anyOf"),
    (False, "schema.invalid", ""),
    (None, "schema.invalid", ""),
    ([], "schema.invalid", ""),
    ("", "schema.invalid", ""),
    ("{", "schema.invalid", ""),
    ("[" * 100_000, "schema.invalid", ""),
    ('{"type": NaN}', "schema.invalid", ""),
    ('{"type": "null", "type": "string"}', "schema.invalid", ""),
    ("9" * 5000, "schema.invalid", ""),
    (" " * (1 << 21), "schema.invalid", ""),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "code", "pointer"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_compiled_is_refused_by_name_and_at_once(schema: Any, code: str, pointer: str) -> None:
    started = time.perf_counter()
    with pytest.raises(SchemaError) as caught:
        Format(schema)
    assert (caught.value.code, caught.value.pointer) == (code, pointer), str(caught.value)
    assert len(str(caught.value)) < 300
    assert pointer.rpartition("/")[2].replace("~1", "/") in str(caught.value).replace("~1", "/")
    assert time.perf_counter() - started < 2


def test_large_schemas_within_the_limits_compile_quickly() -> None:
    chain = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(2000)}
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}}
    started = time.perf_counter()
    Format({"$ref": "#/$defs/d0", "$defs": {**chain, "d2000": {"type": "null"}}})
    state = Format(wide).start()
    assert accepts(state, b'{"p7": "x", "p4999": ""}')
    assert accepts(Format({"type": "string", "maxLength": 10**9}).start(), b'"' + b"a" * 1000 + b'"')
    assert accepts(Format({"enum": list(range(5000))}).start(), b"4999")
    assert time.perf_counter() - started < 5


def test_one_of_many_large_objects_may_be_told_apart_by_its_last_member() -> None:
    names, digit = [f"m{n}" for n in range(50)], {"type": "integer"}
    kinds = [
        {"type": "object", "required": [*names, "kind"], "properties": {**dict.fromkeys(names, digit), "kind": tag}}
        for tag in ({"const": f"k{n}"} for n in range(64))
    ]
    started = time.perf_counter()
    state = Format({"oneOf": kinds}).start()
    assert time.perf_counter() - started < 2
    for kind in ("k0", "k63"):
        assert accepts(state, json.dumps({**dict.fromkeys(names, 1), "kind": kind}).encode())
    assert not accepts(state, json.dumps({**dict.fromkeys(names, 1), "kind": "k64"}).encode())


def test_choices_within_choices_are_followed_once_each() -> None:
    same = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 64} for n in range(4)}
    crossed = {
        f"d{n}x{k}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}x{other}"} for other in range(20)]}
        for n in range(6)
        for k in range(20)
    }
    crossed |= {f"d6x{k}": {"type": "array", "items": {"const": k}} for k in range(20)}
    started = time.perf_counter()
    state = Format({"$ref": "#/$defs/d0", "$defs": {**same, "d4": {"type": "string"}}}).start()
    assert accepts(state, b'"a"')
    state = Format({"$ref": "#/$defs/d0x0", "$defs": crossed}).start()
    assert [k for k in range(30) if accepts(state, b"[%d, %d]" % (k, k))] == list(range(20))
    assert not accepts(state, b"[1, 2]")  # each alternative is still one of its own
    crossed |= {f"d6x{k}": {"type": "array", "items": {"$ref": "#/$defs/d0x0"}} for k in range(20)}
    state = Format({"$ref": "#/$defs/d0x0", "$defs": crossed}).start()
    assert accepts(state, b"[" * 60 + b"]" * 60)
    assert time.perf_counter() - started < 2
