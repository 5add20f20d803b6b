"""Number formats as surgeries: every matrix whose path fits becomes a leaf of fewer bits, without any data.

    params = chain(Int8(where="blocks/*"), Lora(rank=16))(params, key)

A matrix that is an adapter on a base, or pruned, scaled or rotated, keeps that and has its base quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx import tree
from lmx.adapt.matrices import EVERY, LAYERS, change, is_matrix, within
from lmx.formats import gguf_blocks
from lmx.formats.gguf import BLOCKS
from lmx.weights import Fake, Quantized, Rotated, Weight, dense, quantize, shape_of
from lmx.weights.quantized import NF4, to_float8, to_table
from lmx.weights.rotated import hadamard
from lmx.weights.surgery import Surgery

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Quantize(Surgery):
    """To the nearest point of a grid of 2**bits. group_size: inputs that share a scale; None means all of an output.

    symmetric: zero is a point of the grid and costs no bits. scale_dtype: scales are rounded up to it before the codes.
    activations: "float", or "int8" for W8A8: inputs are rounded too, each row by its largest, and products are of
    whole numbers (Dettmers et al. 2022, arXiv:2208.07339, without its exceptions).
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    where: str = LAYERS
    scale_dtype: str = "float16"
    activations: str = "float"

    def __post_init__(self):
        name = type(self).__name__
        if self.bits not in BITS:
            raise ValueError(f"{name}: bits={self.bits}; use {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(
                f"{name}: group_size={self.group_size}; use 2 or more, or None for one scale an output"
            )
        if self.activations not in ("float", "int8"):
            raise ValueError(f'{name}: activations={self.activations!r}; use "float" or "int8"')
        if self.activations == "int8":
            four = self.bits == 4 and self.symmetric and self.group_size is not None
            if not four and (self.bits, self.group_size) != (8, None):
                raise ValueError(
                    f"{name}: with rounded activations use bits=8 and group_size=None, or bits=4 on a symmetric grid "
                    f"with groups, not bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"
                )
        if self.scale_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"{name}: scale_dtype={self.scale_dtype!r}; use float32, float16 or bfloat16")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        """Raises: ValueError for a matrix with scales beyond the range of scale_dtype. A compiled program cannot: there
        too large a scale gives numbers that are not finite, and too small a one is rounded up."""

        def one(path, w):
            self._check_range(path, w)
            return self.of(w)

        return change(params, self.where, lambda path, w: on_base(path, w, lambda w: one(path, w)))

    def _check_range(self, path: str, w: jax.Array) -> None:
        if isinstance(w, jax.core.Tracer):
            return
        limits = jnp.finfo(self.scale_dtype)
        for largest in np.abs(np.asarray([w.max((-2, -1)), w.min((-2, -1))], np.float64)).max(0).flat:
            scale = 2 * largest / (2**self.bits - 1)
            if limits.max < scale < np.inf or 0 < scale < limits.smallest_subnormal:
                raise ValueError(
                    f"{path}: its largest number is {largest:.3g}, for which {self.scale_dtype} holds no scale; use "
                    f'{type(self).__name__}(scale_dtype="float32")'
                )

    def of(self, w: jax.Array) -> Weight:
        if self.activations == "int8" and self.bits == 4 and w.shape[-2] % 8:
            raise ValueError(
                f"{type(self).__name__}: {w.shape[-2]} inputs are no multiple of 8, as products of 4-bit codes want"
            )
        if self.activations == "int8" and self.group_size and w.shape[-2] % self.group_size:
            raise ValueError(
                f"{type(self).__name__}: group_size={self.group_size} does not divide {w.shape[-2]} inputs; with "
                "rounded activations it must"
            )
        return quantize(
            w,
            self.bits,
            self.group_size,
            self.symmetric,
            scale_dtype=self.scale_dtype,
            activations=self.activations,
        )


@dataclass(frozen=True)
class Int8(Quantize):
    """8 bits with a scale for each output."""

    bits: int = 8
    group_size: int | None = None
    scale_dtype: str = "float32"


@dataclass(frozen=True)
class W8A8(Int8):
    """Int8 whose inputs are rounded to int8 as well."""

    activations: str = "int8"


@dataclass(frozen=True)
class W4A8(Quantize):
    """4 bits with a scale for each 64 inputs, which are rounded to int8 as they come."""

    activations: str = "int8"


@dataclass(frozen=True)
class Int4(Quantize):
    """4 bits with a scale for each 64 inputs of an output."""


