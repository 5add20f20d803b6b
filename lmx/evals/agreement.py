"""How near one model stays to another on the same tokens: what each makes of the text, and of the other.

    KL = sum_v p(v) log(p(v) / q(v)) in nats per position, p of the first model, q of the second
    top-1 agreement = the share of positions at which both find the same token likeliest

Rows of tokens are independent windows of text; 95 % intervals are drawn over rows, the same ones for both models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmx.report.stats import Interval

CHUNK = 128
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class Agreement:
    """perplexity, of the second model; ratio: of it to the first one's; kl in nats per token; top1 in [0, 1]."""

    perplexity: Interval
    ratio: Interval
    kl: Interval
    top1: Interval
    n_tokens: int


def agreement(
    model,
    params: Any,
    other: Any,
    tokens: Int[np.ndarray, "N T"],
    *,
    other_model: Any = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Parameters `params` and `other` of one model on N windows of T tokens, whose first token is given.

    other_model: that of `other`, such as a student's of the same vocabulary; None means the same one.
    Raises: ValueError if the vocabularies differ, or a row's figures are not finite.
    """
    other_model = other_model or model
    words = model.config.vocab_size, other_model.config.vocab_size
    if words[0] != words[1]:
        raise ValueError(
            f"agreement: the models have {words[0]} and {words[1]} words; compare models of one vocabulary"
        )
    score = _scorer(model, other_model)
    rows = np.stack([np.asarray(score(params, other, jnp.asarray(row[None])), np.float64) for row in tokens])
    if not np.isfinite(rows).all():
        raise ValueError(
            f"agreement: window {int(np.argwhere(~np.isfinite(rows))[0, 0])} gives numbers not finite"
        )
    draws = np.random.default_rng(seed).integers(0, len(rows), (bootstrap, len(rows)))
    mean, drawn = rows.mean(0), rows[draws].mean(1)

    def interval(f) -> Interval:
        if len(rows) == 1:
            return Interval(float(f(mean)), n=1)
        low, high = np.quantile(f(drawn.T), (0.025, 0.975))
        return Interval(float(f(mean)), float(low), float(high), n=len(rows))

    return Agreement(
        interval(lambda x: np.exp(x[1])),
        interval(lambda x: np.exp(x[1] - x[0])),
        interval(lambda x: x[2]),
        interval(lambda x: x[3]),
        tokens.size - len(tokens),
    )


@lru_cache(maxsize=4)
def _scorer(model, other_model):
    @jax.jit
    def score(params, other, row: Int[Array, "1 T"]) -> Float[Array, 4]:
        """Means over the row: nats of each model, KL, share of equal tops."""
        a, b = (m.apply(x, {"tokens": row[:, :-1]}) for m, x in ((model, params), (other_model, other)))
        labels = row[0, 1:]
        n = labels.shape[0]
        short = -n % CHUNK

        def part(xs):
            hidden, label = xs
            p, q = (jax.nn.log_softmax(_logits(out, h)) for out, h in zip((a, b), hidden))
            at = jnp.arange(CHUNK), label
            kl = (jnp.exp(p) * (p - q)).sum(-1)
            return jnp.stack([-p[at], -q[at], kl, (p.argmax(-1) == q.argmax(-1)).astype(jnp.float32)])

        def cut(x):
            return jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1))).reshape(-1, CHUNK, *x.shape[1:])

        parts = jax.lax.map(part, ((cut(a.hidden[0]), cut(b.hidden[0])), cut(labels)))
        return parts.transpose(1, 0, 2).reshape(4, -1)[:, :n].mean(1)

    return score


def _logits(out, hidden):
    return replace(out, hidden=hidden[None]).logits[0]
