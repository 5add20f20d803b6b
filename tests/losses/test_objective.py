from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer import answer, batch
from hypothesis import given

from lmx import values
from lmx.losses import Chunked, Loss, NextToken, Term, ZLoss, counts, total

B, T, D, V = 4, 6, 5, 9
OBJECTIVE = {"ce": Term(NextToken(0.1)), "z": Term(ZLoss(), 1e-2, mask="z_mask")}


def example(seed=0):
    data = batch(B, T, V, seed + 1)
    some = np.random.default_rng(seed + 2).integers(0, 2, (B, T))
    return answer(B, T, D, V, seed), data | {"z_mask": jnp.asarray(some, bool)}


def test_total_is_the_weighted_sum_of_masked_means():
    out, data = example()
    x = np.asarray(out.logits, np.float64)
    z = np.log(np.exp(x).sum(-1))
    chosen = np.take_along_axis(x, np.asarray(data["labels"])[..., None], -1)[..., 0]
    ce = z - 0.9 * chosen - 0.1 * x.mean(-1)
    mask, z_mask = np.asarray(data["loss_mask"]), np.asarray(data["z_mask"])
    loss, terms = total(OBJECTIVE, out, data, counts(OBJECTIVE, data))
    np.testing.assert_allclose(terms["ce"], (ce * mask).sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(terms["z"], (z * z * z_mask).sum() / z_mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss, terms["ce"] + 0.01 * terms["z"], rtol=1e-6)


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def objective_and_grad(out, data, n):
    return total(OBJECTIVE, out, data, n)


@given(seed=st.integers(0, 1000), n_micro=st.sampled_from([2, 4]))
def test_micro_batches_add_up_to_the_batch_however_uneven_the_masks(seed, n_micro):
    out, data = example(seed)
    data["loss_mask"] = data["loss_mask"].at[0].set(0.0)
    n = counts(OBJECTIVE, data)
    whole, grad = objective_and_grad(out, data, n)
    size = B // n_micro
    losses, heads = [], []
    for i in range(0, B, size):
        rows = {k: x[i : i + size] for k, x in data.items()}
        value, part = objective_and_grad(replace(out, hidden=out.hidden[i : i + size]), rows, n)
        np.testing.assert_allclose(part.hidden, grad.hidden[i : i + size], rtol=1e-5, atol=1e-6)
        losses.append(value)
        heads.append(part.head)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(sum(b), a, rtol=1e-5, atol=1e-6), whole, *losses)
    np.testing.assert_allclose(sum(heads), grad.head, rtol=1e-5, atol=1e-6)


def test_counts_are_the_sums_of_masks_in_float32():
    data = {"loss_mask": jnp.array([[1, 0, 1]], jnp.int32), "share": jnp.array([[0.25, 0.5, 0.0]])}
    n = counts({"a": Term(NextToken()), "b": Term(NextToken(), mask="share")}, data)
    assert {k: (float(x), x.dtype) for k, x in n.items()} == {
        "a": (2.0, jnp.float32),
        "b": (0.75, jnp.float32),
    }


def test_a_term_without_tokens_is_zero_with_gradient_zero():
    out, data = example()
    data["loss_mask"] = jnp.zeros((B, T))

    def loss(hidden):
        return total({"ce": Term(NextToken())}, type(out)(hidden, out.head), data, counts(OBJECTIVE, data))[0]

    value, grad = jax.value_and_grad(loss)(out.hidden)
    assert float(value) == 0.0 and not np.any(grad)


def test_tokens_outside_the_mask_change_nothing():
    out, data = example()
    other = {**data, "labels": jnp.where(data["loss_mask"] > 0, data["labels"], 0)}
    n = counts(OBJECTIVE, data)
    np.testing.assert_array_equal(
        total(OBJECTIVE, out, data, n)[1]["ce"], total(OBJECTIVE, out, other, n)[1]["ce"]
    )


def test_a_missing_mask_and_an_empty_objective_are_told():
    with pytest.raises(ValueError, match=r"term 'kd'.*'teacher_mask'.*labels"):
        counts({"kd": Term(NextToken(), mask="teacher_mask")}, batch(B, T, V))
    with pytest.raises(ValueError, match="no terms"):
        counts({}, batch(B, T, V))


def test_smoothing_is_a_share():
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"smoothing={smoothing}"):
            NextToken(smoothing)


def test_an_objective_is_text_and_back():
    objective = {"ce": Term(Chunked(NextToken(0.1), 64)), "z": Term(ZLoss(), 1e-4)}
    assert values.parse(repr(objective), dict[str, Term], "objective") == objective


def test_a_loss_of_ones_own_needs_one_method():
    class Brier(Loss):
        def __call__(self, out, batch):
            p = jax.nn.softmax(out.logits)
            return ((p - jax.nn.one_hot(batch["labels"], p.shape[-1])) ** 2).sum(-1)

    out, data = example()
    objective = {"brier": Term(Brier())}
    loss, _ = total(objective, out, data, counts(objective, data))
    assert 0 < float(loss) < 2
    with pytest.raises(TypeError, match="abstract"):
        Loss()
