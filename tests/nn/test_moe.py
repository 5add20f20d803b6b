"""The mixture of experts as a module: its parameters, its counts and what its settings refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import tree, values
from lmx.nn import BlockConfig, MlpConfig, Moe, MoeConfig
from lmx.ops.experts import mix
from lmx.weights import Transposed

CONFIG = MoeConfig(d_ff=6, n_experts=4, top_k=2)


def module(config=CONFIG):
    return config.module(0.5, 0.25, mix)


def init(config=CONFIG):
    return jax.jit(module(config).init)(jax.random.key(0), x())["params"]


def run(params, dtype="float32"):
    return jax.jit(module().apply)({"params": params}, x(dtype))


def x(dtype="float32"):
    return jax.random.normal(jax.random.key(1), (2, 5, 8)).astype(dtype)


def test_parameters_are_named_and_shaped_as_documented():
    params = init()
    shapes = dict(zip(tree.paths(params), (p.shape for p in jax.tree.leaves(params))))
    assert shapes == {
        "router/w": (8, 4),
        "experts/up/w": (4, 8, 6),
        "experts/gate/w": (4, 8, 6),
        "experts/down/w": (4, 6, 8),
    }
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    plain = init(MoeConfig("gelu", d_ff=6))
    assert set(plain["experts"]) == {"up", "down"}
    wide = init(MoeConfig(d_ff=60, n_experts=32))
    assert float(wide["experts"]["up"]["w"].std()) == pytest.approx(0.5, rel=0.02)
    assert float(wide["experts"]["down"]["w"].std()) == pytest.approx(0.25, rel=0.02)


def test_logits_are_float32_and_the_result_has_the_dtype_of_the_tokens():
    params = init()
    y, logits = run(params, "bfloat16")
    assert y.dtype == jnp.bfloat16 and logits.dtype == jnp.float32 and logits.shape == (2, 5, 4)
    exact = np.asarray(x("bfloat16"), np.float64) @ np.asarray(params["router"]["w"], np.float64)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def test_a_stack_may_be_any_leaf_of_the_right_shape():
    params = init()
    want, _ = run(params)
    turned = dict(
        params, experts=jax.tree.map(lambda w: Transposed(jnp.swapaxes(w, 1, 2)), params["experts"])
    )
    np.testing.assert_allclose(run(turned)[0], want, rtol=1e-5, atol=1e-6)
    params["experts"]["down"]["w"] = jnp.zeros((4, 8, 6))
    with pytest.raises(
        ValueError, match=r"experts/down/w has shape \(4, 8, 6\), this model wants \(4, 6, 8\)"
    ):
        run(params)


def test_experts_alike_are_one_layer():
    """If all experts hold the same matrices and their weights add up to 1, the mixture is that layer."""
    params = init()
    params["experts"] = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), params["experts"])
    one = {name: {"w": p["w"][0]} for name, p in params["experts"].items()}
    want, none = MlpConfig(d_ff=6).module(0.5, 0.25, mix).apply({"params": one}, x())
    got, _ = run(params)
    assert none is None
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_counts_of_weights():
    params = init()
    assert CONFIG.n_weights(8) == tree.count(params)
    assert CONFIG.n_active(8) == 8 * 4 + 2 * 3 * 8 * 6
    assert MlpConfig("gelu", d_ff=6).n_active(8) == MlpConfig("gelu", d_ff=6).n_weights(8) == 2 * 8 * 6


@pytest.mark.parametrize("n_experts, top_k", [(128, 8), (8, 1), (3, 3), (1, 1)])
def test_a_tiny_one_is_still_a_mixture(n_experts, top_k):
    tiny = MoeConfig(d_ff=999, n_experts=n_experts, top_k=top_k, renormalise=False).tiny()
    assert tiny == MoeConfig(n_experts=min(n_experts, 4), top_k=min(top_k, 2), renormalise=False)
    assert MlpConfig("gelu", 7).tiny() == MlpConfig("gelu")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_experts": 0}, "n_experts=0 must be at least 1"),
        ({"n_experts": 4, "top_k": 5}, "top_k=5 must lie in 1 to n_experts=4"),
        ({"top_k": 0}, "top_k=0 must lie in 1 to n_experts=8"),
        ({"bias": True}, "bias=True; experts have no biases, use bias=False"),
        ({"activation": "tanh"}, "activation='tanh'"),
    ],
)
def test_wrong_settings_are_refused_when_written(settings, message):
    with pytest.raises(ValueError, match=message):
        MoeConfig(**settings)


def test_a_block_with_experts_rebuilds_from_its_text():
    config = BlockConfig(mlp=MoeConfig("geglu", 7, n_experts=3, top_k=1, renormalise=False))
    assert values.parse(values.show(config), BlockConfig) == config
    assert values.override(config, {"mlp.top_k": "2"}).mlp.top_k == 2
    assert values.override(config, {"mlp": "MoeConfig(n_experts=16)"}).mlp == MoeConfig(n_experts=16)
    assert isinstance(module(), Moe)


def test_each_expert_says_what_reached_it():
    """Grams, extents and counts in float64, by a router of numpy's; the last expert gets no token."""
    params = init()
    params["router"]["w"] = params["router"]["w"].at[:, 3].set(-9.0)
    tokens = jnp.abs(x())
    _, found = module().apply({"params": params}, tokens, mutable=["stats"])
    rows = np.asarray(tokens, np.float64).reshape(-1, 8)
    up, gate = (np.asarray(params["experts"][name]["w"], np.float64) for name in ("up", "gate"))
    chosen = np.argsort(-rows @ np.asarray(params["router"]["w"], np.float64), axis=1)[:, :2]
    for e in range(4):
        mine = rows[(chosen == e).any(1)]
        a = mine @ gate[e]
        for name, read in (("up", mine), ("gate", mine), ("down", a / (1 + np.exp(-a)) * (mine @ up[e]))):
            inputs = found["stats"]["experts"][name]["w"]
            np.testing.assert_allclose(inputs.gram[e], read.T @ read, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(
                inputs.largest[e], np.abs(read).max(0, initial=0), rtol=1e-5, atol=1e-5
            )
            assert inputs.n[e] == len(mine)
    assert len(mine) == 0 and inputs.n.sum() == 2 * len(rows)
