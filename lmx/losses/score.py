"""Learning a number in [0, 1]: what a teacher makes of a text, or the share of annotators who say yes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx import values
from lmx.losses.base import Loss


@dataclass(frozen=True)
class SoftLabels(Loss):
    """-s log p - (1 - s) log(1 - p) in nats, where p is the probability of the second of two classes and s the score;
    least, and then the entropy of s, at p = s. Its gradient in the logits' difference is p - s.

    Batches have `scores` [B, T] from `lmx.tasks.Answers` of a task whose answer is a `Score`; the head is
    `lmx.adapt.Classes(2)`.
    Raises: ValueError, when called, for a batch without scores or another number of classes.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, for two classes at temperature 1.
    """

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        z, s = self._pair(out, batch)
        return jax.nn.softplus(z) - s * z

    def _pair(self, out, batch):
        """(the logit of p, s)"""
        name = type(self).__name__
        if "scores" not in batch:
            raise ValueError(
                f"{name}: the batch has no scores; train on Answers(task, head=True) of a task with answer=Score()"
            )
        logits = out.logits
        if logits.shape[-1] != 2:
            raise ValueError(f"{name}: {logits.shape[-1]} classes; score with two, start=(..., Classes(2))")
        return logits[..., 1] - logits[..., 0], batch["scores"].astype(jnp.float32)


@dataclass(frozen=True)
class SoftLogits(SoftLabels):
    """(z - log(s / (1 - s)))**2, z the logit of p, with s kept within [clip, 1 - clip], where that is finite.

    It weighs what is wrong near 0 and 1 more than `SoftLabels` does, for teachers whose small scores mean something.
    Source: Ba & Caruana 2014, arXiv:1312.6184, section 2.2.
    """

    clip: float = 1e-3

    def __post_init__(self):
        values.check(self, clip="(0, 0.5)")

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        z, s = self._pair(out, batch)
        s = jnp.clip(s, self.clip, 1.0 - self.clip)
        return jnp.square(z - jnp.log(s) + jnp.log1p(-s))
