"""Self-attention: queries, keys and values from one stream, with or without a cache of earlier keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmx import values
from lmx.nn.linear import Linear, keep
from lmx.nn.norm import Norm, NormConfig
from lmx.ops.mask import EVERY, Causal, Mask, SameOrEvery, SameSegment, SlidingWindow, Where
from lmx.ops.position import NoPE, Position, RoPE
from lmx.ops.rounding import codes, grid


@dataclass(frozen=True)
class Local:
    """Layers that see the latest `window` tokens alone, their own included, among others that see all.

    pattern: one letter a layer, L for local and G for global, repeated over the depth: "LG" alternates, "LLLLLG" is
    Gemma 3's. position: how they turn queries and keys; None means as the others do.
    Source: Beltagy et al. 2020 (Longformer), arXiv:2004.05150, section 3.1; Gemma 2, arXiv:2408.00118, section 2.
    """

    window: int
    pattern: str = "LG"
    position: RoPE | NoPE | None = None

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"Local: window={self.window} lets a token see nothing; use 1 or more")
        if not self.pattern or set(self.pattern) - set("LG"):
            raise ValueError(f'Local: pattern={self.pattern!r} is not made of L and G; use "LG" or "LLLLLG"')

    def holds(self, layer: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a layer is local."""
        return jnp.asarray([letter == "L" for letter in self.pattern])[layer % len(self.pattern)]


