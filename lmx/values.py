"""Trees of frozen dataclasses as text: shown, read back, overridden by path, compared; and their numbers checked.

Text is read with `ast`, never executed. A class name is looked up among the subclasses of the declared type
of the field it is given to, so a new subclass needs no registration.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def show(value: Any, width: int = 100) -> str:
    """The text that `parse` reads back: the `repr` of a value, broken over lines if wider than `width`.

    A class is named without the scope it was defined in; numpy numbers are plain numbers, lists are tuples.
    """
    return _show(value, width, 0, 0)


def parse(text: str, kind: Any, where: str = "value") -> Any:
    """The value that `text` writes, of the declared type `kind`.

    >>> parse("3e-4", float), parse("none", str | None), parse("(1, 2)", tuple[int, ...])
    (0.0003, None, (1, 2))

    Where the type admits a string, text that reads as nothing else is that string; quotes are not needed.
    Raises: ValueError naming `where`, the text, and what would be accepted.
    """
    words = text.strip()
    if words.lower() in ("true", "false", "none"):
        words = words.capitalize()
    plain = _admits(kind, str) and not (len(words) > 1 and words[0] == words[-1] and words[0] in "'\"")
    if plain and not (words == "None" and _admits(kind, type(None))) and not _reads_otherwise(words, kind):
        return text.strip()
    node = _parsed(words)
    if node is not None:
        try:
            return _build(node, kind, where)
        except RecursionError:
            pass
        except ValueError as error:
            raise ValueError(f"{error}{_tuple_hint(text, kind)}") from None
    raise ValueError(f"{where}: cannot read {_short(text)!r} as {_name(kind)}{_tuple_hint(text, kind)}")


def part(text: str, path: str, kind: Any, where: str = "value") -> Any:
    """One setting of a value that `show` wrote, without reading the others, whose classes need not be known.

    >>> part("Run(data=Data(train=(Mine(),), seq_len=64), seed=3)", "data.seq_len", int)
    64

    Raises: ValueError if it is not there, or not of this type.
    """
    node: Any = _parsed(text.strip())
    for name in path.split("."):
        node = next((k.value for k in getattr(node, "keywords", ()) if k.arg == name), None)
        if node is None:
            raise ValueError(f"{where}: no setting {path!r} in {_short(text)!r}")
    return _build(node, kind, f"{where}: {path}")


def override(value: Any, changes: dict[str, str]) -> Any:
    """`value` with fields replaced by text: `override(run, {"optim.lr": "3e-4", "model.unroll": "none"})`.

    Raises: ValueError for an unknown path, naming the nearest ones, or for text of the wrong type.
    """
    for path, text in changes.items():
        value = _override(value, type(value), path.split("."), text, path, value)
    return value


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its path; a dataclass also counts as the path of its own class name.

    >>> from dataclasses import dataclass
    >>> leaves((1, {"a": True}))
    {'0': 1, '1.a': True}
    """
    if dataclasses.is_dataclass(value):
        children = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        found = {prefix: type(value).__name__} if prefix else {}
    elif isinstance(value, dict):
        children, found = value, {}
    elif isinstance(value, tuple | list):
        children, found = {str(i): v for i, v in enumerate(value)}, {}
    else:
        return {prefix: value.item() if isinstance(value, np.generic) else value}
    for name, child in children.items():
        found |= leaves(child, f"{prefix}.{name}" if prefix else str(name))
    return found


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """path -> (setting in a, setting in b) where they differ; a setting that one lacks is None there."""
    left, right = leaves(a), leaves(b)
    return {
        path: (left.get(path), right.get(path))
        for path in [*left, *(p for p in right if p not in left)]
        if _differ(left.get(path), right.get(path))
    }


def check(owner: Any, **ranges: str) -> None:
    """Refuses a number outside its range: `check(self, b1="[0, 1)", clip="(0, inf) or None")`, once it is built.

    Raises: ValueError naming class, field, value and range; NaN lies in none.
    """
    for name, wanted in ranges.items():
        value = getattr(owner, name)
        interval, _, none = wanted.partition(" or ")
        if none and value is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{type(owner).__name__}: {name}={value} is not in {wanted}")


def _differ(a: Any, b: Any) -> bool:
    """A warmup of 1 (steps) is not one of 1.0 (a share)."""
    return a != b or type(a) is not type(b)


