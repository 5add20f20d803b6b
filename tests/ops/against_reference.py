"""What tests of attention share: inputs, and equality with the form to read, forward and gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lmx.ops.attention import attention
from lmx.ops.mask import Causal, SameSegment, SlidingWindow

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
CAUSAL = Causal() & SameSegment()
WINDOW = SlidingWindow(7) & SameSegment()


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(B, T, N, K, H, dtype="float32", S=None):
    return draw(0, B, T, N, H, dtype=dtype), *(draw(i, B, S or T, K, H, dtype=dtype) for i in (1, 2))


def value_and_gradients(f, args, g):
    @jax.jit
    def run(args, g):
        out, pull = jax.vjp(f, *args)
        return out, pull(g)

    return run(args, g)


def assert_equal_to_reference(path, args, dtype="float32", make_bias=None, **rule):
    """Value and gradients with respect to q, k, v and the bias's weights.

    |difference| <= 32 eps of the dtype times the largest value: the same terms, in another order.
    """
    g = draw(9, *args[0].shape, dtype=dtype)

    def call(f, q, k, v, *weights):
        return f(q, k, v, bias=make_bias and make_bias(*weights), **rule)

    expected, got = (
        jax.tree.leaves(value_and_gradients(partial(call, f), args, g)) for f in (attention, path)
    )
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        assert np.abs(a - b).max() <= 32 * EPS[dtype] * max(np.abs(b).max(), 1.0)
