"""A model's answer as the losses see it, and a batch for it: what `models.Out` has, without a model."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from lmx.weights import linear


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Out:
    hidden: jax.Array
    head: jax.Array
    softcap: float | None = field(default=None, metadata={"static": True})

    @property
    def logits(self):
        logits = linear(self.hidden, self.head).astype(jnp.float32)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def answer(B, T, D, V, seed=0, softcap=None):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V)) / D**0.5
    return Out(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), softcap)


def batch(B, T, V, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "labels": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "loss_mask": jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32),
    }
