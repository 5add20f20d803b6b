"""Learning a number in [0, 1]: what a teacher makes of a text, or the share of annotators who say yes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

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
        if "scores" not in batch:
            raise ValueError(
                "SoftLabels: the batch has no scores; train on Answers(task, head=True) of a task with answer=Score()"
            )
        logits = out.logits
        if logits.shape[-1] != 2:
            raise ValueError(
                f"SoftLabels: {logits.shape[-1]} classes; score with two, start=(..., Classes(2))"
            )
        z = logits[..., 1] - logits[..., 0]
        return jax.nn.softplus(z) - batch["scores"] * z
