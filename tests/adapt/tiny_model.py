"""A model of two layers and an input, small enough for many surgeries."""

import functools

import jax
import jax.numpy as jnp

from lmx.models import TransformerConfig, build
from lmx.nn import AttentionConfig, MlpConfig

CONFIG = TransformerConfig(
    vocab_size=40,
    d_model=32,
    n_layers=2,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2),
    mlp=MlpConfig(d_ff=64),
)
MODEL = build(CONFIG)
TOKENS = jax.random.randint(jax.random.key(9), (2, 12), 0, 40)
KEY = jax.random.key(4)


def fresh(seed: int = 0):
    """Parameters of which none is zero, one or small beside the others."""
    params = MODEL.init(jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def moved(params, seed: int = 1):
    """Adapters and all other floats as training might leave them."""

    def one(keys, x):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
            return x
        name = str(keys[-1])
        if name in (".a", ".b", ".d", ".magnitude"):
            return x + 0.05 * jax.random.normal(
                jax.random.fold_in(jax.random.key(seed), x.size), x.shape, x.dtype
            )
        return x

    return jax.tree_util.tree_map_with_path(one, params)


@functools.cache
def compiled():
    return jax.jit(lambda params, tokens: MODEL.apply(params, {"tokens": tokens}).logits)


def logits(params, tokens=TOKENS):
    return compiled()(params, tokens)
