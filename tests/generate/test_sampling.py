"""Filters against brute-force numpy, and the draw against the distribution it claims."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx import values
from lmx.generate import Sampling
from lmx.generate.sampling import choose, filtered, min_p, repetition_penalty, temperature, top_k, top_p

V = 13


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits_of(seed, ties=False):
    """float32 [3, V], away from ties unless they are wanted."""
    rng = np.random.default_rng(seed)
    if ties:
        return rng.integers(-2, 3, (3, V)).astype(np.float32)
    steps = np.stack([rng.permutation(V) for _ in range(3)])
    return (0.4 * steps + rng.uniform(0, 0.2, (3, V)) - 2.5).astype(np.float32)


def keep_top_k(x, k):
    return np.array([[sum(other > own for other in row) < k for own in row] for row in x])


def keep_top_p(x, p):
    """Straight from the definition: a token stays while the tokens above it do not yet reach p."""
    prob = softmax(x.astype(np.float64))
    return np.array([[q[row > own].sum() < p for own in row] for row, q in zip(x, prob)])


def keep_min_p(x, p):
    prob = softmax(x.astype(np.float64))
    return prob >= p * prob.max(-1, keepdims=True)


def kept(filtered_logits):
    return np.isfinite(np.asarray(filtered_logits))


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, V + 3), st.booleans())
def test_top_k_is_brute_force(seed, k, ties):
    x = logits_of(seed, ties)
    got = np.asarray(top_k(jnp.asarray(x), k))
    want = keep_top_k(x, k)
    np.testing.assert_array_equal(kept(got), want)
    np.testing.assert_array_equal(got[want], x[want])
    if not ties:
        assert (kept(got).sum(-1) == min(k, V)).all()


@given(seeds, st.floats(0.01, 0.99), st.booleans())
def test_top_p_is_the_smallest_set_that_reaches_p(seed, p, ties):
    x = logits_of(seed, ties)
    prob = softmax(x.astype(np.float64))
    sums = np.array([[q[row > own].sum() for own in row] for row, q in zip(x, prob)])
    if np.abs(sums - p).min() < 1e-5:
        return  # float32 may fall on either side of p
    got = kept(top_p(jnp.asarray(x), p))
    np.testing.assert_array_equal(got, keep_top_p(x, p))
    for row, q, keep in zip(x, prob, got):
        assert q[keep].sum() >= p - 1e-6
        least = keep & (row == row[keep].min())
        assert q[keep & ~least].sum() < p


@given(seeds, st.floats(0.001, 1.0), st.booleans())
def test_min_p_is_brute_force(seed, p, ties):
    x = logits_of(seed, ties)
    ratio = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    if np.abs(ratio / p - 1).min() < 1e-5:
        return
    np.testing.assert_array_equal(kept(min_p(jnp.asarray(x), p)), keep_min_p(x, p))


@given(seeds, st.floats(1e-6, 1e3))
def test_temperature_divides(seed, t):
    x = logits_of(seed)
    np.testing.assert_allclose(
        softmax(np.asarray(temperature(jnp.asarray(x), t))),
        softmax(x.astype(np.float64) / t),
        rtol=2e-3,
        atol=1e-6,
    )


@given(seeds, st.floats(0.5, 3.0))
def test_repetition_penalty_makes_seen_tokens_less_likely(seed, penalty):
    x = logits_of(seed)
    seen = np.random.default_rng(seed).random((3, V)) < 0.4
    got = np.asarray(repetition_penalty(jnp.asarray(x), jnp.asarray(seen), penalty))
    want = np.array(
        [
            [(v / penalty if v > 0 else v * penalty) if s else v for v, s in zip(row, mark)]
            for row, mark in zip(x, seen)
        ]
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    if penalty > 1:
        assert (got[seen] < x[seen]).all()


@given(
    seeds, st.sampled_from([0, 2, 5, 40]), st.sampled_from([1.0, 0.8, 0.3]), st.sampled_from([0.0, 0.05, 0.4])
)
def test_filters_apply_in_the_documented_order(seed, k, p, least):
    """Each step sees the renormalised rest of the step before."""
    x = logits_of(seed)
    sampling = Sampling(temperature=0.7, top_k=k, top_p=p, min_p=least, repetition_penalty=1.3)
    seen = np.random.default_rng(seed).random((3, V)) < 0.4
    want = np.where(seen, np.where(x > 0, x / 1.3, x * 1.3), x).astype(np.float64) / 0.7
    if k:
        want = np.where(keep_top_k(want, k), want, -np.inf)
    if p < 1:
        prob = softmax(want)
        sums = np.array([[q[row > own].sum() for own in row] for row, q in zip(want, prob)])
        if np.abs(sums - p).min() < 1e-5:
            return
        want = np.where(keep_top_p(want, p), want, -np.inf)
    if least:
        want = np.where(softmax(want) >= least * softmax(want).max(-1, keepdims=True), want, -np.inf)
    got = np.asarray(filtered(jnp.asarray(x), sampling.settings(), k, jnp.asarray(seen)))
    np.testing.assert_array_equal(kept(got), np.isfinite(want))
    np.testing.assert_allclose(softmax(got), softmax(want), rtol=1e-4, atol=1e-7)


def test_off_is_the_identity():
    x = jnp.asarray(logits_of(0))
    assert Sampling().settings().keys() == {"temperature"}
    np.testing.assert_allclose(filtered(x, Sampling().settings()), x - x.max(-1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(filtered(x, Sampling(temperature=0.0, top_p=0.1, min_p=0.5).settings()), x)
    for same in (top_k(x, 0), top_k(x, V), top_p(x, 1.0), min_p(x, 0.0)):
        np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(repetition_penalty(x, x > 0, 1.0), x)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=4),
        Sampling(top_p=0.7),
        Sampling(min_p=0.2),
        Sampling(temperature=0.8, top_k=8, top_p=0.9, min_p=0.02),
    ],
    ids=repr,
)
def test_draws_follow_the_distribution(sampling):
    """Pearson's chi-square of 20,000 draws with fixed seeds, against the 1 - 1e-4 quantile."""
    from scipy.stats import chi2

    x = logits_of(3)[:1]
    n = 20_000
    prob = softmax(x[0].astype(np.float64) / sampling.temperature)
    for keep in (
        lambda q: keep_top_k(q[None], sampling.top_k or V)[0],
        lambda q: keep_top_p(np.log(np.maximum(q, 1e-300))[None], sampling.top_p)[0] | (sampling.top_p == 1),
        lambda q: q >= sampling.min_p * q.max(),
    ):
        prob = np.where(keep(prob), prob, 0)
        prob /= prob.sum()
    keys = jax.random.split(jax.random.key(11), n)
    draw = jax.jit(lambda x, keys: choose(x, keys, sampling.settings(), sampling.top_k)[0])
    tokens = np.asarray(draw(jnp.broadcast_to(jnp.asarray(x), (n, V)), keys))
    counts = np.bincount(tokens, minlength=V)
    assert counts[prob == 0].sum() == 0
    some = prob > 0
    statistic = ((counts[some] - n * prob[some]) ** 2 / (n * prob[some])).sum()
    assert statistic < chi2.ppf(1 - 1e-4, some.sum() - 1)
    assert some.sum() > 2


