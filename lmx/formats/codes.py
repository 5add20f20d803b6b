"""Matrices in codes of a few bits as the files of others hold them: the tensors of one linear layer <-> `Quantized`.

pack-quantized   weight_packed int32 [d_out, words]: codes from 0, packed along d_in as `lmx.ops.bits` does;
                 weight_scale [d_out, groups], weight_shape [2], weight_zero_point int32, packed along d_out [words,
                 groups]; weight_g_idx as g_idx below, in older files
int-quantized    weight int8 [d_out, d_in], weight_scale [d_out, groups], weight_zero_point int8 [d_out, groups]
float-quantized  weight float8_e4m3fn [d_out, d_in], weight_scale [d_out, groups]
gptq, gptq_v2    qweight int32 [words, d_out]: codes from 0, packed along d_in; scales float16 [groups, d_out]; qzeros
                 int32 [groups, words], packed along d_out; g_idx int32 [d_in], the group of each input

The first three are formats of compressed-tensors. The zeros of "gptq", the first version, are stored less 1.
Source: vllm-project/compressed-tensors 0.20, compressors/pack_quantized and naive_quantized; ModelCloud/GPTQModel 7.6,
utils/model.py, convert_gptq_v1_to_v2_format_module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Int, UInt

from lmx.formats.tensor import Wanted
from lmx.ops.bits import GROUP, n_words
from lmx.weights import Quantized

GPTQ = ("gptq", "gptq_v2")
GPTQ_BITS = (2, 3, 4, 8)
FORMATS = {"pack-quantized": range(2, 9), "int-quantized": range(2, 9), "float-quantized": (8,)}
FORMATS |= dict.fromkeys(GPTQ, GPTQ_BITS)
"""Format -> bits of its codes."""
DENSE = "lmx.weights.dense, or --layout dense of `lmx convert`"
"""The way out where no format holds a matrix."""
INTEGERS, FLOATS = ("I32", "I64"), ("F16", "BF16", "F32")
OPTIONAL = ("g_idx", "weight_g_idx")
"""Tensors that are left out where inputs lie as they come."""


@dataclass(frozen=True)
class Scheme:
    """How a file holds a matrix. group_size: inputs that share a scale; None means all.

    activations, as of `Quantized`; calibrated: whether the file holds their scale.
    """

    format: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    activations: str = "float"
    calibrated: bool = False

    def __post_init__(self):
        allowed = FORMATS.get(self.format, ())
        if self.bits not in allowed:
            known = f"{self.format} has {', '.join(map(str, allowed))}" if allowed else ", ".join(FORMATS)
            raise ValueError(f"format={self.format!r:.99} with bits={self.bits}; {known}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}; use 1 or more, or -1 for all inputs")

    def __str__(self):
        together = f"in groups of {self.group_size}" if self.group_size else "with a scale for each output"
        kind = "" if self.format == "float-quantized" else ", symmetric" if self.symmetric else ", affine"
        inputs = ", int8 activations" if self.activations == "int8" else ""
        return f"{self.format}, {self.bits} bits {together}{kind}{inputs}"

    def n_groups(self, d_in: int) -> int:
        return -(-d_in // (self.group_size or d_in))


def stored(scheme: Scheme, d_out: int, d_in: int) -> dict[str, Wanted]:
    """The tensors of a matrix, named as they follow the name of its layer."""
    groups = scheme.n_groups(d_in)
    if scheme.format in GPTQ:
        return {
            "qweight": Wanted((n_words(d_in, scheme.bits), d_out), ("I32",)),
            "qzeros": Wanted((groups, n_words(d_out, scheme.bits)), ("I32",)),
            "scales": Wanted((groups, d_out), FLOATS),
            "g_idx": Wanted((d_in,), INTEGERS),
        }
    found = {"weight_scale": Wanted((d_out, groups), FLOATS)}
    if scheme.format == "pack-quantized":
        found["weight_packed"] = Wanted((d_out, _n_whole(d_in, scheme.bits)), ("I32",))
        found["weight_shape"] = Wanted((2,), INTEGERS)
        found["weight_g_idx"] = Wanted((d_in,), INTEGERS)
        zeros = Wanted((_n_whole(d_out, scheme.bits), groups), ("I32",))
    else:
        kind = "F8_E4M3" if scheme.format == "float-quantized" else "I8"
        found["weight"] = Wanted((d_out, d_in), (kind,))
        zeros = Wanted((d_out, groups), ("I8",))
    if not scheme.symmetric:
        found["weight_zero_point"] = zeros
    if scheme.calibrated:
        found["input_scale"] = Wanted((1,), FLOATS)
    return found


def scheme_of(w: Quantized, layout: str, d_out: int) -> Scheme:
    """What holds a leaf in "compressed-tensors" or "gptq". d_out: of their tensor, which may join several of ours.

    Raises: ValueError saying why nothing does.
    """
    if w.table is not None:
        raise ValueError(
            f"it numbers the entries of a table of {len(w.table)}, as NF4 does, which {layout} has not; quantize it "
            f"to whole numbers (lmx.weights.quantize), or make it dense ({DENSE})"
        )
    groups, float8 = w.scale.shape[-1], w.q.dtype == ml_dtypes.float8_e4m3fn
    if not float8 and w.q.dtype not in (np.int8, np.uint32):
        raise ValueError(f"it holds {w.q.dtype}, which {layout} has not; make it dense ({DENSE})")
    size = None if groups == 1 else w.group_size
    if size and w.d_in % size:
        raise ValueError(
            f"{layout} wants groups that divide its {w.d_in:,} inputs, not of {size:,}; quantize it in such groups, or "
            f"make it dense ({DENSE})"
        )
    kinds = (w.bits, size, w.zero is None, w.activations, w.input_scale is not None)
    if layout == "gptq":
        other = "use layout='compressed-tensors'"
        if float8 or w.bits not in GPTQ_BITS:
            what = "8-bit floats" if float8 else f"{w.bits} bits"
            raise ValueError(f"it has {what}, and gptq 2, 3, 4 or 8 bits of whole numbers; {other}")
        if w.activations != "float":
            raise ValueError(f"it rounds activations to {w.activations}, which gptq has not; {other}")
        if w.d_in % GROUP or d_out % GROUP:
            raise ValueError(
                f"gptq wants inputs and outputs that {GROUP} divides, not {w.d_in:,} and {d_out:,}; {other}"
            )
        return Scheme("gptq" if w.zero is None else "gptq_v2", *kinds)
    if w.order is not None:
        raise ValueError(
            "its inputs lie in another order, which compressed-tensors has not; use layout='gptq'"
        )
    if float8:
        return Scheme("float-quantized", *kinds)
    whole = w.bits == 8 and w.activations == "int8"
    return Scheme("int-quantized" if whole else "pack-quantized", *kinds)


def pack(scheme: Scheme, w: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one matrix, whose fields are numpy's. Raises: ValueError for a scale that float16 has not."""
    bits, d_in = scheme.bits, w.d_in
    d_out, middle = w.q.shape[0], 2 ** (bits - 1)
    if scheme.format in GPTQ:
        scales = w.scale.T.astype(np.float16)
        if not np.array_equal(scales.astype(np.float32), w.scale.T.astype(np.float32)):
            raise ValueError(
                "a scale of it is no float16, as those of gptq are; quantize with scale_dtype='float16', or use "
                "layout='compressed-tensors'"
            )
        group = np.arange(d_in, dtype=np.int32) // (scheme.group_size or d_in)
        words = w.q if bits < 8 else to_words(_from_zero(w), 8)
        if w.order is not None:
            place = np.argsort(w.order)
            words, group = to_words(_from_zero(w)[:, place], bits), group[place]
        zeros = np.zeros(w.scale.shape, np.int8) if w.zero is None else w.zero
        zeros = to_words(zeros.T.astype(np.int16) + middle, bits)
        zeros = _shifted(zeros, bits, -1) if scheme.format == "gptq" else zeros
        return {
            "qweight": words.T.view(np.int32),
            "qzeros": zeros.view(np.int32),
            "scales": scales,
            "g_idx": group,
        }
    found = {"weight_scale": w.scale}
    if scheme.format == "pack-quantized":
        words = w.q if bits < 8 else to_words(_from_zero(w), 8)
        found["weight_packed"] = words[:, : _n_whole(d_in, bits)].view(np.int32)
        found["weight_shape"] = np.array([d_out, d_in], np.int64)
    else:
        found["weight"] = w.q
    if w.zero is not None:
        found["weight_zero_point"] = w.zero
        if scheme.format == "pack-quantized":
            zeros = to_words(w.zero.T.astype(np.int16) + middle, bits)[:, : _n_whole(d_out, bits)]
            found["weight_zero_point"] = zeros.T.view(np.int32)
    if w.input_scale is not None:
        found["input_scale"] = w.input_scale
    return found


