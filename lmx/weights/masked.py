"""A matrix with some of its numbers held at zero: pruning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmx.ops.matmul import matmul
from lmx.weights.base import OnBase, Part, dense, leaf, over


@leaf
class Masked(OnBase):
    """mask: True where a number is kept; what is not kept gets no gradient either."""

    base: Part
    mask: Part = over("in", "out")

    def linear(self, x, dtype=None):
        return jax.checkpoint(lambda x, w: matmul(x, w.dense(), dtype))(x, self)

    def dense(self):
        return jnp.where(self.mask, dense(self.base), 0.0)
