"""Numbers into the blocks of GGUF: a few bits a value, with scales per block that leave the least squared error.

    quantize(x, "Q4_K")                  x [.., n] float32 -> the bytes of its rows
    quantize(x, "Q4_K", importance)      importance [n], the mean of x_j ** 2 over what a matrix multiplies

A block has parts, each with a scale s and an offset o, and its values are codes q of a few bits:

    scaled    x ~ s q        s = d c                     Q4_0 Q5_0 Q8_0 Q3_K Q6_K
    affine    x ~ s q + o    s = d c,  o = -e m          Q4_1 Q5_1 Q2_K Q4_K Q5_K

d and e are float16, one of each in a block; c and m are whole numbers of a few bits, one of each in a part, and 1
where a block has one part. For each part, some scales around the one that spans its values round them to codes, for
which least squares give s and o; the best are kept, rounded to d, c, e, m, and the codes chosen again.
Source: ggml, ggml-common.h for the layouts; ggml-quants.c, make_qx_quants and make_qkx2_quants for the search, whose
error is weighted by the values themselves where ours is not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lmx.formats.gguf import BLOCKS, CHUNK, PLAIN, decoder

SCALED = {"Q4_0": (4, 1, 1), "Q5_0": (5, 1, 1), "Q8_0": (8, 1, 1), "Q3_K": (3, 16, 31), "Q6_K": (6, 16, 127)}
AFFINE = {"Q4_1": (4, 1, 1), "Q5_1": (5, 1, 1), "Q2_K": (2, 16, 15), "Q4_K": (4, 8, 63), "Q5_K": (5, 8, 63)}
"""Type -> (bits of a code, parts of a block, largest c and m)."""
STEPS = np.linspace(-2, 2, 13)
"""What is added to the number of codes that span the values of a part, for each scale that is tried."""
NEAR = [(i, j) for i in (0, -1, 1) for j in (0, -1, 1)]
"""What is added to the rounded c and m."""
LARGEST, SMALLEST = float(np.finfo(np.float16).max), 2.0**-24
TINY = 1e-30


FINE = "Q6_K"
"""Of embedding and head where the other matrices are of a K type."""
WHERE_ROWS_ARE_NO_BLOCKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""As llama.cpp has it; F16 in place of every other type."""
UNROUNDED = ("position_embd.weight", "ffn_gate_inp.weight")


def type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor in a file whose matrices are of a kind."""
    if not is_rounded(name, shape):
        return "F32"
    if kind.endswith("K") and name in ("token_embd.weight", "output.weight"):
        kind = FINE
    if shape[-1] % BLOCKS[kind][0]:
        kind = WHERE_ROWS_ARE_NO_BLOCKS.get(kind, "F16")
    return kind if shape[-1] % BLOCKS[kind][0] == 0 else "F16"


def is_rounded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor's numbers lose anything in a file of a few bits."""
    return len(shape) > 1 and not name.endswith(UNROUNDED)


