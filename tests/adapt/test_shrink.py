"""Smaller models of a larger one's parts: what must not change, and that the parts kept are those worth most."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from tiny_model import CONFIG, KEY, TOKENS, fresh, logits

from lmx import tree
from lmx.adapt import Int8, Lora, Prompt, shrink, smaller, spread, worth
from lmx.models import build, layers
from lmx.nn import AttentionConfig, Local, MlpConfig, MoeConfig, NormConfig
from lmx.ops.position import T5, ALiBi, Learned, Sinusoidal

HINDI = "नदी के किनारे एक पुराना पेड़ था, जिस पर तोते रहते थे। ".encode()
READ = jnp.asarray(np.frombuffer(HINDI * 2, np.uint8)[:240].reshape(10, 24) % 40, jnp.int32)
"""Ten windows of Hindi, of which the last batch is smaller than the others."""
STREAM = "embed|blocks/attn/o/w|blocks/mlp/down/w"
"""What writes to the residual stream."""
KINDS = {
    "tied, grouped": CONFIG,
    "bias, layer norm, learned": replace(
        CONFIG,
        attention=AttentionConfig(4, bias=True, out_bias=True),
        mlp=MlpConfig("gelu", 48, bias=True),
        norm=NormConfig("layer", bias=True),
        position=Learned(32),
        tie_head=False,
    ),
    "Gemma": replace(
        CONFIG,
        attention=AttentionConfig(4, 2, head_dim=12, qk_norm=True, local=Local(4, "LG")),
        norm=NormConfig(offset=1.0),
        placement="sandwich",
        scale_embed=True,
        logit_softcap=20.0,
    ),
    "OLMo": replace(CONFIG, attention=AttentionConfig(4, 2, qk_norm="joint"), placement="inner"),
    "T5's positions": replace(CONFIG, position=T5()),
}


def made(config, seed=0):
    params = build(config).init(jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def answers(config, params, tokens=TOKENS):
    return build(config).apply(params, {"tokens": tokens}).logits


def measured(config, params):
    return worth(config, layers(config), params, READ)


def zeroed(params, path, at):
    return tree.map_at(lambda _, x: x.at[at].set(0.0), params, path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_shape_changes_nothing(kind):
    config = KINDS[kind]
    params, sizes = made(config), {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": config.mlp.d_ff}
    small, same = shrink(config, params, measured(config, params), **sizes)
    assert small == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_is_one_of_its_configuration(kind):
    config = KINDS[kind]
    params = made(config)
    sizes = {"n_layers": 1, "n_heads": None if config.position.biased else 2, "d_ff": 20, "d_model": 24}
    small, params = shrink(config, params, measured(config, params), **sizes)
    wanted = jax.eval_shape(build(small).init, KEY)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), params, wanted)
    assert small == smaller(config, **sizes) or config.attention.local
    found = answers(small, params)[0]
    assert np.isfinite(found).all()
    if kind in list(KINDS)[:2]:  # numpy_model knows no more
        wanted = numpy_model.logits(params, small, TOKENS[:1])[0]
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)


def test_a_layer_that_adds_nothing_goes_first():
    config = replace(CONFIG, n_layers=4)
    params = made(config)
    params = zeroed(params, "blocks/attn/o/w|blocks/mlp/down/w", (jnp.array([1, 3]),))
    found = measured(config, params)
    np.testing.assert_allclose(found.layers[[1, 3]], 0, atol=1e-6)
    assert found.layers[[0, 2]].min() > 0.01
    small, cut = shrink(config, params, found, n_layers=2)
    assert small.n_layers == 2
    np.testing.assert_allclose(answers(small, cut), answers(config, params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_heads_and_units_go_first(kind):
    config = KINDS[kind]
    params, K = made(config), config.attention.kv_heads
    width = 4 // K * config.attention.width(32)
    dead_heads = None if config.position.biased else (K - 1, 0)  # one in each layer
    for layer in range(2):
        units = jnp.arange(layer, config.mlp.d_ff, 3)
        params = zeroed(params, "blocks/mlp/down/w", (layer, units))
        if dead_heads:
            at = slice(dead_heads[layer] * width, (dead_heads[layer] + 1) * width)
            params = zeroed(params, "blocks/attn/o/w", (layer, at))
    if config.attention.qk_norm == "joint":
        dead_heads = None  # its norm sees all heads together, those of no use too
    left = config.mlp.d_ff - len(units)
    sizes = {"d_ff": left, "n_heads": 4 - 4 // K if dead_heads else None}
    small, cut = shrink(config, params, measured(config, params), **sizes)
    assert small.mlp.d_ff == left and small.attention.kv_heads == K - bool(dead_heads)
    np.testing.assert_allclose(answers(small, cut), answers(config, params), rtol=1e-4, atol=1e-4)


def test_features_that_hold_nothing_go_first():
    params = fresh()
    dead = jnp.array([3, 4, 20, 31])
    params = zeroed(params, "embed", (slice(None), dead))
    params = zeroed(params, "blocks/attn/o/w|blocks/mlp/down/w", (slice(None), slice(None), dead))
    small, cut = shrink(CONFIG, params, measured(CONFIG, params), d_model=28)
    assert small.d_model == 28 and small.attention.head_dim == 8
    np.testing.assert_allclose(answers(small, cut), logits(params), rtol=1e-4, atol=1e-4)


def by_hand(config, params, tokens):
    """Each part's worth in float64, from the sublayers' own outputs on rows of tokens, RMS norm before each."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rms = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm.eps) * scale  # noqa: E731
    N, K, H, T = config.attention.n_heads, config.attention.kv_heads, 8, tokens.shape[1]
    x, causal = p["embed"][np.asarray(tokens)], np.tril(np.ones((T, T), bool))
    angle = np.arange(T)[:, None] * 1e4 ** (-np.arange(0, H, 2) / H)

    def turn(y):
        return np.concatenate(
            [
                y[..., :4] * np.cos(angle) - y[..., 4:] * np.sin(angle),
                y[..., 4:] * np.cos(angle) + y[..., :4] * np.sin(angle),
            ],
            -1,
        )

    influence, groups, units = [], [], []
    shares = np.zeros(config.d_model)
    for i in range(config.n_layers):
        w = jax.tree.map(lambda y: y[i], p["blocks"])  # noqa: B023
        start, h = x, rms(x, w["attn_norm"]["scale"])
        q, k, v = ((h @ w["attn"][m]["w"]).reshape(*h.shape[:2], -1, H).swapaxes(1, 2) for m in "qkv")
        q, k, v = turn(q), turn(k).repeat(N // K, 1), v.repeat(N // K, 1)
        scores = np.where(causal, q @ k.swapaxes(2, 3) / H**0.5, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True)) @ v  # [B, N, T, H]
        o = w["attn"]["o"]["w"].reshape(N, H, -1)
        added = np.einsum("bnth,nhd->nbtd", y, o).reshape(K, N // K, *x.shape).sum(1)
        groups.append((added**2).sum(-1).mean((1, 2)))
        x = x + added.sum(0)
        m, mlp = (
            rms(x, w["mlp_norm"]["scale"]),
            {name: w["mlp"][name]["w"] for name in ("gate", "up", "down")},
        )
        gate = m @ mlp["gate"]
        u = gate / (1 + np.exp(-gate)) * (m @ mlp["up"])
        units.append((u**2).mean((0, 1)) * (mlp["down"] ** 2).sum(1))
        x = x + u @ mlp["down"]
        cosine = (start * x).sum(-1) / np.linalg.norm(start, axis=-1) / np.linalg.norm(x, axis=-1)
        influence.append(1 - cosine.mean())
        for size, readers in ((h, [w["attn"][n]["w"] for n in "qkv"]), (m, [mlp["gate"], mlp["up"]])):
            share = (size**2).mean((0, 1)) * sum((r**2).sum(1) for r in readers)
            shares += share / share.sum()
    last = rms(x, p["norm"]["scale"])
    share = (last**2).mean((0, 1)) * (p["embed"] ** 2).sum(0)
    return (
        np.array(influence),
        np.array(groups),
        np.array(units),
        (shares + share / share.sum()) / (2 * len(units) + 1),
    )


def test_worth_is_what_float64_finds():
    params = fresh()
    for found, wanted in zip(measured(CONFIG, params), by_hand(CONFIG, params, READ)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_kept_are_those_of_all_choices_that_are_worth_most():
    config = replace(CONFIG, n_layers=4, attention=AttentionConfig(4, 4), mlp=MlpConfig(d_ff=6))
    params = made(config)
    found = measured(config, params)
    _small, cut = shrink(config, params, found, n_layers=2, n_heads=2, d_ff=3, d_model=29)

    def best(scores, n):
        return max(itertools.combinations(range(len(scores)), n), key=lambda at: scores[list(at)].sum())

    at, features = np.array(best(found.layers, 2)), np.array(best(found.features, 29))
    for here, there in enumerate(at):
        heads, units = (np.array(best(x[there], n)) for x, n in ((found.heads, 2), (found.units, 3)))
        columns = (heads[:, None] * 8 + np.arange(8)).ravel()
        for name, rows, cols in (
            ("attn/v", features, columns),
            ("attn/o", columns, features),
            ("mlp/down", units, features),
        ):
            one, two = name.split("/")
            want = params["blocks"][one][two]["w"][there][rows][:, cols]
            np.testing.assert_array_equal(cut["blocks"][one][two]["w"][here], want)
    np.testing.assert_array_equal(cut["embed"], params["embed"][:, features])


def test_norms_give_what_is_left_its_size_back():
    """Features of which many are small: without the others a norm would make them larger than they were."""
    params = fresh()
    large = np.where(np.arange(32) % 2, 3.0, 0.1)
    large = jnp.asarray(large, jnp.float32)
    params = tree.map_at(lambda _, w: w * jnp.broadcast_to(large, w.shape), params, STREAM)
    small, cut = shrink(CONFIG, params, measured(CONFIG, params), d_model=16)
    kept = np.flatnonzero(np.arange(32) % 2)
    np.testing.assert_array_equal(cut["embed"], params["embed"][:, kept])
    with_all, with_few = (
        layers(c).layer({}, tree.layer(p["blocks"], 0), jnp.int32(0), layers(c).enter(p, READ))[1]["attn"][
            "q"
        ]["w"]
        for c, p in ((CONFIG, params), (small, cut))
    )
    before, after = (np.sqrt(np.diag(x.gram)) for x in (with_all, with_few))
    np.testing.assert_allclose(after, before[kept], rtol=0.05)


def test_local_layers_stay_local():
    config = replace(CONFIG, n_layers=6, attention=AttentionConfig(4, 2, local=Local(4, "LLG")))
    assert smaller(config, n_layers=(0, 2, 5)).attention.local.pattern == "LGG"
    assert spread(1, 6) == (0,) and spread(6, 6) == tuple(range(6))


def test_chance_keeps_other_parts():
    found = measured(CONFIG, fresh())
    mixed = found.shuffled(1)
    for one, other in zip(found[:-1], mixed[:-1]):
        np.testing.assert_array_equal(np.sort(one, -1), np.sort(other, -1))
    assert (mixed.units != found.units).mean() > 0.9


@pytest.mark.parametrize(
    "change, sizes, told",
    [
        ({}, {"n_heads": 3}, "n_heads=3 parts heads that share keys, 2 each; use 2, 4"),
        ({}, {"d_ff": 65}, "d_ff=65; the model has 64, use 1 to 64"),
        ({}, {"n_layers": 0}, "n_layers=0; the model has 2"),
        ({}, {"n_layers": (1, 0)}, "not numbers of layers in order"),
        ({"position": ALiBi()}, {"n_heads": 2}, "tells heads apart by their number"),
        ({"position": Sinusoidal()}, {"d_model": 16}, "adds to each feature by its number"),
        ({"mlp": MoeConfig(d_ff=24, n_experts=4)}, {"d_ff": 12}, "models with experts are not pruned"),
        ({"d_model": 16}, {"d_ff": 12}, "this is another model; measure it anew"),
    ],
)
def test_what_cannot_be_is_said(change, sizes, told):
    config = replace(CONFIG, **change)
    with pytest.raises(ValueError, match=told):
        shrink(config, made(config), measured(CONFIG, fresh()), **sizes)


@pytest.mark.parametrize(
    "surgery, told", [(Int8(), "Dense"), (Lora(2), "Merge"), (Prompt(3), "prompt was learned")]
)
def test_what_stands_on_matrices_is_refused(surgery, told):
    with pytest.raises(ValueError, match=told):
        worth(CONFIG, layers(CONFIG), surgery(fresh(), KEY), READ)
