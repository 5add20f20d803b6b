"""A matrix that is stored for turned inputs, in which no input stands out: y = ((x * signs) H) W, H of Hadamard.

Quantizing W instead of the matrix it stands for, diag(signs) H W, spreads each large number over many.
Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, section 4; Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lmx.weights.base import OnBase, Part, dense, leaf, linear, over


@leaf
class Rotated(OnBase):
    """signs: +1 or -1 for each input."""

    base: Part
    signs: Part = over("in")

    def linear(self, x, dtype=None):
        return linear(hadamard(x * jnp.broadcast_to(self.signs.astype(x.dtype), x.shape)), self.base, dtype)

    def dense(self):
        turned = jnp.swapaxes(hadamard(jnp.swapaxes(dense(self.base), -1, -2)), -1, -2)
        return turned * self.signs[..., None]


def hadamard(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """x H with H H = 1, in blocks of the largest power of two that divides n (Sylvester's construction)."""
    n = x.shape[-1]
    block = n & -n
    y = x.reshape(*x.shape[:-1], n // block, block)
    done = 1
    while done < block:  # H of 2^k is a Kronecker product, applied in factors of at most 64
        size = min(64, block // done)
        y = y.reshape(*x.shape[:-1], -1, size, done)
        y = jnp.einsum("...kd,kl->...ld", y, jnp.asarray(_sylvester(size), x.dtype))
        done *= size
    return y.reshape(x.shape)


def _sylvester(n: int) -> Float[np.ndarray, "n n"]:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / n**0.5
