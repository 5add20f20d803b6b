"""A matrix that is stored for scaled inputs: y = (x * scale) W.

Quantizing W = diag(1 / scale) W0 rather than W0 gives inputs that matter, or that stand out, finer steps.
Source: Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438; Lin et al. 2024 (AWQ), arXiv:2306.00978.
"""

from __future__ import annotations

import jax.numpy as jnp

from lmx.weights.base import OnBase, Part, dense, leaf, linear, over


@leaf
class Scaled(OnBase):
    """scale: of each input, [d_in]."""

    base: Part
    scale: Part = over("in")

    def linear(self, x, dtype=None):
        return linear(x * jnp.broadcast_to(self.scale.astype(x.dtype), x.shape), self.base, dtype)

    def dense(self):
        return dense(self.base) * self.scale[..., None]
