import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lmx.report.stats import Interval, bootstrap, mean_interval, paired_difference, t_quantile


@given(st.floats(0.55, 0.999))
def test_t_quantiles_have_closed_forms_for_one_and_two_degrees_of_freedom(p):
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8).filter(lambda v: np.std(v) > 1e-6))
def test_mean_interval_is_scipys_t_interval(values):
    low, high = scipy.stats.t.interval(
        0.9, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
    got = mean_interval(values, 0.9)
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    assert got.n == len(values)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    trials = [mean_interval(rng.normal(5.0, 2.0, 3)) for _ in range(4000)]
    covered = np.mean([t.low <= 5.0 <= t.high for t in trials])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_pairing_removes_what_the_seed_does_to_both():
    rng = np.random.default_rng(1)
    seeds = rng.normal(0, 10, 5)
    noise = rng.normal(0, 0.01, 5)
    a, b = seeds + 1.0 + noise, seeds
    paired = paired_difference(a, b)
    assert paired.excludes(0.0) and paired.low <= 1.0 <= paired.high
    assert mean_interval(a).high - mean_interval(a).low > 100 * (paired.high - paired.low)
    with pytest.raises(ValueError, match="pair them by seed"):
        paired_difference([1.0], [1.0, 2.0])


def test_bootstrap_of_a_mean_nears_the_normal_interval_and_repeats():
    x = np.random.default_rng(2).normal(0, 1, 400)
    got = bootstrap(x, seed=3)
    half = 1.96 * x.std() / math.sqrt(400)
    assert got.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(x.mean() + half, abs=0.1 * half)
    assert got == bootstrap(x, seed=3) and got != bootstrap(x, seed=4)


def test_bootstrap_resamples_rows_together_so_a_constant_ratio_has_no_width():
    sums = np.array([[1.0, 2.0], [10.0, 20.0], [3.0, 6.0]])
    got = bootstrap(sums, lambda rows: rows[:, 0].sum() / rows[:, 1].sum(), resamples=50)
    assert (got.value, got.low, got.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(3.21432, 3.20232, 3.22632, 3), "3.214 ± 0.012"),
        (Interval(1234.5, 1111.5, 1357.5, 3), "1234 ± 123"),
        (Interval(3.2, 3.1, 3.5), "3.20 [3.10, 3.50]"),
        (Interval(3.21432), "3.214"),
        (Interval(math.nan), "–"),
        (Interval(2.0, 2.0, 2.0), "2.000 ± 0.000"),
    ],
)
def test_an_interval_prints_with_two_digits_of_its_half_width(interval, text):
    assert str(interval) == text


def test_one_seed_claims_nothing():
    one = mean_interval([3.0])
    assert one.value == 3.0 and math.isnan(one.low) and not one.excludes(100.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_missing_or_broken_values_are_refused(values):
    with pytest.raises(ValueError):
        mean_interval(values)
