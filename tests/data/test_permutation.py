import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data.permutation import fold, inverse, permute


@given(n=st.integers(1, 3000), key=st.integers(-(2**63), 2**64 - 1))
def test_it_is_a_bijection_with_an_inverse(n, key):
    i = np.arange(n)
    moved = permute(i, n, key)
    assert moved.dtype == np.int64
    assert sorted(moved) == list(range(n))
    assert np.array_equal(inverse(moved, n, key), i)


@given(n=st.integers(2**33, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_huge_sets_are_reached_one_index_at_a_time(n, key, data):
    i = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    moved = permute(i, n, key)
    assert ((moved >= 0) & (moved < n)).all()
    assert np.array_equal(inverse(moved, n, key), i)


def test_a_key_per_index_equals_one_call_per_key():
    n, keys = 1000, fold(3, np.arange(5))
    together = permute(np.tile(np.arange(n), (5, 1)), n, keys[:, None])
    for row, key in zip(together, keys):
        assert np.array_equal(row, permute(np.arange(n), n, int(key)))


def test_all_orders_of_four_come_up_equally_often():
    """Over 24,000 keys each of the 24 orders should come up 1000 times; chi-square with 23 degrees of
    freedom."""
    keys = fold(1, np.arange(24_000))
    orders = permute(np.tile(np.arange(4), (24_000, 1)), 4, keys[:, None])
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24
    chi2 = sum((c - 1000) ** 2 / 1000 for c in counts.values())
    assert chi2 < 23 + 5 * math.sqrt(2 * 23)


@pytest.mark.parametrize("n", [10, 97, 1000])
def test_where_an_index_goes_is_uniform_and_neighbours_part(n):
    keys = fold(7, np.arange(20_000))
    first = permute(np.zeros(20_000, int), n, keys)
    expected = 20_000 / n
    chi2 = float(((np.bincount(first, minlength=n) - expected) ** 2 / expected).sum())
    assert abs(chi2 - (n - 1)) < 5 * math.sqrt(2 * (n - 1))
    second = permute(np.ones(20_000, int), n, keys)
    gap = (second - first) % n
    assert abs(float((gap == 1).mean()) - 1 / (n - 1)) < 5 * math.sqrt(1 / (n - 1) / 20_000)


def test_fold_depends_on_every_value_and_on_their_order():
    keys = [
        int(k[0])
        for k in (
            fold(0),
            fold(1),
            fold(0, 0),
            fold(0, 1),
            fold(1, 0),
            fold(0, 0, 1),
            fold(0, 1, 0),
            fold(-1),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert np.array_equal(fold(5, np.arange(3))[2:], fold(5, 2))


def test_indices_outside_the_set_are_refused():
    with pytest.raises(ValueError, match=r"outside \[0, 5\)"):
        permute(np.array([5]), 5, 0)
    with pytest.raises(ValueError, match="n=0"):
        permute(np.array([], int), 0, 0)