def test_greedy_takes_the_likeliest_and_the_lowest_id_among_equals():
    x = np.full((2, V), -1.0, np.float32)
    x[0, 5] = 2.0
    x[1, [4, 9]] = 3.0
    tokens, log_p = choose(
        jnp.asarray(x), jax.random.split(jax.random.key(0), 2), Sampling(temperature=0.0).settings()
    )
    assert tokens.tolist() == [5, 4] and tokens.dtype == jnp.int32
    np.testing.assert_allclose(log_p, np.log(softmax(x.astype(np.float64)))[[0, 1], [5, 4]], rtol=1e-6)


def test_log_probabilities_are_of_the_model_not_of_the_filters():
    x = logits_of(5)
    sampling = Sampling(temperature=0.3, top_k=2, repetition_penalty=1.5)
    seen = jnp.ones((3, V), bool)
    tokens, log_p = choose(
        jnp.asarray(x), jax.random.split(jax.random.key(1), 3), sampling.settings(), 2, seen
    )
    want = np.log(softmax(x.astype(np.float64)))[np.arange(3), np.asarray(tokens)]
    np.testing.assert_allclose(log_p, want, rtol=1e-5)


def test_a_tiny_temperature_is_greedy_and_finite():
    x = logits_of(7) * 50
    settings = Sampling(temperature=1e-30, top_p=0.5, min_p=0.1).settings()
    tokens, log_p = choose(jnp.asarray(x), jax.random.split(jax.random.key(0), 3), settings)
    np.testing.assert_array_equal(tokens, x.argmax(-1))
    assert np.isfinite(log_p).all()


@pytest.mark.parametrize(("k", "most"), [(0, 1), (5, 0)])
def test_full_sorts(k, most):
    """One sort of the vocabulary at most, none where top-k finds the largest, none when greedy."""

    def sorts(sampling):
        def run(x):
            return filtered(x, sampling.settings(), sampling.top_k)

        return len(re.findall(r"= sort\[", str(jax.make_jaxpr(run)(jnp.zeros((2, V))))))

    full = Sampling(top_k=k, top_p=0.9, min_p=0.1)
    assert sorts(full) == most
    assert sorts(dataclasses.replace(full, temperature=0.0)) == 0
    assert sorts(Sampling(min_p=0.3)) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_tokens": -5}, "max_tokens=-5"),
        ({"max_tokens": 3_000_000_000}, "max_tokens=3000000000; use 0 to .*int32"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"stop": ("a", "")}, "empty string"),
        ({"stop": "end"}, r"\('end',\)"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_sampling_is_a_value():
    sampling = Sampling(temperature=0.0, stop=("\n\n", "।"), seed=3)
    assert values.parse(repr(sampling), Sampling) == sampling and hash(sampling) == hash(
        Sampling(0.0, stop=("\n\n", "।"), seed=3)
    )
