import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.optim import AdamW, Constant, Muon, orthogonal

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (3, 24, 16)])
def test_singular_values_are_near_one_and_directions_are_those_of_the_svd(shape):
    m = draw(*shape)
    got = np.asarray(orthogonal(jnp.asarray(m)), np.float64)
    u, s, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    aligned = np.swapaxes(u, -1, -2) @ got @ np.swapaxes(vt, -1, -2)
    diagonal = np.diagonal(aligned, axis1=-2, axis2=-1)
    big = s > 0.02 * np.linalg.norm(s, axis=-1, keepdims=True)
    assert big.mean() > 0.9 and (diagonal[big] > 0.65).all() and (diagonal[big] < 1.25).all()
    np.testing.assert_allclose(aligned - np.eye(s.shape[-1]) * diagonal[..., None, :], 0.0, atol=2e-3)


def test_it_follows_the_published_iteration():
    m = draw(6, 10).astype(np.float64)
    x = m / np.linalg.norm(m)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    np.testing.assert_allclose(orthogonal(jnp.asarray(m, jnp.float32)), x, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(orthogonal(jnp.asarray(m.T, jnp.float32)), x.T, rtol=1e-3, atol=1e-4)


def test_zero_stays_zero():
    assert not np.any(orthogonal(jnp.zeros((4, 3))))


def steps(update, params, grads):
    tx = update.build(10, params)
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    for g in grads:
        params, state = step(params, state, g)
    return params


def test_stacked_layers_move_as_they_would_alone():
    stacked = {"blocks": {"q": {"w": jnp.asarray(draw(3, 8, 12))}}}
    grads = [{"blocks": {"q": {"w": jnp.asarray(draw(3, 8, 12))}}} for _ in range(4)]
    update = Muon(0.1, Constant(0), clip=None)
    together = steps(update, stacked, grads)["blocks"]["q"]["w"]
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], (stacked, grads))
        np.testing.assert_allclose(together[i], steps(update, *one)["blocks"]["q"]["w"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "factor"), [("adamw", 0.2 * 12**0.5), ("spectral", (12 / 8) ** 0.5)])
def test_momentum_scale_and_decay_against_a_loop(scale, factor, nesterov):
    lr, wd, b = 0.1, 0.2, 0.9
    p = draw(8, 12).astype(np.float64)
    grads = [draw(8, 12) for _ in range(5)]
    tree = lambda x: {"blocks": {"q": {"w": jnp.asarray(x, jnp.float32)}}}  # noqa: E731
    update = Muon(lr, Constant(0), wd, clip=None, momentum=b, scale=scale, nesterov=nesterov)
    got = steps(update, tree(p), [tree(g) for g in grads])["blocks"]["q"]["w"]
    m = np.zeros_like(p)
    for g in grads:
        m = b * m + (1 - b) * g
        x = b * m + (1 - b) * g if nesterov else m
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        p = p - lr * (factor * x + wd * p)
    np.testing.assert_allclose(got, p, rtol=1e-3, atol=2e-4)


def test_updates_have_the_size_of_adamws():
    for shape in ((32, 128), (128, 32), (64, 64)):
        params = {"blocks": {"q": {"w": jnp.asarray(draw(*shape))}}}
        grads = [params]
        moved = steps(Muon(1.0, Constant(0), weight_decay=0.0), params, grads)
        step = moved["blocks"]["q"]["w"] - params["blocks"]["q"]["w"]
        assert 0.14 < float(jnp.sqrt(jnp.mean(step**2))) < 0.24


def test_the_partner_takes_what_is_no_matrix_of_the_blocks():
    params = {
        "embed": {"w": jnp.asarray(draw(9, 4))},
        "blocks": {"q": {"w": jnp.asarray(draw(2, 4, 4)), "b": jnp.asarray(draw(2, 4))}, "hole": None},
        "norm": {"scale": jnp.asarray(draw(4))},
    }
    grads = [jax.tree.map(lambda p: jnp.asarray(draw(*p.shape)), params) for _ in range(3)]
    partner = AdamW(0.01, Constant(0), clip=None)
    got = steps(Muon(0.1, Constant(0), clip=None, partner=partner), params, grads)
    alone = steps(partner, params, grads)
    for path in ("embed", "norm"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got[path], alone[path])
    np.testing.assert_allclose(got["blocks"]["q"]["b"], alone["blocks"]["q"]["b"], rtol=1e-6)
    assert not np.allclose(got["blocks"]["q"]["w"], alone["blocks"]["q"]["w"], atol=1e-2)


def test_one_clip_sees_all_gradients():
    """A huge gradient of the embedding shrinks the momentum of a matrix: the norm is global."""
    params = {"embed": {"w": jnp.ones((2, 2))}, "blocks": {"q": {"w": jnp.eye(2)}}}
    grads = {"embed": {"w": jnp.full((2, 2), 50.0)}, "blocks": {"q": {"w": jnp.eye(2)}}}
    tx = Muon(clip=1.0).build(10, params)
    _, state = tx.update(grads, tx.init(params), params)
    momentum = [x for x in jax.tree.leaves(state) if x.shape == (2, 2)]
    norm = np.sqrt(4 * 50.0**2 + 2)
    assert any(np.allclose(x, 0.05 * np.eye(2) / norm, rtol=1e-5) for x in momentum)


def test_agrees_with_optax_on_a_plain_matrix():
    g = jnp.asarray(draw(8, 12))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = optax.contrib.scale_by_muon(
            nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
        )
        expected, _ = theirs.update(g, theirs.init(g))
    np.testing.assert_allclose(orthogonal(g), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda: Muon(scale="big"), '"adamw" or "spectral"'),
        (lambda: Muon(partner=AdamW(ema=0.9)), "Muon's own ema"),
        (lambda: Muon(where="layers/*"), "fits no parameter"),
        (lambda: Muon(where="norm/*"), "norm/scale of shape .4,., which is no matrix"),
    ],
)
def test_mistakes_are_told(update, message):
    params = {"blocks": {"q": {"w": jnp.ones((4, 4))}}, "norm": {"scale": jnp.ones(4)}}
    with pytest.raises(ValueError, match=message):
        update().build(10, params)
