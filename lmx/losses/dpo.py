"""Learning from pairs of replies of which one is preferred, without a reward model.

    r(x, y) = beta * (log p(y | x) - log p_ref(y | x))        the reward that a reply y to x has under the model
    margin = r(x, chosen) - r(x, rejected)

    objective = {
        "dpo": Term(Dpo(), mask="pair_mask"),
        "margin": Term(Margin(), 0.0, "pair_mask"),        measured, not learned
        "accuracy": Term(Preferred(), 0.0, "pair_mask"),
    }

Batches come from `Preferences`, and the reference from `enrich=Reference()`. Each term computes its logits anew: one
more product with the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx import values
from lmx.losses.base import Loss
from lmx.losses.next_token import log_p


@dataclass(frozen=True)
class Margin(Loss):
    """By how much the reward of the chosen reply is above that of the rejected one, in nats times beta. Replies in the
    common beginning of both cancel.

    beta: strength of the pull towards the reference, dimensionless.
    """

    beta: float = 0.1
    local: ClassVar[bool] = False
    of_pairs: ClassVar[bool] = True

    def __post_init__(self):
        values.check(self, beta="(0, inf)")

    def margin(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        """On every token that of its pair.

        Raises: ValueError for a batch that lacks pairs or the reference.
        """
        for name, way in (("rejected_mask", "data of Preferences"), ("reference", "enrich=Reference()")):
            if name not in batch:
                raise ValueError(f"{type(self).__name__}: the batch has no {name!r}; train with {way}")
        gain = log_p(out, batch) - batch["reference"]
        pair = (batch["segment_ids"] + 1) // 2  # segments 1 and 2 are pair 1; padding is 0
        signed = (batch["loss_mask"] - batch["rejected_mask"]) * gain

        def summed(pair, signed):
            return jnp.zeros(pair.shape[0] + 1, jnp.float32).at[pair].add(signed)[pair]

        return self.beta * jax.vmap(summed)(pair, signed)

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        return self.margin(out, batch)


@dataclass(frozen=True)
class Preferred(Margin):
    """1 where the chosen reply has the higher reward, else 0: as a mean the accuracy, in [0, 1]."""

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        return (self.margin(out, batch) > 0).astype(jnp.float32)


@dataclass(frozen=True)
class Dpo(Margin):
    """-(1 - s) log sigmoid(margin) - s log sigmoid(-margin), in nats per pair; log 2 where nothing is learned yet.

    smoothing: s, the share of pairs whose labels are thought to be swapped, in [0, 0.5).
    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; for s, Mitchell 2023, A note on DPO with noisy
      preferences & relationship to IPO (conservative DPO).
    """

    smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        values.check(self, smoothing="[0, 0.5)")

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        margin = self.margin(out, batch)
        s = self.smoothing
        return -(1.0 - s) * jax.nn.log_sigmoid(margin) - s * jax.nn.log_sigmoid(-margin)


@dataclass(frozen=True)
class Ipo(Margin):
    """(margin / beta - 1 / (2 beta))**2, in nats squared per pair: a margin of 1/2 is enough, more is too much.

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17, with beta for tau; of sums over tokens, not of means.
    """

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        return jnp.square((self.margin(out, batch) - 0.5) / self.beta)
