"""All that a training run carries from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmx import tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """step: int32, updates tried so far, which is also the number of the next batch.
    trainable, frozen: the parameters, each with None where the other holds the leaf.
    constants: arrays that take part but never change, such as a teacher's parameters.
    key: uint32 [2], the run's random key; skipped: int32, updates left out as not finite; streak: how many of
    them in a row, now.
    """

    step: jax.Array
    trainable: Any
    frozen: Any
    constants: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    streak: jax.Array

    @property
    def params(self) -> Any:
        return tree.combine(self.trainable, self.frozen)


def new_state(
    params: Any, pattern: str, tx: optax.GradientTransformation, key: jax.Array, constants: Any = None
) -> State:
    """The state before the first step.

    Raises: ValueError if the pattern of trainable paths fits none, or one that holds integers.
    """
    trainable, frozen = tree.partition(params, pattern)
    for path, x in zip(tree.paths(trainable), jax.tree.leaves(trainable)):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"trainable={pattern!r} selects {path}, whose {x.dtype} values have no gradient; leave it out"
            )
    zero = jnp.zeros((), jnp.int32)
    return State(zero, trainable, frozen, constants, tx.init(trainable), jax.random.key_data(key), zero, zero)
