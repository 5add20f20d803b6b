"""Activations of the feed-forward layer, plain and gated.

    gelu(x) = x * P(Z <= x)        silu(x) = x * sigmoid(x)        relu_squared(x) = max(x, 0)^2
    swiglu(gate, up) = silu(gate) * up                             geglu(gate, up) = gelu(gate) * up

Each computes its slope together with its value and keeps it for the backward pass, which is then one product.
Inner arithmetic is float32; the result, and the slope that is kept, have the dtype of the input. Axes: any.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.ops.barrier import once


def gelu(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """GELU by its tanh approximation, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2; GPT-2 and HF's `gelu_new` use this form.
    """
    return _gelu(x)


def gelu_exact(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """GELU itself, 0.5 x (1 + erf(x / sqrt 2)); HF's `gelu`. Source: arXiv:1606.08415, section 2."""
    return _gelu_exact(x)


def silu(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """x sigmoid(x). Source: Elfwing et al. 2017, arXiv:1702.03118, equation 5; also called swish."""
    return _silu(x)


def relu_squared(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """max(x, 0)^2. Source: So et al. 2021 (Primer), arXiv:2109.08668, section 4.1."""
    return _relu_squared(x)


def swiglu(gate: Float[Array, "*A"], up: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """silu(gate) * up. Source: Shazeer 2020, arXiv:2002.05202, section 2; biases are left out."""
    return _swiglu(gate, up)


def geglu(gate: Float[Array, "*A"], up: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """gelu(gate) * up with the tanh form, as in Gemma. Source: Shazeer 2020, arXiv:2002.05202, section 2."""
    return _geglu(gate, up)


def _gelu_with_slope(x):
    inner = math.sqrt(2 / math.pi)
    t = jnp.tanh(inner * (x + 0.044715 * x * x * x))
    half = 0.5 * (1 + t)
    return x * half, half + 0.5 * x * (1 - t * t) * inner * (1 + 3 * 0.044715 * x * x)


def _gelu_exact_with_slope(x):
    half = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    return x * half, half + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _silu_with_slope(x):
    s = jax.nn.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _relu_squared_with_slope(x):
    r = jnp.maximum(x, 0)
    return r * r, 2 * r


def _plain(with_slope: Callable) -> Callable:
    """The function alone, whose gradient is the kept slope times the incoming one."""

    @jax.custom_vjp
    def f(x):
        return forward(x)[0]

    def forward(x):
        y, slope = with_slope(x.astype(jnp.float32))
        return once((y.astype(x.dtype), slope.astype(x.dtype)))

    def backward(slope, g):
        return (g * slope,)

    f.defvjp(forward, backward)
    return f


def _gated(with_slope: Callable) -> Callable:
    """f(gate) * up, with both gradients written once for the two matrix products that read each."""

    @jax.custom_vjp
    def f(gate, up):
        return (with_slope(gate.astype(jnp.float32))[0] * up.astype(jnp.float32)).astype(up.dtype)

    def forward(gate, up):
        return once(f(gate, up)), (gate, up)

    def backward(saved, g):
        gate, up = saved
        y, slope = with_slope(gate.astype(jnp.float32))
        g = g.astype(jnp.float32)
        dgate = g * up.astype(jnp.float32) * slope
        return once((dgate.astype(gate.dtype), (g * y).astype(up.dtype)))

    f.defvjp(forward, backward)
    return f


_gelu = _plain(_gelu_with_slope)
_gelu_exact = _plain(_gelu_exact_with_slope)
_silu = _plain(_silu_with_slope)
_relu_squared = _plain(_relu_squared_with_slope)
_swiglu = _gated(_silu_with_slope)
_geglu = _gated(_gelu_with_slope)