def unpack(scheme: Scheme, tensors: Mapping[str, np.ndarray], d_out: int, d_in: int) -> Quantized:
    """One matrix of the tensors that `stored` describes; its fields are numpy's, `zero` always there if it may be.

    Raises: ValueError for numbers that do not fit the scheme.
    """
    bits, size = scheme.bits, min(scheme.group_size or d_in, d_in)
    middle = 2 ** (bits - 1)
    zero = tensors.get("weight_zero_point")
    if scheme.format in GPTQ:
        zeros = tensors["qzeros"].view(np.uint32)
        zeros = of_words(_shifted(zeros, bits, 1) if scheme.format == "gptq" else zeros, bits, d_out)
        zero = _centred(zeros.T, middle)
        words, scale = np.ascontiguousarray(tensors["qweight"].view(np.uint32).T), tensors["scales"].T
        q = words if bits < 8 else _centred(of_words(words, 8, d_in), middle)
    elif scheme.format == "pack-quantized":
        if tuple(tensors["weight_shape"]) != (d_out, d_in):
            raise ValueError(
                f"weight_shape is {tensors['weight_shape'].tolist()} where the config makes it {[d_out, d_in]}"
            )
        words, scale = _whole(tensors["weight_packed"].view(np.uint32), d_in, bits), tensors["weight_scale"]
        q = words if bits < 8 else _centred(of_words(words, 8, d_in), middle)
        if zero is not None:
            zeros = _whole(np.ascontiguousarray(zero.T).view(np.uint32), d_out, bits)
            zero = _centred(of_words(zeros, bits, d_out).T, middle)
    else:
        q, scale = tensors["weight"], tensors["weight_scale"]
        if bits < 8 and q.size:
            if q.min() < -middle or q.max() >= middle:
                raise ValueError(f"weight holds {q.min()} to {q.max()}, more than {bits} bits do")
            q = to_words(q.astype(np.int16) + middle, bits)
    order = _order(tensors.get("g_idx", tensors.get("weight_g_idx")), size, d_in)
    if order is not None:
        q = of_words(q, bits, d_in)[:, order] if bits < 8 else q[:, order]
        q = to_words(q, bits) if bits < 8 else q
    return Quantized(
        np.ascontiguousarray(q),
        np.ascontiguousarray(scale),
        None if zero is None else np.ascontiguousarray(zero),
        order,
        tensors.get("input_scale"),
        bits=bits,
        d_in=d_in,
        group_size=size,
        activations=scheme.activations,
    )


