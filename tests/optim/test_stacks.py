"""Matrices stacked by layer and expert, [L, E, d_in, d_out], are updated and decayed as each would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import optim

UPDATES = [optim.Muon(clip=None), optim.AdamW(clip=None), optim.Adafactor(clip=None, weight_decay=0.1)]


@pytest.mark.parametrize("update", UPDATES, ids=lambda u: type(u).__name__)
def test_experts_move_as_they_would_alone(update):
    def tree(w):
        return {"blocks": {"mlp": {"experts": {"up": {"w": w}}}}}

    def moved(w, g):
        tx = update.build(10, tree(w))
        updates, _ = jax.jit(tx.update)(tree(g), tx.init(tree(w)), tree(w))
        return np.asarray(updates["blocks"]["mlp"]["experts"]["up"]["w"])

    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.standard_normal((2, 3, 4, 6)), jnp.float32) for _ in range(2))
    got = moved(w, g)
    for at in np.ndindex(2, 3):
        np.testing.assert_allclose(got[at], moved(w[at], g[at]), rtol=1e-4, atol=1e-8)
    still = moved(w, jnp.zeros_like(g))
    np.testing.assert_allclose(still, still[0, 0, 0, 0] / w[0, 0, 0, 0] * w, rtol=1e-5)
    assert np.abs(still).min() > 0  # decay alone is left
