"""Norms against float64 numpy, and their gradients against autodiff of the plain form and closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.ops.norm import layer_norm, rms_norm

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
SHAPES = [(7,), (5, 8), (2, 3, 16), (2, 3, 4, 6)]


def draw(seed, *shape, dtype="float32", size=1.0, level=0.0):
    values = level + size * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, dtype)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def close(got, expected, dtype, terms=1):
    """|error| <= 16 eps of the dtype, times the largest value, times the square root of the terms summed."""
    bound = 16 * EPS[dtype] * max(np.abs(expected).max(), 1e-30) * terms**0.5
    assert np.abs(wide(got) - expected).max() <= bound


def gradient_of_rms(x, w, g, eps):
    """dx and dscale in float64, by the quotient rule."""
    D = x.shape[-1]
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    dx = g * w / rms - x * (g * w * x).sum(-1, keepdims=True) / (D * rms**3)
    return dx, (g * x / rms).reshape(-1, D).sum(0)


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_gradient_equal_float64(shape, dtype):
    x, g, w = draw(0, *shape, dtype=dtype), draw(1, *shape, dtype=dtype), draw(2, shape[-1])
    y, pull = jax.vjp(lambda x, w: rms_norm(x, w, 1e-5), x, w)
    dx, dw = pull(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    X, G, W = wide(x), wide(g), wide(w)
    close(y, W * X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5), dtype)
    expected_dx, expected_dw = gradient_of_rms(X, W, G, 1e-5)
    close(dx, expected_dx, dtype)
    close(dw, expected_dw, "float32", terms=x.size)


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_and_gradient_equal_float64(shape, dtype):
    x, g = draw(0, *shape, dtype=dtype, level=2.0), draw(1, *shape, dtype=dtype)
    w, b = draw(2, shape[-1]), draw(3, shape[-1])
    y, pull = jax.vjp(lambda *args: layer_norm(*args, 1e-5), x, w, b)
    dx, dw, db = pull(g)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (x.dtype, x.dtype, w.dtype, b.dtype)
    X, G, W = wide(x), wide(g), wide(w)
    centred = X - X.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    close(y, W * unit + wide(b), dtype)
    # shifting x changes nothing, so dx is the gradient of rms_norm at the centred x, centred
    expected_dx, expected_dw = gradient_of_rms(centred, W, G, 1e-5)
    close(dx, expected_dx - expected_dx.mean(-1, keepdims=True), dtype)
    close(dw, expected_dw, "float32", terms=x.size)
    close(db, G.reshape(-1, shape[-1]).sum(0), dtype, terms=x.size)
    np.testing.assert_array_equal(layer_norm(x, w), layer_norm(x, w, jnp.zeros_like(b)))


def plain_rms(x, w):
    return w[None] * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def plain_layer(x, w):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return w[None] * centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("custom, plain", [(rms_norm, plain_rms), (layer_norm, plain_layer)])
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_gradients_equal_autodiff_of_the_plain_form(custom, plain, seed, size):
    x, g, w = draw(seed, 5, 8, size=size), draw(seed + 1, 5, 8), draw(seed + 2, 8)
    got, expected = (jax.vjp(f, x, w)[1](g) for f in (custom, plain))
    for a, b in zip(got, expected):
        close(a, wide(b), "float32", terms=40)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_zeros_have_finite_gradients(norm):
    x, w = jnp.zeros((2, 8)), jnp.ones(8)
    y, pull = jax.vjp(norm, x, w)
    assert np.array_equal(y, x) and all(np.isfinite(d).all() for d in pull(jnp.ones_like(x)))


@pytest.mark.parametrize("custom, plain", [(rms_norm, plain_rms), (layer_norm, plain_layer)])
def test_second_gradient_equals_autodiff_of_the_plain_form(custom, plain):
    """The custom gradient is itself differentiable: the curvature along u."""
    x, u, w = draw(0, 3, 8), draw(1, 3, 8), draw(2, 8)

    def curvature(norm):
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x, w))))
        return jax.jvp(slope, (x,), (u,))[1]

    close(curvature(custom), wide(curvature(plain)), "float32", terms=8)
