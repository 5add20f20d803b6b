"""Directions that treat every parameter alone: AdamW, Lion, SGD. g is the gradient, t counts from 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmx import values
from lmx.optim.base import Update


@dataclass(frozen=True)
class AdamW(Update):
    """direction = m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps), with

    m <- b1 * m + (1 - b1) * g and v <- b2 * v + (1 - b2) * g**2 from 0. State: two trees like the parameters.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; b2 = 0.95 as in Brown et al. 2020
      (GPT-3), arXiv:2005.14165, appendix B.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        values.check(self, b1="[0, 1)", b2="[0, 1)", eps="[0, inf)")

    def direction(self, params: Any) -> optax.GradientTransformation:
        return adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class Lion(Update):
    """direction = sign(b1 * m + (1 - b1) * g), then m <- b2 * m + (1 - b2) * g from 0. State: one tree.

    Every entry moves by lr, so lr is a third to a tenth of AdamW's and weight_decay as many times larger.
    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2 and section 5 (language models: b1 0.95, b2 0.98).
    """

    lr: float = 1e-4
    weight_decay: float = 1.0
    b1: float = 0.95
    b2: float = 0.98

    def __post_init__(self):
        super().__post_init__()
        values.check(self, b1="[0, 1)", b2="(0, 1)")

    def direction(self, params: Any) -> optax.GradientTransformation:
        return lion(self.b1, self.b2)


@dataclass(frozen=True)
class Sgd(Update):
    """m <- momentum * m + g from 0; direction = m, or g + momentum * m with `nesterov`.

    momentum=0 is plain gradient descent and keeps no state. Weight decay is decoupled here too, and off.
    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning",
      section 2, in the form of PyTorch, where the learning rate stays out of m.
    """

    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self):
        super().__post_init__()
        values.check(self, momentum="[0, 1)")

    def direction(self, params: Any) -> optax.GradientTransformation:
        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()


class AdamState(NamedTuple):
    """count: updates so far, int32. mean, square: trees like the parameters."""

    count: jax.Array
    mean: Any
    square: Any


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction. Own code, as `optax.scale_by_adam` does not trace under strict dtype promotion."""

    def init(params):
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamState(jnp.zeros((), jnp.int32), mean, square)

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


class LionState(NamedTuple):
    """mean: a tree like the parameters."""

    mean: Any


def lion(b1: float, b2: float) -> optax.GradientTransformation:
    """Lion's direction, from the new m: b1 * m_old + (1 - b1) * g = c * m_new + (1 - c) * g with c = b1 / b2.

    `optax.scale_by_lion` reads the old m beside the new one, for which XLA keeps a copy of all of it.
    """

    def init(params):
        return LionState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        c = b1 / b2
        mean = jax.tree.map(lambda m, g: b2 * m + (1.0 - b2) * g, state.mean, grads)
        direction = jax.tree.map(lambda m, g: jnp.sign(c * m + (1.0 - c) * g), mean, grads)
        return direction, LionState(mean)

    return optax.GradientTransformation(init, update)
