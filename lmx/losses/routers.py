"""Losses on the routers of a model with experts: an even load, and small logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.losses.base import Loss
from lmx.ops.cross_entropy import log_z
from lmx.ops.experts import route


@dataclass(frozen=True)
class LoadBalance(Loss):
    """E * sum over experts e of f_e * p_e(token), a mean over layers: small when tokens spread evenly.

    p_e is the router's probability of e for this token. f_e is the share of token copies that go to e, a
    constant to the gradient: of the copies of all tokens that count, top_k each, so the f_e add up to 1. With
    P_e the mean of p_e over those tokens the mean of this loss is E * sum of f_e * P_e in each layer: 1 when
    either is even, up to E / top_k when all tokens choose the same experts with certainty.

    Give it a term of its own, `Term(LoadBalance(), 0.01)`. The f_e are those of one micro-batch (and, under
    pmap, of one device), so cutting a batch into more of them changes the loss a little.
    Args:
      mask: the batch entry [B, T] that says which tokens count in f_e; the term's mask should be the same.
    Raises: ValueError, when called, for a model without experts or a batch without the mask.
    Source: Fedus et al. 2021 (Switch), arXiv:2101.03961, equations 4 to 6, where top_k = 1 and layers are
      summed instead of averaged. HF's `load_balancing_loss_func` (Mixtral, Qwen-MoE) is top_k times this for
      one layer; for several it averages f_e and P_e over layers before it multiplies them.
    """

    mask: str = "loss_mask"
    local: ClassVar[bool] = False

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        routing = _routing(self, out)
        if self.mask not in batch:
            raise ValueError(f"LoadBalance: the batch has no mask {self.mask!r}; it has {sorted(batch)}")
        E = routing.logits.shape[-1]
        mask = batch[self.mask].astype(jnp.float32)[None, :, :, None]
        ids, _ = route(routing.logits, routing.top_k)
        chosen = jnp.sum(jax.nn.one_hot(ids, E), axis=-2)  # [L, B, T, E]
        copies = jnp.maximum(routing.top_k * mask.sum(), 1.0)
        share = jnp.sum(chosen * mask, axis=(1, 2), keepdims=True) / copies
        p = jax.nn.softmax(routing.logits, axis=-1)
        return E * jnp.sum(jax.lax.stop_gradient(share) * p, axis=-1).mean(0)


@dataclass(frozen=True)
class RouterZLoss(Loss):
    """log(Z)**2 with Z = sum(exp(router logits)), a mean over layers: keeps the routers' logits from growing.

    Give it a term of its own, `Term(RouterZLoss(), 1e-3)`.
    Raises: ValueError, when called, for a model without experts.
    Source: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, equation 5, with weight 1e-3.
    """

    local: ClassVar[bool] = False

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        z = log_z(_routing(self, out).logits)
        return jnp.square(z).mean(0)


def _routing(loss, out):
    routing = getattr(out, "routing", None)
    if routing is None:
        name = type(loss).__name__
        raise ValueError(f"{name}: the model has no experts; set model.mlp=MoeConfig(...) or drop the term")
    return routing
