"""Predicting the next token, and keeping the softmax's normaliser near 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from lmx.losses.base import Loss
from lmx.losses.chunked import Chunked
from lmx.ops.cross_entropy import cross_entropy, log_z


@dataclass(frozen=True)
class NextToken(Loss):
    """Cross entropy of `labels` (the token after each position), in nats per token.

    smoothing: share s of the target spread evenly over the vocabulary, in [0, 1). Reported losses then
      contain it:
    compare runs by perplexity, which is measured without.
    Raises: ValueError for smoothing outside [0, 1).
    """

    smoothing: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(
                f"NextToken: smoothing={self.smoothing} is not a share in [0, 1); 0 is off, 0.1 usual"
            )

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        return cross_entropy(out.logits, batch["labels"], self.smoothing)


def log_p(out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
    """The log of the probability of every label, float32, in nats; holds no [B, T, V]."""
    vocab_size = jax.eval_shape(lambda out: out.logits, out).shape[-1]
    loss = Chunked.fitting(NextToken(), out.hidden.shape[0], vocab_size)
    return -loss(out, {"labels": batch["labels"]})


@dataclass(frozen=True)
class ZLoss(Loss):
    """log(Z)**2 with Z = sum(exp(logits)), in nats squared: pulls Z towards 1, which keeps logits from
    drifting.

    Give it a term of its own, `Term(ZLoss(), 1e-4)`.
    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5, with weight 1e-4.
    """

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        z = log_z(out.logits)
        return z * z