def quantize(x: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a tensor's rows, uint8 [.., bytes of a row].

    Args:
      x: [.., n] float32, n a multiple of the type's block: 256 values for types with K, 32 for others with Q.
      importance: [n], from 0: an error in column j counts importance[j] times; or [.., n], of each matrix of x its
        own. Plain types round each value to the nearest with or without. Without it, types without K are llama.cpp's,
        byte for byte.
    Raises: ValueError for another shape or type, for values that are not finite, and for those beyond 65,504 unless
      the type is F32 or BF16: scales are float16.
    """
    x = np.ascontiguousarray(x, np.float32)
    if kind not in BLOCKS:
        raise ValueError(f"{kind!r:.99} is no type of tensor; use {', '.join(BLOCKS)}")
    n_values, n_bytes = BLOCKS[kind]
    if x.shape[-1] % n_values:
        raise ValueError(
            f"{kind} packs {n_values} values at a time, of which rows of {x.shape[-1]} are no multiple"
        )
    if importance is not None:
        importance = np.asarray(importance, np.float32)
        if (
            importance.shape not in (x.shape[-1:], x.shape[:-2] + x.shape[-1:])
            or not (np.isfinite(importance) & (importance >= 0)).all()
        ):
            raise ValueError(f"importance is not one number from 0 for each of {x.shape[-1]} columns")
        importance = importance / np.maximum(importance.max(-1, keepdims=True, initial=0), TINY)
        importance = importance.reshape(-1, x.shape[-1] // n_values, n_values)
    blocks = x.reshape(-1, n_values)
    found = np.empty((len(blocks), n_bytes), np.uint8)
    step = CHUNK // n_values
    for i in range(0, len(blocks), step):
        piece = blocks[i : i + step]
        _check(piece, kind)
        weights = None if importance is None else _of_blocks(importance, x.shape[-2:-1], i, len(piece))
        found[i : i + step] = _encoded(piece, kind, weights)
    return found.reshape(*x.shape[:-1], x.shape[-1] // n_values * n_bytes)


def _check(x, kind):
    largest = np.abs(x).max(initial=0)
    if not np.isfinite(largest):
        raise ValueError("some values are not finite")
    if largest > LARGEST and kind not in ("F32", "BF16"):
        raise ValueError(f"a value of {largest:.3g} is too large for {kind}; use BF16 or F32")


def _of_blocks(importance, rows, first, n):
    """Of the columns that n blocks from the first hold; a row's blocks repeat in the next row of its matrix."""
    row, at = np.divmod(np.arange(first, first + n), importance.shape[1])
    return importance[row // math.prod(rows) % len(importance), at]


def _encoded(x, kind, weights):
    if kind in PLAIN:
        return x.astype(PLAIN[kind]).view(np.uint8)
    if weights is None and not kind.endswith("K"):
        from gguf import GGMLQuantizationType
        from gguf import quantize as as_llama_cpp

        return as_llama_cpp(x, GGMLQuantizationType[kind])
    fields = _fields(kind, coded(x, kind, weights))
    return np.concatenate([field.reshape(len(x), -1).view(np.uint8) for field in fields], 1)


def rounded(x: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """What a file of this type gives back of rows [.., n], float32. Args and raises: as `quantize`."""
    raw = quantize(x, kind, importance)
    return decoder(kind)(raw.reshape(-1)).astype(np.float32).reshape(x.shape)


class Coded(NamedTuple):
    """Blocks of P parts: d, e [N, 1] float32 that float16 holds, c, m [N, P] and q [N, P, values of a part] float32,
    all but d and e whole numbers; e and m are 0 for a type that is scaled alone."""

    d: np.ndarray
    c: np.ndarray
    e: np.ndarray
    m: np.ndarray
    q: np.ndarray

    def values(self) -> np.ndarray:
        """[N, values of a block]"""
        return ((self.d * self.c)[..., None] * self.q - (self.e * self.m)[..., None]).reshape(len(self.d), -1)


def coded(x: np.ndarray, kind: str, weights: np.ndarray | None = None) -> Coded:
    """The blocks x [N, values of a block] in a type of SCALED or AFFINE. weights: of each value, [N, same]."""
    bits, parts, most = (SCALED | AFFINE)[kind]
    x = x.reshape(len(x), parts, -1)
    w = np.ones((1, 1, 1), np.float32) if weights is None else weights.reshape(x.shape)
    w = np.broadcast_to(w, x.shape)
    return _scaled(x, w, bits, most) if kind in SCALED else _affine(x, w, bits, most)


def _scaled(x, w, bits, most):
    half = 2 ** (bits - 1)
    extreme = _extreme(x)
    s, gain = extreme / -half, np.zeros(x.shape[:-1], np.float32)
    for step in STEPS:  # the error is what is left of sum(w x x) after this gain
        q = np.clip(np.rint(x * _over(step - half, extreme)[..., None]), -half, half - 1)
        qx, qq = _sum(w, q, x), _sum(w, q, q)
        try_s = _over(qx, qq)
        better = try_s * qx > gain
        s, gain = np.where(better, try_s, s), np.where(better, try_s * qx, gain)
    d = _half(_extreme(s)[:, None] / most)
    c = np.clip(np.rint(s / d), -most - (most > 1), most)
    q = np.clip(np.rint(x * _over(1, d * c)[..., None]), -half, half - 1)
    return Coded(d, c, np.zeros_like(d), np.zeros_like(c), q)


def _affine(x, w, bits, most):
    top = 2**bits - 1
    low = x.min(-1)
    if most > 1:  # the parts of a block have one e, so that their offsets have one sign
        low = np.minimum(low, 0)
    span = x.max(-1) - low
    s, o, error = span / top, low, np.full(low.shape, np.inf, np.float32)
    w_, wx, wxx = _sum(w), _sum(w, x), _sum(w, x, x)
    for step in STEPS:
        q = np.clip(np.rint((x - low[..., None]) * _over(top + step, span)[..., None]), 0, top)
        wq, wqq, wqx = _sum(w, q), _sum(w, q, q), _sum(w, q, x)
        det = w_ * wqq - wq * wq
        try_s, try_o = _over(w_ * wqx - wx * wq, det), _over(wqq * wx - wq * wqx, det)
        if most > 1:
            try_s, try_o = np.where(try_o > 0, _over(wqx, wqq), try_s), np.minimum(try_o, 0)
        left = wxx + try_s * (try_s * wqq + 2 * (try_o * wq - wqx)) + try_o * (try_o * w_ - 2 * wx)
        better = (det > 0) & (try_s > 0) & (left < error)
        s, o, error = (np.where(better, a, b) for a, b in ((try_s, s), (try_o, o), (left, error)))
    d, e = _half(s.max(-1, keepdims=True) / most), _half((-o).max(-1, keepdims=True) / most)
    c, m = np.clip(np.rint(s / d), 0, most), np.clip(np.rint(-o / e), 0, most)

    def codes(c, m):
        return np.clip(np.rint((x + (e * m)[..., None]) * _over(1, d * c)[..., None]), 0, top)

    found_c, found_m, error = c, m, np.full(c.shape, np.inf, np.float32)
    for more_c, more_m in NEAR:
        try_c, try_m = np.clip(c + more_c, 0, most), np.clip(m + more_m, 0, most)
        off = Coded(d, try_c, e, try_m, codes(try_c, try_m)).values().reshape(x.shape) - x
        left = _sum(w, off, off)
        better = left < error
        tried = (try_c, found_c), (try_m, found_m), (left, error)
        found_c, found_m, error = (np.where(better, a, b) for a, b in tried)
    return Coded(d, found_c, e, found_m, codes(found_c, found_m))


def _extreme(x):
    """Along the last axis, the number farthest from 0, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]


def _sum(*factors):
    return np.einsum(",".join(["nps"] * len(factors)) + "->np", *factors)


def _over(a, b):
    """a / b, and 0 where b is as good as 0, of which float32 has no inverse."""
    a = np.float32(a)
    return np.divide(
        a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), b.shape), np.float32), where=np.abs(b) > TINY
    )


def _half(x):
    """x as float16 holds it, and never 0, so that one can divide by it."""
    size = np.clip(np.abs(x), SMALLEST, LARGEST)
    return np.copysign(size, x).astype(np.float16).astype(np.float32)


def _fields(kind: str, b: Coded) -> list[np.ndarray]:
    """The fields of a block in the order of the file."""
    n = len(b.d)
    d, e = b.d.astype("<f2"), b.e.astype("<f2")
    q = (b.q + (2 ** (SCALED[kind][0] - 1) if kind in SCALED else 0)).astype(np.uint8).reshape(n, -1)
    c, m = b.c.astype(np.int8), b.m.astype(np.uint8)
    halves = q.reshape(n, 2, 4, -1)  # of 256 values, each in four planes of 32
    match kind:
        case "Q8_0":
            return [(b.d * b.c).astype("<f2"), q ^ 128]
        case "Q4_0" | "Q5_0" | "Q4_1" | "Q5_1":
            numbers = [(b.d * b.c).astype("<f2")] + ([(-b.e * b.m).astype("<f2")] if kind in AFFINE else [])
            fifth = [np.packbits(q >> 4, 1, "little")] if kind.startswith("Q5") else []
            return [*numbers, *fifth, _joined(q.reshape(n, 2, 16) & 15, 4)]
        case "Q2_K":
            return [c.view(np.uint8) | m << 4, _joined(halves, 2), d, e]
        case "Q3_K":
            u = (c + 32).astype(np.uint8)
            low, high = _joined(u.reshape(n, 2, 8) & 15, 4), _joined(u.reshape(n, 4, 4) >> 4, 2)
            return [_joined(q.reshape(n, 8, 32) >> 2, 1), _joined(halves & 3, 2), low, high, d]
        case "Q4_K" | "Q5_K":
            u, fifth = c.view(np.uint8), [_joined(q.reshape(n, 8, 32) >> 4, 1)] if kind == "Q5_K" else []
            scales = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (u, m)] + [u[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
            return [d, e, *scales, *fifth, _joined(q.reshape(n, 4, 2, 32) & 15, 4)]
        case "Q6_K":
            return [_joined((halves & 15).reshape(n, 2, 2, 64), 4), _joined(halves >> 4, 2), c, d]
    raise AssertionError(kind)


def _joined(x, bits):
    """[.., k, n] numbers of `bits` bits -> [.., n] bytes, the first of k in the lowest bits."""
    shifts = np.arange(0, bits * x.shape[-2], bits, dtype=np.uint8)
    return np.bitwise_or.reduce(x << shifts[:, None], axis=-2)
