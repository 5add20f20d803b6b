"""Rows times a matrix of whole numbers, as decoding with quantized weights multiplies.

| where                                                                 | `int8_by`          | `int4_by`          |
|-----------------------------------------------------------------------|--------------------|--------------------|
| CPU: up to ROWS rows, K a multiple of STEP, and `native.available()`; | compiled here      | compiled here      |
| for int8 no FAST units, for int4 a group size in GROUPS               |                    |                    |
| CPU otherwise                                                         | int8 dot, 2 rows   | widened to float32 |
|                                                                       | or more            |                    |
| GPU, TPU                                                              | int8 dot           | widened to float32 |

XLA:CPU multiplies int8 fast where it has AMX. On AVX2 its dot is 1.1 to 1.8 times as fast as that of float32, and
one row takes six times as long as two. Converting blocks of the matrix just before their product takes as long as
float32; integer sums over either axis and dots of int16 or int32 take longer. So the products are written in LLVM's
language below: of one row 2.5 times as fast as float32, which reads four times the bytes, and of 16 or more rows
1.4 to 1.8 times (`scripts/bench_int8.py`).

int8: pmaddwd multiplies 16 pairs of int16 and adds neighbours; bytes of the matrix are widened on the way. int4:
pmaddubsw multiplies 32 codes 0 to 15 by int8 and adds neighbours as int16, where the sums of a group fit, since
8 * 2 * 15 * 128 < 2^15.
"""

from __future__ import annotations

import functools
import math
from string import Template

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float32, Int8, Int32

from lmx.ops import native
from lmx.ops.dot import rows_by

FAST = frozenset({"amx_int8", "avx512_vnni", "avx_vnni"})
"""Flags of /proc/cpuinfo that promise int8 products, which XLA then uses."""
ROWS = 512
"""Up to so many rows the functions compiled here were measured, and faster than XLA's dots."""
STEP = 32
"""Columns of the matrix that the compiled functions take at once: K is a multiple of it."""
TOGETHER = 4
"""Rows that share what is read of the matrix."""
BLOCK = 8
"""Rows of the matrix, BLOCK K bytes, that stay in the nearest cache while all rows of x pass."""
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

    compiled = _worth_compiling(rows, *w.shape) and not FAST & native.cpu_flags()
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
    return 0 < rows <= ROWS and M > 0 and K > 0 and K % STEP == 0 and native.available()


@custom_vmap
def _int8_compiled(x, w):
    rows, K = math.prod(x.shape[:-1]), x.shape[-1]
    sums = jax.ShapeDtypeStruct((rows, w.shape[0]), jnp.int32)
    y = jax.ffi.ffi_call(_int8_target(), sums)(x.reshape(rows, K).astype(jnp.int16), w)
    return y.reshape(*x.shape[:-1], w.shape[0])