def fields_of(cls: type) -> dict[str, Any]:
    """Name -> declared type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _show(value: Any, width: float, indent: int, beside: int) -> str:
    """beside: characters that stand on the first line beside the value, its indentation included."""
    opening, items, closing = _pieces(value)
    if items is None:
        return opening
    flat = opening + ", ".join(name + _show(item, math.inf, 0, 0) for name, item in items)
    flat += "," * (opening == "(" and len(items) == 1) + closing
    if len(flat) + beside <= width:
        return flat
    inner = indent + 4
    shown = (f"{' ' * inner}{n}{_show(item, width, inner, inner + len(n) + 1)},\n" for n, item in items)
    return f"{opening}\n{''.join(shown)}{' ' * indent}{closing}"


def _pieces(value: Any) -> tuple[str, list[tuple[str, Any]] | None, str]:
    """(opening, [(name and sign, item)], closing) of a container; (text, None, "") of anything else."""
    if dataclasses.is_dataclass(value):
        items = [(f"{f.name}=", getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
        return f"{type(value).__name__}(", items, ")"
    if isinstance(value, dict):
        return "{", [(f"{key!r}: ", item) for key, item in value.items()], "}"
    if isinstance(value, tuple | list):
        return "(", [("", item) for item in value], ")"
    return repr(value.item() if isinstance(value, np.generic) else value), None, ""


def _override(value: Any, kind: Any, path: list[str], text: str, full: str, root: Any) -> Any:
    if not path:
        return parse(text, kind, full)
    head, *rest = path
    if dataclasses.is_dataclass(value):
        kinds = fields_of(type(value))
        if head in kinds:
            new = _override(getattr(value, head), kinds[head], rest, text, full, root)
            return dataclasses.replace(value, **{head: new})
    if isinstance(value, dict) and head in value:
        return value | {head: _override(value[head], _within(kind, dict, 1), rest, text, full, root)}
    if isinstance(value, tuple | list) and head.isdecimal() and int(head) < len(value):
        i = int(head)
        new = _override(value[i], _within(kind, tuple, i), rest, text, full, root)
        return (*value[:i], new, *value[i + 1 :])
    _unknown(full, root)


def _within(kind: Any, container: type, i: int) -> Any:
    """The declared type of item i of a tuple, or of the values (i = 1) of a dict."""
    for option in _options(kind):
        args = typing.get_args(option)
        if typing.get_origin(option) is container and args:
            return args[0] if args[-1] is Ellipsis else args[i]
    return Any


def _unknown(path: str, root: Any) -> None:
    known = list(leaves(root))
    last = path.split(".")[-1]
    near = [p for p in known if p.split(".")[-1] == last]
    near = near or difflib.get_close_matches(path, known, n=3, cutoff=0.4)
    near = near or difflib.get_close_matches(last, known, n=3, cutoff=0.3) or known
    raise ValueError(f"no setting {path!r}; did you mean {' or '.join(near[:3])}?")


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is None and isinstance(kind, type):
        return kind.__name__
    return str(kind).replace("typing.", "")


def _options(kind: Any) -> tuple:
    """The members of a union, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _admits(kind: Any, wanted: type) -> bool:
    return wanted in _options(kind)


def _classes(kind: Any) -> list[type]:
    """Every dataclass that a field of this type may hold: neither abstract nor private ones."""
    found: list[type] = []
    for option in _options(kind):
        if isinstance(option, type) and typing.get_origin(option) is None:
            pending = [option]
            while pending:
                cls = pending.pop()
                pending.extend(cls.__subclasses__())
                hidden = inspect.isabstract(cls) or cls.__name__.startswith("_")
                if dataclasses.is_dataclass(cls) and not hidden and cls not in found:
                    found.append(cls)
    return found


def _tuple_hint(text: str, kind: Any) -> str:
    """The way out for text that reads as one item of the tuple that is asked for."""
    items = [typing.get_args(option)[0] for option in _options(kind) if _is_sequence(option)]
    if not items or text.lstrip().startswith(("(", "[")):
        return ""
    try:
        return f"; write a tuple: {_short(show((parse(text, items[0]),), math.inf))}"
    except ValueError:
        return ""


def _is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[-1:] == (Ellipsis,)


def _reads_otherwise(words: str, kind: Any) -> bool:
    """Whether text that may be a string is rather a number, container or class that the type also admits."""
    others = [option for option in _options(kind) if option not in (str, type(None))]
    called = words.partition("(")[0].strip()
    if called in {cls.__name__ for cls in _classes(kind)}:
        return True
    node = _parsed(words)
    return node is not None and any(_fits(node, option) for option in others)


