import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from lmx.optim import WSD, AdamW, Constant, Cosine, Linear, Muon, lr_at

LR = 3e-4
F32 = {"rtol": 1e-6}


def values(schedule, steps, at):
    return np.array([schedule(LR, steps)(t) for t in at])


@pytest.mark.parametrize("schedule", [Constant(10), Linear(10), Cosine(10), WSD(10)])
def test_warmup_is_a_line_that_starts_above_zero_and_meets_the_peak(schedule):
    expected = [LR * (t + 1) / 11 for t in range(10)] + [LR]
    np.testing.assert_allclose(values(schedule, 100, range(11)), expected, **F32)


@pytest.mark.parametrize("schedule", [Constant(0), Linear(0), Cosine(0), WSD(0)])
def test_without_warmup_the_first_step_has_the_peak(schedule):
    assert float(schedule(LR, 100)(0)) == np.float32(LR)


def test_cosine_halves_at_its_middle_and_ends_where_told():
    middle, end, later = values(Cosine(0.2, end=0.1), 100, (60, 100, 1000))
    np.testing.assert_allclose([middle, end, later], [LR * 0.55, LR * 0.1, LR * 0.1], **F32)
    np.testing.assert_allclose(
        values(Cosine(0.2, end=0.0), 100, [40]), LR * (1 + math.cos(math.pi / 4)) / 2, **F32
    )


def test_linear_is_a_line():
    np.testing.assert_allclose(
        values(Linear(20, end=0.5), 100, (20, 40, 60, 100)), np.array([1, 0.875, 0.75, 0.5]) * LR, **F32
    )


@pytest.mark.parametrize(
    ("shape", "quarter"), [("linear", 0.75), ("sqrt", 0.5), ("cosine", (1 + math.cos(math.pi / 4)) / 2)]
)
def test_wsd_is_exactly_flat_then_falls(shape, quarter):
    schedule = WSD(warmup=10, decay=0.4, shape=shape)
    assert set(values(schedule, 100, range(10, 61)).tolist()) == {float(np.float32(LR))}
    np.testing.assert_allclose(values(schedule, 100, [70]), quarter * LR, **F32)
    np.testing.assert_allclose(values(schedule, 100, [100]), 0.0, atol=1e-10)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_a_share_is_the_same_as_its_number_of_steps(steps, share):
    at = (0, steps // 2, steps)
    np.testing.assert_array_equal(
        values(Cosine(share), steps, at), values(Cosine(round(share * steps)), steps, at)
    )


@given(st.sampled_from([2, 7, 200]), st.floats(0, 0.5), st.sampled_from([Linear, Cosine, WSD]))
def test_after_the_warmup_the_rate_never_rises_and_stays_within_its_bounds(steps, share, kind):
    warmup = round(share * steps)
    curve = kind(warmup, end=0.1)(1.0, steps)
    after = np.asarray(curve(np.arange(steps + 1, dtype=np.int32)))[warmup:]
    assert (np.diff(after) <= 1e-6).all() and after.max() <= 1 + 1e-6 and after.min() >= 0.1 - 1e-6


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        (Cosine(1.5), 10, "Cosine.warmup=1.5 is no share"),
        (Cosine(-1), 10, "Cosine.warmup=-1 steps do not fit"),
        (Linear(11), 10, "Linear.warmup=11 steps do not fit into a run of 10"),
        (WSD(5, decay=6), 10, "warmup=5 and decay=6 steps exceed"),
        (Constant(), 0, "steps=0"),
    ],
)
def test_what_does_not_fit_says_so(schedule, steps, message):
    with pytest.raises(ValueError, match=message):
        schedule(LR, steps)


def test_an_unknown_shape_says_which_are_known():
    with pytest.raises(ValueError, match="linear, sqrt, cosine"):
        WSD(shape="cubic")


def test_the_rate_of_a_step_can_be_asked_and_traced():
    for update in (AdamW(lr=LR), Muon(lr=LR)):
        assert float(lr_at(update, 100, 2)) == np.float32(LR)
        np.testing.assert_allclose(jax.jit(lambda t, u=update: lr_at(u, 100, t))(100), LR * 0.1, **F32)
