"""JSON under a schema, against json and jsonschema."""

import functools
import json
import re

import jax
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data import Byte
from lmx.generate import Sampling, generate, json_pattern
from lmx.generate.automaton import automaton
from lmx.models import build
from lmx.models.presets import llama

BYTES = Byte().train(["the byte tokenizer learns nothing"])
REVIEW = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "a review",
    "type": "object",
    "properties": {
        "भाव": {"enum": ["सकारात्मक", "नकारात्मक", 'q"\\+', None]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5, "description": "of five"},
        "शब्द": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "who": {"$ref": "#/$defs/person"},
        "score": {"type": ["number", "null"]},
    },
    "required": ["भाव", "who"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 4},
                "ok": {"type": "boolean"},
            },
        }
    },
}
SCHEMAS = [
    REVIEW,
    {"type": "integer", "exclusiveMinimum": -120, "maximum": 37},
    {"type": "integer"},
    {"type": "number"},
    {"anyOf": [{"const": {"a": [1, 2.5, "हाँ"]}}, {"type": "null"}]},
    {"enum": [1, "a", 2.0, 2.5, True], "type": "integer"},
    {
        "type": "array",
        "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "minItems": 2,
        "maxItems": 3,
    },
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}},
    {"type": "string", "maxLength": 6},
]


@functools.cache
def make():
    model = build(llama(16, 1, 2, vocab_size=BYTES.vocab_size, init_std=0.5))
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_what_ends_by_itself_satisfies_the_schema(schema):
    sampling = Sampling(1.5, max_tokens=250, seed=1, pattern=json_pattern(schema))
    got = [c for c in generate(*make(), BYTES, [""] * 24, sampling) if c.reason == "eos"]
    assert len(got) >= 12
    for completion in got:
        jsonschema.validate(json.loads(completion.text), schema)
    assert len({c.text for c in got}) > 1 or schema.get("type") == "integer"


@given(st.lists(st.integers(-1500, 1500), min_size=2, max_size=2), st.integers(-1600, 1600))
def test_integers_in_a_range(bounds, n):
    low, high = sorted(bounds)
    pattern = json_pattern({"type": "integer", "minimum": low, "maximum": high})
    for x in (n, low - 1, low, low + 1, high - 1, high, high + 1, 0, -1):
        assert bool(re.fullmatch(pattern, str(x))) == (low <= x <= high)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(values)
def test_any_constant_is_written_as_json(value):
    text = json.dumps(value, ensure_ascii=False)
    assert re.fullmatch(json_pattern({"const": value}), text)


def test_strings_are_those_of_json():
    machine = automaton(json_pattern({"type": "string", "minLength": 1, "maxLength": 2}))
    for text, fits in [
        ('"क"', 1),
        ('"\\n😀"', 1),
        ('""', 0),
        ('"abc"', 0),
        ('"\n"', 0),
        ('"\\x"', 0),
        ('"a""', 0),
    ]:
        assert machine.matches(text.encode()) == bool(fits)


def nested(n):
    return functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(n), {"type": "null"})


def doubling(n, pair):
    """Each definition has two of the next."""
    refs = [{"$ref": f"#/$defs/n{i}"} for i in range(n + 1)]
    return {"$defs": {**{f"n{i}": pair(refs[i + 1]) for i in range(n)}, f"n{n}": {"type": "null"}}, **refs[0]}


def test_a_definition_met_often_is_read_once():
    assert json_pattern(doubling(20, lambda x: {"anyOf": [x, x]})) == "null"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({}, "type None; give object"),
        (True, "True is no schema that can be kept"),
        ({"type": "text"}, "type 'text'"),
        ({"type": "object"}, "an object of anything"),
        ({"type": "array"}, "an array of anything"),
        ({"type": "number", "minimum": 0}, "minimum of type number is not supported"),
        ({"type": ["integer", "number"], "minimum": 0}, "minimum of type integer, number is not supported"),
        ({"type": "string", "format": "date"}, "format of type string"),
        ({"oneOf": [{"type": "null"}], "type": "null"}, "oneOf of type null"),
        (
            {"properties": {"a/b": {"type": "string", "pattern": "x"}}},
            "/properties/a~1b: pattern of type string",
        ),
        ({"properties": {"a": {"type": "null"}}, "required": ["b"]}, r"required \['b'\] names what is not"),
        (
            {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 1},
            "minItems 2 is more than",
        ),
        ({"type": "string", "maxLength": -1}, "maxLength -1"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer is within"),
        ({"type": "integer", "minimum": float("nan")}, "minimum nan"),
        ({"enum": []}, "leaves no choice"),
        ({"enum": ["a"], "type": "integer"}, "leaves no choice"),
        ({"const": float("inf")}, "no value of JSON"),
        ({"$ref": "#"}, "# refers to itself"),
        ({"properties": {"next": {"$ref": "#"}}}, "# refers to itself"),
        ({"$ref": "https://example.org/x"}, "is not in this schema"),
        ({"$ref": 3}, "is not in this schema"),
        ({"$ref": "#/a", "minimum": 3}, r"minimum beside \$ref"),
        (nested(30), "more than 65,536 characters"),
        (nested(500), "more than 64 steps"),
        (
            doubling(20, lambda x: {"properties": {"a": x, "b": x}, "required": ["a", "b"]}),
            "more than 65,536 characters",
        ),
        ({"enum": [str(i) for i in range(20_000)]}, "more than 65,536 characters"),
        (
            {"properties": {f"k{i}": {"type": "null"} for i in range(2000)}},
            "more than 65,536 characters",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_would_not_be_kept_is_refused_with_its_place(schema, message):
    with pytest.raises(ValueError, match=f"schema: at #.*{message}"):
        json_pattern(schema)
