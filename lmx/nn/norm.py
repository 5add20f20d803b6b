"""RMSNorm and LayerNorm with their learned scales."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx import values
from lmx.ops.norm import layer_norm, rms_norm


@dataclass(frozen=True)
class NormConfig:
    """kind: "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016); bias: LayerNorm's shift.

    offset: what is added to the stored scale before it multiplies; 1 in Gemma, whose scales are learned from 0.
    """

    kind: str = "rms"
    eps: float = 1e-6
    bias: bool = False
    offset: float = 0.0

    def __post_init__(self):
        values.check(self, eps="[0, inf)")
        if self.kind not in ("rms", "layer"):
            raise ValueError(f'NormConfig: kind={self.kind!r}; use "rms" or "layer"')
        if self.bias and self.kind == "rms":
            raise ValueError('NormConfig: bias=True needs kind="layer"; RMSNorm has no shift')


class Norm(nn.Module):
    config: NormConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        start = nn.initializers.constant(1 - self.config.offset)
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32) + self.config.offset
        if self.config.kind == "rms":
            return rms_norm(x, scale, self.config.eps)
        bias = None
        if self.config.bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, scale, bias, self.config.eps)
