"""Cross entropy of integer labels, in nats, for vocabularies up to 256k and beyond.

    loss = log_z - (1 - s) * logits[label] - s * mean(logits),      log_z = log(sum(exp(logits)))

with s the label smoothing. Axes: B T (any leading axes) and V vocab_size. The gradient, softmax - target, is
written out rather than derived: it is one elementwise pass over [..., V] that reads the logits and `log_z`,
no one-hot array exists in either direction, and a barrier keeps XLA from evaluating it again inside each
matmul that consumes it.
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
    return _log_z(logits)


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
    return _loss(logits, labels, smoothing)[0]


def _log_z(logits):
    x = logits.astype(jnp.float32)
    top = once(x.max(-1, keepdims=True))
    return jnp.log(jnp.exp(x - top).sum(-1)) + top[..., 0]


def _log_z_fwd(logits):
    z = _log_z(logits)
    return z, (logits, z)


def _log_z_bwd(saved, g):
    logits, z = saved
    grad = g[..., None] * jnp.exp(logits.astype(jnp.float32) - z[..., None])
    return (once(grad.astype(logits.dtype)),)


def _loss(logits, labels, smoothing):
    n_words = logits.shape[-1]
    z = _log_z(logits)
    at = jnp.clip(labels, 0, n_words - 1)[..., None]
    chosen = jnp.take_along_axis(logits, at, axis=-1)[..., 0].astype(jnp.float32)
    chosen = jnp.where((labels >= 0) & (labels < n_words), chosen, jnp.nan)
    loss = z - (1.0 - smoothing) * chosen
    if smoothing:
        loss -= smoothing * logits.astype(jnp.float32).mean(-1)
    return loss, z


def _cross_entropy_fwd(logits, labels, smoothing):
    loss, z = _loss(logits, labels, smoothing)
    return loss, (logits, labels, z)


def _cross_entropy_bwd(smoothing, saved, g):
    logits, labels, z = saved
    n_words = logits.shape[-1]
    here = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
    target = jnp.where(here, 1.0 - smoothing + smoothing / n_words, smoothing / n_words).astype(jnp.float32)
    grad = g[..., None] * (jnp.exp(logits.astype(jnp.float32) - z[..., None]) - target)
    return once(grad.astype(logits.dtype)), None


log_z.defvjp(_log_z_fwd, _log_z_bwd)
cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
