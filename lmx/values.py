"""Trees of frozen dataclasses as text: shown, read back, overridden by path, compared.

Text is read with `ast`, never executed. A class name is looked up among the subclasses of the declared type
of the field it is given to, so a new subclass needs no registration.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from typing import Any


def show(value: Any, width: int = 100, indent: int = 0) -> str:
    """The `repr` of a value, broken over lines where it is wider than `width` characters."""
    flat = repr(value)
    if len(flat) + indent <= width:
        return flat
    pad = " " * (indent + 4)
    if dataclasses.is_dataclass(value):
        items = [f"{f.name}={show(getattr(value, f.name), width, indent + 4)}" for f in dataclasses.fields(value)]
        opening, closing = f"{type(value).__name__}(", ")"
    elif isinstance(value, dict):
        items = [f"{k!r}: {show(v, width, indent + 4)}" for k, v in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, tuple):
        items = [show(v, width, indent + 4) for v in value]
        opening, closing = "(", ",)" if len(value) == 1 else ")"
        if len(value) == 1:
            return f"(\n{pad}{items[0]},\n{' ' * indent})"
    else:
        return flat
    return opening + "".join(f"\n{pad}{item}," for item in items) + f"\n{' ' * indent}{closing}"


def parse(text: str, kind: Any, where: str = "value") -> Any:
    """The value that `text` writes, of the declared type `kind`.

    >>> parse("3e-4", float), parse("none", str | None), parse("(1, 2)", tuple[int, ...])
    (0.0003, None, (1, 2))

    Raises: ValueError naming `where`, the text, and what would be accepted.
    """
    words = text.strip()
    if _admits(kind, str) and not (words[:1] in "'\"" and words[-1:] == words[:1] and len(words) > 1):
        if _admits(kind, type(None)) and words.lower() == "none":
            return None
        if not _classes(kind) and not _admits(kind, int) and not _admits(kind, float):
            return words
    if words.lower() in ("true", "false", "none"):
        words = words.capitalize()
    try:
        node = ast.parse(words, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        if _admits(kind, str):
            return words
        raise ValueError(f"{where}: cannot read {text!r} as {_name(kind)}") from None
    if isinstance(node, ast.Name) and _admits(kind, str) and node.id not in {c.__name__ for c in _classes(kind)}:
        return words
    return _build(node, kind, where)


def override(value: Any, changes: dict[str, str]) -> Any:
    """`value` with fields replaced by text: `override(run, {"optim.lr": "3e-4", "model.position": "ALiBi()"})`.

    Raises: ValueError for an unknown path, naming the nearest ones, or for text of the wrong type.
    """
    for path, text in changes.items():
        value = _override(value, path.split("."), text, path, value)
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
    elif isinstance(value, tuple):
        children, found = {str(i): v for i, v in enumerate(value)}, {}
    else:
        return {prefix: value}
    for name, child in children.items():
        found |= leaves(child, f"{prefix}.{name}" if prefix else str(name))
    return found


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """path -> (setting in a, setting in b) where they differ; a setting that one lacks is None there."""
    left, right = leaves(a), leaves(b)
    return {
        path: (left.get(path), right.get(path))
        for path in [*left, *(p for p in right if p not in left)]
        if left.get(path) != right.get(path)
    }


def fields_of(cls: type) -> dict[str, Any]:
    """Name -> declared type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _override(value: Any, path: list[str], text: str, full: str, root: Any) -> Any:
    head, *rest = path
    if dataclasses.is_dataclass(value):
        kinds = fields_of(type(value))
        if head not in kinds:
            _unknown(full, root)
        if not rest:
            return dataclasses.replace(value, **{head: parse(text, kinds[head], full)})
        child = getattr(value, head)
        if not isinstance(child, dict | tuple) and not dataclasses.is_dataclass(child):
            _unknown(full, root)
        return dataclasses.replace(value, **{head: _override(child, rest, text, full, root)})
    if isinstance(value, dict) and head in value:
        new = _override(value[head], rest, text, full, root) if rest else parse(text, type(value[head]), full)
        return value | {head: new}
    if isinstance(value, tuple) and head.isdigit() and int(head) < len(value):
        i = int(head)
        new = _override(value[i], rest, text, full, root) if rest else parse(text, type(value[i]), full)
        return (*value[:i], new, *value[i + 1 :])
    _unknown(full, root)


