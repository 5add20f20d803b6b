"""The feed-forward layer: down(act(up x)), or down(act(gate x) * up x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import flax.linen as nn
from jaxtyping import Array, Float

from lmx import values
from lmx.nn.linear import Linear
from lmx.ops import activation

PLAIN: dict[str, Callable] = {
    "gelu": activation.gelu,
    "gelu_exact": activation.gelu_exact,
    "silu": activation.silu,
    "relu_squared": activation.relu_squared,
}
GATED: dict[str, Callable] = {"swiglu": activation.swiglu, "geglu": activation.geglu}


@dataclass(frozen=True)
class MlpConfig:
    """activation: one of PLAIN or GATED. d_ff: None means 4 d_model, or 8/3 d_model rounded up to 32 when gated."""

    activation: str = "swiglu"
    d_ff: int | None = None
    bias: bool = False

    def __post_init__(self):
        values.check(self, d_ff="[1, inf) or None")
        if self.activation not in PLAIN | GATED:
            raise ValueError(f"MlpConfig: activation={self.activation!r}; use {', '.join(PLAIN | GATED)}")

    def width(self, d_model: int) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * d_model // 96) * 32 if self.activation in GATED else 4 * d_model

    def n_weights(self, d_model: int) -> int:
        """Numbers in the matrices of one layer."""
        return (3 if self.activation in GATED else 2) * d_model * self.width(d_model)

    def n_active(self, d_model: int) -> int:
        """Of `n_weights`, those that one token meets."""
        return self.n_weights(d_model)

    def tiny(self) -> MlpConfig:
        """The same kind of layer, as narrow as the model."""
        return replace(self, d_ff=None)

    def module(self, std: float, out_std: float, mix: Callable) -> nn.Module:
        """The layer named `mlp`: x [B, T, D] -> (y [B, T, D], router logits [B, T, E] or None without experts).

        mix: how tokens meet experts, with the signature of `lmx.ops.experts.mix`.
        """
        del mix
        return Mlp(self, std, out_std, name="mlp")


class Mlp(nn.Module):
    config: MlpConfig
    std: float
    out_std: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        d_ff = c.width(x.shape[-1])
        up = Linear(d_ff, self.std, c.bias, name="up")(x)
        if c.activation in GATED:
            hidden = GATED[c.activation](Linear(d_ff, self.std, c.bias, name="gate")(x), up)
        else:
            hidden = PLAIN[c.activation](up)
        return Linear(x.shape[-1], self.out_std, c.bias, name="down")(hidden), None
