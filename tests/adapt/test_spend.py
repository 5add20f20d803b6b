"""Bits spent where they count, against every choice there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import CONFIG, KEY, MODEL, TOKENS, fresh

from lmx.adapt import Quantize, Unstack, sensitivity, spend
from lmx.models import layers


@given(seed=st.integers(0, 999), bits=st.floats(2, 8), n_layers=st.integers(1, 4))
def test_the_best_of_all_choices_is_found(seed, bits, n_layers):
    choices = (2, 3, 4, 8)
    losses = np.random.default_rng(seed).random((n_layers, len(choices)))
    chosen = spend(losses, bits, choices)
    assert sum(chosen) <= bits * n_layers + 1e-6
    every = (c for c in itertools.product(choices, repeat=n_layers) if sum(c) <= bits * n_layers + 1e-6)
    cost = {c: sum(losses[i, choices.index(b)] for i, b in enumerate(c)) for c in every}
    assert cost[chosen] == pytest.approx(min(cost.values()))


def test_fewer_bits_than_there_are():
    with pytest.raises(ValueError, match=r"bits=1.5 a weight: no layer has less than 2"):
        spend(np.ones((2, 2)), 1.5, (2, 4))


def test_sensitivity_is_the_kl_of_one_layer_rounded():
    tokens = jax.random.randint(KEY, (2, 12), 0, 40)
    params, done = fresh(), []
    found = sensitivity(layers(CONFIG), params, tokens, (2, 8), 16, seen=lambda *at: done.append(at))
    assert done == [(1, 2), (2, 2)] and (found[:, 0] > 10 * found[:, 1]).all()
    rounded = Quantize(2, 16)(params, KEY)["blocks"]
    for i in range(2):
        mixed = jax.tree.map(lambda x: x, params)
        for part, name in (*(("attn", x) for x in "qkvo"), *(("mlp", x) for x in ("up", "gate", "down"))):
            w = rounded[part][name]["w"].dense()[i]
            mixed["blocks"][part][name]["w"] = params["blocks"][part][name]["w"].at[i].set(w)
        p, q = (
            np.asarray(jax.nn.log_softmax(MODEL.apply(x, {"tokens": tokens}).logits), np.float64)
            for x in (params, mixed)
        )
        np.testing.assert_allclose(found[i, 0], (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-3)
    assert jnp.isfinite(found).all()


def test_a_pattern_that_leaves_out_layers_is_refused():
    params = Unstack()(fresh(), KEY)
    with pytest.raises(ValueError, match=r"'blocks/1/\*' chooses among layers, and bits are spent on all"):
        sensitivity(layers(CONFIG), params, TOKENS, where="blocks/1/*")
    with pytest.raises(ValueError, match="fits no matrix; there are blocks/0/attn/k/w"):
        sensitivity(layers(CONFIG), params, TOKENS, where="blocks/9/*")
