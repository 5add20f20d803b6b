"""One layer of the Transformer: attention and feed-forward, each beside a residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import flax.linen as nn
from jaxtyping import Array, Int

from lmx.nn.attention import Attention, AttentionConfig, Context
from lmx.nn.linear import keep
from lmx.nn.mlp import MlpConfig
from lmx.nn.norm import Norm, NormConfig
from lmx.ops.experts import mix
from lmx.ops.position import Position


@dataclass(frozen=True)
class BlockConfig:
    """placement: where the norms stand, with f the sublayer (attention, then feed-forward):

    "pre"       x + f(norm(x))            (Xiong et al. 2020)
    "post"      norm(x + f(x))            (Vaswani et al. 2017)
    "sandwich"  x + norm(f(norm(x)))      (Ding et al. 2021; Gemma 2)
    "inner"     x + norm(f(x))            (Liu et al. 2022, Swin V2; OLMo 2)
    """

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MlpConfig = field(default_factory=MlpConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    placement: str = "pre"
    dropout: float = 0.0

    def __post_init__(self):
        if self.placement not in ("pre", "post", "sandwich", "inner"):
            raise ValueError(
                f'BlockConfig: placement={self.placement!r}; use "pre", "post", "sandwich" or "inner"'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"BlockConfig: dropout={self.dropout} must lie in [0, 1)")


class Block(nn.Module):
    """std: of the input matrices; out_std: of the two that write to the residual stream."""

    config: BlockConfig
    position: Position
    attend: Callable
    std: float
    out_std: float
    deterministic: bool = True
    mix: Callable = mix

    @nn.compact
    def __call__(self, carry, layer: Int[Array, ""], context: Context):
        """carry: (x [B, T, D], cache or None), as `nn.scan` over layers wants it.

        Returns (carry, router logits [B, T, E] or None without experts).
        """
        c = self.config
        x, cache = carry
        routing = None
        mlp = c.mlp.module(self.std, self.out_std, self.mix)
        attention = Attention(
            c.attention, self.position, c.norm, self.attend, self.std, self.out_std, name="attn"
        )

        def attend(y):
            nonlocal cache
            y, cache = attention(y, context, cache, layer)
            return y

        def feed(y):
            nonlocal routing
            y, routing = mlp(y)
            return y

        x = self._residual("attn_norm", x, attend)
        x = self._residual("mlp_norm", x, feed)
        keep(self, "hidden", x)
        return (x, cache), routing

    def _residual(self, name: str, x, sublayer):
        c = self.config
        norm = Norm(c.norm, name=name)
        drop = nn.Dropout(c.dropout, deterministic=self.deterministic)
        if c.placement == "post":
            return norm(x + drop(sublayer(x)))
        if c.placement == "inner":
            return x + drop(norm(sublayer(x)))
        y = sublayer(norm(x))
        if c.placement == "sandwich":
            y = Norm(c.norm, name=f"{name}_out")(y)
        return x + drop(y)
