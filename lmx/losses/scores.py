"""Learning a number in [0, 1] per text, such as the share of annotators who call it toxic, or a teacher's score.

    run = Run(start=(Load("model"), Classes(1)), objective={"score": Term(Score())}, ...)

The head of one number gives z, and sigmoid(z) is the score. A number teaches more than yes or no: 0.5 says that the
text lies on the border, which a label of either kind denies.
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
class Score(Loss):
    """-s log sigmoid(z) - (1 - s) log sigmoid(-z), in nats: least where sigmoid(z) is s, and there the entropy of s.

    s is batch entry `scores` [B, T] float32 in [0, 1], and counts where the term's mask does: at a text's last token.
    Raises: ValueError, when called, for a batch without scores, or a head of more than one number.
    """

    of_scores: ClassVar[bool] = True

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        z, s = self._pair(out, batch)
        return -s * jax.nn.log_sigmoid(z) - (1.0 - s) * jax.nn.log_sigmoid(-z)

    def _pair(self, out, batch):
        name = type(self).__name__
        if "scores" not in batch:
            raise ValueError(
                f"{name}: the batch has no 'scores'; train on data with a number in [0, 1] per text"
            )
        logits = out.logits
        if logits.shape[-1] != 1:
            raise ValueError(
                f"{name}: the head gives {logits.shape[-1]} numbers; start=(..., Classes(1)) gives one"
            )
        return logits[..., 0], batch["scores"].astype(jnp.float32)


@dataclass(frozen=True)
class ScoreLogit(Score):
    """(z - logit(s))**2, with s kept within [clip, 1 - clip], whose logits are finite.

    It weighs what is wrong near 0 and 1 more than `Score` does, for teachers whose small scores mean something.
    Source: Ba & Caruana 2014, arXiv:1312.6184, section 2.2.
    """

    clip: float = 1e-3

    def __post_init__(self):
        values.check(self, clip="(0, 0.5)")

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        z, s = self._pair(out, batch)
        s = jnp.clip(s, self.clip, 1.0 - self.clip)
        return jnp.square(z - jnp.log(s) + jnp.log1p(-s))
