"""lmx.ops.matmul against float64 numpy, against plain jnp, on a mesh, and lowered for other platforms."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.ops.matmul import matmul, matmul_transposed

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SHAPES = [
    ((6,), 4, 5),
    ((2, 8), 4, 6),
    ((3, 5), 7, 9),
    ((2, 3, 4), 8, 2),
    ((), 4, 3),
    ((4,), 1, 5),
    ((4,), 5, 1),
    ((1, 1), 1, 1),
]


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("leading, k, m", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_value_and_gradients_equal_float64(leading, k, m, dtype, transposed):
    """Against x w, g w^T, x^T g in float64 on the same rounded inputs; |error| <= 4 eps sum |terms|."""
    x, w, g = operands(leading, k, m, dtype)
    y, (dx, dw) = value_and_gradients(
        matmul_transposed if transposed else matmul, x, w.T if transposed else w, g
    )
    dw = dw.T if transposed else dw
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, jnp.float32)
    X, W, G = (np.asarray(a.astype(dtype).astype(jnp.float32), np.float64) for a in (x, w, g))
    X, G = X.reshape(-1, k), G.reshape(-1, m)
    close(y.reshape(-1, m), X @ W, np.abs(X) @ np.abs(W), EPS[dtype])
    close(dx.reshape(-1, k), G @ W.T, np.abs(G) @ np.abs(W.T), EPS[dtype])
    close(dw, X.T @ G, np.abs(X.T) @ np.abs(G), EPS["float32"])


def test_bfloat16_sums_are_float32():
    """1 + 4096 * 2^-9 = 9, where a bfloat16 sum would stay at 1."""
    x = jnp.full((1, 4097), 2.0**-9, jnp.bfloat16).at[0, 0].set(1.0)
    assert float(matmul(x, jnp.ones((4097, 1), jnp.float32))[0, 0]) == 9.0
    dw = jax.grad(lambda w: matmul(x.T, w).astype(jnp.float32).sum())(jnp.ones((1, 2), jnp.float32))
    assert dw.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(dw), [[9.0, 9.0]])


def test_no_rows_give_zero_gradient():
    x, w, g = operands((0, 3), 4, 5, "float32")
    y, (dx, dw) = value_and_gradients(matmul, x, w, g)
    assert y.shape == (0, 3, 5) and dx.shape == (0, 3, 4)
    np.testing.assert_array_equal(np.asarray(dw), np.zeros((4, 5)))


@pytest.mark.parametrize("function", [matmul, matmul_transposed])
def test_shapes_that_do_not_meet_are_named(function):
    unchecked = inspect.unwrap(function)  # without the annotation check that runs in tests
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 5\)"):
        unchecked(jnp.ones((2, 3)), jnp.ones((4, 5)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
def test_transforms_keep_value_and_gradients(transform, dtype):
    """Three layers by vmap, scan or remat against the plain loop over jnp products."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (3, 2, 8, 4)).astype(dtype)
    w = jax.random.normal(jax.random.key(1), (3, 4, 4))

    def plain(x, w):
        return sum(jnp.sin((x[i] @ w[i].astype(dtype)).astype(jnp.float32)).sum() for i in range(3))

    def ours(x, w):
        if transform == "vmap":
            y = jax.vmap(matmul)(x, w)
        elif transform == "scan":
            y = jax.lax.scan(lambda c, xw: (c, matmul(*xw)), 0, (x, w))[1]
        else:
            y = jnp.stack([jax.checkpoint(matmul)(x[i], w[i]) for i in range(3)])
        return jnp.sin(y.astype(jnp.float32)).sum()

    want, (want_dx, want_dw) = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, w)
    got, (dx, dw) = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, w)
    close(got, want, 48.0, EPS[dtype])
    close(dx, want_dx, 8.0, EPS[dtype])
    close(dw, want_dw, 16.0, EPS[dtype])


@pytest.mark.parametrize(
    "spec_x, spec_w",
    [
        (P("data"), P()),
        (P("data"), P(None, "tensor")),
        (P("data"), P("tensor")),
        (P("data", "tensor"), P()),
        (P(None, "data"), P("tensor", None)),
    ],
)
def test_eight_devices_equal_one(spec_x, spec_w):
    x, w, g = operands((8, 4), 16, 8, "float32")
    want = value_and_gradients(matmul, x, w, g)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    x, w = jax.device_put(x, NamedSharding(mesh, spec_x)), jax.device_put(w, NamedSharding(mesh, spec_w))
    got = value_and_gradients(matmul, x, w, jax.device_put(g, NamedSharding(mesh, spec_x)))
    jax.tree.map(lambda a, b: close(a, b, 32.0, EPS["float32"]), got, want)


def operands(leading, k, m, dtype):
    keys = jax.random.split(jax.random.key(len(leading) * 100 + k * 10 + m), 3)
    x = jax.random.normal(keys[0], (*leading, k)).astype(dtype)
    g = jax.random.normal(keys[2], (*leading, m)).astype(dtype)
    return x, jax.random.normal(keys[1], (k, m)), g


def value_and_gradients(function, x, w, g):
    @jax.jit
    def both(x, w, g):
        y, pull = jax.vjp(function, x, w)
        return y, pull(g)

    return both(x, w, g)


def close(got, want, magnitude, eps):
    """|got - want| <= 4 eps magnitude + eps |want|: rounding of the sum and of the result."""
    got, want = np.asarray(got.astype(jnp.float32), np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape
    assert np.all(np.abs(got - want) <= 4 * eps * np.asarray(magnitude) + eps * np.abs(want) + 1e-30)