@dataclass(frozen=True)
class Nf4(Surgery):
    """The 4-bit code book of QLoRA: quantiles of a normal distribution times each group's largest magnitude."""

    group_size: int = 64
    where: str = LAYERS

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"Nf4: group_size={self.group_size}; use 2 or more")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return change(params, self.where, lambda path, w: on_base(path, w, self.of))

    def of(self, w: jax.Array) -> Weight:
        return to_table(w, NF4, self.group_size)


@dataclass(frozen=True)
class Fp8(Surgery):
    """8-bit floats. dtype: "float8_e4m3fn" (3 bits of fraction) or "float8_e5m2" (2 bits, more range)."""

    dtype: str = "float8_e4m3fn"
    where: str = LAYERS

    def __post_init__(self):
        if self.dtype not in ("float8_e4m3fn", "float8_e5m2"):
            raise ValueError(f"Fp8: dtype={self.dtype!r}; use float8_e4m3fn or float8_e5m2")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return change(params, self.where, lambda path, w: on_base(path, w, self.of))

    def of(self, w: jax.Array) -> Weight:
        return to_float8(w, self.dtype)


@dataclass(frozen=True)
class Cast(Surgery):
    """Plain arrays of another float dtype."""

    dtype: str = "bfloat16"
    where: str = EVERY

    def __call__(self, params: Any, key: jax.Array) -> Any:
        def one(path, w):
            return w if isinstance(w, Weight) else w.astype(self.dtype)

        return change(params, self.where, one)


@dataclass(frozen=True)
class Gguf(Surgery):
    """The numbers that a GGUF file of this type holds, as float32 arrays: what `lmx convert --type` would lose.

    importance: by path, as `lmx.adapt.importance` finds it.
    """

    kind: str = "Q4_K"
    where: str = EVERY
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in BLOCKS:
            raise ValueError(f"Gguf: kind={self.kind!r:.99}; use {', '.join(BLOCKS)}")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return change(params, self.where, self._one)

    def _one(self, path, w):
        rows = np.asarray(jnp.swapaxes(dense(w), -1, -2), np.float32)
        kind = gguf_blocks.type_of(_name(path), rows.shape, self.kind)
        coded = gguf_blocks.rounded(rows, kind, self.importance.get(path))
        return jnp.swapaxes(jnp.asarray(coded), -1, -2)

    def nbytes(self, params: Any) -> int:
        """Of the file's tensors."""
        total = 0
        for path, w in tree.nodes(params, Weight).items():
            shape = shape_of(w) if path == "embed" else shape_of(w)[:-2] + shape_of(w)[:-3:-1]
            matrix = is_matrix(path)
            values, n_bytes = BLOCKS[gguf_blocks.type_of(_name(path), shape, self.kind) if matrix else "F32"]
            total += math.prod(shape) // values * n_bytes
        return total


def _name(path: str) -> str:
    return {"embed": "token_embd.weight", "head": "output.weight"}.get(path, path)


@dataclass(frozen=True)
class Qat(Quantize):
    """Quantization-aware training: float matrices that multiply as if they were rounded. `Settle` ends it."""

    def of(self, w: jax.Array) -> Weight:
        w = w.astype(jnp.float32)
        return Fake(w, self.bits, self.group_size, self.symmetric, self.activations, self.scale_dtype)


@dataclass(frozen=True)
class Settle(Surgery):
    """What was trained by `Qat` in the codes that it multiplied as."""

    where: str = "*"

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return change(params, self.where, lambda path, w: within(w, Fake, Fake.settled))


@dataclass(frozen=True)
class Rotate(Surgery):
    """Each matrix for inputs turned by random signs and a Hadamard matrix, so that a later one quantizes it better."""

    where: str = LAYERS

    def __call__(self, params: Any, key: jax.Array) -> Any:
        def one(path, w):
            return on_base(path, w, lambda w: rotated(w, signs(path, w.shape, key)))

        return change(params, self.where, one)


def signs(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """+1 or -1 for each input of the matrix at a path."""
    return jax.random.rademacher(tree.key_at(key, path), shape[:-1], jnp.float32)


def rotated(w: jax.Array, signs: jax.Array) -> Rotated:
    turned = jnp.swapaxes(hadamard(jnp.swapaxes(w.astype(jnp.float32) * signs[..., None], -1, -2)), -1, -2)
    return Rotated(turned, signs)


def on_base(path: str, w: Any, f) -> Any:
    """f of a plain matrix, or of the one that adapters and other transforms stand on.

    Raises: ValueError if it is quantized already.
    """
    if isinstance(w, Quantized | Fake):
        raise ValueError(f"{path} is quantized already, to {w.bits} bits; make it dense first: Dense()")
    if isinstance(w, Weight):
        return replace(w, base=on_base(path, w.base, f))
    return f(w)
