"""Quantization-aware training: a float matrix that multiplies as if it were rounded already.

    y = x round(w),  dy/dw = dy/d round(w)        the straight-through gradient
Source: Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877, section 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmx.ops.matmul import matmul
from lmx.weights.base import Part, Weight, leaf, over, static
from lmx.weights.quantized import Quantized, quantize


@leaf
class Fake(Weight):
    """w: float32, what learns. activations: "int8" rounds each row of the input too, as W8A8 does."""

    w: Part = over("in", "out")
    bits: int = static(default=8)
    group_size: int | None = static(default=None)
    symmetric: bool = static(default=True)
    activations: str = static(default="float")
    scale_dtype: str = static(default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    def linear(self, x, dtype=None):
        if self.activations == "int8":
            wide = x.astype(jnp.float32)
            step = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True), 1e-30) / 127
            x = (wide + jax.lax.stop_gradient(jnp.round(wide / step) * step - wide)).astype(x.dtype)
        return matmul(x, self.dense(), dtype)

    def dense(self):
        return self.w + jax.lax.stop_gradient(self.settled().dense() - self.w)

    def settled(self) -> Quantized:
        """What it multiplies as."""
        return quantize(
            self.w,
            self.bits,
            self.group_size,
            self.symmetric,
            scale_dtype=self.scale_dtype,
            activations=self.activations,
        )
