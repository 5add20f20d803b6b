"""A keyed permutation of range(n): shuffling without a list, so that any position is reached at once.

permute(i, n, key) is a bijection of range(n) for every key: a Feistel cipher on Z_a x Z_b with a * b >= n
("generalized Feistel", Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 5). An index is
i = x * b + y, and the rounds alternate x += F(y) mod a, y += F(x) mod b. Values outside range(n) are
enciphered again (cycle walking); as a * b - n < a, that happens to about one index in sqrt(n). The round
function is a
64-bit mixer: good for shuffling, not for secrets.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fold(key: int | np.ndarray, *values: int | np.ndarray) -> np.ndarray:
    """A new key from a key and integers, uint64: equal inputs give equal keys, any change gives an unrelated
    one.

    Arrays are broadcast, so that one call derives the keys of many epochs.
    """
    out = _mix(_u64(key) + np.uint64(_GOLDEN))
    for value in values:
        out = _mix((out ^ _u64(value)) + np.uint64(_GOLDEN))
    return out


def permute(i: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """Where index i goes, int64, the shape of i.

    Args:
      i: integers in [0, n).
      n: size of the set, at least 1.
      key: one key, or one per index (broadcast against i).
    Raises: ValueError if n < 1 or an index lies outside [0, n).
    """
    return _walk(i, n, key, _encipher)


def inverse(i: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """Which index permute sends to i: inverse(permute(i, n, key), n, key) == i."""
    return _walk(i, n, key, _decipher)


def _walk(i, n, key, cipher):
    i = np.asarray(i)
    if n < 1:
        raise ValueError(f"permute: n={n}; a permutation needs at least one element")
    if i.size and (int(i.min()) < 0 or int(i.max()) >= n):
        raise ValueError(f"permute: index {i.min()}..{i.max()} outside [0, {n})")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    out = i.reshape(-1).astype(np.uint64)
    keys = np.broadcast_to(_u64(key), i.shape if np.ndim(key) else (1,)).reshape(-1)
    out = cipher(out, a, b, keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        moved = cipher(out[outside], a, b, keys[outside] if keys.size > 1 else keys)
        out[outside] = moved
        outside = outside[moved >= n]
    return out.astype(np.int64).reshape(i.shape)


def _encipher(value, a, b, key):
    a, b = np.uint64(a), np.uint64(b)
    x, y = value // b, value % b
    for r in range(ROUNDS):
        if r % 2 == 0:
            x = (x + _round(y, key, r) % a) % a
        else:
            y = (y + _round(x, key, r) % b) % b
    return x * b + y


def _decipher(value, a, b, key):
    a, b = np.uint64(a), np.uint64(b)
    x, y = value // b, value % b
    for r in reversed(range(ROUNDS)):
        if r % 2 == 0:
            x = (x + a - _round(y, key, r) % a) % a
        else:
            y = (y + b - _round(x, key, r) % b) % b
    return x * b + y


def _round(half, key, r):
    return _mix(half + (key ^ np.uint64(((r + 1) * _GOLDEN) & _MASK)))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words in which every bit
    matters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _u64(value) -> np.ndarray:
    """Integers modulo 2**64, as an array of at least one axis: numpy warns of overflow in scalars only."""
    if isinstance(value, int):
        return np.array([value & _MASK], np.uint64)
    return np.atleast_1d(np.asarray(value)).astype(np.uint64)
