"""The structure of a parameter tree as JSON, without its arrays: which leaves stand where, and their settings.

described = describe(params)                       {"blocks": {"attn": {"q": {"w": {"weight": "Quantized", ...
rebuild(described, arrays.__getitem__)             the same tree, with the array of each path
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from lmx.weights.base import Transposed
from lmx.weights.fake import Fake
from lmx.weights.low_rank import Bank, Dora, LowRank, Vera
from lmx.weights.masked import Masked
from lmx.weights.quantized import Quantized
from lmx.weights.rotated import Rotated
from lmx.weights.scaled import Scaled

KINDS = {
    kind.__name__: kind
    for kind in (Bank, Dora, Fake, LowRank, Masked, Quantized, Rotated, Scaled, Transposed, Vera)
}


def describe(tree: Any) -> Any:
    """Raises: TypeError for a node that is neither a dict, a tuple nor one of KINDS."""
    if tree is None or hasattr(tree, "dtype"):
        return tree is not None
    if isinstance(tree, dict):
        return {name: describe(x) for name, x in tree.items()}
    if isinstance(tree, tuple | list):
        return [describe(x) for x in tree]
    if type(tree).__name__ not in KINDS:
        raise TypeError(f"{type(tree).__name__} is none of the leaves that can be saved: {', '.join(KINDS)}")
    found: dict[str, Any] = {"weight": type(tree).__name__, "settings": {}, "arrays": {}}
    for part in fields(tree):
        value = getattr(tree, part.name)
        if part.metadata.get("static"):
            found["settings"][part.name] = value
        else:
            found["arrays"][part.name] = describe(value)
    return found


def rebuild(described: Any, array: Callable[[str], Any], where: str = "") -> Any:
    """The tree, whose arrays are those that `array` has for their paths.

    Raises: ValueError for what `describe` does not write; what `array` raises for a path it does not know.
    """

    def inside(name, x):
        return rebuild(x, array, f"{where}/{name}" if where else str(name))

    if isinstance(described, bool):
        return array(where) if described else None
    if isinstance(described, list):
        return tuple(inside(i, x) for i, x in enumerate(described))
    if not isinstance(described, dict):
        raise ValueError(f"{where or 'parameters'}: {described!r:.99} describes no part of a model")
    if "weight" not in described or isinstance(described["weight"], dict | bool):
        return {name: inside(name, x) for name, x in described.items()}
    kind = KINDS.get(str(described["weight"]))
    settings, arrays = described.get("settings"), described.get("arrays")
    if kind is None or not isinstance(settings, dict) or not isinstance(arrays, dict):
        raise ValueError(f"{where}: {described['weight']!r:.99} is none of {', '.join(KINDS)}")
    static = {part.name for part in fields(kind) if part.metadata.get("static")}
    if set(settings) - static or set(arrays) | static != {part.name for part in fields(kind)}:
        raise ValueError(f"{where}: {[*settings, *arrays]} are not the fields of {kind.__name__}")
    settings = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
    return kind(**settings, **{name: inside(name, x) for name, x in arrays.items()})
