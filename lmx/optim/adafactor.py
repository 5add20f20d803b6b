"""Adafactor: a second moment kept as one row and one column per matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmx import tree, values
from lmx.optim.base import Update


@dataclass(frozen=True)
class Adafactor(Update):
    """With G the gradient, V the running mean of G**2 + 1e-30 at rate b_t = 1 - t**-b2_power (t from 1):

        u = G / sqrt(V),    direction = u / max(1, rms(u) / max_rms) * max(min_scale, rms(p))

    A leaf that fits `matrix` keeps V as outer(row, col) / mean(row), row and col being means of G**2 over its
    last two axes; other leaves keep V whole. Each rms runs over one matrix, or over the last axis of other
    leaves, so that layers stacked on a leading axis do exactly what they would do apart (optax factors the
    two largest axes and takes one rms per stack). No first moment.
    Args:
      lr: relative to the size of the parameters (rms) if `relative`, absolute if not.
      matrix: pattern of the paths whose last two axes are [d_in, d_out].
      max_rms: the largest root mean square of u, the paper's d.
      min_scale: the least size that a parameter is taken to have, the paper's epsilon_2.
    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 to 6 and the values of section 9; the
      learning rate is the schedule's instead of min(0.01, 1 / sqrt(t)).
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    matrix: str = "*/w|*/w/*|embed|embed/*|head|head/*"
    b2_power: float = 0.8
    max_rms: float = 1.0
    relative: bool = True
    min_scale: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        values.check(self, b2_power="[0, inf)", max_rms="(0, inf]", min_scale="[0, inf)")

    def direction(self, params: Any) -> optax.GradientTransformation:
        def init(params):
            square = jax.tree_util.tree_map_with_path(self._zeros, params)
            return AdafactorState(jnp.zeros((), jnp.int32), square)

        def update(grads, state, params=None):
            if params is None:
                raise ValueError(
                    "Adafactor: update needs the parameters; call tx.update(grads, opt_state, params)"
                )
            count = state.count + 1
            rate = 1.0 - count.astype(jnp.float32) ** -self.b2_power
            leaves, form = jax.tree_util.tree_flatten_with_path(grads)
            squares, params = form.flatten_up_to(state.square), form.flatten_up_to(params)
            done = [self._leaf(*leaf, v, p, rate) for leaf, v, p in zip(leaves, squares, params, strict=True)]
            direction, square = (form.unflatten(part) for part in zip(*done, strict=True))
            return direction, AdafactorState(count, square)

        return optax.GradientTransformation(init, update)

    def _zeros(self, keys, p):
        if not self._is_matrix(keys, p):
            return jnp.zeros_like(p)
        return Factors(jnp.zeros(p.shape[:-1], p.dtype), jnp.zeros((*p.shape[:-2], p.shape[-1]), p.dtype))

    def _leaf(self, keys, g, v, p, rate):
        square = g * g + 1e-30
        if isinstance(v, Factors):
            axes = (-2, -1)
            row = _mix(v.row, square.mean(-1), rate)
            col = _mix(v.col, square.mean(-2), rate)
            v = Factors(row, col)
            u = (
                g
                * jax.lax.rsqrt(row / row.mean(-1, keepdims=True))[..., None]
                * jax.lax.rsqrt(col)[..., None, :]
            )
        else:
            axes = (-1,) if g.ndim else ()
            v = _mix(v, square, rate)
            u = g * jax.lax.rsqrt(v)
        u = u / jnp.maximum(1.0, _rms(u, axes) / self.max_rms)
        if self.relative:
            u = u * jnp.maximum(self.min_scale, _rms(p, axes))
        return u, v

    def _is_matrix(self, keys, p):
        return p.ndim >= 2 and tree.matches(tree.path_str(keys), self.matrix)


class Factors(NamedTuple):
    """row [..., d_in] and col [..., d_out]: means of the squared gradient over one of the last two axes."""

    row: jax.Array
    col: jax.Array


class AdafactorState(NamedTuple):
    """count: updates so far, int32. square: a tree like the parameters, with `Factors` for matrices."""

    count: jax.Array
    square: Any


def _mix(old, new, rate):
    return rate * old + (1.0 - rate) * new


def _rms(x, axes):
    return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))
