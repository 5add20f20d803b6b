"""AdamW, Lion and SGD against float64 loops written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.optim import AdamW, Constant, Cosine, Lion, Sgd

STEPS = 20
SHAPES = {"embed": {"w": (7, 4)}, "blocks": {"q": {"w": (3, 4, 5), "b": (3, 5)}}, "norm": {"scale": (4,)}}
DECAYED = {("embed", "w"), ("blocks", "q", "w")}


def flat(tree):
    return {tuple(k.key for k in keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def normal(rng, scale):
    draw = lambda shape: (scale * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def run(update, rng, scale=1.0):
    """(parameters after 20 jitted steps, those at the start, the gradients), all by path."""
    start, grads = normal(rng, 1.0), [normal(rng, scale) for _ in range(STEPS)]
    params = jax.tree.map(jnp.asarray, start)
    tx = update.build(STEPS, params)
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, g)
    return flat(params), flat(start), [flat(g) for g in grads]


def clipped(g, largest):
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g.values()))
    return {k: x * min(1.0, largest / norm) for k, x in g.items()}


def rate(lr, t):
    """Cosine to a tenth over 20 steps without warmup, t from 0."""
    return lr * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * t / STEPS)))


def agree(got, expected):
    for path, x in expected.items():
        np.testing.assert_allclose(got[path], x, rtol=2e-5, atol=2e-6, err_msg=str(path))


def test_adamw_follows_algorithm_2():
    lr, b1, b2, eps, wd, clip = 0.02, 0.8, 0.9, 1e-6, 0.3, 2.0
    update = AdamW(lr, Cosine(0), wd, clip=clip, b1=b1, b2=b2, eps=eps)
    got, p, grads = run(update, np.random.default_rng(0))
    p = {k: x.astype(np.float64) for k, x in p.items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, g in enumerate(grads, start=1):
        g = clipped(g, clip)
        for k in p:
            m[k] = b1 * m[k] + (1 - b1) * g[k]
            v[k] = b2 * v[k] + (1 - b2) * g[k] ** 2
            step = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            p[k] = p[k] - rate(lr, t - 1) * (step + (wd * p[k] if k in DECAYED else 0.0))
    agree(got, p)


def test_lion_follows_algorithm_2():
    lr, b1, b2, wd = 0.01, 0.9, 0.97, 0.5
    got, p, grads = run(Lion(lr, Cosine(0), wd, clip=None, b1=b1, b2=b2), np.random.default_rng(1))
    p = {k: x.astype(np.float64) for k, x in p.items()}
    m = {k: np.zeros_like(x) for k, x in p.items()}
    for t, g in enumerate(grads):
        for k in p:
            step = np.sign(b1 * m[k] + (1 - b1) * g[k])
            p[k] = p[k] - rate(lr, t) * (step + (wd * p[k] if k in DECAYED else 0.0))
            m[k] = b2 * m[k] + (1 - b2) * g[k]
    agree(got, p)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_with_momentum(momentum, nesterov):
    lr = 0.05
    update = Sgd(lr, Cosine(0), clip=1.0, momentum=momentum, nesterov=nesterov)
    got, p, grads = run(update, np.random.default_rng(2))
    p = {k: x.astype(np.float64) for k, x in p.items()}
    m = {k: np.zeros_like(x) for k, x in p.items()}
    for t, g in enumerate(grads):
        g = clipped(g, 1.0)
        for k in p:
            m[k] = momentum * m[k] + g[k]
            p[k] = p[k] - rate(lr, t) * (g[k] + momentum * m[k] if nesterov else m[k])
    agree(got, p)


def test_gradients_below_the_bound_are_not_clipped():
    rng = np.random.default_rng
    update = Sgd(0.1, Constant(0), clip=1e3)
    free = Sgd(0.1, Constant(0), clip=None)
    got, _, _ = run(update, rng(3), 1e-2)
    expected, _, _ = run(free, rng(3), 1e-2)
    for path, x in expected.items():
        np.testing.assert_allclose(got[path], x, rtol=1e-6, atol=1e-7)  # fused or not, an update rounds once


def test_adamw_equals_optax_where_both_run():
    with jax.numpy_dtype_promotion("standard"):
        params = {"w": jnp.asarray(np.random.default_rng(4).normal(size=(5, 3)), jnp.float32)}
        ours = AdamW(1e-2, Constant(0), 0.1, decay="w", clip=None).build(10, params)
        theirs = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1)
        a, b = ours.init(params), theirs.init(params)
        for seed in range(5):
            g = jax.tree.map(lambda p, s=seed: jax.random.normal(jax.random.key(s), p.shape), params)
            x, a = ours.update(g, a, params)
            y, b = theirs.update(g, b, params)
            np.testing.assert_allclose(x["w"], y["w"], rtol=1e-5)


def test_a_gradient_of_zero_moves_nothing_and_is_no_division_by_zero():
    params = {"blocks": {"w": jnp.ones((2, 2))}}
    tx = AdamW(weight_decay=0.0).build(3, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["blocks"]["w"], 0.0)
