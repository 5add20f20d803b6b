"""Against float64 numpy, closed forms and jax's own derivatives; float32 leaves errors of about 1e-6."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from lmx.ops.cross_entropy import cross_entropy, log_z

TOL = {"rtol": 2e-6, "atol": 2e-6}


def draw(seed, scale, *shape):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=shape)).astype(np.float32), rng.integers(0, shape[-1], shape[:-1])


def oracle(logits, labels, s):
    """(loss, d loss / d logits) from -sum(target * log softmax) in float64."""
    x = logits.astype(np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    target = (1 - s) * np.eye(x.shape[-1])[labels] + s / x.shape[-1]
    return -(target * np.log(p)).sum(-1), p - target


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_value_and_gradient_are_those_of_the_definition(smoothing, seed, scale):
    logits, labels = draw(seed, scale, 2, 3, 7)
    g = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    loss, back = jax.vjp(lambda x: cross_entropy(x, jnp.asarray(labels), smoothing), jnp.asarray(logits))
    expected, slope = oracle(logits, labels, smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(jnp.asarray(g))[0], g[..., None] * slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_logits_cost_the_log_of_their_number(smoothing):
    for n_words in (1, 2, 65, 1000):
        loss = cross_entropy(jnp.full((3, n_words), 7.5), jnp.zeros(3, jnp.int32), smoothing)
        np.testing.assert_allclose(loss, np.log(n_words), **TOL)


def test_the_gradient_sums_to_zero_over_the_vocabulary():
    logits, labels = draw(1, 3.0, 5, 300)
    grad = jax.grad(lambda x: cross_entropy(x, jnp.asarray(labels), 0.2).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(grad.sum(-1), 0.0, atol=1e-5)


def test_logits_far_from_zero_do_not_overflow():
    logits = jnp.array([[1e4, 0.0], [-1e4, -1e4], [3e38, -3e38]])
    loss, back = jax.vjp(lambda x: cross_entropy(x, jnp.array([1, 0, 0])), logits)
    np.testing.assert_allclose(loss, [1e4, np.log(2), 0.0], **TOL)
    np.testing.assert_allclose(back(jnp.ones(3))[0], [[1, -1], [-0.5, 0.5], [0, 0]], atol=1e-6)


def test_a_word_that_cannot_occur_takes_no_share():
    logits = jnp.array([[1.0, -jnp.inf, 1.0]])
    loss, back = jax.vjp(lambda x: cross_entropy(x, jnp.array([0])), logits)
    np.testing.assert_allclose(loss, [np.log(2)], **TOL)
    np.testing.assert_allclose(back(jnp.ones(1))[0], [[-0.5, 0.0, 0.5]], atol=1e-6)


@pytest.mark.parametrize("label", [-100, -1, 4, 10**6])
def test_a_label_outside_the_vocabulary_is_heard_of_at_once(label):
    loss = cross_entropy(jnp.zeros((2, 4)), jnp.array([label, 3]))
    assert np.isnan(loss[0]) and np.isfinite(loss[1])


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = draw(2, 1.0, 4, 5000)
    low = jnp.asarray(logits).astype(jnp.bfloat16)
    loss, back = jax.vjp(lambda x: cross_entropy(x, jnp.asarray(labels)), low)
    expected, slope = oracle(np.asarray(low.astype(jnp.float32)), labels, 0.0)
    (grad,) = back(jnp.ones(4))
    assert loss.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad.astype(jnp.float32), slope, rtol=2**-8, atol=1e-6)


def test_log_z_and_its_gradient():
    logits, _ = draw(3, 2.0, 2, 3, 11)
    z, back = jax.vjp(log_z, jnp.asarray(logits))
    x = logits.astype(np.float64)
    np.testing.assert_allclose(z, np.log(np.exp(x).sum(-1)), rtol=1e-6, atol=1e-6)
    softmax = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(back(jnp.ones((2, 3)))[0], softmax, rtol=1e-5, atol=1e-7)


def test_second_derivatives_exist():
    """The Hessian of one cross entropy is diag(p) - p p^T (reverse over reverse)."""
    x = jnp.array([0.5, -1.0, 2.0])
    hessian = jax.jacrev(jax.grad(lambda x: cross_entropy(x, jnp.int32(1))))(x)
    p = np.exp(np.asarray(x, np.float64)) / np.exp(np.asarray(x, np.float64)).sum()
    np.testing.assert_allclose(hessian, np.diag(p) - np.outer(p, p), atol=1e-6)


def test_a_vocabulary_of_256k_needs_two_arrays_of_its_size():
    """Beside the logits given and the gradient returned, nothing as large lives: no one-hot, no copy."""
    n, n_words = 16, 256_000
    shape = jax.ShapeDtypeStruct((n, n_words), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda x, y: cross_entropy(x, y, 0.1).sum()))
    memory = step.lower(*shape).compile().memory_analysis()
    array = n * n_words * 4
    assert memory.output_size_in_bytes < 1.01 * array
    assert memory.temp_size_in_bytes < 0.1 * array
