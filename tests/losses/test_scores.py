"""Losses on scores in float64, their minimum, and their gradients in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer import answer, batch

from lmx.losses import Chunked, Counted, NextToken, SoftLabels, SoftLogits, Term, counts, total

B, T, D = 4, 5, 6
HEAD = jnp.array([[-0.5, 0.5]])
"""Whose second logit less the first is the one hidden number."""


def example():
    rng = np.random.default_rng(3)
    scores = rng.uniform(size=(B, T)).astype(np.float32)
    scores[0, :2] = 0, 1
    return answer(B, T, D, 2), batch(B, T, 2) | {"scores": jnp.asarray(scores)}


def numbers(out, data):
    logits = np.asarray(out.hidden, np.float64) @ np.asarray(out.head, np.float64)
    return logits[..., 1] - logits[..., 0], np.asarray(data["scores"], np.float64)


def gradient(loss, out, data):
    """Of the mean over the tokens that count, in z."""
    objective = {"score": Term(loss)}
    n = counts(objective, data)

    def of(z):
        return total(objective, type(out)(z[..., None], HEAD), data, n)[0]

    z = jnp.asarray(numbers(out, data)[0], jnp.float32)
    return np.asarray(jax.grad(of)(z))


def test_a_score_is_the_cross_entropy_of_a_soft_label():
    out, data = example()
    z, s = numbers(out, data)
    q = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(SoftLabels()(out, data), -s * np.log(q) - (1 - s) * np.log(1 - q), rtol=1e-5)
    mask = np.asarray(data["loss_mask"])
    np.testing.assert_allclose(
        gradient(SoftLabels(), out, data), (q - s) * mask / mask.sum(), rtol=1e-4, atol=1e-7
    )


def test_of_logits_it_is_the_squared_difference():
    out, data = example()
    z, s = numbers(out, data)
    s = np.clip(s, 0.01, 0.99)
    apart = z - np.log(s / (1 - s))
    np.testing.assert_allclose(SoftLogits(0.01)(out, data), apart**2, rtol=1e-4)
    mask = np.asarray(data["loss_mask"])
    found = gradient(SoftLogits(0.01), out, data)
    np.testing.assert_allclose(found, 2 * apart * mask / mask.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [SoftLabels(), SoftLogits()], ids=repr)
def test_it_is_least_at_the_score_itself_finite_far_away_and_the_same_in_slices(loss):
    out, data = example()
    s = np.clip(np.asarray(data["scores"]), 0.01, 0.99)
    data["scores"] = jnp.asarray(s)
    at = jnp.asarray(np.log(s / (1 - s)), jnp.float32)
    here, near = (np.asarray(loss(type(out)((at + e)[..., None], HEAD), data)) for e in (0.0, 0.1))
    assert (here < near).all()
    value, grads = jax.value_and_grad(lambda z: loss(type(out)(z, HEAD), data).sum())(
        jnp.full((B, T, 1), 1e4)
    )
    assert np.isfinite(value) and np.isfinite(grads).all()
    np.testing.assert_allclose(Chunked(loss, 2)(out, data), loss(out, data), rtol=1e-4)
    assert Chunked(loss).of_scores and Counted(loss).of_scores and not Chunked(NextToken()).of_scores


def test_what_does_not_fit_is_refused():
    out, data = example()
    with pytest.raises(ValueError, match="SoftLabels: the batch has no scores"):
        SoftLabels()(out, batch(B, T, 2))
    with pytest.raises(
        ValueError, match=r"SoftLogits: 3 classes; score with two, start=\(..., Classes\(2\)\)"
    ):
        SoftLogits()(answer(B, T, D, 3), data)
    with pytest.raises(ValueError, match=r"clip=0\.5"):
        SoftLogits(0.5)