def to_words(codes: Int[np.ndarray, "m n"], bits: int) -> UInt[np.ndarray, "m words"]:
    """`lmx.ops.bits.pack` in numpy."""
    rows, n = codes.shape
    codes = np.pad(codes.astype(np.uint8), ((0, 0), (0, -n % GROUP)))
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, -1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4")


def of_words(words: UInt[np.ndarray, "m words"], bits: int, n: int) -> UInt[np.ndarray, "m n"]:
    """`lmx.ops.bits.unpack` in numpy."""
    stream = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8), axis=-1, count=n * bits, bitorder="little"
    )
    return np.packbits(stream.reshape(len(words), n, bits), axis=-1, bitorder="little")[..., 0]


def _n_whole(n: int, bits: int) -> int:
    """Words that n codes reach into: the last group of 32 codes may end early."""
    return -(-n * bits // 32)


def _whole(words, n, bits):
    return np.pad(words, ((0, 0), (0, n_words(n, bits) - words.shape[1])))


def _from_zero(w):
    """Codes by place, uint8, counting from 0."""
    return of_words(w.q, w.bits, w.d_in) if w.bits < 8 else (w.q.astype(np.int16) + 128).astype(np.uint8)


def _centred(codes, middle):
    return (codes.astype(np.int16) - middle).astype(np.int8)


def _shifted(zeros, bits, by):
    """Codes plus 1 or less 1. Where they fill words evenly GPTQModel adds words, with carries from a code to the next,
    so that a zero of 0 comes back from its file although 0 less 1 is no code."""
    if 32 % bits:
        n = zeros.shape[1] * 32 // bits
        return to_words((of_words(zeros, bits, n) + np.uint8(by % 256)) % 2**bits, bits)
    ones = sum(1 << at for at in range(0, 32, bits))
    return zeros + np.uint32(by * ones % 2**32)


def _order(group, size, d_in):
    """Inputs by group, and within one as they come; None if that is how they lie."""
    plain = np.arange(d_in) // size
    if group is None or np.array_equal(group, plain) or (group == -1).all():
        return None
    if group.min() < 0 or group.max() > plain[-1]:
        raise ValueError(f"g_idx names group {group.min()} to {group.max()} of {plain[-1] + 1}")
    wanted, found = np.bincount(plain), np.bincount(group, minlength=plain[-1] + 1)
    if not np.array_equal(wanted, found):
        at = int(np.argmax(wanted != found))
        raise ValueError(f"g_idx gives group {at} {found[at]} inputs, not {wanted[at]}")
    return np.argsort(group, kind="stable").astype(np.int32)
