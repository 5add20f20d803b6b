"""The matrices of a parameter tree, chosen by pattern: what every surgery on weights maps over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lmx import tree
from lmx.weights import Transposed, Weight, is_matrix
from lmx.weights.base import OnBase

LAYERS = "blocks/*attn/*|blocks/*mlp/[!r]*"
"""All matrices of the layers, but for the routers of experts."""
EVERY = LAYERS + "|embed|head"


def change(params: Any, where: str, f: Callable[[str, Any], Any]) -> Any:
    """f(path, matrix) for each matrix whose path fits: an array [.., d_in, d_out] or a `Weight`; others as they are.

    The embedding [V, D] is handed to f as the matrix [D, V] that a tied head multiplies by.
    Raises: ValueError if no matrix fits, with the paths of those there are.
    """
    check(params, where)

    def one(path, w):
        if not is_matrix(path) or w is None:
            return w
        return turned(path, f(path, turned(path, w)))

    return tree.map_at(one, params, where, is_leaf=lambda w: isinstance(w, Weight))


def found(params: Any, where: str = "*") -> dict[str, Any]:
    """path -> matrix of those whose paths fit."""
    nodes = tree.nodes(params, Weight)
    return {path: w for path, w in nodes.items() if is_matrix(path) and tree.matches(path, where)}


def check(params: Any, where: str) -> None:
    """Raises: ValueError if the pattern fits no matrix, with the paths of those there are."""
    if not found(params, where):
        raise ValueError(f"pattern {where!r} fits no matrix; there are {', '.join(found(params))}")


def within(w: Any, kind: type | tuple, f: Callable[[Any], Any]) -> Any:
    """w with f of what is of this kind in it, be it below a mask or an adapter; of one on another, of the upper one."""
    if isinstance(w, kind):
        return f(w)
    return replace(w, base=within(w.base, kind, f)) if isinstance(w, OnBase) else w


def turned(path: str, w: Any) -> Any:
    """What lies at a path as `change` hands it, and back again: the embedding transposed, all else as it is."""
    if path != "embed":
        return w
    if isinstance(w, Transposed):
        return w.base
    return Transposed(w) if isinstance(w, Weight) else jnp.swapaxes(w, -1, -2)
