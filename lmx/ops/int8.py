"""Rows times a matrix of whole numbers, as decoding with quantized weights multiplies.

| where                                                               | `int8_by`          | `int4_by`          |
|---------------------------------------------------------------------|--------------------|--------------------|
| CPU: up to ROWS rows (for int8 beside AMX up to AMX_ROWS), K a      | `tiles`            | `tiles`            |
| multiple of `tiles.STEP`, `native.available()`; for int4 a group    |                    |                    |
| size in GROUPS                                                      |                    |                    |
| CPU otherwise                                                       | int8 dot, 2 rows   | widened to float32 |
|                                                                     | or more            |                    |
| GPU, TPU                                                            | int8 dot           | widened to float32 |

XLA:CPU multiplies int8 fast where it has AMX. Elsewhere its dot is 1.1 to 2.4 times as fast as that of float32, and on
AVX2 one row takes six times as long as two. Converting blocks of the matrix just before their product takes as long as
float32; integer sums over either axis and dots of int16 or int32 take longer. So the products of `lmx.ops.tiles` are
compiled here: of one row 4 times as fast as float32 with VNNI and 3 times with AVX2, which is what reading a quarter of
the bytes allows, and of 16 rows 3 and 1.8 times (`scripts/bench_int8.py`).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float32, Int8, Int32

from lmx.ops import native, tiles
from lmx.ops.dot import rows_by

VNNI = frozenset({"avx512_vnni", "avx512bw", "avx512vl"})
"""Flags of /proc/cpuinfo with which `tiles.Vnni` runs."""
AMX_ROWS = 16
"""Rows beyond which XLA's int8 dot is faster where the CPU has AMX, by what others measured there."""
ROWS = 512
"""Up to so many rows the functions compiled here were measured, and faster than XLA's dots."""
GROUPS = range(32, 257, 32)
"""Codes that may share a scale in the compiled int4 product."""


def int8_by(x: Int8[Array, "*b K"], w: Int8[Array, "M K"]) -> Int32[Array, "*b M"]:
    """x w^T in whole numbers: exact while sums stay below 2^31, as those of up to 131,071 columns do.

    Source: LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 2.1, whose scales the caller multiplies in.
    """
    rows, K = math.prod(x.shape[:-1]), x.shape[-1]

    def plain(x, w):
        return lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    def at_least_two(x, w):
        if rows != 1:
            return plain(x, w)
        return plain(jnp.pad(x.reshape(1, K), ((0, 1), (0, 0))), w)[:1].reshape(*x.shape[:-1], w.shape[0])

    amx = "amx_int8" in native.cpu_flags()
    compiled = _worth_compiling(rows, *w.shape) and not (amx and rows > AMX_ROWS)
    return lax.platform_dependent(x, w, cpu=_int8_compiled if compiled else at_least_two, default=plain)


def int4_by(
    x: Int8[Array, "*b K"], codes: Int32[Array, "M words"], scale: Float32[Array, "M groups"]
) -> Float32[Array, "*b M"]:
    """x w^T for w[o, i] = scale[o, i // group_size] * (code[o, i] - 8), in float32.

    codes: code i of a row, 0 to 15, is bits 4 (i mod 8) to 4 (i mod 8) + 3 of its word i // 8. The scales of a row
    stand for K / groups codes each. Sums within a group are exact where compiled; they are scaled and added up in
    float32. It is for decoding: where compiled, it has no gradient by `scale`, and JAX says so.
    Raises: ValueError if K is not 8 words, or not a multiple of groups.
    """
    rows, K, groups = math.prod(x.shape[:-1]), x.shape[-1], scale.shape[1]
    if 8 * codes.shape[1] != K or not groups or K % groups:
        raise ValueError(
            f"int4_by: x has {K} columns, codes {codes.shape[1]} words of 8 and scale {groups} groups; columns must "
            "be 8 times the words and a multiple of the groups"
        )
    group_size = K // groups

    def widened(x, codes, scale):
        code = jnp.stack([(codes >> 4 * i) & 15 for i in range(8)], axis=-1)
        w = (code - 8).reshape(-1, group_size).astype(jnp.float32) * scale.reshape(-1, 1)
        return rows_by(x.astype(jnp.float32), w.reshape(-1, K))

    compiled = group_size in GROUPS and _worth_compiling(rows, len(scale), K)
    return lax.platform_dependent(
        x, codes, scale, cpu=_int4_compiled if compiled else widened, default=widened
    )


def _worth_compiling(rows: int, M: int, K: int) -> bool:
    return 0 < rows <= ROWS and M > 0 and K > 0 and K % tiles.STEP == 0 and native.available()


@custom_vmap
def _int8_compiled(x, w):
    rows, K, unit = math.prod(x.shape[:-1]), x.shape[-1], _unit()
    y = jax.ffi.ffi_call(_int8_target(unit), jax.ShapeDtypeStruct((rows, w.shape[0]), jnp.int32))(
        x.reshape(rows, K).astype(unit.dtype), w
    )
    return y.reshape(*x.shape[:-1], w.shape[0])


@custom_vmap
def _int4_compiled(x, codes, scale):
    rows, K, (M, groups), unit = math.prod(x.shape[:-1]), x.shape[-1], scale.shape, _unit()
    y = jax.ffi.ffi_call(_int4_target(unit, K // groups), jax.ShapeDtypeStruct((rows, M), jnp.float32))(
        x.reshape(rows, K), codes, scale
    )
    return y.reshape(*x.shape[:-1], M)


def _unit() -> tiles.Unit:
    return tiles.Vnni() if native.cpu_flags() >= VNNI else tiles.Avx2()


def _vmapped(product):
    """Mapped rows are more rows; mapped matrices are taken one after another."""

    def rule(size, mapped, x, *w):
        if not any(mapped[1:]):
            return product(x, *w), True
        whole = [
            a if is_mapped else jnp.broadcast_to(a, (size, *a.shape)) for a, is_mapped in zip((x, *w), mapped)
        ]
        return lax.map(lambda one: product(*one), whole), True

    product.def_vmap(rule)


_vmapped(_int8_compiled)
_vmapped(_int4_compiled)


@functools.cache
def _int8_target(unit: tiles.Unit) -> str:
    return native.register(f"lmx_int8_by_{unit.name}", tiles.int8_chunk(unit))


@functools.cache
def _int4_target(unit: tiles.Unit, group_size: int) -> str:
    return native.register(f"lmx_int4_by_{unit.name}_{group_size}", tiles.int4_chunk(unit, group_size))
