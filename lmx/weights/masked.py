"""A matrix with some of its numbers held at zero: pruning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmx.ops.matmul import matmul
from lmx.weights.base import Part, Weight, dense, leaf, over, shape_of


@leaf
class Masked(Weight):
    """mask: True where a number is kept; what is not kept gets no gradient either."""

    base: Part
    mask: Part = over("in", "out")

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.base)

    def linear(self, x, dtype=None):
        return jax.checkpoint(lambda x, w: matmul(x, w.dense(), dtype))(x, self)

    def dense(self):
        return jnp.where(self.mask, dense(self.base), 0.0)
