"""The barrier changes no value, and is in the program only where that is lowered for a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.ops.activation import gelu, swiglu
from lmx.ops.barrier import once
from lmx.ops.norm import layer_norm, rms_norm


def test_once_returns_the_same_arrays():
    tree = {"a": jnp.arange(3.0), "b": (jnp.ones((2, 2), jnp.bfloat16),)}
    for f in (once, jax.jit(once)):
        got = f(tree)
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), got, tree)))


def test_once_passes_through_every_transform():
    x = jnp.linspace(-2, 2, 12).reshape(3, 4)

    def f(x):
        return once(jnp.sin(x)) * x

    def scanned(x):
        return jax.lax.scan(lambda c, row: (c, jax.checkpoint(f)(row)), 0, x)[1]

    expected = np.cos(x) * x + np.sin(x)
    for g in (f, jax.vmap(f), jax.checkpoint(f), scanned):
        np.testing.assert_allclose(
            jax.jit(jax.grad(lambda x, g=g: g(x).sum()))(x), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("platform, fenced", [("cpu", True), ("tpu", False), ("cuda", False)])
def test_programs_have_barriers_for_cpu_alone(platform, fenced):
    """Lowered here, on a CPU host, inside jit, scan, remat and custom gradients."""

    def layer(x, w):
        return gelu(layer_norm(rms_norm(x, w), w)) + swiglu(x, x), None

    def loss(x, w):
        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, w)[0].sum()

    args = jnp.ones((2, 8)), jnp.ones((3, 8))
    program = jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=[platform])(*args).mlir_module()
    assert ("optimization_barrier" in program) == fenced
