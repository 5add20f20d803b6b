import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.optim import AdamW, Constant, Muon, Sgd, ema, ema_params


def averages(decay, positions):
    """The mean after each update, with parameters moved through the given positions."""
    tx = ema(decay)
    params = {"w": jnp.float32(positions[0])}
    state, means = tx.init(params), []
    for x in positions[1:]:
        updates = {"w": jnp.float32(x) - params["w"]}
        _, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        means.append(float(ema_params(state)["w"]))
    return means


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_on_a_line_the_average_lags_by_a_closed_form(decay):
    """p_i = i: the sum of (1 - d) d**(t - i) i is t - d (1 - d**t) / (1 - d), here over 1 - d**t."""
    n = 40
    expected = [t / (1 - decay**t) - decay / (1 - decay) for t in range(1, n + 1)]
    np.testing.assert_allclose(averages(decay, range(n + 1)), expected, rtol=2e-4)


def test_where_the_run_starts_has_no_share():
    np.testing.assert_allclose(averages(0.99, [1e3, 2.0, 2.0, 2.0]), 2.0, rtol=1e-4)


def test_before_the_first_update_it_is_a_copy_of_the_parameters():
    params = {"w": jnp.arange(3.0)}
    state = ema(0.9).init(params)
    np.testing.assert_array_equal(ema_params(state)["w"], params["w"])
    assert ema_params(state)["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_it_is_found_in_any_chain_and_averages_all_parameters(kind):
    params = {"blocks": {"q": {"w": jnp.eye(3)[None]}}, "norm": {"scale": jnp.ones(3)}}
    tx = optax.chain(optax.identity(), kind(ema=0.9, weight_decay=0.0).build(10, params))
    updates, state = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ema_params(state), after)
    assert ema_params(kind(weight_decay=0.0).build(10, params).init(params)) is None


def test_two_averages_are_not_one():
    params = {"w": jnp.ones(2)}
    tx = optax.chain(ema(0.9), ema(0.99))
    with pytest.raises(ValueError, match="2 averages"):
        ema_params(tx.init(params))


def test_it_needs_the_parameters():
    tx = Sgd(0.1, Constant(), ema=0.5).build(10, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
