"""Losses on routers: closed forms, float64 loops, and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer import Out, answer

from lmx.losses import Chunked, LoadBalance, NextToken, RouterZLoss, Term, counts, total
from lmx.models import Out as ModelOut
from lmx.models import Routing

L, B, T, E = 2, 3, 4, 6


def routed(logits, top_k):
    return ModelOut(jnp.zeros((*logits.shape[1:3], 2)), jnp.zeros((2, 3)), None, Routing(logits, top_k))


def draw(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((L, B, T, E)), jnp.float32)


def ones():
    return {"loss_mask": jnp.ones((B, T))}


def mean(loss, out, batch):
    objective = {"x": Term(loss)}
    return total(objective, out, batch, counts(objective, batch))[0]


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_even_probabilities_cost_one(top_k):
    loss = LoadBalance()(routed(jnp.zeros((L, B, T, E)), top_k), ones())
    np.testing.assert_allclose(loss, np.ones((B, T)), rtol=1e-6)


def test_an_even_load_costs_one_whatever_the_probabilities():
    logits = jnp.broadcast_to(5 * jnp.eye(E)[None, None], (L, 1, E, E))
    assert float(mean(LoadBalance(), routed(logits, 1), {"loss_mask": jnp.ones((1, E))})) == pytest.approx(1)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_one_choice_of_all_tokens_costs_e_over_k(top_k):
    logits = jnp.broadcast_to(jnp.where(jnp.arange(E) < top_k, 0.0, -60.0)[None, None, None], (L, B, T, E))
    assert float(mean(LoadBalance(), routed(logits, top_k), ones())) == pytest.approx(E / top_k)


def balance(logits, top_k, mask):
    """Fedus et al. 2021, equations 4 to 6, with top_k copies of each token; a mean over layers. float64."""
    found = []
    for layer in np.asarray(logits, np.float64):
        f, P = np.zeros(E), np.zeros(E)
        for at in np.ndindex(layer.shape[:2]):
            if mask[at]:
                p = np.exp(layer[at]) / np.exp(layer[at]).sum()
                P += p / mask.sum()
                f[np.argsort(-p)[:top_k]] += 1 / (top_k * mask.sum())
        found.append(E * f @ P)
    return np.mean(found)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_mean_over_tokens_is_the_papers_loss_and_masked_tokens_take_no_part(top_k):
    logits = draw()
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    batch = {"loss_mask": jnp.asarray(mask)}
    got = mean(LoadBalance(), routed(logits, top_k), batch)
    assert float(got) == pytest.approx(balance(logits, top_k, mask), rel=1e-5)
    other = jnp.where(jnp.asarray(mask)[None, :, :, None] > 0, logits, draw(1))
    assert float(mean(LoadBalance(), routed(other, top_k), batch)) == pytest.approx(float(got), rel=1e-6)


def test_it_is_hf_s_loss_over_top_k_for_one_layer():
    """Their function in numpy: one_hot(top k) [N, k, E] averaged over tokens, times mean probabilities, E times."""
    logits, k = draw()[:1], 2
    p = np.asarray(jax.nn.softmax(logits), np.float64).reshape(-1, E)
    per_expert = np.eye(E)[np.argsort(-p, -1)[:, :k]].mean(0)  # [k, E]
    hf = (per_expert * p.mean(0)[None]).sum() * E
    assert float(mean(LoadBalance(), routed(logits, k), ones())) == pytest.approx(hf / k, rel=1e-5)


def test_the_gradient_goes_through_probabilities_alone_and_evens_the_load():
    logits, batch = draw(), ones()
    grads = jax.grad(lambda x: mean(LoadBalance(), routed(x, 2), batch))(logits)
    assert float(jnp.abs(grads).max()) > 0
    before, after = (mean(LoadBalance(), routed(x, 2), batch) for x in (logits, logits - 100 * grads))
    assert float(after) < float(before)


def test_another_mask_may_say_which_tokens_count():
    logits, batch = draw(), ones() | {"real": jnp.zeros((B, T)).at[0].set(1.0)}
    got = LoadBalance(mask="real")(routed(logits, 2), batch)
    alone = LoadBalance()(routed(logits[:, :1], 2), {"loss_mask": jnp.ones((1, T))})
    np.testing.assert_allclose(got[:1], alone, rtol=1e-6)
    nothing = LoadBalance()(routed(logits, 2), {"loss_mask": jnp.zeros((B, T))})
    np.testing.assert_array_equal(nothing, np.zeros((B, T)))


def test_router_z():
    logits = draw()
    z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    np.testing.assert_allclose(RouterZLoss()(routed(logits, 2), ones()), (z**2).mean(0), rtol=1e-5)
    even = RouterZLoss()(routed(jnp.zeros((L, B, T, E)), 2), ones())
    np.testing.assert_allclose(even, np.log(E) ** 2, rtol=1e-6)


@pytest.mark.parametrize("loss", [LoadBalance(), RouterZLoss()], ids=repr)
def test_what_cannot_be_computed_is_told(loss):
    for out in (answer(1, 2, 3, 4), ModelOut(jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)))):
        with pytest.raises(ValueError, match=r"the model has no experts; set model.mlp=MoeConfig"):
            loss(out, {"loss_mask": jnp.ones((1, 2))})
    with pytest.raises(ValueError, match=r"Chunked: \w+\(.*\) reads .*; use it bare"):
        Chunked(loss, 16)
    assert Chunked(NextToken(), 16).local and isinstance(answer(1, 2, 3, 4), Out)


def test_chunks_of_another_loss_leave_the_routing_alone():
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, T, 2), (2, 3)))
    out = ModelOut(hidden, head, None, Routing(draw(), 2))
    batch = ones() | {"labels": jnp.zeros((B, T), jnp.int32)}
    np.testing.assert_allclose(Chunked(NextToken(), 3)(out, batch), NextToken()(out, batch), rtol=1e-5)


def test_a_batch_without_the_mask_is_told():
    with pytest.raises(ValueError, match=r"no mask 'loss_mask'; it has \['tokens'\]"):
        LoadBalance()(routed(draw(), 2), {"tokens": jnp.zeros((B, T), jnp.int32)})
