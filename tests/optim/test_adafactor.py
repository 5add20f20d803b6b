import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.optim import Adafactor, Constant

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def steps(tx, params, grads):
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    for g in grads:
        params, state = step(params, state, g)
    return params


def ours(lr=0.1, **options):
    return Adafactor(lr, Constant(0), clip=None, **options)


@pytest.mark.parametrize("relative", [True, False])
def test_against_a_loop_from_the_paper(relative):
    params = {"w": draw(6, 9), "b": draw(9)}
    grads = [{"w": draw(6, 9), "b": draw(9)} for _ in range(8)]
    got = steps(
        ours(matrix="w", decay="w", weight_decay=0.01, relative=relative).build(10, params), params, grads
    )
    w, b = (np.asarray(params[k], np.float64) for k in "wb")
    row, col, v = np.zeros(6), np.zeros(9), np.zeros(9)
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    alpha = lambda x: 0.1 * (max(1e-3, rms(x)) if relative else 1.0)  # noqa: E731
    for t, g in enumerate(grads, start=1):
        b2 = 1 - t**-0.8
        gw, gb = (np.asarray(g[k], np.float64) for k in "wb")
        row = b2 * row + (1 - b2) * (gw**2 + 1e-30).sum(1)
        col = b2 * col + (1 - b2) * (gw**2 + 1e-30).sum(0)
        u = gw / np.sqrt(np.outer(row, col) / row.sum())
        w = w - alpha(w) * u / max(1, rms(u)) - 0.1 * 0.01 * w
        v = b2 * v + (1 - b2) * (gb**2 + 1e-30)
        u = gb / np.sqrt(v)
        b = b - alpha(b) * u / max(1, rms(u))
    np.testing.assert_allclose(got["w"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["b"], b, rtol=1e-4, atol=1e-6)


def test_on_one_matrix_it_is_optax():
    params, grads = {"w": draw(6, 9)}, [{"w": draw(6, 9)} for _ in range(5)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = optax.adafactor(0.1, min_dim_size_to_factor=2)
        expected = steps(theirs, params, grads)["w"]
    np.testing.assert_allclose(
        steps(ours(matrix="w").build(10, params), params, grads)["w"], expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(3, 4, 8), (9, 4, 8), (9, 2, 3)])
def test_stacked_layers_move_as_they_would_alone(shape):
    """Shapes where the two largest axes are not the last two included; optax fails these."""
    make = lambda: {"q": {"w": draw(*shape)}, "norm": {"scale": draw(shape[0], shape[2])}}  # noqa: E731
    params, grads = make(), [make() for _ in range(4)]
    scales = jnp.arange(1.0, shape[0] + 1)
    params["q"]["w"] = params["q"]["w"] * scales[:, None, None]
    together = steps(ours().build(10, params), params, grads)
    for i in range(shape[0]):
        p, g = jax.tree.map(lambda x, i=i: x[i], (params, grads))
        alone = steps(ours().build(10, p), p, g)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6), together, alone
        )


def test_a_gradient_of_rank_one_squared_is_kept_exactly():
    """If g**2 is an outer product, the factors lose nothing: the first update is sign(g)."""
    g = jnp.outer(jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, -0.1, 4.0, 1.0]))
    params = {"w": jnp.zeros((3, 4))}
    moved = steps(ours(matrix="w", relative=False).build(10, params), params, [{"w": g}])["w"]
    np.testing.assert_allclose(moved, -0.1 * jnp.sign(g), rtol=1e-5)


def test_state_is_a_row_and_a_column():
    params = {"q": {"w": jnp.zeros((5, 40, 30))}, "norm": {"scale": jnp.zeros((5, 40))}}
    state = ours().build(10, params).init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 5 * (40 + 30) + 5 * 40 + 2


def test_the_size_of_an_update_is_bounded():
    params = {"q": {"w": draw(8, 8)}}
    grads = [{"q": {"w": draw(8, 8) * s}} for s in (1e-3, 1e3)]
    before = steps(ours(relative=False).build(10, params), params, grads[:1])["q"]["w"]
    after = steps(ours(relative=False).build(10, params), params, grads)["q"]["w"]
    assert float(jnp.sqrt(jnp.mean((after - before) ** 2))) <= 0.1 * (1 + 1e-5)
