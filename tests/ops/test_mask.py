"""Masks against a loop over pairs, and how far they reach."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allows
from hypothesis import given
from hypothesis import strategies as st

from lmx.ops.mask import And, Causal, Full, Mask, PrefixLM, SameSegment, SlidingWindow, Where
from lmx.values import parse

masks = st.recursive(
    st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.just(SameSegment()),
        st.integers(1, 6).map(SlidingWindow),
        st.integers(0, 6).map(PrefixLM),
    ),
    lambda inner: st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
    max_leaves=3,
)


def places(rng, length):
    """Positions and segments in any order, as cache slots may stand; segment 0 is empty."""
    return Where(
        np.asarray(rng.integers(0, 8, (2, length)), np.int32),
        np.asarray(rng.integers(0, 3, (2, length)), np.int32),
    )


@given(mask=masks, seed=st.integers(0, 2**31))
def test_mask_equals_a_loop_over_pairs(mask, seed):
    rng = np.random.default_rng(seed)
    q, k = places(rng, 5), places(rng, 7)
    got = np.asarray(mask(*(Where(*map(jnp.asarray, where)) for where in (q, k))))
    assert got.shape == (2, 1, 5, 7)
    for b, t, s in np.ndindex(2, 5, 7):
        pair = (int(q[0][b, t]), int(q[1][b, t]), int(k[0][b, s]), int(k[1][b, s]))
        assert got[b, 0, t, s] == allows(mask, *pair)


@given(mask=masks)
def test_reach_is_the_furthest_distance_plus_one(mask):
    """Over all pairs of one segment whose query stands at 40, beyond every size and prefix drawn here."""
    distances = [40 - j for j in range(41) if allows(mask, 40, 1, j, 1)]
    if mask.reach is None:
        assert max(distances) == 40
    else:
        assert max(distances) == mask.reach - 1


@given(mask=masks)
def test_mask_is_rebuilt_from_its_repr(mask):
    assert parse(repr(mask), Mask, "mask") == mask


def test_and_joins_in_order():
    assert Causal() & SameSegment() == And(Causal(), SameSegment())
    assert (Causal() & SlidingWindow(3) & SameSegment()).parts == (Causal(), SlidingWindow(3), SameSegment())


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="size=0"):
        SlidingWindow(0)
    with pytest.raises(ValueError, match="length=-1"):
        PrefixLM(-1)
