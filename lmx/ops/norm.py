"""Normalisations over the last axis.

    rms_norm(x)   = scale * x / sqrt(mean(x^2) + eps)
    layer_norm(x) = scale * (x - mean(x)) / sqrt(var(x) + eps) + bias

Sums are float32 whatever comes in; the result has the dtype of `x`. Axis D is d_model or head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.ops.barrier import once


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*A D"], scale: Float[Array, D], eps: float = 1e-6) -> Float[Array, "*A D"]:
    """x over its root mean square, times `scale`.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4; eps inside the root, as in Llama.
    """
    return _rms_forward(x, scale, eps)[0]


def _rms_forward(x, scale, eps):
    wide = x.astype(jnp.float32)
    r = once(jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps))
    return (wide * r * _row(scale, x.ndim)).astype(x.dtype), (x, scale, r)


def _rms_backward(eps, saved, g):
    x, scale, r = saved
    g = g.astype(jnp.float32)
    unit = x.astype(jnp.float32) * r
    e = g * _row(scale, x.ndim)
    dx = r * (e - unit * once(jnp.mean(e * unit, -1, keepdims=True)))
    return dx.astype(x.dtype), _sum_rows(g * unit).astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


def layer_norm(
    x: Float[Array, "*A D"], scale: Float[Array, D], bias: Float[Array, D] | None = None, eps: float = 1e-5
) -> Float[Array, "*A D"]:
    """x shifted to mean 0 and divided by its standard deviation, times `scale`, plus `bias` where given.

    Source: Ba et al. 2016, arXiv:1607.06450, equation 4; the variance is the biased one, as in every library.
    """
    y = _layer_norm(x, scale, eps)
    return y if bias is None else y + _row(bias, x.ndim).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _layer_norm(x, scale, eps):
    return _layer_forward(x, scale, eps)[0]


def _layer_forward(x, scale, eps):
    wide = x.astype(jnp.float32)
    mean = once(jnp.mean(wide, -1, keepdims=True))
    centred = wide - mean
    r = once(jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps))
    return (centred * r * _row(scale, x.ndim)).astype(x.dtype), (x, scale, mean, r)


def _layer_backward(eps, saved, g):
    x, scale, mean, r = saved
    g = g.astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * r
    e = g * _row(scale, x.ndim)
    along, level = once((jnp.mean(e * unit, -1, keepdims=True), jnp.mean(e, -1, keepdims=True)))
    dx = r * (e - level - unit * along)
    return dx.astype(x.dtype), _sum_rows(g * unit).astype(scale.dtype)


_layer_norm.defvjp(_layer_forward, _layer_backward)


def _row(w: Float[Array, D], ndim: int) -> Float[Array, ...]:
    return w.astype(jnp.float32).reshape((1,) * (ndim - 1) + w.shape)


def _sum_rows(x: Float[Array, "*A D"]) -> Float[Array, D]:
    return x.reshape(-1, x.shape[-1]).sum(0)
