"""Matrices that differ from a base by little: adapters of low rank.

    LoRA   W + s A B              s = alpha / R, or alpha / sqrt(R) for rank-stabilised LoRA
    DoRA   m (W + s A B) / |W + s A B|     the norm of each output's column, through which no gradient flows
    VeRA   W + A d B b             A, B random and never stored, d [R] and b [d_out] learned
    Bank   W + sum_n mix_n s A_n B_n       several adapters, mixed by the row of the batch

Axes: R rank, N adapters, B rows of the batch.
Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Liu et al. 2024, arXiv:2402.09353;
Kopiczko et al. 2023, arXiv:2310.11454.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.weights.base import (
    OnBase,
    Part,
    dense,
    leaf,
    linear,
    linear_transposed,
    lookup,
    over,
    static,
)


@leaf
class LowRank(OnBase):
    base: Part
    a: Part = over("in", None)
    b: Part = over(None, "out")
    alpha: float = static(default=16.0)
    stabilised: bool = static(default=False)

    @property
    def scale(self) -> float:
        rank = self.a.shape[-1]
        return self.alpha / (rank**0.5 if self.stabilised else rank)

    def linear(self, x, dtype=None):
        return linear(x, self.base, dtype) + linear(linear(x, self.a) * self.scale, self.b, dtype)

    def linear_transposed(self, x, dtype=None):
        learned = linear_transposed(linear_transposed(x, self.b) * self.scale, self.a, dtype)
        return linear_transposed(x, self.base, dtype) + learned

    def lookup(self, ids):
        return lookup(self.base, ids) + self.a[ids] @ self.b * self.scale

    def dense(self):
        return dense(self.base) + self.a @ self.b * self.scale


@leaf
class Dora(OnBase):
    """magnitude: of each output, [1, d_out]."""

    base: Part
    a: Part = over("in", None)
    b: Part = over(None, "out")
    magnitude: Part = over(None, "out")
    alpha: float = static(default=16.0)
    stabilised: bool = static(default=False)

    @property
    def scale(self) -> float:
        return self.direction.scale

    @property
    def direction(self) -> LowRank:
        return LowRank(self.base, self.a, self.b, self.alpha, self.stabilised)

    def linear(self, x, dtype=None):
        y = self.direction.linear(x, "float32")
        return (y * jnp.broadcast_to(self._gain()[0], y.shape)).astype(dtype or x.dtype)

    def dense(self):
        return self.direction.dense() * self._gain()

    def _gain(self) -> Float[Array, "*L 1 d_out"]:
        norm = jnp.linalg.norm(jax.lax.stop_gradient(self.direction.dense()), axis=-2, keepdims=True)
        return self.magnitude / jnp.where(norm == 0, 1.0, norm)  # of a column of zeros, as pruning leaves


@leaf
class Vera(OnBase):
    """key: uint32 [2], from which A and B are drawn anew at each use. d: [1, R]; b: [1, d_out]."""

    base: Part
    key: Part = over(None)
    d: Part = over(None, None)
    b: Part = over(None, "out")

    def linear(self, x, dtype=None):
        a, b = self._drawn(self.key)
        inner = linear(x, a)
        y = linear(inner * jnp.broadcast_to(self.d[0].astype(x.dtype), inner.shape), b, "float32")
        y = (y * jnp.broadcast_to(self.b[0], y.shape)).astype(dtype or x.dtype)
        return linear(x, self.base, dtype) + y

    def dense(self):
        drawn = self._drawn
        for _ in self.key.shape[:-1]:
            drawn = jax.vmap(drawn)
        a, b = drawn(self.key)
        return dense(self.base) + (a * self.d) @ b * self.b

    def _drawn(self, key) -> tuple[Float[Array, "d_in R"], Float[Array, "R d_out"]]:
        """Both with unit variance over what they add up (Kaiming), uniform."""
        d_in, d_out = self.shape[-2:]
        rank = self.d.shape[-1]
        into, out = jax.random.split(jax.random.wrap_key_data(key))
        a = jax.random.uniform(into, (d_in, rank), minval=-1.0, maxval=1.0) * (3 / d_in) ** 0.5
        return a, jax.random.uniform(out, (rank, d_out), minval=-1.0, maxval=1.0) * (3 / rank) ** 0.5


@leaf
class Bank(OnBase):
    """mix: the share of each adapter, [1, N] for all rows alike or [B, N]; those that are 0 change nothing.

    scale: of each adapter, its alpha / R.
    """

    base: Part
    a: Part = over("in", None)
    b: Part = over(None, "out")
    scale: Part = over(None)
    mix: Part = over(None, None)

    def linear(self, x, dtype=None):
        share = (self.mix * self.scale[None]).astype(x.dtype)
        share = share.reshape(share.shape[0], *[1] * (x.ndim - 2), -1)
        inner = jnp.einsum("b...i,nir->b...nr", x, self.a.astype(x.dtype))
        inner = inner * jnp.broadcast_to(share[..., None], inner.shape)
        y = jnp.einsum("b...nr,nro->b...o", inner, self.b.astype(x.dtype))
        return linear(x, self.base, dtype) + y.astype(dtype or x.dtype)

    def dense(self):
        """Raises: ValueError if rows of the batch differ."""
        if self.mix.shape[-2] != 1:
            raise ValueError(
                f"Bank: {self.mix.shape[-2]} rows each have a matrix of their own; mix them alike first"
            )
        share = jnp.swapaxes(self.mix, -1, -2)[..., None] * self.scale[..., None, None]
        return dense(self.base) + (self.a @ self.b * share).sum(-3)
