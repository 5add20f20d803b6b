"""Routing and mixing against float64 loops over tokens, and what may be exchanged without any effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from lmx.ops.activation import silu, swiglu
from lmx.ops.experts import mix, pick, route

B, T, D, E, F = 2, 5, 6, 4, 3


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), jnp.float32)


def experts(seed=0):
    return (draw(E, D, F, seed=seed), draw(E, D, F, seed=seed + 1)), draw(E, F, D, seed=seed + 2)


def loop(x, logits, top_k, renormalise, into, out):
    """float64: for each token softmax over all experts, the top_k of them, and their weighted sum."""
    x, logits, gate, up, down = (np.asarray(a, np.float64) for a in (x, logits, *into, out))
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        p = np.exp(logits[at]) / np.exp(logits[at]).sum()
        chosen = np.argsort(-p, kind="stable")[:top_k]
        for e in chosen:
            g = x[at] @ gate[e]
            expert = (g / (1 + np.exp(-g)) * (x[at] @ up[e])) @ down[e]
            y[at] += expert * p[e] / (p[chosen].sum() if renormalise else 1.0)
    return y


@jax.jit(static_argnums=(2, 3))
def mixed(x, logits, top_k, renormalise, into, out):
    return mix(x, *route(logits, top_k, renormalise), into, out, swiglu)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_a_mixture_equals_a_float64_loop_over_tokens(top_k, renormalise):
    x, logits = draw(B, T, D), draw(B, T, E)
    into, out = experts()
    got = mixed(x, logits, top_k, renormalise, into, out)
    np.testing.assert_allclose(got, loop(x, logits, top_k, renormalise, into, out), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, E), renormalise=st.booleans())
def test_routing(seed, top_k, renormalise):
    logits = draw(B, T, E, seed=seed)
    ids, weights = route(logits, top_k, renormalise)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    np.testing.assert_array_equal(ids, jax.lax.top_k(logits, top_k)[1])
    want = np.take_along_axis(p, np.asarray(ids), -1)
    want = want / want.sum(-1, keepdims=True) if renormalise else want
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32


def test_ties_go_to_the_first_experts_and_low_precision_is_widened():
    ids, weights = route(jnp.zeros((1, E), jnp.bfloat16), 3)
    np.testing.assert_array_equal(ids, [[0, 1, 2]])
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-7)


def test_exchanging_experts_with_their_logits_changes_nothing():
    x, logits = draw(B, T, D), draw(B, T, E)
    into, out = experts()
    other = jnp.array([2, 0, 3, 1])
    got = mixed(x, logits[..., other], 2, True, tuple(w[other] for w in into), out[other])
    np.testing.assert_allclose(got, mixed(x, logits, 2, True, into, out), rtol=1e-5, atol=1e-6)


def test_a_token_does_not_feel_the_others():
    x, logits = draw(B, T, D), draw(B, T, E)
    into, out = experts()
    alone = mixed(x[:1, 2:3], logits[:1, 2:3], 2, True, into, out)
    np.testing.assert_allclose(mixed(x, logits, 2, True, into, out)[:1, 2:3], alone, rtol=1e-5, atol=1e-6)


def dense(x, logits, into, out):
    """The mixture with every expert in it, without sorting."""
    gate, up = (jnp.einsum("btd,edf->btef", x, w) for w in into)
    y = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, out)
    return jnp.einsum("bted,bte->btd", y, jax.nn.softmax(logits))


def test_all_experts_are_the_dense_mixture_and_so_are_the_gradients():
    arguments = draw(B, T, D), draw(B, T, E), *experts()

    def sparse(x, logits, into, out):
        return mixed(x, logits, E, True, into, out)

    def slopes(f):
        return jax.jit(jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2, 3)))(*arguments)

    np.testing.assert_allclose(sparse(*arguments), dense(*arguments), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), slopes(sparse), slopes(dense)
    )


def test_gradients_of_chosen_experts_equal_those_of_a_masked_dense_mixture():
    """With top_k = 2 and no renormalising, what is not chosen has weight 0 and the rest its probability."""
    x, logits, (into, out) = draw(B, T, D), draw(B, T, E), experts()
    top = jnp.sum(jax.nn.one_hot(jax.lax.top_k(logits, 2)[1], E), axis=-2)

    def masked(x, logits, into, out):
        gate, up = (jnp.einsum("btd,edf->btef", x, w) for w in into)
        y = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, out)
        return jnp.einsum("bted,bte->btd", y, jax.nn.softmax(logits) * top)

    def slopes(f):
        return jax.jit(jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2, 3)))(x, logits, into, out)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        slopes(lambda x, logits, into, out: mixed(x, logits, 2, False, into, out)),
        slopes(masked),
    )


@pytest.mark.parametrize("rows, width", [(8, 4), (3, 5)], ids=["divided", "whole"])
def test_a_mesh_changes_neither_values_nor_gradients(rows, width):
    """Rows over data and fsdp, each expert's width over tensor; what does not divide is on every device."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    ids, weights = route(draw(rows, T, E), 2)
    into, out = (draw(E, D, width), draw(E, D, width, seed=1)), draw(E, width, D)

    def value_and_slopes(mix):
        def f(x, weights, into, out):
            return jnp.sin(mix(x, ids, weights, into, out, swiglu)).sum()

        return jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(draw(rows, T, D), weights, into, out)

    got, want = value_and_slopes(pick(mesh)), value_and_slopes(pick())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_bfloat16_tokens_and_a_plain_activation():
    x, logits, (into, out) = draw(B, T, D), draw(B, T, E), experts()
    ids, weights = route(logits, 2)
    exact = mix(x, ids, weights, into[:1], out, silu)
    low = mix(x.astype(jnp.bfloat16), ids, weights, into[:1], out, silu)
    assert low.dtype == exact.dtype == jnp.float32
    assert float(jnp.abs(low - exact).max()) < 0.03 * float(jnp.abs(exact).max())
