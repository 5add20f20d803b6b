"""Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmx.optim.base import Update


@dataclass(frozen=True)
class AdamW(Update):
    """direction = m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps), m and v running means of g and g**2.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; b2 = 0.95 as in Brown et al. 2020
      (GPT-3), arXiv:2005.14165, appendix B.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def direction(self, params: Any) -> optax.GradientTransformation:
        return adam(self.b1, self.b2, self.eps)


class AdamState(NamedTuple):
    """count: updates so far, int32. mean, square: trees like the parameters."""

    count: jax.Array
    mean: Any
    square: Any


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction. Own code, as `optax.scale_by_adam` does not trace under strict dtype promotion."""

    def init(params):
        return AdamState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(jnp.zeros_like, params),
        )

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        t = count.astype(jnp.float32)
        to_mean = 1.0 / (1.0 - b1**t)
        to_square = 1.0 / (1.0 - b2**t)
        mean = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * g * g, state.square, grads)
        direction = jax.tree.map(lambda m, v: m * to_mean / (jnp.sqrt(v * to_square) + eps), mean, square)
        return direction, AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)
