"""Learning a number in [0, 1] per text: what a teacher makes of it, or the share of annotators who say yes.

    run = Run(start=(Load("model"), Classes(2)), objective={"bce": Term(SoftLabels())}, ...)

The head is one of two classes, so that a student of scores and one of labels are the same model, and are judged alike:
z is the logit of the second class less that of the first, and sigmoid(z) the score. A number teaches more than yes or
no: 0.5 says that the text lies on the border, which a label of either kind denies.
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


@dataclass(frozen=True)
class SoftLabels(Loss):
    """-s log sigmoid(z) - (1 - s) log sigmoid(-z), in nats: least, and the entropy of s, where sigmoid(z) is s; its
    gradient in z is sigmoid(z) - s.

    s is batch entry `scores` [B, T] float32 in [0, 1], of `lmx.tasks.Answers` of a task whose answer is a `Score`, and
    counts where the term's mask does: at a text's last token.
    Raises: ValueError, when called, for a batch without scores, or another number of classes.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, for two classes at temperature 1.
    """

    of_scores: ClassVar[bool] = True

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        z, s = self._pair(out, batch)
        return jax.nn.softplus(z) - s * z

    def _pair(self, out, batch):
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
    """(z - logit(s))**2, with s kept within [clip, 1 - clip], whose logits are finite.

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
