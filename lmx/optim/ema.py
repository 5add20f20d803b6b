"""A moving average of the parameters, kept inside the optimizer's state."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class EmaState(NamedTuple):
    """count: updates so far, int32. ema_params: their average, a tree like the parameters."""

    count: jax.Array
    ema_params: Any


def ema(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are and averages the parameters that they lead to. Last in a chain.

    With decay d and parameters p_1 .. p_t after each update, the mean is the bias-corrected one,
    (1 - d) / (1 - d**t) * sum of d**(t - i) * p_i, in its running form

        mean_t = mean_{t-1} + (1 - d) / (1 - d**t) * (p_t - mean_{t-1})

    so mean_1 = p_1: the initial parameters have no share in it. Before the first update it holds a copy of
    them.
    Raises: ValueError for a decay outside [0, 1).
    Source: Kingma & Ba 2015, arXiv:1412.6980, section 7.2 (temporal averaging with the bias correction).
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema={decay} is not in [0, 1); usual are 0.999 and 0.9999, None is off")

    def init(params):
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.array(p, copy=True), params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("ema: update needs the parameters; call tx.update(grads, opt_state, params)")
        count = state.count + 1
        share = _share(decay, count)
        mean = jax.tree.map(
            lambda m, p, u: m + share.astype(m.dtype) * (p + u - m), state.ema_params, params, updates
        )
        return updates, EmaState(count, mean)

    return optax.GradientTransformation(init, update)


def ema_params(opt_state: Any) -> Any | None:
    """The averaged parameters inside any optimizer state; None if it keeps none.

    Raises: ValueError if it keeps several.
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_ema) if _is_ema(x)]
    if len(found) > 1:
        raise ValueError(
            f"ema_params: the optimizer state holds {len(found)} averages; keep ema on the outermost Update"
        )
    return found[0].ema_params if found else None


def _is_ema(x):
    return isinstance(x, EmaState)


def _share(decay, count):
    """(1 - d) / (1 - d**t), through expm1 as d**t nears 1."""
    if decay == 0.0:
        return jnp.ones((), jnp.float32)
    return (1.0 - decay) / -jnp.expm1(count.astype(jnp.float32) * math.log(decay))
