"""An objective: named terms, each a loss with a weight and a mask, summed over tokens and divided once.

    total = sum over terms of weight * sum(loss * mask) / n,      n = sum of the mask over the whole batch

`n` comes from `counts` on the whole batch and goes into `total` for each micro-batch or shard. Sums of totals
and of their gradients then equal those of the undivided batch, which a mean of means does not when masks are
uneven.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx import values
from lmx.losses.base import Loss


@dataclass(frozen=True)
class Term:
    """A loss, its weight in the total (0 measures it), and the name of the batch entry [B, T] that says which tokens
    count (1, 0 or a share between).

    Raises: ValueError for a loss of pairs with another mask than "pair_mask", or that mask with another loss.
    """

    loss: Loss
    weight: float = 1.0
    mask: str = "loss_mask"

    def __post_init__(self):
        values.check(self, weight="(-inf, inf)")
        if self.loss.of_pairs != (self.mask == "pair_mask"):
            of = "pairs of replies" if self.loss.of_pairs else "tokens"
            way = 'mask="pair_mask"' if self.loss.of_pairs else 'another mask, such as "loss_mask"'
            raise ValueError(f"Term: {self.loss} is of {of}, and mask={self.mask!r} counts others; use {way}")


def reads(objective: Mapping[str, Term]) -> tuple[str, ...]:
    """What its terms read of every layer, each name once."""
    return tuple(dict.fromkeys(name for term in objective.values() for name in term.loss.reads))


def counts(objective: Mapping[str, Term], batch: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
    """The sum of each term's mask, float32, in tokens. Plain sums: over shards they add up (`psum`).

    Raises: ValueError for an empty objective or a mask that the batch lacks.
    """
    if not objective:
        raise ValueError('objective: it has no terms; use {"ce": Term(NextToken())}')
    return {name: _mask(name, term, batch).sum() for name, term in objective.items()}


def total(
    objective: Mapping[str, Term], out: Any, batch: Mapping[str, Any], n: Mapping[str, Array]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of the terms, and each term alone without its weight; float32, in each loss's unit per
    token.

    Args:
      out, batch: of the whole batch or of one micro-batch.
      n: `counts` of the whole batch. A term with no token to count gives 0.
    """
    terms = {}
    for name, term in objective.items():
        summed = (term.loss(out, batch) * _mask(name, term, batch)).sum()
        some = n[name] > 0
        terms[name] = jnp.where(some, summed / jnp.where(some, n[name], 1.0), 0.0)
    weighted = [term.weight * terms[name] for name, term in objective.items()]
    return sum(weighted[1:], weighted[0]), terms


def _mask(name, term, batch):
    if term.mask not in batch:
        raise ValueError(
            f"objective term {name!r}: the batch has no mask {term.mask!r}; it has {sorted(batch)}"
        )
    return batch[term.mask].astype(jnp.float32)
