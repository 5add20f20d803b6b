"""A JSON schema as a regular expression: text that matches it is JSON, and what it says satisfies the schema.

    json_pattern({"type": "object", "properties": {"भाव": {"enum": ["अच्छा", "बुरा"]}}, "required": ["भाव"]})
    '\\{"भाव": (?:"अच्छा"|"बुरा")\\}'

An expression cannot count brackets, so schemas that refer to themselves are refused, and so is every keyword that would
not be kept. Properties come in the schema's order and no others are added; spaces are those of Python's json.dumps.
Source: JSON Schema draft 2020-12, of which this is a part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import regex

from lmx.generate.automaton import MOST_CHARS

MOST_DEPTH = 64
"""In words and names from the top of a schema."""
DIGITS = 16
"""Of numbers without bounds, before and after the point."""

Schema = Mapping[str, Any]

_SAYS_NOTHING = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $id $comment $defs definitions".split()
)
_OF_TYPE = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_WHOLE = f"(?:0|[1-9][0-9]{{0,{DIGITS - 1}}})"
_CHAR = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])'


def json_pattern(schema: Schema) -> str:
    r"""The regular expression of a JSON schema, for `Sampling(pattern=...)`.

    Args:
      schema: with type, enum, const, anyOf and $ref within it; properties, required and additionalProperties of
        objects; items, minItems and maxItems of arrays; minLength and maxLength of strings; minimum, maximum and
        the exclusive ones of integers.

    >>> json_pattern({"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 12}, "maxItems": 2})
    '\\[(?:(?:[1-9]|1[0-2])(?:, (?:[1-9]|1[0-2])){0,1})?\\]'

    Raises: ValueError, naming the place, for anything else, or for an expression of more than MOST_CHARS.
    """
    return _value(schema, schema, "#", {})


def _value(schema: Any, root: Schema, where: str, known: dict[str, str]) -> str:
    """known: the pattern of each reference that was met, "" while it is followed."""
    if not isinstance(schema, Mapping):
        raise _wrong(where, f"{schema!r:.80} is no schema that can be kept; write an object with a type")
    if where.count("/") > MOST_DEPTH:
        raise _wrong(where, f"more than {MOST_DEPTH} steps into the schema; nest less")
    said = schema.keys() - _SAYS_NOTHING
    for word, beside in (("$ref", ()), ("anyOf", ()), ("const", ("type",)), ("enum", ("type",))):
        if word in said:
            _only(said, {word, *beside}, where, f"beside {word}")
            break
    if "$ref" in said:
        pattern = _referred(schema["$ref"], root, where, known)
    elif "anyOf" in said:
        choices = _some(schema["anyOf"], f"{where}/anyOf")
        pattern = _any(_value(x, root, f"{where}/anyOf/{i}", known) for i, x in enumerate(choices))
    elif "const" in said or "enum" in said:
        values = [schema["const"]] if "const" in said else _some(schema["enum"], f"{where}/enum")
        kinds = _kinds(schema, where) if "type" in said else _OF_TYPE
        fitting = [x for x in values if any(_is(x, kind) for kind in kinds)]
        pattern = _any(_literal(x, where) for x in _some(fitting, f"{where}, of type {schema.get('type')}"))
    else:
        kinds = _kinds(schema, where)
        words = {"type"}.union(*(_OF_TYPE[kind] for kind in kinds))
        words -= _OF_TYPE["integer"] if "number" in kinds else set()
        _only(said, words, where, f"of type {', '.join(kinds)}")
        pattern = _any(_of(kind, schema, root, where, known) for kind in kinds)
    if len(pattern) > MOST_CHARS:
        raise _too_long(where)
    return pattern


def _of(kind: str, schema: Schema, root: Schema, where: str, known: dict[str, str]) -> str:
    match kind:
        case "object":
            return _object(schema, root, where, known)
        case "array":
            if "items" not in schema:
                raise _wrong(where, "an array of anything; say what its items are")
            item = _value(schema["items"], root, f"{where}/items", known)
            least, most = _counts(schema, "minItems", "maxItems", where)
            if most == 0:
                return r"\[\]"
            more = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
            items = f"{item}(?:, {item}){more}"
            return rf"\[{items}\]" if least else rf"\[(?:{items})?\]"
        case "string":
            least, most = _counts(schema, "minLength", "maxLength", where)
            return f'"{_CHAR}{{{least},{"" if most is None else most}}}"'
        case "integer":
            return _integer(schema, where)
        case "number":
            return rf"-?{_WHOLE}(?:\.[0-9]{{1,{DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?"
        case "boolean":
            return "(?:true|false)"
    return "null"


def _object(schema: Schema, root: Schema, where: str, known: dict[str, str]) -> str:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping):
        raise _wrong(where, "an object of anything; say what its properties are")
    if not isinstance(required, list) or not all(
        isinstance(name, str) and name in properties for name in required
    ):
        raise _wrong(where, f"required {required!r:.80} names what is not among the properties; add it there")
    if not isinstance(schema.get("additionalProperties", False), bool):
        raise _wrong(where, "a schema of additionalProperties is not supported; name the properties")
    pairs = [
        (
            f"{_literal(name, where)}: {_value(x, root, f'{where}/properties/{_step(name)}', known)}",
            name in required,
        )
        for name, x in properties.items()
    ]
    after = [f", {pair}" if needed else f"(?:, {pair})?" for pair, needed in pairs]
    starts = []
    for i, (pair, needed) in enumerate(pairs):  # which comes first
        starts.append("".join([pair, *after[i + 1 :]]))
        if sum(map(len, starts)) > MOST_CHARS:
            raise _too_long(where)
        if needed:
            break
    else:
        starts.append("")
    return rf"\{{{_any(starts)}\}}"


def _integer(schema: Schema, where: str) -> str:
    bounds = {word: schema[word] for word in _OF_TYPE["integer"] if word in schema}
    if not bounds:
        return f"-?{_WHOLE}"
    for word, x in bounds.items():
        if not _is(x, "number") or not abs(x) < 10**DIGITS:
            raise _wrong(where, f"{word} {x!r:.80}; give a number of at most {DIGITS} digits")
    far = 10**DIGITS - 1
    low = max(
        math.ceil(bounds.get("minimum", -far)), math.floor(bounds.get("exclusiveMinimum", -far - 1)) + 1
    )
    high = min(math.floor(bounds.get("maximum", far)), math.ceil(bounds.get("exclusiveMaximum", far + 1)) - 1)
    if low > high:
        raise _wrong(where, f"no integer is within {bounds}; give a range that holds one")
    parts = [f"-{_between(max(1, -high), -low)}"] if low < 0 else []
    return _any([*parts, *([_between(max(0, low), high)] if high >= 0 else [])])


def _between(low: int, high: int) -> str:
    """Decimals from low to high, 0 <= low <= high."""

    def same_length(a: str, b: str) -> str:
        free = len(a) - 1
        if a == b:
            return a
        if a[0] == b[0]:
            return a[0] + same_length(a[1:], b[1:])
        first, last, parts = int(a[0]), int(b[0]), []
        if a[1:] != "0" * free:
            parts.append(a[0] + same_length(a[1:], "9" * free))
            first += 1
        if b[1:] != "9" * free:
            last -= 1
        if first <= last:
            digit = str(first) if first == last else f"[{first}-{last}]"
            parts.append(digit + {0: "", 1: "[0-9]"}.get(free, f"[0-9]{{{free}}}"))
        if b[1:] != "9" * free:
            parts.append(b[0] + same_length("0" * free, b[1:]))
        return _any(parts)

    return _any(
        same_length(str(max(low, 10 ** (n - 1) if n > 1 else 0)), str(min(high, 10**n - 1)))
        for n in range(len(str(low)), len(str(high)) + 1)
    )


def _referred(name: Any, root: Schema, where: str, known: dict[str, str]) -> str:
    found: Any = root
    steps = name.split("/") if isinstance(name, str) else []
    for step in steps[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, Mapping) else None
    if steps[:1] != ["#"] or found is None:
        raise _wrong(where, f"$ref {name!r:.80} is not in this schema; use such as #/$defs/name")
    if name not in known:
        known[name] = ""
        known[name] = _value(found, root, f"{where}/$ref", known)
    if not known[name]:
        raise _wrong(
            where, f"{name} refers to itself, and a pattern has no recursion; write out a few levels"
        )
    return known[name]


def _step(name: str) -> str:
    """A name within a place, as RFC 6901 writes it."""
    return name.replace("~", "~0").replace("/", "~1")


def _kinds(schema: Schema, where: str) -> list[str]:
    kinds = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else None)
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not kinds or not all(isinstance(kind, str) and kind in _OF_TYPE for kind in kinds):
        raise _wrong(
            where, f"type {schema.get('type')!r:.80}; give {', '.join(_OF_TYPE)}, enum, anyOf or $ref"
        )
    return kinds


def _counts(schema: Schema, least: str, most: str, where: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for word, n in ((least, low), (most, 0 if high is None else high)):
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 10**9:
            raise _wrong(where, f"{word} {n!r:.80}; give a whole number")
    if high is not None and high < low:
        raise _wrong(where, f"{least} {low} is more than {most} {high}; give the lower number first")
    return low, high


def _is(x: Any, kind: str) -> bool:
    """Whether a value of JSON is of a type."""
    match kind:
        case "object":
            return isinstance(x, Mapping)
        case "array":
            return isinstance(x, list | tuple)
        case "string":
            return isinstance(x, str)
        case "boolean":
            return isinstance(x, bool)
        case "null":
            return x is None
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and (kind == "number" or x == x // 1)


def _literal(x: Any, where: str) -> str:
    try:
        text = json.dumps(x, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _wrong(where, f"{x!r:.80} is no value of JSON ({error})") from None
    return regex.sub(r"[\\\[\](){}*+?^$|.]", r"\\\g<0>", text)


def _any(patterns: Iterable[str]) -> str:
    found = list(dict.fromkeys(patterns))
    return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"


def _some(values: Any, where: str) -> list:
    if not isinstance(values, list) or not values:
        raise _wrong(where, f"{values!r:.80} leaves no choice; give a list of one or more")
    return values


def _only(said: Iterable[str], words: Iterable[str], where: str, beside: str) -> None:
    if unknown := sorted(set(said) - set(words)):
        raise _wrong(
            where, f"{', '.join(unknown)} {beside} is not supported, and would not be kept; leave it out"
        )


def _wrong(where: str, what: str) -> ValueError:
    return ValueError(f"schema: at {where:.200}: {what}")


def _too_long(where: str) -> ValueError:
    return _wrong(
        where,
        f"it needs a pattern of more than {MOST_CHARS:,} characters; nest less, name fewer values, or require more of "
        "the properties",
    )
