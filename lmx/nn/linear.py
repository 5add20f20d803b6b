"""y = x W + b, where W is whatever the parameter tree holds at this place."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lmx.ops.dot import gram
from lmx.ops.matmul import PRODUCT
from lmx.weights import Weight, linear, shape_of


def weight(module: nn.Module, name: str, init, shape: tuple[int, ...]) -> Array | Weight:
    """The only way a module reads a matrix: a new float32 array at init, later any `Weight` of that shape.

    Raises: ValueError if the tree holds a matrix of another shape.
    """
    if module.is_initializing() or not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    w = module.get_variable("params", name)
    if shape_of(w) != tuple(shape):
        where = "/".join((*module.path, name))
        raise ValueError(f"{where} has shape {shape_of(w)}, this model wants {tuple(shape)}")
    return w


class Inputs(NamedTuple):
    """What a matrix was multiplied by: the sum of x x^T, the largest |x| of each input, and their number, float32.

    Of the matrices of experts each field leads with [E].
    """

    gram: Float[Array, "*E d_in d_in"]
    largest: Float[Array, "*E d_in"]
    n: Float[Array, "*E"]


KEPT = ("hidden", "queries", "keys", "values")
"""What every layer can say of itself: its output [B, T, D], and its heads [B, T, N, H], [B, T, K, H] twice, before they
are turned by position. Each is a collection, and kept only where that is mutable."""


def keep(module: nn.Module, name: str, x: Array) -> None:
    """Says x of a layer where the collection of this name, one of KEPT, is asked for."""
    if module.is_mutable_collection(name) and not module.is_initializing():
        module.put_variable(name, name, x)


class Linear(nn.Module):
    """x [..., d_in] -> [..., d_out]; `w` [d_in, d_out] is drawn from N(0, std^2), `b` starts at 0.

    Where the collection `stats` is mutable, it says there what its inputs are like, as `Inputs`.
    """

    d_out: int
    std: float
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b d_in"]) -> Float[Array, "*b d_out"]:
        w = weight(self, "w", nn.initializers.normal(self.std), (x.shape[-1], self.d_out))
        if self.is_mutable_collection("stats") and not self.is_initializing():
            self.put_variable("stats", "w", _inputs(x))
        y = checkpoint_name(linear(x, w), PRODUCT)
        if self.bias:
            b = self.param("b", nn.initializers.zeros, (self.d_out,), jnp.float32)
            y = y + jnp.broadcast_to(b.astype(y.dtype), y.shape)
        return y


def _inputs(x: Float[Array, "*b d_in"]) -> Inputs:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    n = jnp.full((), rows.shape[0], jnp.float32)
    return Inputs(gram(rows, rows), jnp.abs(rows).max(0), n)
