"""A matrix in codes of a few bits with a scale for each output, or for each group of its inputs.

    w[i, o] = scale[o, g] (q[o, p] - zero[o, g])        p the place of input i, g = p // group_size
    w[i, o] = scale[o, g] table[q[o, p]]                with a table, as NF4 has

Codes lie output by output, [d_out, d_in], as the formats of others have them and as few rows are multiplied fastest
(`lmx.ops.dot.rows_by`); those of less than 8 bits are packed, `lmx.ops.bits`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from lmx.ops import bits as bit
from lmx.ops.int8 import int4_by, int8_by
from lmx.ops.matmul import matmul, matmul_transposed
from lmx.ops.rounding import codes, grid, grouped, rounded_up, spread
from lmx.weights.base import Part, Weight, leaf, over, static

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, appendix E."""


@leaf
class Quantized(Weight):
    """q: int8 or float8 [d_out, d_in], or packed uint32 [d_out, words]; packed codes count from 0, and stand for q +
    2**(bits - 1) unless they number the entries of `table`.
    scale: [d_out, groups]. zero: int8 [d_out, groups], None for a symmetric grid.
    order: input number order[p] lies at place p (GPTQ's act-order); None where they lie as they come.
    input_scale: [1], of calibrated activations; None measures each row's largest input.
    activations: "float"; or, for products of whole numbers where they are `whole`, "int8", which rounds each row of the
    inputs to 255 steps (W8A8), or "int16", to 65,025, which takes two products.
    """

    q: Part = over("out", "in")
    scale: Part = over("out", "in")
    zero: Part = over("out", "in", default=None)
    order: Part = over("in", default=None)
    input_scale: Part = over(None, default=None)
    bits: int = static(default=8)
    d_in: int = static(default=0)
    group_size: int = static(default=0)
    table: tuple[float, ...] | None = static(default=None)
    activations: str = static(default="float")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-2], self.d_in, self.q.shape[-2])

    def linear(self, x, dtype=None):
        if self.order is not None:
            x = x[..., self.order]
        if self.activations != "float":
            return _rounded_inputs(x, self).astype(dtype or x.dtype)
        if self.zero is None and self.table is None and self.scale.shape[-1] == 1:
            y = _checkpointed(
                lambda q: q.astype(x.dtype), x, self.q if self.bits == 8 else self.codes(), "float32"
            )
            return (y * _row(self.scale, y)).astype(dtype or x.dtype)
        return _checkpointed(lambda w: w._placed().astype(x.dtype), x, self, dtype)

    def columns(self, ids):
        at = self.__class__(
            q=self.q[ids],
            scale=self.scale[ids],
            zero=None if self.zero is None else self.zero[ids],
            **{name: getattr(self, name) for name in ("order", "bits", "d_in", "group_size", "table")},
        )
        return at._as_they_come()

    def dense(self):
        return jnp.swapaxes(self._as_they_come(), -1, -2)

    def codes(self) -> Shaped[Array, "*L d_out d_in"]:
        """int8 (or float8), by place; of a table, the numbers of its entries."""
        if self.q.dtype != jnp.uint32:
            return self.q
        found = bit.unpack(self.q, self.bits, self.d_in)
        return found.astype(jnp.int8) - np.int8(0 if self.table else 2 ** (self.bits - 1))

    def _placed(self) -> Float[Array, "*L d_out d_in"]:
        """The transposed matrix, float32, its inputs by place."""
        found = self.codes()
        values = jnp.asarray(self.table, jnp.float32)[found] if self.table else found.astype(jnp.float32)
        if self.zero is not None:
            values = values - spread(self.zero.astype(jnp.float32), self.group_size, self.d_in)
        return values * spread(self.scale.astype(jnp.float32), self.group_size, self.d_in)

    def _as_they_come(self):
        found = self._placed()
        if self.order is None:
            return found
        if self.order.ndim == 1:
            return found[..., jnp.argsort(self.order)]
        return jnp.take_along_axis(found, jnp.argsort(self.order, -1)[..., None, :], -1)

    @property
    def whole(self) -> bool:
        """Whether products of whole numbers can stand for its own: a scale to each output or, of 4 bits, to groups that
        divide the inputs."""
        if self.bits == 4:
            even = self.group_size * self.scale.shape[-1] == self.d_in and self.d_in % 8 == 0
            return even and self.table is None and self.zero is None
        return self.q.dtype == jnp.int8 and self.scale.shape[-1] == 1

    def _whole_numbers(self, x: Float[Array, "*b d_in"]) -> Float[Array, "*b d_out"]:
        """Inputs in one digit of 8 bits or two, a product of whole numbers for each, and both scales."""
        x = x.astype(jnp.float32)
        most = 127 if self.activations == "int8" else 127 * 256
        if self.input_scale is None:
            step = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30) / most
        else:
            step = jnp.broadcast_to(self.input_scale * (127 / most), (*x.shape[:-1], 1))
        rounded = jnp.clip(jnp.round(x / step), -most, most)
        if self.activations == "int8":
            return self._product(rounded.astype(jnp.int8)) * step
        high = jnp.floor((rounded + 128) / 256)
        both = jnp.stack([high, rounded - 256 * high]).astype(jnp.int8)
        high, low = self._product(both)
        return (high * 256 + low) * step

    def _product(self, x: Int[Array, "*b d_in"]) -> Float[Array, "*b d_out"]:
        if self.bits == 4:
            words = jax.lax.bitcast_convert_type(self.q[:, : self.d_in // 8], jnp.int32)
            return int4_by(x, words, self.scale.astype(jnp.float32))
        sums = int8_by(x, self.codes()).astype(jnp.float32)
        if self.zero is not None:
            ones = x.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32)
            sums = sums - ones * _row(self.zero, sums)
        return sums * _row(self.scale, sums)


@jax.custom_vjp
def _rounded_inputs(x: Float[Array, "*b d_in"], w: Quantized) -> Float[Array, "*b d_out"]:
    """x w with rounded x; its gradient is that of x w, as rounding has none."""
    return w._whole_numbers(x)


def _rounded_forward(x, w):
    return w._whole_numbers(x), (x, w)


def _rounded_backward(kept, g):
    x, w = kept
    dx = matmul(g.astype(x.dtype), w._placed().astype(x.dtype))

    def none(part):
        floats = jnp.issubdtype(part.dtype, jnp.floating)
        return jnp.zeros_like(part) if floats else np.zeros(part.shape, jax.dtypes.float0)

    return dx, jax.tree.map(none, w)


_rounded_inputs.defvjp(_rounded_forward, _rounded_backward)


def quantize(
    w: Float[Array, "*L d_in d_out"],
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    *,
    scale_dtype: str = "float32",
    activations: str = "float",
) -> Quantized:
    """Each number to the nearest point of its group's grid. group_size: inputs that share one; None means all."""
    turned = jnp.swapaxes(w, -1, -2).astype(jnp.float32)
    d_in = turned.shape[-1]
    size = min(group_size or d_in, d_in)
    scale, zero = grid(grouped(turned, size), bits, symmetric, scale_dtype)
    wide = None if zero is None else spread(zero, size, d_in)
    q = codes(turned, spread(scale, size, d_in), wide, bits)
    return of_codes(q, scale.astype(scale_dtype), zero, bits, size, activations=activations)


def of_codes(
    q: Int[Array, "*L d_out d_in"], scale: Array, zero: Array | None, bits: int, size: int, **more: Any
):
    """A `Quantized` of int8 codes, packed if they have less than 8 bits."""
    d_in = q.shape[-1]
    if bits < 8:
        offset = 0 if more.get("table") else 2 ** (bits - 1)
        q = bit.pack((q.astype(jnp.int32) + offset).astype(jnp.uint8), bits)
    return Quantized(q, scale, zero, bits=bits, d_in=d_in, group_size=size, **more)


def to_table(
    w: Float[Array, "*L d_in d_out"],
    table: tuple[float, ...] = NF4,
    group_size: int = 64,
    scale_dtype: str = "float32",
) -> Quantized:
    """Each number to the nearest entry of a table of 16 in [-1, 1], times the largest magnitude of its group."""
    turned = jnp.swapaxes(w, -1, -2).astype(jnp.float32)
    d_in = turned.shape[-1]
    size = min(group_size, d_in)
    scale = rounded_up(jnp.abs(grouped(turned, size)).max(-1), scale_dtype)
    scale = jnp.where(scale == 0, jnp.ones((), scale.dtype), scale)
    entries = np.asarray(table, np.float32)
    between = (entries[1:] + entries[:-1]) / 2
    q = jnp.searchsorted(between, turned / spread(scale.astype(jnp.float32), size, d_in)).astype(jnp.int8)
    return of_codes(q, scale, None, 4, size, table=tuple(table))


def to_float8(w: Float[Array, "*L d_in d_out"], dtype: str = "float8_e4m3fn") -> Quantized:
    """8-bit floats with a scale for each output that brings its largest number to the largest float.

    Source: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    turned = jnp.swapaxes(w, -1, -2).astype(jnp.float32)
    most = float(jnp.finfo(dtype).max)
    scale = jnp.abs(turned).max(-1, keepdims=True) / most
    scale = jnp.where(scale == 0, 1.0, scale)
    q = jnp.clip(turned / scale, -most, most).astype(dtype)
    return Quantized(q, scale, d_in=turned.shape[-1], group_size=turned.shape[-1])


def _row(of_output: Shaped[Array, "d_out 1"], like: Array) -> Array:
    return jnp.broadcast_to(of_output[:, 0].astype(like.dtype), like.shape)


def _checkpointed(expand, x, stored, dtype):
    """x times what `expand` makes of `stored`, made again for the gradient rather than kept."""
    return jax.checkpoint(lambda x, w: matmul_transposed(x, expand(w), dtype))(x, stored)
