"""The one verb of a matrix, `linear`, for arrays and for every other representation of a matrix.

A matrix is stored [d_in, d_out]; a stack of layers leads with [L, ...] in every field of a leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.ops.matmul import matmul, matmul_transposed

Part = Any
"""A field of a `leaf`: an array or a weight, or what stands for it in a tree of specs, shardings or gradients."""


class Weight:
    """A matrix [d_in, d_out] in another representation than a plain array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix it stands for, a leading [L] included."""
        raise TypeError(f"{type(self).__name__} does not say its shape")

    def linear(self, x: Float[Array, "*B d_in"], dtype: str | None = None) -> Float[Array, "*B d_out"]:
        """x times the matrix, computed in the dtype of x; the result has `dtype`, None meaning that of x."""
        return matmul(x, self.dense(), dtype)

    def linear_transposed(
        self, x: Float[Array, "*B d_out"], dtype: str | None = None
    ) -> Float[Array, "*B d_in"]:
        """x times the transpose of the matrix, as `linear`."""
        return matmul_transposed(x, self.dense(), dtype)

    def lookup(self, ids: Int[Array, "*B"]) -> Float[Array, "*B d_out"]:
        """Rows of the matrix, float32."""
        return self.dense()[ids]

    def columns(self, ids: Int[Array, "*B"]) -> Float[Array, "*B d_in"]:
        """Columns of the matrix, each as a row, float32."""
        return jnp.swapaxes(self.dense(), -1, -2)[ids]

    def dense(self) -> Float[Array, "*L d_in d_out"]:
        """The matrix as a plain float32 array."""
        raise TypeError(f"{type(self).__name__} cannot be made dense")


@dataclass_transform(frozen_default=True)
def leaf(cls: type) -> type:
    """A frozen dataclass as a pytree node: fields are arrays, except those marked `static()`."""
    cls = dataclass(frozen=True)(cls)
    data = [f.name for f in fields(cls) if not f.metadata.get("static")]
    meta = [f.name for f in fields(cls) if f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, data, meta)


def static(**options):
    """A field of a `leaf` that is part of the program, not an array."""
    return field(metadata={"static": True}, **options)


def over(*axes: str | None, **options):
    """A field of a `leaf` whose last axes run "in" over the inputs of the matrix, "out" over its outputs, or None
    over neither: a mesh splits them as it splits the matrix. A field that is a weight itself has no axes."""
    return field(metadata={"axes": axes}, **options)


def axes_of(w: Weight, f: Callable[[Any, tuple], Any], turned: bool = False) -> Weight:
    """The weight with f(array, axes) for each of its arrays, axes as `over` gives them, of the matrix in the tree."""
    found = {}
    for part in fields(w):
        x = getattr(w, part.name)
        if part.metadata.get("static") or x is None:
            continue
        if isinstance(x, Weight):
            found[part.name] = axes_of(x, f, turned != isinstance(w, Transposed))
        else:
            axes = part.metadata.get("axes", ("out", "in") if isinstance(w, Transposed) else ("in", "out"))
            other = {"in": "out", "out": "in", None: None}
            found[part.name] = f(x, tuple(other[a] for a in axes) if turned else axes)
    return replace(w, **found)


class OnBase(Weight):
    """A weight that stands on another, its `base`, of the same shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.base)


@leaf
class Transposed(Weight):
    """The transpose of `base` [d_out, d_in]: a head [D, V] that shares the embedding [V, D]."""

    base: Part

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, d_out, d_in = shape_of(self.base)
        return (*lead, d_in, d_out)

    def linear(self, x, dtype=None):
        return linear_transposed(x, self.base, dtype)

    def linear_transposed(self, x, dtype=None):
        return linear(x, self.base, dtype)

    def lookup(self, ids):
        if isinstance(self.base, Weight):
            return self.base.columns(ids)
        return jnp.moveaxis(self.base[:, ids], 0, -1)

    def columns(self, ids):
        return lookup(self.base, ids)

    def dense(self):
        return jnp.swapaxes(dense(self.base), -1, -2)


def is_matrix(path: str) -> bool:
    """Whether a parameter's path is that of a matrix, which may be a `Weight`."""
    return path.split("/")[-1] in ("w", "embed", "head")


def linear(
    x: Float[Array, "*B d_in"], w: Array | Weight, dtype: str | None = None
) -> Float[Array, "*B d_out"]:
    """x @ w, computed in the dtype of x and accumulated in float32.

    dtype: of the result; None means that of x. Logits ask for "float32" and are never rounded to less.
    """
    return w.linear(x, dtype) if isinstance(w, Weight) else matmul(x, w, dtype)


def linear_transposed(
    x: Float[Array, "*B d_out"], w: Array | Weight, dtype: str | None = None
) -> Float[Array, "*B d_in"]:
    """x @ w^T, computed as `linear`."""
    return w.linear_transposed(x, dtype) if isinstance(w, Weight) else matmul_transposed(x, w, dtype)


def lookup(w: Array | Weight, ids: Int[Array, "*B"]) -> Float[Array, "*B d_out"]:
    """Rows of an embedding [V, D], float32; ids must lie in [0, V)."""
    return w.lookup(ids) if isinstance(w, Weight) else w[ids].astype(jnp.float32)


def dense(w: Array | Weight) -> Array:
    """The matrix as a plain float32 array."""
    return w.dense() if isinstance(w, Weight) else w.astype(jnp.float32)


def shape_of(w: Part) -> tuple[int, ...]:
    return tuple(w.shape)
