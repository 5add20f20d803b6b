"""Blocks of GGUF's quantised types, packed value by value as ggml's ggml-common.h lays them out.

Each function draws codes and scales at random and gives (the bytes of a block, its values in float64).
"""

import numpy as np


def q4_0(rng):
    d, q = half(rng), codes(rng, 16, 32)
    return raw(d) + nibbles(q), [d * (x - 8) for x in q]


def q4_1(rng):
    d, m, q = half(rng), half(rng), codes(rng, 16, 32)
    return raw(d, m) + nibbles(q), [d * x + m for x in q]


def q5_0(rng):
    d, q = half(rng), codes(rng, 32, 32)
    return raw(d) + fifth_bits(q) + nibbles(q), [d * (x - 16) for x in q]


def q5_1(rng):
    d, m, q = half(rng), half(rng), codes(rng, 32, 32)
    return raw(d, m) + fifth_bits(q) + nibbles(q), [d * x + m for x in q]


def q8_0(rng):
    d, q = half(rng), rng.integers(-128, 128, 32).tolist()
    return raw(d) + np.array(q, np.int8).tobytes(), [d * x for x in q]


def q2_k(rng):
    d, dmin, scale, least, q = (
        half(rng),
        half(rng),
        codes(rng, 16, 16),
        codes(rng, 16, 16),
        codes(rng, 4, 256),
    )
    scales = bytes(s | m << 4 for s, m in zip(scale, least))
    values = [d * scale[v // 16] * x - dmin * least[v // 16] for v, x in enumerate(q)]
    return scales + planes_of_two_bits(q) + raw(d, dmin), values


def q3_k(rng):
    d, scale, q = half(rng), codes(rng, 64, 16), codes(rng, 8, 256)
    high, scales = bytearray(32), bytearray(12)
    for v, x in enumerate(q):
        high[v % 32] |= (x >> 2) << (v // 32)
    for i, s in enumerate(scale):
        scales[i % 8] |= (s & 15) << 4 * (i // 8)
        scales[8 + i % 4] |= (s >> 4) << 2 * (i // 4)
    values = [d * (scale[v // 16] - 32) * (x - 4) for v, x in enumerate(q)]
    return bytes(high) + planes_of_two_bits(q) + bytes(scales) + raw(d), values


def q4_k(rng, n_codes=16):
    d, dmin, scale, least = half(rng), half(rng), codes(rng, 64, 8), codes(rng, 64, 8)
    q, scales, low, high = codes(rng, n_codes, 256), bytearray(12), bytearray(128), bytearray(32)
    for i in range(4):
        scales[i] = scale[i] | (scale[i + 4] >> 4) << 6
        scales[i + 4] = least[i] | (least[i + 4] >> 4) << 6
        scales[i + 8] = (scale[i + 4] & 15) | (least[i + 4] & 15) << 4
    for v, x in enumerate(q):
        part, b = divmod(v, 32)
        low[32 * (part // 2) + b] |= (x & 15) << 4 * (part % 2)
        high[b] |= (x >> 4) << part
    values = [d * scale[v // 32] * x - dmin * least[v // 32] for v, x in enumerate(q)]
    return raw(d, dmin) + bytes(scales) + (bytes(high) if n_codes == 32 else b"") + bytes(low), values


def q5_k(rng):
    return q4_k(rng, 32)


def q6_k(rng):
    d, scale, q = half(rng), rng.integers(-128, 128, 16).tolist(), codes(rng, 64, 256)
    low, high = bytearray(128), bytearray(64)
    for v, x in enumerate(q):
        part, rest = divmod(v, 128)
        plane, b = divmod(rest, 32)
        low[64 * part + 32 * (plane % 2) + b] |= (x & 15) << 4 * (plane // 2)
        high[32 * part + b] |= (x >> 4) << 2 * plane
    values = [d * scale[v // 16] * (x - 32) for v, x in enumerate(q)]
    return bytes(low) + bytes(high) + np.array(scale, np.int8).tobytes() + raw(d), values


def half(rng):
    return float(np.float16(rng.normal()))


def codes(rng, n, size):
    return rng.integers(0, n, size).tolist()


def raw(*halves):
    return np.array(halves, "<f2").tobytes()


def nibbles(q):
    return bytes((a & 15) | (b & 15) << 4 for a, b in zip(q[:16], q[16:]))


def fifth_bits(q):
    return sum((x >> 4) << j for j, x in enumerate(q)).to_bytes(4, "little")


def planes_of_two_bits(q):
    out = bytearray(64)
    for v, x in enumerate(q):
        part, rest = divmod(v, 128)
        plane, b = divmod(rest, 32)
        out[32 * part + b] |= (x & 3) << 2 * plane
    return bytes(out)
