"""Pytrees of parameters, addressed by path: `blocks/attn/q/w`, and chosen by pattern: `blocks/*/w|head/*`."""

from __future__ import annotations

import difflib
import fnmatch
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def path_str(keys: tuple) -> str:
    """The path of a leaf as jax gives it, joined by slashes."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern of shell wildcards; `a|b` means either, and `*` crosses slashes.

    >>> matches("blocks/attn/q/w", "blocks/*/w"), matches("norm/scale", "embed/*|norm/*")
    (True, True)
    """
    return any(fnmatch.fnmatchcase(path, part) for part in pattern.split("|"))


def paths(tree: Tree) -> list[str]:
    return [path_str(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def nodes(tree: Tree, kind: type | tuple = ()) -> dict[str, Any]:
    """path -> leaf, where what is of this kind is a leaf as a whole."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kind))
    return {path_str(keys): x for keys, x in found}


def partition(tree: Tree, pattern: str) -> tuple[Tree, Tree]:
    """(selected, rest): two trees of the same shape with None where the other holds the leaf.

    Raises: ValueError if the pattern selects nothing; it lists the paths nearest to it.
    """
    check_pattern(tree, pattern)

    def keep(wanted: bool) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda keys, x: x if matches(path_str(keys), pattern) == wanted else None, tree
        )

    return keep(True), keep(False)


def combine(a: Tree, b: Tree) -> Tree:
    """Undoes `partition`: each leaf from the tree that has it."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def depth(blocks: Tree) -> int:
    """The number of layers, in a stack whose arrays lead with [L, ...] or in a tuple of layers."""
    return len(blocks) if isinstance(blocks, tuple) else len(jax.tree.leaves(blocks)[0])


def layer(blocks: Tree, i: int) -> Tree:
    """One layer of a stack or a tuple."""
    return blocks[i] if isinstance(blocks, tuple) else jax.tree.map(lambda x: x[i], blocks)


def stack(layers: Sequence[Tree]) -> Tree:
    """Layers of one structure as a stack, whose arrays lead with [L, ...]."""
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def map_at(fn: Callable[[str, Any], Any], tree: Tree, pattern: str, is_leaf: Callable | None = None) -> Tree:
    """fn(path, leaf) where the path fits the pattern; other leaves as they are."""

    def change(keys, x):
        path = path_str(keys)
        return fn(path, x) if matches(path, pattern) else x

    return jax.tree_util.tree_map_with_path(change, tree, is_leaf=is_leaf)


def check_pattern(tree: Tree, pattern: str) -> None:
    """Raises ValueError if no path fits the pattern."""
    known = paths(tree)
    if not any(matches(path, pattern) for path in known):
        near = difflib.get_close_matches(pattern.replace("*", ""), known, n=4, cutoff=0.2) or known[:4]
        raise ValueError(f"pattern {pattern!r} fits no parameter; paths near it: {', '.join(near)}")


def key_at(key: jax.Array, path: str) -> jax.Array:
    """The random key of one path: the same in every process (crc32, not Python's salted hash)."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def count(tree: Tree) -> int:
    """Number of values in all leaves."""
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves, of arrays or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
