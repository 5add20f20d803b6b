"""The reference attention against float64 numpy, forward and gradient, and what must hold of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attend
from hypothesis import given
from hypothesis import strategies as st

from lmx.ops.attention import attention
from lmx.ops.mask import Causal, Full, PrefixLM, SameSegment, SlidingWindow, Where

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
B, T, N, H = 2, 9, 4, 8
jitted = jax.jit(attention, static_argnames="mask")
MASKS = [
    Full(),
    Causal() & SameSegment(),
    SlidingWindow(3) & SameSegment(),
    PrefixLM(2) & SameSegment(),
    SlidingWindow(4) & Causal() & SameSegment(),
]


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def packed():
    """Row 0: segments of 4, 3 and two of padding; row 1: one segment."""
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 0, 0], list(range(9))], jnp.int32)
    return Where(positions, jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], jnp.int32))


def qkv(seed, n_kv, dtype="float32", keys=T):
    return draw(seed, B, T, N, H, dtype=dtype), *(
        draw(seed + i, B, keys, n_kv, H, dtype=dtype) for i in (1, 2)
    )


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def close(got, expected, dtype):
    """|error| <= 32 eps of the dtype times the largest value: scores up to about 4 and sums of T terms."""
    assert np.abs(wide(got) - expected).max() <= 32 * EPS[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize(
    "n_kv, biased, scale, softcap", [(4, False, None, None), (2, True, 0.2, 1.5), (1, True, None, None)]
)
def test_value_and_gradients_equal_float64(mask, n_kv, biased, scale, softcap, dtype):
    q, k, v = qkv(0, n_kv, dtype)
    table, g, where = draw(3, B, N, T, T), draw(4, B, T, N, H, dtype=dtype), packed()
    rule = {"q_where": where, "k_where": where, "mask": mask, "scale": scale, "softcap": softcap}

    def f(q, k, v, table):
        return attention(q, k, v, bias=(lambda i, j: table) if biased else None, **rule)

    out, pull = jax.vjp(f, q, k, v, table)
    expected = attend(*map(wide, (q, k, v)), bias=wide(table) if biased else None, g=wide(g), **rule)
    assert out.dtype == q.dtype
    for got, value in zip((out, *pull(g)), expected if biased else expected[:4]):
        close(got, value, dtype)


def test_scores_are_float32_inside():
    """Scores near 256 apart by 1/2: bfloat16 scores would tie them (its step there is 2)."""
    q = jnp.full((1, 1, 1, 1), 256.0, jnp.bfloat16)
    k = jnp.asarray([1.0, 1.0 - 2.0**-7], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.asarray([1.0, 0.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    q_where = Where(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    k_where = Where(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
    out = attention(q, k, v, q_where=q_where, k_where=k_where, mask=Full(), scale=0.25)
    assert abs(float(out[0, 0, 0, 0]) - 1 / (1 + np.exp(-0.5))) < 2.0**-8


@given(cut=st.integers(0, T - 1), seed=st.integers(0, 2**31))
def test_the_future_changes_nothing(cut, seed):
    where = Where(jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (B, 1)), jnp.ones((B, T), jnp.int32))
    rule = {"q_where": where, "k_where": where, "mask": Causal() & SameSegment()}
    q, k, v = qkv(seed, 2)
    k2, v2 = (x.at[:, cut + 1 :].set(9.0) for x in (k, v))
    before, after = jitted(q, k, v, **rule), jitted(q, k2, v2, **rule)
    assert np.array_equal(before[:, : cut + 1], after[:, : cut + 1])


@given(seed=st.integers(0, 2**31))
def test_packed_segments_do_not_see_each_other(seed):
    q, k, v = qkv(seed, 4)
    where = packed()
    out = jitted(q, k, v, q_where=where, k_where=where, mask=Causal() & SameSegment())
    for first, last in ((0, 4), (4, 7)):
        alone = tuple(x[:1, first:last] for x in (q, k, v))
        place = Where(*(x[:1, first:last] for x in where))
        expected = jitted(*alone, q_where=place, k_where=place, mask=Causal() & SameSegment())
        np.testing.assert_allclose(out[:1, first:last], expected, atol=16 * EPS["float32"])


def test_queries_that_see_nothing_give_zeros_and_finite_gradients():
    q, k, v = qkv(0, 4)
    where = packed()

    def f(q, k, v):
        return jitted(q, k, v, q_where=where, k_where=where, mask=Causal() & SameSegment())

    out, pull = jax.vjp(f, q, k, v)
    assert np.array_equal(out[0, 7:], jnp.zeros((2, N, H)))
    grads = pull(jnp.ones_like(out))
    assert all(np.isfinite(d).all() for d in grads)
    assert all(not d[0, 7:].any() for d in grads)


@pytest.mark.parametrize("n_kv", [1, 2])
def test_grouped_queries_equal_repeated_keys(n_kv):
    q, k, v = qkv(0, n_kv)
    where = packed()
    rule = {"q_where": where, "k_where": where, "mask": Causal() & SameSegment()}
    repeated = (jnp.repeat(x, N // n_kv, axis=2) for x in (k, v))
    np.testing.assert_allclose(
        jitted(q, k, v, **rule), jitted(q, *repeated, **rule), atol=16 * EPS["float32"]
    )


@given(seed=st.integers(0, 2**31))
def test_one_query_over_shuffled_cache_slots_equals_the_row(seed):
    """Decoding: slots stand in any order, with empty ones (segment 0, wild numbers) between."""
    q, k, v = qkv(seed, 2)
    where = Where(jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (B, 1)), jnp.ones((B, T), jnp.int32))
    mask = SlidingWindow(5) & SameSegment()
    full = jitted(q, k, v, q_where=where, k_where=where, mask=mask)
    slots = np.random.default_rng(seed).permutation(14)[:T]
    kc, vc = (jnp.full((B, 14, 2, H), 1e4).at[:, slots].set(x) for x in (k, v))
    cache = Where(*(jnp.zeros((B, 14), jnp.int32).at[:, slots].set(x) for x in where))
    last = Where(*(x[:, 6:7] for x in where))
    one = jitted(q[:, 6:7], kc, vc, q_where=last, k_where=cache, mask=mask)
    np.testing.assert_allclose(one[:, 0], full[:, 6], atol=16 * EPS["float32"])


def test_heads_must_divide():
    where = packed()
    with pytest.raises(ValueError, match="n_heads=4 is not a multiple of n_kv_heads=3; use 1, 2, 4"):
        attention(*qkv(0, 3), q_where=where, k_where=where, mask=Causal())
