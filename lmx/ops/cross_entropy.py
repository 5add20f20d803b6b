"""Cross entropy of integer labels, in nats, for vocabularies up to 256k and beyond.

    loss = log_z - (1 - s) * logits[label] - s * mean(logits),      log_z = log(sum(exp(logits)))

with s the label smoothing. Axes: B T (any leading axes) and V vocab_size. The gradient, softmax - target, is
written out rather than derived: it is one elementwise pass over [..., V] that reads the logits and their
normaliser, no one-hot array exists in either direction, and a barrier keeps XLA from evaluating it again
inside each matmul that consumes it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.ops.barrier import once


@jax.custom_vjp
def log_z(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """log(sum(exp(logits))) over the last axis, float32, in nats, shifted by the maximum against overflow."""
    return _log_z_fwd(logits)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], smoothing: float = 0.0
) -> Float[Array, "*B"]:
    """-sum(target * log_softmax(logits)) in nats, float32, with target = (1 - s) * onehot(label) + s / V.

    Reverse mode only (`jax.grad`, `jax.vjp`): the rule is custom. The gradient has the dtype of the logits.
    Args:
      logits: computed with in float32. A logit of -inf is a word that cannot occur; with smoothing > 0 its
        loss is inf.
      labels: in [0, V). A label outside, -100 included, is the caller's mistake and makes its own loss NaN:
        positions that do not count are told by the loss mask, and carry any label inside.
      smoothing: s in [0, 1), dimensionless.
    Source: Szegedy et al. 2015, arXiv:1512.00567, section 7 (label smoothing).
    """
    return _cross_entropy_fwd(logits, labels, smoothing)[0]


def _parts(logits):
    """(x - top float32, log(sum(exp(x - top))), top): log_z as two numbers, since their sum rounds."""
    x = logits.astype(jnp.float32)
    top = once(x.max(-1, keepdims=True))
    shifted = x - top
    return shifted, jnp.log(jnp.exp(shifted).sum(-1)), top[..., 0]


def _softmax(logits, log_sum, top):
    return jnp.exp(logits.astype(jnp.float32) - top[..., None] - log_sum[..., None])


def _log_z_fwd(logits):
    _, log_sum, top = _parts(logits)
    return log_sum + top, (logits, log_sum, top)


def _log_z_bwd(saved, g):
    logits, log_sum, top = saved
    grad = g[..., None] * _softmax(logits, log_sum, top)
    return (once(grad.astype(logits.dtype)),)


def _cross_entropy_fwd(logits, labels, smoothing):
    n_words = logits.shape[-1]
    shifted, log_sum, top = _parts(logits)
    at = jnp.clip(labels, 0, n_words - 1)[..., None]
    chosen = jnp.take_along_axis(logits, at, axis=-1)[..., 0].astype(jnp.float32) - top
    chosen = jnp.where((labels >= 0) & (labels < n_words), chosen, jnp.nan)
    loss = log_sum - (1.0 - smoothing) * chosen
    if smoothing:
        loss -= smoothing * shifted.mean(-1)
    return loss, (logits, labels, log_sum, top)


def _cross_entropy_bwd(smoothing, saved, g):
    logits, labels, log_sum, top = saved
    n_words = logits.shape[-1]
    here = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
    target = jnp.where(here, 1.0 - smoothing + smoothing / n_words, smoothing / n_words).astype(jnp.float32)
    grad = g[..., None] * (_softmax(logits, log_sum, top) - target)
    return once(grad.astype(logits.dtype)), None


log_z.defvjp(_log_z_fwd, _log_z_bwd)
cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