@custom_vmap
def _int4_compiled(x, codes, scale):
    rows, K, (M, groups) = math.prod(x.shape[:-1]), x.shape[-1], scale.shape
    of_groups = x.reshape(rows, groups, -1).astype(jnp.int32).sum(-1)
    # A byte of codes holds an even column's code below an odd one's: 16 bytes are split into 16 evens and 16 odds.
    split = x.reshape(rows, K // STEP, STEP // 2, 2).swapaxes(2, 3).reshape(rows, K)
    y = jax.ffi.ffi_call(_int4_target(K // groups), jax.ShapeDtypeStruct((rows, M), jnp.float32))(
        split, of_groups, codes, scale
    )
    return y.reshape(*x.shape[:-1], M)


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
def _int8_target() -> str:
    return native.register("lmx_int8_by", _INTRINSICS + _tiles(_int8_tile, ("x", "w", "y")))


@functools.cache
def _int4_target(group_size: int) -> str:
    tile = functools.partial(_int4_tile, group_size)
    arguments = ("x", "sums", "codes", "scale", "y")
    return native.register(f"lmx_int4_by_{group_size}", _INTRINSICS + _tiles(tile, arguments))


_INTRINSICS = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare i32 @llvm.vector.reduce.add.v8i32(<8 x i32>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)
"""


def _tiles(tile, names: tuple[str, ...]) -> str:
    """Columns begin to end of y [N, M], BLOCK by BLOCK: for TOGETHER rows at a time, then for one at a time.

    names: of the call's arguments in their order, the first [N, K], and of its result.
    """
    pointers = ", ".join(f"ptr %{name}" for name in names)
    parameters = f"{pointers}, i64 %K, i64 %M"
    load = "\n".join(
        f"  %{name} = call ptr @data(ptr %frame, i64 {i})"
        for i, name in zip((*range(len(names) - 1), -1), names)
    )
    return f"""
{tile(TOGETHER, parameters)}
{tile(1, parameters)}
define internal void @chunk(ptr %frame, i64 %begin, i64 %end) {{
entry:
{load}
  %N = call i64 @dim(ptr %frame, i64 -1, i64 0)
  %M = call i64 @dim(ptr %frame, i64 -1, i64 1)
  %K = call i64 @dim(ptr %frame, i64 0, i64 1)
  br label %block
block:
  %from = phi i64 [ %begin, %entry ], [ %until, %ones ]
  %after = add i64 %from, {BLOCK}
  %until = call i64 @llvm.umin.i64(i64 %after, i64 %end)
  %none = icmp sge i64 %from, %end
  br i1 %none, label %exit, label %several
several:
  %r = phi i64 [ 0, %block ], [ %r.next, %some ]
  %r.next = add i64 %r, {TOGETHER}
  %fits = icmp sle i64 %r.next, %N
  br i1 %fits, label %some, label %ones
some:
  %o = phi i64 [ %from, %several ], [ %o.next, %some ]
  call void @tile{TOGETHER}({parameters}, i64 %r, i64 %o)
  %o.next = add i64 %o, 1
  %o.more = icmp slt i64 %o.next, %until
  br i1 %o.more, label %some, label %several
ones:
  %q = phi i64 [ %r, %several ], [ %q.next, %one ]
  %q.next = add i64 %q, 1
  %left = icmp slt i64 %q, %N
  br i1 %left, label %one, label %block
one:
  %p = phi i64 [ %from, %ones ], [ %p.next, %one ]
  call void @tile1({parameters}, i64 %q, i64 %p)
  %p.next = add i64 %p, 1
  %p.more = icmp slt i64 %p.next, %until
  br i1 %p.more, label %one, label %ones
exit:
  ret void
}}
"""


def _int8_tile(rows: int, parameters: str) -> str:
    return _unrolled(_INT8_TILE, rows).substitute(rows=rows, parameters=parameters)


def _int4_tile(group_size: int, rows: int, parameters: str) -> str:
    return _unrolled(_INT4_TILE, rows).substitute(
        rows=rows,
        parameters=parameters,
        group_size=group_size,
        low_bits=_vector("i8", 15, 16),
        shift=_vector("i8", 4, 16),
        ones=_vector("i16", 1, 16),
        evens_then_odds=", ".join(f"i32 {i}" for i in range(32)),
    )


def _unrolled(lines: str, rows: int) -> Template:
    """A line with # in it stands once for each row, whose number replaces #."""
    return Template(
        "\n".join(
            line.replace("#", str(row))
            for line in lines.splitlines()
            for row in range(rows if "#" in line else 1)
        )
    )


def _vector(kind: str, value: int, length: int) -> str:
    return "<" + ", ".join([f"{kind} {value}"] * length) + ">"


# y[r : r + rows, o] of x int16, w int8; the matrix is asked for 1 KB before it is read.
_INT8_TILE = """
define internal void @tile$rows($parameters, i64 %r, i64 %o) alwaysinline {
entry:
  %oK = mul i64 %o, %K
  %w.o = getelementptr i8, ptr %w, i64 %oK
  %r# = add i64 %r, #
  %rK# = mul i64 %r#, %K
  %x# = getelementptr i16, ptr %x, i64 %rK#
  br label %loop
loop:
  %k = phi i64 [ 0, %entry ], [ %k.next, %loop ]
  %s# = phi <8 x i32> [ zeroinitializer, %entry ], [ %s#.b, %loop ]
  %w.a.at = getelementptr i8, ptr %w.o, i64 %k
  %w.b.at = getelementptr i8, ptr %w.a.at, i64 16
  %w.ahead = getelementptr i8, ptr %w.a.at, i64 1024
  call void @llvm.prefetch.p0(ptr %w.ahead, i32 0, i32 3, i32 1)
  %w.a.bytes = load <16 x i8>, ptr %w.a.at, align 1
  %w.b.bytes = load <16 x i8>, ptr %w.b.at, align 1
  %w.a = sext <16 x i8> %w.a.bytes to <16 x i16>
  %w.b = sext <16 x i8> %w.b.bytes to <16 x i16>
  %x#.a.at = getelementptr i16, ptr %x#, i64 %k
  %x#.b.at = getelementptr i16, ptr %x#.a.at, i64 16
  %x#.a = load <16 x i16>, ptr %x#.a.at, align 2
  %x#.b = load <16 x i16>, ptr %x#.b.at, align 2
  %p#.a = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %x#.a, <16 x i16> %w.a)
  %p#.b = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %x#.b, <16 x i16> %w.b)
  %s#.a = add <8 x i32> %s#, %p#.a
  %s#.b = add <8 x i32> %s#.a, %p#.b
  %k.next = add i64 %k, 32
  %more = icmp ult i64 %k.next, %K
  br i1 %more, label %loop, label %end
end:
  %rM# = mul i64 %r#, %M
  %ro# = add i64 %rM#, %o
  %y# = getelementptr i32, ptr %y, i64 %ro#
  %sum# = call i32 @llvm.vector.reduce.add.v8i32(<8 x i32> %s#.b)
  store i32 %sum#, ptr %y#
  ret void
}
"""

# y[r : r + rows, o] of x int8 with 16 even columns before 16 odd ones, and sums: of x over each group. A group's
# sum of x (code - 8) is taken in 8 parts; -sum(x) in each of them makes the -8 sum(x).
_INT4_TILE = """
define internal void @tile$rows($parameters, i64 %r, i64 %o) alwaysinline {
entry:
  %groups = udiv i64 %K, $group_size
  %bytes = udiv i64 %K, 2
  %o.bytes = mul i64 %o, %bytes
  %codes.o = getelementptr i8, ptr %codes, i64 %o.bytes
  %o.groups = mul i64 %o, %groups
  %scale.o = getelementptr float, ptr %scale, i64 %o.groups
  %r# = add i64 %r, #
  %rK# = mul i64 %r#, %K
  %x# = getelementptr i8, ptr %x, i64 %rK#
  %rG# = mul i64 %r#, %groups
  %sums# = getelementptr i32, ptr %sums, i64 %rG#
  br label %group
group:
  %g = phi i64 [ 0, %entry ], [ %g.next, %scaled ]
  %f# = phi <8 x float> [ zeroinitializer, %entry ], [ %f#.next, %scaled ]
  %k.begin = mul i64 %g, $group_size
  %k.end = add i64 %k.begin, $group_size
  br label %loop
loop:
  %k = phi i64 [ %k.begin, %group ], [ %k.next, %loop ]
  %s# = phi <16 x i16> [ zeroinitializer, %group ], [ %s#.next, %loop ]
  %k.bytes = udiv i64 %k, 2
  %at = getelementptr i8, ptr %codes.o, i64 %k.bytes
  %ahead = getelementptr i8, ptr %at, i64 1024
  call void @llvm.prefetch.p0(ptr %ahead, i32 0, i32 3, i32 1)
  %pairs = load <16 x i8>, ptr %at, align 1
  %evens = and <16 x i8> %pairs, $low_bits
  %odds = lshr <16 x i8> %pairs, $shift
  %code = shufflevector <16 x i8> %evens, <16 x i8> %odds, <32 x i32> <$evens_then_odds>
  %x#.at = getelementptr i8, ptr %x#, i64 %k
  %x#.k = load <32 x i8>, ptr %x#.at, align 1
  %p# = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %code, <32 x i8> %x#.k)
  %s#.next = add <16 x i16> %s#, %p#
  %k.next = add i64 %k, 32
  %more = icmp ult i64 %k.next, %k.end
  br i1 %more, label %loop, label %scaled
scaled:
  %scale.at = getelementptr float, ptr %scale.o, i64 %g
  %scale.one = load float, ptr %scale.at
  %scale.part = insertelement <8 x float> poison, float %scale.one, i32 0
  %scales = shufflevector <8 x float> %scale.part, <8 x float> poison, <8 x i32> zeroinitializer
  %i# = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %s#.next, <16 x i16> $ones)
  %sums#.at = getelementptr i32, ptr %sums#, i64 %g
  %sums#.one = load i32, ptr %sums#.at
  %sums#.part = insertelement <8 x i32> poison, i32 %sums#.one, i32 0
  %sums#.all = shufflevector <8 x i32> %sums#.part, <8 x i32> poison, <8 x i32> zeroinitializer
  %i#.zero = sub <8 x i32> %i#, %sums#.all
  %i#.float = sitofp <8 x i32> %i#.zero to <8 x float>
  %f#.next = call <8 x float> @llvm.fma.v8f32(<8 x float> %i#.float, <8 x float> %scales, <8 x float> %f#)
  %g.next = add i64 %g, 1
  %again = icmp ult i64 %g.next, %groups
  br i1 %again, label %group, label %end
end:
  %rM# = mul i64 %r#, %M
  %ro# = add i64 %rM#, %o
  %y# = getelementptr float, ptr %y, i64 %ro#
  %sum# = call reassoc float @llvm.vector.reduce.fadd.v8f32(float -0.0, <8 x float> %f#.next)
  store float %sum#, ptr %y#
  ret void
}
"""
