"""One of every leaf, and the matrix it stands for, written out in float64 from its fields."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from lmx.weights import (
    Bank,
    Dora,
    Fake,
    LowRank,
    Masked,
    Quantized,
    Rotated,
    Scaled,
    Transposed,
    Vera,
    quantize,
)
from lmx.weights.quantized import to_float8, to_table

D_IN, D_OUT, L = 48, 20, 3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def ordered(w, order):
    return replace(
        quantize(w[..., order, :], 4, 16), order=jnp.broadcast_to(order, (*w.shape[:-2], len(order)))
    )


def kinds(lead=()):
    w = normal(0, *lead, D_IN, D_OUT)
    a, b = normal(1, *lead, D_IN, 4), normal(2, *lead, 4, D_OUT)
    int4 = quantize(w, 4, 16)
    keys = jnp.broadcast_to(jax.random.key_data(jax.random.key(7)), (*lead, 2))
    return {
        "int8": quantize(w),
        "int8 affine in groups": quantize(w, 8, 16, symmetric=False),
        "int4": int4,
        "int4 in groups that do not divide": quantize(w, 4, 20),
        "int3 affine": quantize(w, 3, 16, symmetric=False),
        "int2": quantize(w, 2, 8, scale_dtype="float16"),
        "int4 in another order": ordered(w, jax.random.permutation(jax.random.key(3), D_IN)),
        "nf4": to_table(w, group_size=16),
        "float8": to_float8(w),
        "masked": Masked(w, normal(5, *lead, D_IN, D_OUT) > 0),
        "masked int4": Masked(int4, normal(5, *lead, D_IN, D_OUT) > 0),
        "fake": Fake(w, 4, 16),
        "rotated": Rotated(w, jnp.sign(normal(6, *lead, D_IN))),
        "rotated int4": Rotated(int4, jnp.sign(normal(6, *lead, D_IN))),
        "scaled int4": Scaled(int4, jnp.abs(normal(6, *lead, D_IN))),
        "lora": LowRank(w, a, b, 8.0),
        "rslora on int4": LowRank(int4, a, b, 8.0, stabilised=True),
        "dora": Dora(w, a, b, jnp.abs(normal(4, *lead, 1, D_OUT)), 8.0),
        "dora on int4": Dora(int4, a, b, jnp.abs(normal(4, *lead, 1, D_OUT)), 8.0),
        "vera": Vera(w, keys, normal(8, *lead, 1, 6), normal(9, *lead, 1, D_OUT)),
        "bank": Bank(
            int4, normal(1, *lead, 2, D_IN, 4), normal(2, *lead, 2, 4, D_OUT),
            normal(3, *lead, 2), normal(4, *lead, 1, 2),
        ),
        "transposed int4": Transposed(quantize(normal(0, *lead, D_OUT, D_IN), 4, 8)),
    }  # fmt: skip


def f64(x):
    return np.asarray(x, np.float64)


def turned(x):
    return np.swapaxes(x, -1, -2)


def by_hand(w):
    match w:
        case Quantized():
            return quantized_by_hand(w)
        case Transposed():
            return turned(by_hand(w.base))
        case Masked():
            return by_hand(w.base) * f64(w.mask)
        case Fake():
            return quantized_by_hand(quantize(w.w, w.bits, w.group_size))
        case Rotated():
            from scipy.linalg import block_diag
            from scipy.linalg import hadamard as sylvester

            H = block_diag(*[sylvester(16) / 4] * 3)
            return f64(w.signs)[..., None] * (H @ by_hand(w.base))
        case Scaled():
            return f64(w.scale)[..., None] * by_hand(w.base)
        case LowRank():
            rank = w.a.shape[-1]
            return by_hand(w.base) + f64(w.a) @ f64(w.b) * w.alpha / (rank**0.5 if w.stabilised else rank)
        case Dora():
            v = by_hand(w.base) + f64(w.a) @ f64(w.b) * w.alpha / w.a.shape[-1]
            return f64(w.magnitude) * v / np.sqrt((v**2).sum(-2, keepdims=True))
        case Vera():
            one = w.key.reshape(-1, 2)[0]
            a, b = map(f64, w._drawn(one))
            return by_hand(w.base) + (a * f64(w.d)) @ b * f64(w.b)
        case Bank():
            share = f64(w.mix)[..., 0, :] * f64(w.scale)
            return by_hand(w.base) + np.einsum("...n,...nir,...nro->...io", share, f64(w.a), f64(w.b))
    return f64(w)


def quantized_by_hand(w):
    q = np.asarray(w.q)
    if q.dtype == np.uint32:
        lead = q.shape[:-1]
        stream = ((q[..., None] >> np.arange(32, dtype=np.uint32)) & 1).reshape(*lead, -1)
        stream = stream[..., : w.d_in * w.bits].reshape(*lead, w.d_in, w.bits)
        q = (stream.astype(np.int64) << np.arange(w.bits)).sum(-1)
        q = np.asarray(w.table)[q] if w.table else q - 2 ** (w.bits - 1)
    group = np.arange(w.d_in) // w.group_size
    values = q.astype(np.float64)
    if w.zero is not None:
        values = values - f64(w.zero)[..., group]
    values = values * f64(w.scale)[..., group]
    if w.order is not None:
        place = np.argsort(np.asarray(w.order), -1)
        values = np.take_along_axis(values, np.broadcast_to(place[..., None, :], values.shape), -1)
    return turned(values)
