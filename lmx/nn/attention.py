"""Self-attention: queries, keys and values from one stream, with or without a cache of earlier keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx import values
from lmx.nn.linear import Linear
from lmx.nn.norm import Norm, NormConfig
from lmx.ops.mask import Causal, Mask, SameSegment, Where
from lmx.ops.position import Position


@dataclass(frozen=True)
class AttentionConfig:
    """n_kv_heads: None means n_heads (multi-head), 1 is multi-query, between is grouped-query (Ainslie et al. 2023).

    head_dim: None means d_model / n_heads. qk_norm: RMSNorm of each query and key head (Henry et al. 2020).
    softcap: c tanh(score / c) before the mask (Gemma 2). scale: None means head_dim ** -0.5.
    impl: "auto", or a name in `lmx.ops.flash.IMPLEMENTATIONS`.
    """

    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    mask: Mask = Causal()
    qk_norm: bool = False
    softcap: float | None = None
    scale: float | None = None
    bias: bool = False
    out_bias: bool = False
    impl: str = "auto"

    def __post_init__(self):
        if self.n_heads < 1:
            raise ValueError(f"AttentionConfig: n_heads={self.n_heads} must be at least 1")
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            fits = [str(k) for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise ValueError(
                f"AttentionConfig: n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; "
                f"use {', '.join(fits)}"
            )
        values.check(self, head_dim="[1, inf) or None")
        values.check(self, softcap="(0, inf) or None", scale="(0, inf) or None")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def width(self, d_model: int) -> int:
        """head_dim H.

        Raises: ValueError if d_model does not split evenly and head_dim is not given.
        """
        if self.head_dim is None and d_model % self.n_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of n_heads={self.n_heads}; set head_dim")
        return self.head_dim or d_model // self.n_heads


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    where: place of each query token. position_weights: learned arrays of the positional scheme.
    slots: cache slots of the new tokens, and kv_where the places of all slots, or None without a cache.
    """

    where: Where
    position_weights: dict[str, Array]
    slots: Int[Array, "B t"] | None = None
    kv_where: Where | None = None


class Attention(nn.Module):
    config: AttentionConfig
    position: Position
    norm: NormConfig
    attend: Callable
    std: float
    out_std: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context, cache=None, layer=None):
        """Returns (y [B, T, D], cache): the cache holds k and v [L, B, S, K, H] and comes back with new rows."""
        c = self.config
        B, T, D = x.shape
        H, N, K = c.width(D), c.n_heads, c.kv_heads
        q = Linear(N * H, self.std, c.bias, name="q")(x).reshape(B, T, N, H)
        k = Linear(K * H, self.std, c.bias, name="k")(x).reshape(B, T, K, H)
        v = Linear(K * H, self.std, c.bias, name="v")(x).reshape(B, T, K, H)
        if c.qk_norm:
            q, k = Norm(self.norm, name="q_norm")(q), Norm(self.norm, name="k_norm")(k)
        q, k = (self.position.rotate(heads, context.where.positions) for heads in (q, k))
        kv_where = context.where
        if cache is not None:
            rows = jnp.arange(B)[:, None]
            cache = tuple(
                stack.at[layer, rows, context.slots].set(new.astype(stack.dtype), mode="drop")
                for stack, new in zip(cache, (k, v))
            )
            k, v = (stack[layer].astype(x.dtype) for stack in cache)
            kv_where = context.kv_where
        bias = None
        if self.position.biased:
            bias = partial(self.position.bias, n_heads=N, w=context.position_weights)
        y = self.attend(
            q,
            k,
            v,
            q_where=context.where,
            k_where=kv_where,
            mask=c.mask & SameSegment(),
            bias=bias,
            scale=c.scale,
            softcap=c.softcap,
        )
        return Linear(D, self.out_std, c.out_bias, name="o")(y.reshape(B, T, N * H)), cache
