"""Activations against float64 numpy, and their gradients against autodiff of the plain form."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.ops.activation import geglu, gelu, gelu_exact, relu_squared, silu, swiglu

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
C = math.sqrt(2 / math.pi)
erf = np.vectorize(math.erf)
sigmoid = np.vectorize(lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0)

ORACLES = {  # value in float64 numpy, and the plain jax form that autodiff reads
    gelu: (
        lambda x: 0.5 * x * (1 + np.tanh(C * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + jnp.tanh(C * (x + 0.044715 * x**3))),
    ),
    gelu_exact: (
        lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
        lambda x: 0.5 * x * (1 + jax.scipy.special.erf(x / math.sqrt(2))),
    ),
    silu: (lambda x: x * sigmoid(x), lambda x: x / (1 + jnp.exp(-x))),
    relu_squared: (lambda x: np.maximum(x, 0) ** 2, lambda x: jnp.maximum(x, 0) ** 2),
}
GATED = {swiglu: silu, geglu: gelu}


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(3 * np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def close(got, expected, dtype, size=1.0):
    """|error| <= 8 eps of the dtype times the value or `size`, whichever is larger."""
    assert (np.abs(wide(got) - expected) <= 8 * EPS[dtype] * np.maximum(np.abs(expected), size)).all()


def slope_size(x):
    """What rounding in a slope is relative to: gelu's has x (1 - t^2) (1 + 0.13 x^2) with 1 - t^2 near 0."""
    return np.maximum(1, np.abs(x) * (1 + 0.13 * x**2))


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("f", ORACLES)
def test_value_equals_float64(f, dtype):
    x = jnp.asarray([*np.linspace(-12, 12, 241), 0.0, -0.0, 1e4, -1e4], dtype)
    assert f(x).dtype == x.dtype
    close(f(x), ORACLES[f][0](wide(x)), dtype)


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("f", ORACLES)
def test_slope_equals_differences_of_float64(f, dtype):
    x = jnp.asarray(np.linspace(-8.05, 8.05, 162), dtype)
    (slope,) = jax.vjp(f, x)[1](jnp.ones_like(x))
    assert slope.dtype == x.dtype
    h, value = 1e-5, ORACLES[f][0]
    close(slope, (value(wide(x) + h) - value(wide(x) - h)) / (2 * h), dtype, slope_size(wide(x)))


@pytest.mark.parametrize("f", ORACLES)
@given(seed=st.integers(0, 2**31))
def test_gradient_equals_autodiff_of_the_plain_form(f, seed):
    x, g = draw(seed, 3, 7), draw(seed + 1, 3, 7)
    for a, b in zip(jax.vjp(f, x)[1](g), jax.vjp(ORACLES[f][1], x)[1](g)):
        np.testing.assert_allclose(a, b, atol=16 * EPS["float32"] * 10 * 10)  # |g|, |slope| up to about 10


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("f", GATED)
def test_gated_forms_multiply(f, dtype):
    gate, up, g = (draw(i, 4, 9, dtype=dtype) for i in range(3))
    y, pull = jax.vjp(f, gate, up)
    dgate, dup = pull(g)
    assert y.dtype == dgate.dtype == dup.dtype == gate.dtype
    value, h = ORACLES[GATED[f]][0], 1e-5
    a, b, c = wide(gate), wide(up), wide(g)
    slope = (value(a + h) - value(a - h)) / (2 * h)
    close(y, value(a) * b, dtype)
    close(dup, c * value(a), dtype)
    close(dgate, c * b * slope, dtype, np.abs(c * b) * slope_size(a))


@pytest.mark.parametrize("f", [*ORACLES, *GATED])
def test_far_inputs_have_finite_gradients(f):
    x = jnp.asarray([-1e10, -100.0, 0.0, 100.0, 1e10])
    args = (x, jnp.ones_like(x)) if f in GATED else (x,)
    assert all(np.isfinite(d).all() for d in jax.vjp(f, *args)[1](jnp.ones_like(x)))


@pytest.mark.parametrize("f", [*ORACLES, *GATED])
def test_vmap_scan_and_remat_change_nothing(f):
    x = draw(0, 3, 5)
    args = (x, draw(1, 3, 5)) if f in GATED else (x,)

    def total(f, args):
        return jnp.sum(jnp.sin(f(*args)))

    def scanned(*args):
        return jax.lax.scan(lambda carry, row: (carry, jax.checkpoint(f)(*row)), None, args)[1]

    expected = jax.grad(lambda args: total(f, args))(args)
    for g in (jax.vmap(f), jax.checkpoint(f), scanned):
        for a, b in zip(jax.jit(jax.grad(lambda args, g=g: total(g, args)))(args), expected):
            np.testing.assert_allclose(a, b, atol=64 * EPS["float32"] * 10)
