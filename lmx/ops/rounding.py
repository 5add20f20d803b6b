"""Rounding to a grid: w ~ scale (q - zero) with whole numbers q in [-2**(b-1), 2**(b-1) - 1].

symmetric:  scale = 2 max|w| / (2**b - 1),           zero = 0
affine:     scale = (max(w, 0) - min(w, 0)) / (2**b - 1),  zero = round(-min(w, 0) / scale) - 2**(b-1)

Either way what is rounded lies within half a step of where it was; a scale is rounded up, or the largest would lie
beyond the last point of the grid. One grid serves the values of a group, which lie together along the last axis; the
last group may be smaller.
Source: Nagel et al. 2021, arXiv:2106.08295, sections 2.2 and 2.3; the symmetric scale as in Frantar et al. 2023 (GPTQ).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def grid(
    w: Float[Array, "*b n"], bits: int, symmetric: bool, dtype: str = "float32"
) -> tuple[Float[Array, "*b"], Int[Array, "*b"] | None]:
    """(scale, zero) for the values along the last axis: scale rounded up to `dtype`, as float32; zero int8, or None.

    A scale is infinite where `dtype` holds none so large.
    """
    steps = 2**bits - 1
    lo, hi = (jnp.minimum(w.min(-1), 0), jnp.maximum(w.max(-1), 0))
    if symmetric:
        # a little less, or the largest would lie between two points and rounding errors would choose
        scale = 2 * (1 - 2.0**-20) * jnp.maximum(-lo, hi) / steps
    else:
        scale = (hi - lo) / steps
    scale = rounded_up(scale, dtype).astype(jnp.float32)
    scale = jnp.where(scale == 0, 1.0, scale)
    if symmetric:
        return scale, None
    return scale, (jnp.clip(jnp.round(-lo / scale), 0, steps) - 2 ** (bits - 1)).astype(jnp.int8)


SHARES = tuple(1 - i / 50 for i in range(20))
"""Of a group's range, tried by `clipped`."""


def clipped(
    w: Float[Array, "*b n"], bits: int, symmetric: bool, dtype: str = "float32"
) -> tuple[Float[Array, "*b"], Int[Array, "*b"] | None]:
    """As `grid`, of the share of the range with the smallest sum of squares: a few large values lose, the rest gain."""

    def one(best, share):
        scale, zero = grid(w * share, bits, symmetric, dtype)
        off = w - values(codes(w, scale[..., None], _ahead(zero), bits), scale[..., None], _ahead(zero))
        here = ((off**2).sum(-1), scale, zero)
        return jax.tree.map(lambda a, b: jnp.where(here[0] < best[0], a, b), here, best), None

    worst = (jnp.full(w.shape[:-1], jnp.inf), *grid(w, bits, symmetric, dtype))
    (_, scale, zero), _ = jax.lax.scan(one, worst, jnp.asarray(SHARES))
    return scale, zero


def rounded_up(x: Float[Array, "*b"], dtype: str) -> Float[Array, "*b"]:
    """The least number of a float dtype that is not below x; without a gradient, as rounding has none."""
    x = jax.lax.stop_gradient(x)
    near = x.astype(dtype)
    return jnp.where(near.astype(x.dtype) < x, jnp.nextafter(near, jnp.asarray(jnp.inf, dtype)), near)


def codes(
    w: Float[Array, "*b"], scale: Float[Array, "*#b"], zero: Int[Array, "*#b"] | None, bits: int
) -> Array:
    """The nearest whole numbers q, int8."""
    q = jnp.round(w / scale)
    if zero is not None:
        q = q + zero.astype(q.dtype)
    return jnp.clip(q, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(jnp.int8)


def values(
    q: Int[Array, "*b"], scale: Float[Array, "*#b"], zero: Int[Array, "*#b"] | None
) -> Float[Array, "*b"]:
    """What codes stand for, float32."""
    q = q.astype(jnp.float32)
    return scale * (q if zero is None else q - zero.astype(jnp.float32))


def grouped(x: Float[Array, "*b n"], group_size: int) -> Float[Array, "*b groups size"]:
    """The last axis in groups; the last one is filled up with zeros, which widen no grid."""
    short = -x.shape[-1] % group_size
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, group_size)


def spread(of_group: Shaped[Array, "*b groups"], group_size: int, n: int) -> Shaped[Array, "*b n"]:
    """What belongs to a group, for each of its n members."""
    if of_group.shape[-1] == 1:
        return jnp.broadcast_to(of_group, (*of_group.shape[:-1], n))
    return jnp.repeat(of_group, group_size, axis=-1)[..., :n]


def _ahead(zero):
    return None if zero is None else zero[..., None]
