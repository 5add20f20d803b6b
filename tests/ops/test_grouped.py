"""lmx.ops.grouped against float64 numpy, and its two forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.ops import grouped as module
from lmx.ops.grouped import grouped

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
SIZES = {
    "even": [16, 16, 16],
    "uneven": [5, 1, 23, 8],
    "some empty": [0, 9, 0, 0, 30, 0],
    "all in one": [0, 0, 41],
    "many blocks": [300, 7, 1, 200],
    "one row": [0, 1],
    "no rows": [0, 0],
}


def operands(sizes, dtype, K=6, N=5):
    rng = np.random.default_rng(sum(sizes))
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    M, E = sum(sizes), len(sizes)
    return draw(M, K).astype(dtype), draw(E, K, N), jnp.asarray(sizes, jnp.int32), draw(M, N).astype(dtype)


def close(got, want, magnitude, eps):
    got = np.asarray(got.astype(jnp.float32), np.float64)
    assert got.shape == want.shape
    assert np.all(np.abs(got - want) <= 4 * eps * magnitude + eps * np.abs(want) + 1e-30)


@jax.jit
def value_and_gradients(x, w, sizes, g):
    y, pull = jax.vjp(lambda x, w: grouped(x, w, sizes), x, w)
    return y, *pull(g)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", SIZES)
def test_value_and_gradients_equal_float64(name, dtype):
    """Row by row on the same rounded inputs; |error| <= 4 eps sum |terms|."""
    x, w, sizes, g = operands(SIZES[name], dtype)
    y, dx, dw = value_and_gradients(x, w, sizes, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, jnp.float32)
    X, W, G = (np.asarray(a.astype(dtype).astype(jnp.float32), np.float64) for a in (x, w, g))
    group = np.repeat(np.arange(len(sizes)), sizes)
    want = [np.zeros(y.shape), np.zeros(x.shape), np.zeros(w.shape)]
    scale = [np.zeros(y.shape), np.zeros(x.shape), np.zeros(w.shape)]
    for r, e in enumerate(group):
        for into, a, b, c in ((want, X[r], W[e], G[r]), (scale, *map(np.abs, (X[r], W[e], G[r])))):
            into[0][r], into[1][r] = a @ b, b @ c
            into[2][e] += np.outer(a, c)
    close(y, want[0], scale[0], EPS[dtype])
    close(dx, want[1], scale[1], EPS[dtype])
    close(dw, want[2], scale[2], EPS["float32"])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", ["uneven", "some empty", "many blocks"])
def test_blocks_equal_ragged_dot(name, dtype):
    x, w, sizes, g = operands(SIZES[name], dtype)
    for over, rows in ((1, x), (2, g)):
        a, b = (
            jax.jit(f, static_argnums=3)(rows, w, sizes, over)
            for f in (module.rows_by_blocks, module.rows_by_ragged_dot)
        )
        assert a.dtype == b.dtype == x.dtype
        a, b = (y.astype(jnp.float32) for y in (a, b))
        np.testing.assert_allclose(a, b, rtol=2 * EPS[dtype], atol=20 * EPS["float32"])
    a, b = (jax.jit(f)(x, g, sizes) for f in (module.grams_by_blocks, module.grams_by_ragged_dot))
    assert a.dtype == b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_bfloat16_sums_are_float32():
    """1 + 4096 * 2^-9 = 9, where a bfloat16 sum would stay at 1."""
    x = jnp.full((1, 4097), 2.0**-9, jnp.bfloat16).at[0, 0].set(1.0)
    w, one = jnp.ones((2, 4097, 1)), jnp.array([0, 1], jnp.int32)
    assert float(grouped(x, w, one)[0, 0]) == 9.0
    sizes = jnp.array([0, 4097], jnp.int32)
    dw = jax.grad(lambda w: grouped(x.T, w, sizes).astype(jnp.float32).sum())(jnp.ones((2, 1, 2)))
    np.testing.assert_array_equal(np.asarray(dw), [[[0.0, 0.0]], [[9.0, 9.0]]])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_cpu_takes_blocks_and_others_ragged_dot(platform):
    program = value_and_gradients.trace(*operands(SIZES["even"], "bfloat16"))
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert ("chlo.ragged_dot" in text) == (platform != "cpu") == ("while" not in text)


def test_each_block_ends_before_the_padding_does():
    for n in (1, 7, 64, 1000, 10**6):
        for groups in (1, 3, 128):
            size = module._block(n, groups)
            assert 8 <= size <= 128 and size % 8 == 0
