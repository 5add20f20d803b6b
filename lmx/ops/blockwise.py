"""Attention in memory O(T * block), forward and backward, on any platform.

Key blocks pass by one at a time while each query keeps its running maximum m, sum l and weighted values o:

    m' = max(m, max s)     l' = l e^(m - m') + sum e^(s - m')     o' = o e^(m - m') + e^(s - m') v

and out = o / l. The backward pass recomputes p = e^(s - L) from the kept L = m + ln l, block by block. A
block in which no query may see a key is skipped, so causal masks cost half, windows and packed documents
less.

Axes: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H head_dim; t and s within one
block.
Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmx.ops.attention import LOWEST, Bias, cap, check_heads
from lmx.ops.mask import Mask, Where


def blockwise(
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
    block: int = 256,
) -> Float[Array, "B T N H"]:
    """As `attention.attention`, in pieces of `block` queries by `block` keys.

    The arrays that `bias` closes over, such as T5's table, receive their gradients.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    check_heads(N, K)
    grouped = q.reshape(B, T, K, N // K, H)
    q_places = _blocks(q_where, block)
    k_places = _blocks(k_where, block)
    real = _blocks(jnp.ones((1, S), bool), block)[:, :, None, None, None]  # False where a block is filled up
    add, arrays = None, []
    if bias is not None:
        add, arrays = jax.closure_convert(bias, q_places.positions[0], k_places.positions[0])
    rule = _Rule(mask, add, H**-0.5 if scale is None else scale, softcap)
    queries, keys = (
        (_blocks(grouped, block), q_places),
        (_blocks(k, block), _blocks(v, block), k_places, real),
    )
    out = _attend(rule, arrays, queries, keys)
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]


class _Rule(NamedTuple):
    """What makes scores of queries and keys, apart from arrays."""

    mask: Mask
    bias: Callable | None
    scale: float
    softcap: float | None

    def scores(self, arrays, q, k, q_where, k_where) -> Float[Array, "B K G t s"]:
        s = self.scale * jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        s = cap(s, self.softcap)
        if self.bias is not None:
            s = s + self.bias(q_where.positions, k_where.positions, *arrays).reshape(s.shape)
        return s

    def allowed(self, q_where, k_where, real) -> Bool[Array, "B 1 1 t s"]:
        return self.mask(q_where, k_where)[:, :, None] & real


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, arrays, queries, keys):
    return _forward(rule, arrays, queries, keys)[0]


def _forward(rule, arrays, queries, keys):
    def of_queries(query):
        q, q_where = query

        def of_keys(carry, key):
            k, v, k_where, real = key
            allowed = rule.allowed(q_where, k_where, real)

            def see(carry):
                top, total, out = carry
                s = jnp.where(allowed, rule.scores(arrays, q, k, q_where, k_where), LOWEST)
                new_top = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
                p = jnp.where(allowed, jnp.exp(s - new_top), 0.0)
                shrink = jnp.exp(top - new_top)
                return new_top, total * shrink + jnp.sum(p, -1, keepdims=True), out * shrink + _weigh(p, v)

            return jax.lax.cond(jnp.any(allowed), see, lambda carry: carry, carry), None

        B, t, K, G, H = q.shape
        start = jnp.full((B, K, G, t, 1), LOWEST), jnp.zeros((B, K, G, t, 1)), jnp.zeros((B, K, G, t, H))
        (top, total, out), _ = jax.lax.scan(of_keys, start, keys)
        total = jnp.where(total > 0, total, 1.0)
        return jnp.moveaxis(out / total, 3, 1).astype(q.dtype), top + jnp.log(total)

    out, log_total = jax.lax.map(of_queries, queries)
    return out, (arrays, queries, keys, out, log_total)


def _backward(rule, saved, dout):
    arrays, queries, keys, out, log_total = saved

    def of_queries(sums, query):
        (q, q_where), out, log_total, dout = query
        level = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1)  # rowsum(dO * O) in the paper
        level = jnp.moveaxis(level, 1, 3)[..., None]
        do = jnp.moveaxis(dout.astype(jnp.float32), 1, 3)

        def of_keys(carry, key):
            k, v, k_where, real = key
            allowed = rule.allowed(q_where, k_where, real)

            def see(carry):
                dq_sum, darrays_sum = carry
                s, pull = jax.vjp(lambda a, q, k: rule.scores(a, q, k, q_where, k_where), arrays, q, k)
                p = jnp.where(allowed, jnp.exp(s - log_total), 0.0)
                dp, dv = jax.vjp(lambda p, v: _weigh(p, v), p, v)[1](do)
                darrays, dq, dk = pull(p * (dp - level))
                return (dq_sum + dq.astype(jnp.float32), jax.tree.map(jnp.add, darrays_sum, darrays)), (
                    dk,
                    dv,
                )

            def skip(carry):
                return carry, (jnp.zeros_like(k), jnp.zeros_like(v))

            return jax.lax.cond(jnp.any(allowed), see, skip, carry)

        dk_sum, dv_sum, darrays = sums
        (dq, darrays), (dk, dv) = jax.lax.scan(of_keys, (jnp.zeros(q.shape, jnp.float32), darrays), keys)
        return (dk_sum + dk.astype(jnp.float32), dv_sum + dv.astype(jnp.float32), darrays), dq.astype(q.dtype)

    k, v = keys[:2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (k, v, arrays))
    (dk, dv, darrays), dq = jax.lax.scan(of_queries, zeros, (queries, out, log_total, dout))
    return darrays, (dq, None), (dk.astype(k.dtype), dv.astype(v.dtype), None, None)


def _weigh(p: Float[Array, "B K G t s"], v: Float[Array, "B s K H"]) -> Float[Array, "B K G t H"]:
    return jnp.einsum("bkgts,bskh->bkgth", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


_attend.defvjp(_forward, _backward)


def _blocks(tree, block: int):
    """Each [B, T, ...] as [ceil(T / block), B, block, ...], zeros (segment 0) at the end; one block if T is
    short.
    """

    def cut(x):
        size = min(block, x.shape[1])
        rest = -x.shape[1] % size
        x = jnp.pad(x, ((0, 0), (0, rest), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)
