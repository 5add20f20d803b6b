from math import inf, nan

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import values
from lmx.optim import (
    WSD,
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Linear,
    Lion,
    Muon,
    Sgd,
    Update,
    clip_by_norm,
    ema,
)
from lmx.weights import Weight
from lmx.weights.base import leaf

ALL = [
    AdamW(ema=0.9),
    Lion(ema=0.9),
    Sgd(ema=0.9),
    Adafactor(ema=0.9, weight_decay=0.1),
    Muon(ema=0.9, where="blocks/*/w|blocks/*/w/*"),
]
ids = lambda u: type(u).__name__  # noqa: E731


@leaf
class Pair(Weight):
    a: jax.Array | Weight
    b: jax.Array


def params():
    """Arrays, holes, and weights of two arrays, one of them a weight again."""
    return {
        "embed": {"w": jnp.ones((6, 4))},
        "blocks": {
            "q": {"w": jnp.ones((2, 4, 4)), "b": None},
            "k": {"w": Pair(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 4)))},
            "norm": {"scale": jnp.ones((2, 4))},
        },
        "head": {"w": Pair(Pair(jnp.ones((4, 1)), jnp.ones((1, 6))), jnp.ones((6, 6)))},
        "gate": jnp.ones(()),
    }


@pytest.mark.parametrize("update", ALL, ids=ids)
def test_weight_leaves_and_holes_pass_through_every_optimizer(update):
    p = params()
    tx = update.build(10, p)
    updates, state = jax.jit(tx.update)(p, jax.jit(tx.init)(p), p)
    assert jax.tree.structure(updates) == jax.tree.structure(p)
    assert all(bool((u < 0).all()) for u in jax.tree.leaves(updates))
    again, after = jax.jit(tx.update)(p, state, p)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.structure(again) == jax.tree.structure(p)


@pytest.mark.parametrize("update", ALL, ids=ids)
def test_building_needs_shapes_only_and_state_takes_no_part_in_the_program(update):
    shapes = jax.eval_shape(params)
    state = jax.eval_shape(update.build(10, shapes).init, shapes)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("update", ALL, ids=ids)
def test_repr_rebuilds_it(update):
    assert values.parse(repr(update), Update, "optim") == update
    assert values.parse(values.show(update), Update, "optim") == update


@pytest.mark.parametrize("update", ALL, ids=ids)
def test_state_may_be_donated_beside_the_parameters(update):
    p = params()
    tx = update.build(10, p)
    state = jax.jit(tx.init)(p)

    def step(p, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, p), state, p)
        return jax.tree.map(jnp.add, p, updates), state

    p, state = jax.jit(step, donate_argnums=(0, 1))(p, state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((p, state)))


@pytest.mark.parametrize("update", [AdamW(), Lion(), Sgd()], ids=ids)
def test_updates_in_place_need_no_memory_of_the_size_of_the_parameters(update):
    """With parameters and state donated, nothing of their size is held beside them and the gradients."""
    p = {"blocks": {"q": {"w": jnp.ones((64, 1024))}}}
    tx = update.build(10, p)

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return jax.tree.map(jnp.add, p, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(p, tx.init(p), p).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 1024 * 4 / 8


@pytest.mark.parametrize(
    "update",
    [
        AdamW(0.05, weight_decay=0.0),
        Lion(0.02, weight_decay=0.0),
        Sgd(0.1, clip=None),
        Adafactor(0.05),
        Muon(0.05, where="w", weight_decay=0.0, partner=AdamW(0.05, weight_decay=0.0)),
    ],
    ids=ids,
)
def test_every_optimizer_finds_a_least_squares_solution(update):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 8), (8, 4)))
    y = x @ w + 1.0
    p = {"w": jnp.full((8, 4), 0.1), "b": jnp.full((4,), 0.1)}
    tx = update.build(200, p)

    @jax.value_and_grad
    def loss(p):
        return jnp.mean((x @ p["w"] + jnp.broadcast_to(p["b"], y.shape) - y) ** 2)

    def body(carry, _):
        p, state = carry
        value, g = loss(p)
        updates, state = tx.update(g, state, p)
        return (jax.tree.map(jnp.add, p, updates), state), value

    _, values = jax.jit(lambda: jax.lax.scan(body, (p, tx.init(p)), None, length=200))()
    assert values[-1] < 0.02 * values[0]


def test_clip_is_one_factor_for_all_leaves():
    g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, _ = clip_by_norm(1.0).update(g, clip_by_norm(1.0).init(g))
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[0.8]], rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, g)
    assert not np.any(clip_by_norm(1.0).update(zero, ())[0]["a"])
    broken, _ = clip_by_norm(1.0).update({"a": jnp.array([jnp.nan]), "b": jnp.ones(2)}, ())
    assert np.isnan(broken["a"]).all() and np.isnan(broken["b"]).all()


def test_decay_falls_on_its_pattern_alone():
    p = params()
    zero = jax.tree.map(jnp.zeros_like, p)
    tx = Sgd(0.5, Constant(0), weight_decay=0.1, decay="embed/*|*/q/w").build(10, p)
    updates, _ = tx.update(zero, tx.init(p), p)
    np.testing.assert_allclose(updates["embed"]["w"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["blocks"]["q"]["w"], -0.05, rtol=1e-6)
    rest = [updates["blocks"]["k"], updates["blocks"]["norm"], updates["head"], updates["gate"]]
    assert all(not np.any(u) for u in jax.tree.leaves(rest))


def test_a_decay_pattern_that_fits_nothing_lists_what_is_near():
    with pytest.raises(ValueError, match="embed/w"):
        AdamW(decay="embd/*").build(10, params())
    AdamW(decay="embd/*", weight_decay=0.0).build(10, params())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(lr=-1.0), r"AdamW: lr=-1.0 is not in \[0, inf\)"),
        (lambda: AdamW(clip=0.0), r"AdamW: clip=0.0 is not in \(0, inf\) or None"),
        (lambda: ema(1.0), r"ema=1.0 is not in \[0, 1\)"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


OUTSIDE = {
    Sgd: {
        "lr": (-1.0, inf),
        "weight_decay": (-0.1, inf),
        "clip": (0.0, inf),
        "ema": (1.0,),
        "momentum": (1.0,),
    },
    AdamW: {"b1": (-0.1, 1.0), "b2": (1.0,), "eps": (-1e-8, inf)},
    Lion: {"b1": (1.0,), "b2": (0.0, 1.0)},
    Muon: {"momentum": (-0.1, 1.0), "ns_steps": (0,)},
    Adafactor: {"b2_power": (-0.8, inf), "max_rms": (0.0,), "min_scale": (-1e-3, inf)},
    Linear: {"end": (-0.1, 1.1)},
    Cosine: {"end": (-0.1, 1.1)},
    WSD: {"end": (-0.1, 1.1)},
}


@pytest.mark.parametrize("kind", OUTSIDE, ids=lambda kind: kind.__name__)
def test_numbers_outside_their_range_are_refused(kind):
    for name, wrong in OUTSIDE[kind].items():
        for value in (*wrong, nan):
            with pytest.raises(ValueError, match=f"{kind.__name__}: {name}={value} is not in "):
                kind(**{name: value})