def _unknown(path: str, root: Any) -> None:
    known = list(leaves(root))
    last = path.split(".")[-1]
    near = [p for p in known if p.split(".")[-1] == last] or difflib.get_close_matches(path, known, n=3, cutoff=0.4)
    near = near or difflib.get_close_matches(last, known, n=3, cutoff=0.3) or known[:5]
    raise ValueError(f"no setting {path!r}; did you mean {' or '.join(near[:3])}?")


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)).replace("typing.", "")


def _options(kind: Any) -> tuple:
    """The members of a union, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _admits(kind: Any, wanted: type) -> bool:
    return wanted in _options(kind)


def _classes(kind: Any) -> list[type]:
    """Every dataclass that a field of this type may hold."""
    found: list[type] = []
    for option in _options(kind):
        if isinstance(option, type) and typing.get_origin(option) is None:
            pending = [option]
            while pending:
                cls = pending.pop()
                pending.extend(cls.__subclasses__())
                if dataclasses.is_dataclass(cls) and cls not in found:
                    found.append(cls)
    return found


def _build(node: ast.expr, kind: Any, where: str) -> Any:
    if isinstance(node, ast.Call | ast.Name):
        return _build_call(node, kind, where)
    problem = None
    for option in _options(kind):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if isinstance(node, ast.Tuple | ast.List) and (option is tuple or origin is tuple):
            if not args:
                args = (Any, ...)
            each = [args[0]] * len(node.elts) if args[-1] is Ellipsis else list(args)
            if len(each) == len(node.elts):
                return tuple(_build(e, k, f"{where}.{i}") for i, (e, k) in enumerate(zip(node.elts, each)))
            problem = f"{where}: expected {len(each)} items, got {len(node.elts)}"
        elif isinstance(node, ast.Dict) and (option is dict or origin is dict):
            inner = args[1] if args else Any
            keys = [_literal(k, where) for k in node.keys]
            return {k: _build(v, inner, f"{where}.{k}") for k, v in zip(keys, node.values)}
    if isinstance(node, ast.Tuple | ast.List | ast.Dict) and kind is not Any:
        raise ValueError(problem or f"{where}: {ast.unparse(node)} is not {_name(kind)}")
    return _scalar(_literal(node, where), kind, where)


def _build_call(node: ast.Call | ast.Name, kind: Any, where: str) -> Any:
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        raise ValueError(f"{where}: {ast.unparse(node)} is not a value; write a class name and its settings")
    candidates = {cls.__name__: cls for cls in _classes(kind)}
    if name.id not in candidates:
        choices = ", ".join(sorted(candidates)) or _name(kind)
        raise ValueError(f"{where}: {ast.unparse(node)!r} is not one of {choices}")
    cls = candidates[name.id]
    if isinstance(node, ast.Name):
        return cls()
    kinds = fields_of(cls)
    given = {}
    for field_name, arg in zip(kinds, node.args):
        given[field_name] = _build(arg, kinds[field_name], f"{where}.{field_name}")
    for keyword in node.keywords:
        if keyword.arg not in kinds:
            raise ValueError(f"{where}: {name.id} has no setting {keyword.arg!r}; it has {', '.join(kinds)}")
        given[keyword.arg] = _build(keyword.value, kinds[keyword.arg], f"{where}.{keyword.arg}")
    return cls(**given)


def _literal(node: ast.expr | None, where: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        raise ValueError(f"{where}: {ast.unparse(node)!r} is not a plain value") from None


def _scalar(found: Any, kind: Any, where: str) -> Any:
    for option in _options(kind):
        if option is Any or (option is type(found)) or (found is None and option is type(None)):
            return found
        origin = typing.get_origin(option)
        if origin is typing.Literal and found in typing.get_args(option):
            return found
    if _admits(kind, float) and isinstance(found, int) and not isinstance(found, bool):
        return float(found)
    if _admits(kind, int) and isinstance(found, float) and found.is_integer():
        return int(found)
    raise ValueError(f"{where}: {found!r} is {type(found).__name__}, expected {_name(kind)}")
