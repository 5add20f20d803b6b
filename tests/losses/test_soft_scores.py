"""Losses on scores in float64, their minimum, and their gradients in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer import answer, batch

from lmx.losses import Chunked, SoftLabels, SoftLogits, Term, counts, total

B, T, D = 4, 5, 6


def example():
    rng = np.random.default_rng(3)
    scores = rng.uniform(size=(B, T)).astype(np.float32)
    scores[0, :2] = 0, 1
    return answer(B, T, D, 2), batch(B, T, 2) | {"scores": jnp.asarray(scores)}


def numbers(out, data):
    both = np.asarray(out.hidden, np.float64) @ np.asarray(out.head, np.float64)
    return both[..., 1] - both[..., 0], np.asarray(data["scores"], np.float64)


def of(loss, z, data):
    """The loss where the second class has logit z and the first 0."""
    head = jnp.asarray([[0.0, 1.0]])
    return loss(type(answer(1, 1, 1, 1))(z[..., None], head), data)


def gradient(loss, out, data):
    """Of the mean over the tokens that count, in z."""
    mask = data["loss_mask"]
    z = jnp.asarray(numbers(out, data)[0], jnp.float32)
    return np.asarray(jax.grad(lambda z: (of(loss, z, data) * mask).sum() / mask.sum())(z))


def test_soft_labels_are_the_cross_entropy_of_a_share():
    out, data = example()
    z, s = numbers(out, data)
    q = 1 / (1 + np.exp(-z))
    wanted = -s * np.log(q) - (1 - s) * np.log(1 - q)
    np.testing.assert_allclose(SoftLabels()(out, data), wanted, rtol=1e-4, atol=1e-6)
    mask = np.asarray(data["loss_mask"])
    objective = {"score": Term(SoftLabels())}
    found = total(objective, out, data, counts(objective, data))[0]
    np.testing.assert_allclose(found, (wanted * mask).sum() / mask.sum(), rtol=1e-4)
    np.testing.assert_allclose(
        gradient(SoftLabels(), out, data), (q - s) * mask / mask.sum(), rtol=1e-4, atol=1e-6
    )


def test_soft_logits_are_the_squared_difference():
    out, data = example()
    z, s = numbers(out, data)
    s = np.clip(s, 0.01, 0.99)
    apart = z - np.log(s / (1 - s))
    np.testing.assert_allclose(SoftLogits(0.01)(out, data), apart**2, rtol=1e-4, atol=1e-5)
    mask = np.asarray(data["loss_mask"])
    found = gradient(SoftLogits(0.01), out, data)
    np.testing.assert_allclose(found, 2 * apart * mask / mask.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [SoftLabels(), SoftLogits()], ids=repr)
def test_it_is_least_at_the_score_itself_finite_far_away_and_the_same_in_slices(loss):
    out, data = example()
    s = np.clip(np.asarray(data["scores"]), 0.01, 0.99)
    data["scores"] = jnp.asarray(s)
    at = jnp.asarray(np.log(s / (1 - s)), jnp.float32)
    assert (np.asarray(of(loss, at, data)) < np.asarray(of(loss, at + 0.1, data))).all()
    value, grads = jax.value_and_grad(lambda z: of(loss, z, data).sum())(jnp.full((B, T), 1e4))
    assert np.isfinite(value) and np.isfinite(grads).all()
    np.testing.assert_allclose(Chunked(loss, 2)(out, data), loss(out, data), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    out, data = example()
    with pytest.raises(ValueError, match="SoftLogits: the batch has no scores"):
        SoftLogits()(out, batch(B, T, 2))
    with pytest.raises(ValueError, match="SoftLogits: 3 classes"):
        SoftLogits()(answer(B, T, D, 3), data)
    with pytest.raises(ValueError, match=r"clip=0\.5"):
        SoftLogits(0.5)
