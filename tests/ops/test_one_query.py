"""Attention of one query a row, against the form to read: shuffled caches, both lengths of vectors, what is not finite,
other dtypes, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_reference import CAUSAL, WINDOW, assert_equal_to_reference, qkv

from lmx.ops import native
from lmx.ops.attention import attention
from lmx.ops.flash import choose
from lmx.ops.mask import Full, SameSegment, Where
from lmx.ops.one_query import one_query

pytestmark = pytest.mark.skipif(not native.available(), reason="needs AVX2 and llvmlite")
PLAIN = {"mask": CAUSAL, "bias": None, "softcap": None, "mesh": None}


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, Full()])
@pytest.mark.parametrize(
    "B, S, N, K, H",
    [(3, 8, 1, 1, 8), (2, 40, 4, 2, 24), (4, 48, 10, 2, 16), (3, 112, 9, 3, 64), (2, 32, 8, 8, 128)],
)
def test_one_query_a_row_over_a_cache(B, S, N, K, H, mask, monkeypatch):
    """Tokens stand in shuffled slots, in each row another number of them, in the last none; by both lengths of
    vectors."""
    rng = np.random.default_rng(S)
    n = np.array([S, *rng.integers(1, S, B - 2), 0])
    places = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    k_where = Where(jnp.asarray(places), jnp.asarray(places < n[:, None], jnp.int32))
    q_where = Where(jnp.asarray(n[:, None] - 1, jnp.int32), jnp.ones((B, 1), jnp.int32))
    args = qkv(B, 1, N, K, H, S=S)
    rule = {"q_where": q_where, "k_where": k_where, "mask": mask & SameSegment(), "scale": 0.7}
    for flags in ({"avx512f"} & native.cpu_flags(), set()):
        monkeypatch.setattr(native, "cpu_flags", lambda flags=flags: {"avx2", "fma"} | flags)
        assert_equal_to_reference(one_query, args, **rule)
        out = jax.jit(partial(one_query, **rule))(*args)
        assert not out[-1].any()
        rows = jax.tree.map(lambda x: x[:, None], (*args, q_where, k_where))
        mapped = jax.vmap(lambda q, k, v, q_where, k_where: one_query(
            q, k, v, q_where=q_where, k_where=k_where, mask=rule["mask"], scale=0.7
        ))(*rows)  # fmt: skip
        np.testing.assert_array_equal(mapped[:, 0], out)
    assert choose("cpu", *args[:2], **PLAIN) == "one_query"
    assert choose("cpu", *args[:2], **PLAIN | {"softcap": 2.0}) == "reference"
    assert choose("gpu", *args[:2], **PLAIN) == "reference"


def test_one_query_weighs_what_is_far_apart_and_equal_alike():
    """Scores of 0, -80, -200 and -1e4 beside each other, and none but equal ones."""
    k = jnp.zeros((1, 8, 1, 8)).at[0, :, 0, 0].set(jnp.array([0, -80, -200, -1e4, 0, 0, 0, 0]))
    v = jnp.eye(8)[None, :, None]
    where = Where(jnp.arange(8, dtype=jnp.int32)[None], jnp.ones((1, 8), jnp.int32))
    for q in (1.0, 0.0):
        q_where = Where(jnp.full((1, 1), 7, jnp.int32), jnp.ones((1, 1), jnp.int32))
        rule = {"q_where": q_where, "k_where": where, "mask": CAUSAL, "scale": 1.0}
        q = jnp.full((1, 1, 1, 8), q)
        np.testing.assert_allclose(
            one_query(q, k, v, **rule), attention(q, k, v, **rule), rtol=3e-7, atol=1e-37
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_query_hides_nothing_that_is_not_finite(bad):
    """A query, or a key that it sees, without a number makes an output without one, as in the form to read."""
    q, k, v = qkv(1, 1, 4, 2, 16, S=32)
    seen = jnp.ones((1, 32), jnp.int32).at[0, 20:].set(0)
    rule = {
        "q_where": Where(jnp.full((1, 1), 19, jnp.int32), jnp.ones((1, 1), jnp.int32)),
        "k_where": Where(jnp.arange(32, dtype=jnp.int32)[None], seen),
        "mask": CAUSAL,
    }
    for args in (
        (q.at[0, 0, 1, 3].set(bad), k, v),
        (q, k.at[0, 5, 0, 3].set(bad), v),
        (q, k.at[0, 25, 0, 3].set(bad), v),
    ):
        np.testing.assert_allclose(one_query(*args, **rule), attention(*args, **rule), rtol=1e-5, atol=1e-6)


def test_threads_that_trace_one_query_at_once_share_what_is_compiled():
    args = qkv(1, 1, 7, 1, 8, S=8)  # heads that no other test has
    where = Where(jnp.arange(8, dtype=jnp.int32)[None], jnp.ones((1, 8), jnp.int32))
    rule = {"q_where": Where(where.positions[:, -1:], where.segment_ids[:, -1:]), "k_where": where}
    with ThreadPoolExecutor(8) as threads:
        outs = list(threads.map(lambda _: one_query(*args, mask=CAUSAL, **rule), range(8)))
    for out in outs:
        np.testing.assert_array_equal(out, outs[0])


def test_one_query_reads_values_of_another_dtype_as_numbers():
    q, k, v = qkv(2, 1, 4, 2, 8, S=24)
    k_where = Where(jnp.tile(jnp.arange(24), (2, 1)), jnp.ones((2, 24), jnp.int32))
    q_where = Where(jnp.full((2, 1), 20), jnp.ones((2, 1), jnp.int32))
    rule = {"q_where": q_where, "k_where": k_where, "mask": CAUSAL}
    half = v.astype(jnp.bfloat16)
    expected = attention(q, k, half.astype(jnp.float32), **rule)
    np.testing.assert_allclose(one_query(q, k, half, **rule), expected, rtol=1e-5, atol=1e-6)