def _parsed(words: str) -> ast.expr | None:
    try:
        return ast.parse(words, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _fits(node: ast.expr, kind: Any) -> bool:
    try:
        _build(node, kind, "")
    except (ValueError, RecursionError):
        return False
    return True


def _build(node: ast.expr, kind: Any, where: str) -> Any:
    if _admits(kind, float) and ast.unparse(node) in ("inf", "-inf", "nan"):
        return float(ast.unparse(node))
    if isinstance(node, ast.Call | ast.Name):
        return _build_call(node, kind, where)
    problem = None
    for option in _options(kind):
        try:
            if isinstance(node, ast.Tuple | ast.List) and _holds(option, tuple, Sequence):
                return _build_tuple(node, option, where)
            if isinstance(node, ast.Dict) and _holds(option, dict, Mapping):
                of_key, of_value = typing.get_args(option) or (Any, Any)
                keys = [_scalar(_literal(k, where), of_key, where) for k in node.keys]
                return {k: _build(v, of_value, f"{where}.{k}") for k, v in zip(keys, node.values)}
        except ValueError as error:
            problem = str(error)
    if isinstance(node, ast.Tuple | ast.List | ast.Dict):
        raise ValueError(problem or f"{where}: {_text(node)} is not {_name(kind)}")
    return _scalar(_literal(node, where), kind, where)


def _holds(kind: Any, *containers: type) -> bool:
    return kind is Any or kind in containers or typing.get_origin(kind) in containers


def _build_tuple(node: ast.Tuple | ast.List, kind: Any, where: str) -> tuple:
    args = typing.get_args(kind) or (Any, ...)
    if typing.get_origin(kind) is Sequence:
        args = (*args, ...)
    each = [args[0]] * len(node.elts) if args[-1] is Ellipsis else list(args)
    if len(each) != len(node.elts):
        raise ValueError(f"{where}: expected {len(each)} items, got {len(node.elts)}")
    return tuple(_build(e, k, f"{where}.{i}") for i, (e, k) in enumerate(zip(node.elts, each)))


def _build_call(node: ast.Call | ast.Name, kind: Any, where: str) -> Any:
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        raise ValueError(f"{where}: {_text(node)} is not a value; write a class name and its settings")
    candidates = [cls for cls in _classes(kind) if cls.__name__ == name.id]
    if not candidates:
        choices = ", ".join(sorted({cls.__name__ for cls in _classes(kind)})) or _name(kind)
        raise ValueError(f"{where}: {_text(node)!r} is not one of {choices}")
    cls = candidates[-1]
    if any((c.__module__, c.__qualname__) != (cls.__module__, cls.__qualname__) for c in candidates):
        homes = " and ".join(sorted({c.__module__ for c in candidates}))
        raise ValueError(f"{where}: {name.id} is defined in {homes}; rename one of them")
    kinds = fields_of(cls)
    given = {}
    if isinstance(node, ast.Call):
        if len(node.args) > len(kinds):
            raise ValueError(f"{where}: {name.id} has {len(kinds)} settings, given {len(node.args)}")
        named = [(k.arg, k.value) for k in node.keywords]
        for field, arg in [*zip(kinds, node.args), *named]:
            if field not in kinds:
                near = difflib.get_close_matches(str(field), kinds, n=1) or [", ".join(kinds) or "none"]
                raise ValueError(f"{where}: {name.id} has no setting {field!r}; it has {near[0]}")
            if field in given:
                raise ValueError(f"{where}: {name.id} is given {field} twice")
            given[field] = _build(arg, kinds[field], f"{where}.{field}")
    missing = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in given and _required(f)]
    if missing:
        raise ValueError(f"{where}: {name.id} needs {', '.join(missing)}")
    return cls(**given)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _literal(node: ast.expr | None, where: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError):
        raise ValueError(f"{where}: {_text(node)!r} is not a plain value") from None


def _text(node: ast.expr | None) -> str:
    return _short("**" if node is None else ast.unparse(node))


def _short(text: str) -> str:
    return text if len(text) < 200 else f"{text[:200]}..."


def _scalar(found: Any, kind: Any, where: str) -> Any:
    for option in _options(kind):
        if option is Any or (option is type(found)) or (found is None and option is type(None)):
            return found
        if typing.get_origin(option) is typing.Literal and found in typing.get_args(option):
            return found
    if _admits(kind, float) and isinstance(found, int) and not isinstance(found, bool):
        try:
            return float(found)
        except OverflowError:
            raise ValueError(f"{where}: an integer of {found.bit_length()} bits is no float") from None
    if _admits(kind, int) and isinstance(found, float) and found.is_integer():
        return int(found)
    raise ValueError(f"{where}: {_short(repr(found))} is {type(found).__name__}, expected {_name(kind)}")
