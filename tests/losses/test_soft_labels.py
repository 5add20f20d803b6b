"""The loss of soft labels against float64 numpy and closed forms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.losses import SoftLabels, Term, total


def batch_of(logits, scores):
    out = SimpleNamespace(logits=jnp.asarray(logits, jnp.float32), hidden=jnp.zeros((*logits.shape[:2], 1)))
    return out, {"scores": jnp.asarray(scores, jnp.float32), "loss_mask": jnp.ones(scores.shape, jnp.float32)}


def test_it_is_the_cross_entropy_of_two_classes():
    rng = np.random.default_rng(0)
    logits, scores = 6 * rng.normal(size=(3, 5, 2)), rng.random((3, 5))
    p = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    right = -scores * np.log(p) - (1 - scores) * np.log(1 - p)
    np.testing.assert_allclose(SoftLabels()(*batch_of(logits, scores)), right, rtol=1e-5, atol=1e-6)


def test_at_its_least_it_is_the_entropy_and_certain_labels_far_off_cost_their_distance():
    s = np.array([[0.1, 0.5, 0.9]])
    logits = np.stack([np.zeros_like(s), np.log(s / (1 - s))], -1)
    out, batch = batch_of(logits, s)
    entropy = -s * np.log(s) - (1 - s) * np.log(1 - s)
    np.testing.assert_allclose(SoftLabels()(out, batch), entropy, rtol=1e-6)
    far = SoftLabels()(*batch_of(np.array([[[0.0, 100.0], [0.0, -100.0]]]), np.array([[0.0, 1.0]])))
    np.testing.assert_allclose(far, [[100.0, 100.0]])


def test_the_gradient_is_how_far_the_probability_lies_from_the_score():
    logits, s = np.array([[[0.3, -1.0], [2.0, 2.5]]]), np.array([[0.8, 0.25]])
    out, batch = batch_of(logits, s)

    def loss(x):
        return total({"bce": Term(SoftLabels())}, SimpleNamespace(logits=x), batch, {"bce": jnp.float32(1)})[
            0
        ]

    p = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    np.testing.assert_allclose(jax.grad(loss)(out.logits)[..., 1], p - s, rtol=1e-5)


def test_what_it_cannot_read_is_said():
    out, batch = batch_of(np.zeros((1, 2, 2)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"the batch has no scores; train on Answers\(task, head=True\)"):
        SoftLabels()(out, {"loss_mask": batch["loss_mask"]})
    with pytest.raises(ValueError, match="3 classes; score with two"):
        SoftLabels()(*batch_of(np.zeros((1, 2, 3)), np.zeros((1, 2))))
