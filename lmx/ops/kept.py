"""Attention for short rows on a CPU: the softmax is kept for the backward pass, and every product is a plain
dot.

Forward: P = softmax(scores), O = P V. Backward, with dO given and each sum over one row:

    dV = P^T dO     dP = dO V^T     dS = P * (dP - rowsum(dO * O))     dQ = dS K     dK = dS^T Q

Heads that share a key/value head become further rows of one matrix, so each dot is [G T, H] by [S, H].
Axes: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H head_dim; A = B K products at
once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.ops.attention import LOWEST, Bias, cap, check_heads
from lmx.ops.barrier import once
from lmx.ops.dot import dot, gram
from lmx.ops.mask import Mask, Where


def kept(
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
    """As `attention.attention`; the softmax is kept in the dtype of `v`, B N T S numbers."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    check_heads(N, K)
    allowed = jnp.broadcast_to(mask(q_where, k_where), (B, 1, T, S))
    added = None if bias is None else bias(q_where.positions, k_where.positions)
    scale = H**-0.5 if scale is None else scale
    q, k, v = (jnp.swapaxes(x, 1, 2).reshape(B * K, -1, H) for x in (q, k, v))
    out = _attend(scale, softcap, allowed, added, q, k, v)
    return jnp.swapaxes(out.reshape(B, N, T, H), 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, softcap, allowed, added, q, k, v):
    return _forward(scale, softcap, allowed, added, q, k, v)[0]


def _forward(scale, softcap, allowed, added, q, k, v):
    s = cap(scale * dot(q, k, (2,), (2,), batch=1), softcap)
    s = s.reshape(allowed.shape[0], -1, *allowed.shape[2:])  # [B, N, T, S]
    if added is not None:
        s = s + added
    s = jnp.where(allowed, s, LOWEST)
    top = once(jnp.max(s, -1, keepdims=True))
    e = jnp.exp(s - top)
    share = once(jnp.where(top > LOWEST, 1 / jnp.sum(e, -1, keepdims=True), 0.0))
    p = (e * share).astype(v.dtype).reshape(q.shape[0], q.shape[1], k.shape[1])
    out = dot(p, v, (2,), (1,), batch=1).astype(q.dtype)
    return out, (added, q, k, v, p, out)


def _backward(scale, softcap, saved, dout):
    added, q, k, v, p, out = saved
    level = once(jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True))
    ds = p.astype(jnp.float32) * (dot(dout, v, (2,), (2,), batch=1) - level)
    dadded = None if added is None else ds.reshape(added.shape)
    if softcap is not None:
        ds = ds * (1 - jnp.square(cap(scale * dot(q, k, (2,), (2,), batch=1), softcap) / softcap))
    ds = once((scale * ds).astype(q.dtype))
    dq, dk, dv = dot(ds, k, (2,), (1,), batch=1), gram(ds, q, batch=1), gram(p, dout, batch=1)
    return None, dadded, dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_forward, _backward)
