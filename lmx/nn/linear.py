"""y = x W + b, where W is whatever the parameter tree holds at this place."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

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


class Linear(nn.Module):
    """x [..., d_in] -> [..., d_out]; `w` [d_in, d_out] is drawn from N(0, std^2), `b` starts at 0."""

    d_out: int
    std: float
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b d_in"]) -> Float[Array, "*b d_out"]:
        w = weight(self, "w", nn.initializers.normal(self.std), (x.shape[-1], self.d_out))
        y = checkpoint_name(linear(x, w), PRODUCT)
        if self.bias:
            b = self.param("b", nn.initializers.zeros, (self.d_out,), jnp.float32)
            y = y + jnp.broadcast_to(b.astype(y.dtype), y.shape)
        return y
