"""Attention of one query a row over a cache, as decoding on a CPU has it, in LLVM's language.

    scores = q kt;  weights = softmax(scores, over the allowed keys);  out = weights v

XLA:CPU makes a product of its own for each row and head, over all slots of the cache. Here keys and values are read
once, where they lie, up to the last slot that is allowed (`scripts/bench_decode.py`). Axes: B rows, K key/value heads,
G query heads of each, H head_dim, S slots.
"""

from __future__ import annotations

import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lmx.ops import native
from lmx.ops.attention import Bias, attention, check_heads
from lmx.ops.llvm import Lines, everywhere, numbers, pointers, whole
from lmx.ops.mask import Mask, Where

ROWS = 4
"""Query heads whose sums are held at once."""
SHARE = 1 << 16
"""Numbers of keys that a thread is given at the least."""


def one_query(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_where: Where,
    k_where: Where,
    mask: Mask,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """As `attention.attention`, in float32. Its gradient is that of the form to read.

    Raises: ValueError for what `obstacle` names.
    """
    check_heads(q.shape[2], k.shape[2])
    if reason := obstacle(q, k, bias, softcap):
        raise ValueError(f'attention: impl="one_query" {reason}; use "reference" or "auto"')
    return _with_gradient(q, k, v, q_where, k_where, mask, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _with_gradient(q, k, v, q_where, k_where, mask, scale):
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    G = N // K
    heads = (H**-0.5 if scale is None else scale) * q.reshape(B * K, G, H)
    kt, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3).astype(jnp.float32)
    allowed = mask(q_where, k_where).reshape(B, S).astype(jnp.float32)
    results = tuple(jax.ShapeDtypeStruct((B * K, G, n), jnp.float32) for n in (H, S))
    target = _target(G, H, _lanes(S, H), _smallest(S, H))
    out, _ = jax.ffi.ffi_call(target, results, vmap_method="sequential")(
        heads, kt.reshape(B * K, H, S), v.reshape(B * K, S, H), allowed
    )
    return out.reshape(B, 1, N, H)


def _forward(*args):
    return _with_gradient(*args), args[:5]


def _backward(mask, scale, kept, g):
    *qkv, q_where, k_where = kept
    reference = functools.partial(attention, q_where=q_where, k_where=k_where, mask=mask, scale=scale)
    return *jax.vjp(reference, *qkv)[1](g), None, None


_with_gradient.defvjp(_forward, _backward)


def obstacle(q, k, bias: Bias | None, softcap: float | None) -> str | None:
    """Why it cannot express a call, in words that follow its name; None if it can."""
    if bias is not None or softcap is not None:
        return "takes no bias on the scores and no soft cap"
    if q.shape[1] != 1 or q.dtype != jnp.float32 or k.dtype != jnp.float32:
        return f"takes one query a row in float32, not {q.shape[1]} in {q.dtype} over {k.dtype}"
    if k.shape[1] % 8 or q.shape[-1] % 8:
        return f"needs slots and head_dim that are multiples of 8, not {k.shape[1]} and {q.shape[-1]}"
    return None if native.available() else "needs Linux on x86 with AVX2, and llvmlite"


def _lanes(S: int, H: int) -> int:
    return 8 if S % 16 or H % 16 or "avx512f" not in native.cpu_flags() else 16


def _smallest(S: int, H: int) -> int:
    """Key/value heads of a thread at the least; powers of two, so that few functions are compiled."""
    return 1 << max(0, (SHARE // (S * H)).bit_length() - 1)


@functools.cache
def _target(G: int, H: int, lanes: int, smallest: int) -> str:
    return native.register(
        f"lmx_one_query_{G}_{H}_{lanes}_{smallest}", chunk(G, H, lanes), axis=0, smallest=smallest
    )


def chunk(G: int, H: int, lanes: int) -> str:
    """`chunk` of (q [BK, G, H], kt [BK, H, S], v [BK, S, H], allowed [B, S]) -> (out [BK, G, H], scores [BK, G, S])."""
    f, kind = Lines(), f"<{lanes} x float>"
    for i, name in enumerate(("q", "kt", "v", "allowed", "out", "scores")):
        f.do(f"%{name} = call ptr @data(ptr %frame, i64 {i if i < 4 else 3 - i})")
    for name, argument, axis in (("BK", 0, 0), ("B", 3, 0), ("S", 3, 1)):
        f.do(f"%{name} = call i64 @dim(ptr %frame, i64 {argument}, i64 {axis})")
    f.do("%K = udiv i64 %BK, %B")
    with f.loop("%first", "%last", 1) as pair:
        sizes = {"q": (G, H), "kt": (H, "%S"), "v": (H, "%S"), "out": (G, H), "scores": (G, "%S")}
        q, kt, v, out, scores = (
            f.at("float", f"%{name}", f(f"mul i64 {pair}, {f(f'mul i64 {a}, {b}')}"))
            for name, (a, b) in sizes.items()
        )
        allowed = f.at("float", "%allowed", f(f"mul i64 {f(f'udiv i64 {pair}, %K')}, %S"))
        n = _seen(f, allowed, lanes)
        _product(f, lanes, G, (q, str(H)), (kt, "%S"), (scores, "%S"), str(H), n)
        with f.loop("0", str(G), 1) as g:
            _softmax(f, lanes, f.at("float", scores, f(f"mul i64 {g}, %S")), allowed, n)
        _product(f, lanes, G, (scores, "%S"), (v, str(H)), (out, str(H)), n, str(H))
    functions = (f"maxnum.v{lanes}f32({kind}, {kind})", f"fma.v{lanes}f32({kind}, {kind}, {kind})",
                 f"nearbyint.v{lanes}f32({kind})")  # fmt: skip
    reductions = (f"fmax.v{lanes}f32({kind})", f"fadd.v{lanes}f32(float, {kind})")
    declared = [f"declare {kind} @llvm.{x}" for x in functions]
    declared += [f"declare float @llvm.vector.reduce.{x}" for x in reductions]
    head = "define internal void @chunk(ptr %frame, i64 %first, i64 %last) {"
    return "\n".join((*declared, head, str(f), "  ret void", "}"))


def _seen(f: Lines, allowed: str, lanes: int) -> str:
    """Up to where keys are allowed, as a multiple of `lanes`."""
    n, kind = f.variable("i64", "0"), f"<{lanes} x float>"
    with f.loop("0", "%S", lanes) as s:
        these = f.read(kind, allowed, s)
        most = f(f"call float @llvm.vector.reduce.fmax.v{lanes}f32({kind} {these})")
        some = f(f"fcmp ogt float {most}, 0.0")
        f.put("i64", f(f"select i1 {some}, i64 {f(f'add i64 {s}, {lanes}')}, i64 {f.get('i64', n)}"), n)
    return f.get("i64", n)


def _product(f: Lines, lanes: int, rows: int, a: tuple, b: tuple, y: tuple, K: str, M: str) -> None:
    """y [rows, M] = a [rows, K] b [K, M], each a pointer and the length of its rows; M is a multiple of `lanes`."""
    kind, (a, of_a), (b, of_b), (y, of_y) = f"<{lanes} x float>", a, b, y
    for first in range(0, rows, ROWS):
        some = range(first, min(rows, first + ROWS))
        from_a = pointers(f, "float", a, str(first), len(some), of_a)
        to_y = pointers(f, "float", y, str(first), len(some), of_y)
        begin = "0"
        for columns in (lanes // 4, 1):
            end = whole(f, M, columns * lanes)
            with f.loop(begin, end, columns * lanes) as m:
                sums = [[f.variable(kind, "zeroinitializer") for _ in range(columns)] for _ in some]
                from_b = f.at("float", b, m)
                with f.loop("0", K, 1) as k:
                    at = f.at("float", from_b, f(f"mul i64 {k}, {of_b}"))
                    of_k = [f.read(kind, at, str(i * lanes)) for i in range(columns)]
                    for row, row_sums in zip(from_a, sums):
                        x = everywhere(f, "float", f(f"load float, ptr {f.at('float', row, k)}"), lanes)
                        for w, sum_at in zip(of_k, row_sums):
                            f.put(kind, _fma(f, lanes, x, w, f.get(kind, sum_at)), sum_at)
                for row, row_sums in zip(to_y, sums):
                    for i, sum_at in enumerate(row_sums):
                        to = f.at("float", row, m, str(i * lanes))
                        f.do(f"store {kind} {f.get(kind, sum_at)}, ptr {to}, align 4")
            begin = end


def _softmax(f: Lines, lanes: int, at: str, allowed: str, n: str) -> None:
    """The n scores at `at` become their weights: zeros where none is allowed."""
    kind = f"<{lanes} x float>"
    lowest = _same(lanes, -1e30)

    def each(s):
        some = f(f"fcmp ogt {kind} {f.read(kind, allowed, s)}, zeroinitializer")
        return f.read(kind, at, s), some, f.at("float", at, s)

    tops = f.variable(kind, lowest)
    with f.loop("0", n, lanes) as s:
        x, some, _ = each(s)
        x = f(f"select <{lanes} x i1> {some}, {kind} {x}, {kind} {lowest}")
        f.put(kind, f(f"call {kind} @llvm.maxnum.v{lanes}f32({kind} {x}, {kind} {f.get(kind, tops)})"), tops)
    top = f(f"call float @llvm.vector.reduce.fmax.v{lanes}f32({kind} {f.get(kind, tops)})")
    top = everywhere(f, "float", top, lanes)
    sums = f.variable(kind, "zeroinitializer")
    with f.loop("0", n, lanes) as s:
        x, some, to = each(s)
        e = _exp(f, lanes, f(f"fsub {kind} {x}, {top}"))
        e = f(f"select <{lanes} x i1> {some}, {kind} {e}, {kind} zeroinitializer")
        f.put(kind, f(f"fadd {kind} {e}, {f.get(kind, sums)}"), sums)
        f.do(f"store {kind} {e}, ptr {to}, align 4")
    total = f(
        f"call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float 0.0, {kind} {f.get(kind, sums)})"
    )
    none = f(f"fcmp oeq float {total}, 0.0")
    share = f(f"fdiv float 1.0, {f(f'select i1 {none}, float 1.0, float {total}')}")
    share = everywhere(f, "float", share, lanes)
    with f.loop("0", n, lanes) as s:
        f.do(
            f"store {kind} {f(f'fmul {kind} {f.read(kind, at, s)}, {share}')}, ptr {f.at('float', at, s)}, align 4"
        )


def _exp(f: Lines, lanes: int, x: str) -> str:
    """exp(x) for x <= 0: 2^n e^r by its series to the 7th power, |r| <= ln(2) / 2; 0 below -88, NaN of NaN."""
    kind, whole_kind, lowest = f"<{lanes} x float>", f"<{lanes} x i32>", _same(lanes, -88.0)
    low = f(f"fcmp olt {kind} {x}, {lowest}")
    x = f(f"select <{lanes} x i1> {low}, {kind} {lowest}, {kind} {x}")
    t = f(f"fmul {kind} {x}, {_same(lanes, 1.4426950408889634)}")
    n = f(f"call {kind} @llvm.nearbyint.v{lanes}f32({kind} {t})")
    r = _fma(f, lanes, n, _same(lanes, -0.693359375), x)
    r = _fma(f, lanes, n, _same(lanes, 2.12194440e-4), r)  # ln 2 in two parts, the first of few bits
    y = _same(lanes, 1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        y = _fma(f, lanes, y, r, _same(lanes, factor))
    power = f(f"freeze {whole_kind} {f(f'fptosi {kind} {n} to {whole_kind}')}")  # any number, of NaN
    biased = f(f"add {whole_kind} {power}, {numbers('i32', [127] * lanes)}")
    bits = f(f"shl {whole_kind} {biased}, {numbers('i32', [23] * lanes)}")
    return f(f"fmul {kind} {y}, {f(f'bitcast {whole_kind} {bits} to {kind}')}")


def _fma(f: Lines, lanes: int, a: str, b: str, c: str) -> str:
    kind = f"<{lanes} x float>"
    return f(f"call {kind} @llvm.fma.v{lanes}f32({kind} {a}, {kind} {b}, {kind} {c})")


def _same(lanes: int, number: float) -> str:
    """A vector of one number, which LLVM writes as the bits of a double that a float holds exactly."""
    bits = struct.unpack(">Q", struct.pack(">d", np.float32(number)))[0]
    return numbers("float", [f"0x{bits:016X}"] * lanes)