@dataclass(frozen=True)
class AttentionConfig:
    """n_kv_heads: None means n_heads (multi-head), 1 is multi-query, between is grouped-query (Ainslie et al. 2023).

    head_dim: None means d_model / n_heads. qk_norm: a norm of each query and key head (Henry et al. 2020), or with
    "joint" of all heads of a token together (OLMo 2). softcap: c tanh(score / c) before the mask (Gemma 2).
    scale: None means head_dim ** -0.5. local: what some of the layers do otherwise.
    impl: "auto", or a name in `lmx.ops.flash.IMPLEMENTATIONS`.
    """

    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    mask: Mask = Causal()
    qk_norm: bool | str = False
    softcap: float | None = None
    scale: float | None = None
    bias: bool = False
    out_bias: bool = False
    impl: str = "auto"
    local: Local | None = None

    def __post_init__(self):
        if self.qk_norm not in (False, True, "joint"):
            raise ValueError(f'AttentionConfig: qk_norm={self.qk_norm!r}; use False, True or "joint"')
        if self.n_heads < 1:
            raise ValueError(f"AttentionConfig: n_heads={self.n_heads} must be at least 1")
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            fits = [str(k) for k in range(1, min(self.n_heads, 1024) + 1) if self.n_heads % k == 0]
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
        """Returns (y [B, T, D], cache): the cache, k [B, K, H, S] and v [B, K, S, H] of this layer or of a stack of all
        layers, and where they are int8 codes a scale [B, K, 1, S] of each, comes back with the new tokens in their
        slots.

        prefix: {"k", "v"} [P, K H] beside the matrices of a layer, where the tree holds it, are keys and values that
        every segment sees before its own, at positions -P to -1; they are read as a cache would hold them, turned.
        """
        c = self.config
        B, T, D = x.shape
        H, N, K = c.width(D), c.n_heads, c.kv_heads
        q, k, v = (
            Linear(n * H, self.std, c.bias, name=name)(x) for name, n in (("q", N), ("k", K), ("v", K))
        )
        if c.qk_norm == "joint":
            q, k = Norm(self.norm, name="q_norm")(q), Norm(self.norm, name="k_norm")(k)
        q, k, v = (y.reshape(B, T, -1, H) for y in (q, k, v))
        if c.qk_norm is True:
            q, k = Norm(self.norm, name="q_norm")(q), Norm(self.norm, name="k_norm")(k)
        for name, heads in zip(("queries", "keys", "values"), (q, k, v)):
            keep(self, name, heads)

        def turn(local, q, k):
            position = local.position if local and local.position else self.position
            return tuple(position.rotate(heads, context.where.positions) for heads in (q, k))

        q, k = self._either(layer, turn, q, k)
        kv_where = context.where
        if cache is not None:
            cache = self._written(cache, layer, context.slots, k, v)
            kt, v, *scales = (stack if stack.ndim == 4 else stack[layer] for stack in cache)
            if scales:
                kt, v = kt.astype(jnp.float32), v.astype(jnp.float32)
                kt, v = kt * scales[0], v * jnp.swapaxes(scales[1], 2, 3)
            k, v = (
                y.astype(x.dtype).transpose(order) for y, order in ((kt, (0, 3, 1, 2)), (v, (0, 2, 1, 3)))
            )
            kv_where = context.kv_where
        segments, prefix = SameSegment(), self.get_variable("params", "prefix")
        if prefix is not None:
            segments = SameOrEvery()
            k, v, kv_where = _after(prefix, k, v, kv_where)
        bias = None
        if self.position.biased:
            bias = partial(self.position.bias, n_heads=N, w=context.position_weights)

        def attend(local, q, k, v):
            mask = c.mask & SlidingWindow(local.window) if local else c.mask
            return self.attend(
                q,
                k,
                v,
                q_where=context.where,
                k_where=kv_where,
                mask=mask & segments,
                bias=bias,
                scale=c.scale,
                softcap=c.softcap,
            )

        y = self._either(layer, attend, q, k, v)
        return Linear(D, self.out_std, c.out_bias, name="o")(y.reshape(B, T, N * H)), cache

    def _written(self, cache, layer, slots, k, v):
        """Each lies as its product wants it, with H and with S before the last axis: a CPU would copy it otherwise."""
        rows, every = jnp.arange(k.shape[0])[:, None], slice(None)
        kt, vs, *scales = cache
        of_layer = () if kt.ndim == 4 else (layer,)
        at = (*of_layer, rows, every, every, slots)
        if scales:
            (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
            scales = [s.at[at].set(new, mode="drop") for s, new in zip(scales, (k_scale, v_scale))]
        kt = kt.at[at].set(k.astype(kt.dtype), mode="drop")
        vs = vs.at[(*of_layer, rows, every, slots)].set(v.astype(vs.dtype), mode="drop")
        return kt, vs, *scales

    def _either(self, layer, f, *args):
        """f(local, *args), with the config's Local in local layers and None in the others."""
        local = self.config.local
        if local is None:
            return f(None, *args)
        return jax.lax.cond(local.holds(layer), partial(f, local), partial(f, None), *args)


def _after(prefix, k, v, where: Where):
    """Keys, values and places of a layer, with those of its prefix in front."""
    B, _, K, H = k.shape
    P = prefix["k"].shape[0]

    def join(learned, y):
        if learned.shape != (P, K * H):
            raise ValueError(f"a prefix has shape {learned.shape}, this model wants {(P, K * H)}")
        learned = learned.reshape(1, P, K, H).astype(y.dtype)
        return jnp.concatenate([jnp.broadcast_to(learned, (B, P, K, H)), y], 1)

    before = jnp.broadcast_to(jnp.arange(-P, 0, dtype=jnp.int32)[None], (B, P))
    places = Where(before, jnp.full_like(before, EVERY))
    where = Where(*(jnp.concatenate(pair, 1) for pair in zip(places, where)))
    return join(prefix["k"], k), join(prefix["v"], v), where


def rounded(x: Float[Array, "B T K H"]) -> tuple[Int[Array, "B T K H"], Float[Array, "B T K 1"]]:
    """(codes int8, scale float32) of new keys or values, x ~ codes scale within half a step of scale.

    Each token and head has a scale of its own, so that a later token changes nothing that is kept.
    """
    x = x.astype(jnp.float32)
    scale, _ = grid(x, 8, symmetric=True)
    scale = scale[..., None]
    return codes(x, jnp.broadcast_to(scale, x.shape), None, 8), scale
