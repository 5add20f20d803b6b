"""Attention as the paper has it: the form to read, and the one every fused path is tested against.

    out = softmax(softcap(scale * q k^T) + bias, over the allowed keys) v

Axes: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H head_dim. Query head n reads
key/value head n // G: K = N is multi-head, 1 < K < N grouped-query, K = 1 multi-query attention.
Sources: Vaswani et al. 2017, arXiv:1706.03762, equation 1; Ainslie et al. 2023 (GQA), arXiv:2305.13245,
section 2.2;
soft cap: Gemma 2, arXiv:2408.00118, section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.ops.mask import Mask, Where

Bias = Callable[..., Float[Array, "B N T S"]]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_where: Where,
    k_where: Where,
    mask: Mask,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Each query's average of the values it may see, weighted by softmax of its scores. Memory O(B N T S).

    Args:
      q_where, k_where: positions and segments of the queries and of the keys; `mask` and `bias` read them.
      bias: a function of query positions [B, T] and key positions [B, S] that gives float32 [B, N, T, S],
        added to the scores after the soft cap; `position.bias` with its heads and weights applied.
      scale: of the scores; None means H**-0.5.
      softcap: c bounds scores to (-c, c) by c * tanh(score / c); None leaves them.
    Returns: the dtype of q; scores and softmax are float32. A query that may see nothing gets zeros.
    Raises: ValueError if N is not a multiple of K.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    check_heads(N, K)
    scale = H**-0.5 if scale is None else scale
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores = scale * jnp.einsum("bkgth,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = cap(scores, softcap)
    if bias is not None:
        scores = scores + bias(q_where.positions, k_where.positions).reshape(B, K, N // K, T, S)
    allowed = mask(q_where, k_where)[:, :, None]  # [B, 1, 1, T, S]
    weights = masked_softmax(scores, allowed).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->bkgth", weights, v, preferred_element_type=jnp.float32)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


def masked_softmax(scores: Float[Array, "*A S"], allowed) -> Float[Array, "*A S"]:
    """softmax of float32 scores over the last axis where `allowed` (broadcast), zeros where none is."""
    top = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True, where=allowed, initial=LOWEST))
    e = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top, 0.0)), 0.0)
    total = jnp.sum(e, -1, keepdims=True)
    return e / jnp.where(total == 0, 1.0, total)


def cap(scores: Float[Array, "*A"], softcap: float | None) -> Float[Array, "*A"]:
    """softcap * tanh(scores / softcap), or the scores themselves for None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def check_heads(n_heads: int, n_kv_heads: int) -> None:
    """Raises ValueError unless every key/value head serves equally many query heads."""
    if n_heads % n_kv_heads:
        fit = ", ".join(str(d) for d in range(1, n_heads + 1) if n_heads % d == 0)
        raise ValueError(f"attention: {n_heads=} is not a multiple of {n_kv_heads=}; use {fit}")


LOWEST = -1e30
