"""The feed-forward layer as a mixture of experts: a router sends each token to top_k of n_experts layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.nn.linear import Inputs, Linear, weight
from lmx.nn.mlp import GATED, PLAIN, MlpConfig
from lmx.ops.experts import Sent, hidden, route, send
from lmx.ops.grouped import grams
from lmx.weights import dense


@dataclass(frozen=True)
class MoeConfig(MlpConfig):
    """n_experts layers, each of width d_ff, of which a token meets top_k; no token is dropped.

    renormalise: the weights of a token's experts add up to 1 (Mixtral), or are their probabilities among all
      n_experts (Switch; Qwen3-MoE where its norm_topk_prob is false).
    Routers learn to share the work only under a loss that asks for it: `lmx.losses.LoadBalance`.
    Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024 (Mixtral), arXiv:2401.04088, section 2.1.
    """

    n_experts: int = 8
    top_k: int = 2
    renormalise: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.n_experts < 1:
            raise ValueError(f"MoeConfig: n_experts={self.n_experts} must be at least 1")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"MoeConfig: top_k={self.top_k} must lie in 1 to n_experts={self.n_experts}")
        if self.bias:
            raise ValueError("MoeConfig: bias=True; experts have no biases, use bias=False")

    def n_weights(self, d_model: int) -> int:
        return self.n_experts * (d_model + super().n_weights(d_model))

    def n_active(self, d_model: int) -> int:
        return self.n_experts * d_model + self.top_k * super().n_weights(d_model)

    def tiny(self) -> MoeConfig:
        return replace(self, d_ff=None, n_experts=min(self.n_experts, 4), top_k=min(self.top_k, 2))

    def module(self, std: float, out_std: float, mix: Callable) -> nn.Module:
        return Moe(self, std, out_std, mix, name="mlp")


class Moe(nn.Module):
    """`router/w` [D, E] and the experts' matrices; probabilities are float32 whatever the dtype of x is
    (Fedus et al. 2021, arXiv:2101.03961, section 2.4)."""

    config: MoeConfig
    std: float
    out_std: float
    mix: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
        c = self.config
        logits = Linear(c.n_experts, self.std, name="router")(x.astype(jnp.float32))
        ids, weights = route(logits, c.top_k, c.renormalise)
        y = Experts(c, self.std, self.out_std, self.mix, name="experts")(x, ids, weights)
        return y.astype(x.dtype), logits


class Experts(nn.Module):
    """`up/w`, `gate/w` [E, D, F] and `down/w` [E, F, D]."""

    config: MoeConfig
    std: float
    out_std: float
    mix: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], ids: Int[Array, "B T k"], weights: Float[Array, "B T k"]
    ) -> Float[Array, "B T D"]:
        c, D = self.config, x.shape[-1]
        F = c.width(D)
        up, down = (c.n_experts, D, F), (c.n_experts, F, D)
        activation = (GATED | PLAIN)[c.activation]
        sent = partial(send, x, ids, c.n_experts)
        names = ("gate", "up") if c.activation in GATED else ("up",)
        into = tuple(Stack(up, self.std, name=name)(sent) for name in names)

        def between():
            return sent()._replace(rows=hidden(sent(), into, activation))

        out = Stack(down, self.out_std, name="down")(between)
        return self.mix(x, ids, weights, into, out, activation)


class Stack(nn.Module):
    """The matrices of all experts as one float32 array `w` [E, d_in, d_out], drawn from N(0, std^2).

    reads: what each of them is multiplied by, of which it says, as `Linear` does, what it is like: `Inputs` [E, ...].
    """

    shape: tuple[int, int, int]
    std: float

    @nn.compact
    def __call__(self, reads: Callable[[], Sent]) -> Float[Array, "E d_in d_out"]:
        if self.is_mutable_collection("stats") and not self.is_initializing():
            self.put_variable("stats", "w", _inputs(reads()))
        return dense(weight(self, "w", nn.initializers.normal(self.std), self.shape))


def _inputs(sent: Sent) -> Inputs:
    rows, (E,) = sent.rows.astype(jnp.float32), sent.sizes.shape
    mine = jnp.repeat(jnp.arange(E), sent.sizes, total_repeat_length=len(rows))
    largest = jnp.zeros((E, rows.shape[1])).at[mine].max(jnp.abs(rows))
    return Inputs(grams(rows, rows, sent.sizes), largest, sent.sizes.astype(jnp.float32))
