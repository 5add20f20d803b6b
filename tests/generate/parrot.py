"""A Transformer with weights chosen so that its greedy completion spells a given list of tokens.

Position p is a unit vector of its own and the head maps it to the token at p; attention and feed-forward
write nothing. After a prompt of n tokens it therefore goes on with tokens[n - 1], tokens[n], ..., whatever
the prompt says.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lmx.models import build
from lmx.models.presets import llama
from lmx.ops.position import Learned


def parrot(tokens, vocab_size, sure=9.0, room=128, **more):
    """sure: the logit of the right token, where all others have 0; after the tokens come zeros."""
    n = D = room
    config = llama(D, 1, 2, vocab_size=vocab_size, tie_head=False, **more)
    config = dataclasses.replace(config, position=Learned(n))
    model = build(config)
    params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(jax.random.key(0)))
    params["position_table"] = jnp.eye(n, D)
    params["norm"]["scale"] = jnp.ones(D)
    params["head"] = (
        sure / D**0.5 * jax.nn.one_hot(jnp.asarray([*tokens, *[0] * (n - len(tokens))]), vocab_size)
    )
    return model, params
