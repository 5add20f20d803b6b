"""Codes of a few bits each, packed end to end into words of 32: code k lies in bits [k b, (k + 1) b) of the stream.

A code may lie in two words; 32 codes fill b words exactly, and a last group of fewer is filled up with zeros.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

GROUP = 32
"""Codes that begin and end with a word, whatever their bits."""


def n_words(n: int, bits: int) -> int:
    """Words that hold n codes."""
    return -(-n // GROUP) * bits


def pack(codes: UInt[Array, "*b n"], bits: int) -> UInt[Array, "*b words"]:
    """Words uint32 [.., n_words(n, bits)] of codes below 2**bits, which lie along the last axis."""
    *lead, n = codes.shape
    codes = jnp.pad(codes.astype(jnp.uint32), [(0, 0)] * len(lead) + [(0, -n % GROUP)])
    codes = codes.reshape(*lead, -1, GROUP)
    words = []
    for word in range(bits):
        parts = jnp.zeros(codes.shape[:-1], jnp.uint32)
        for k in range(GROUP):
            shift = k * bits - 32 * word
            if -bits < shift < 32:
                code = codes[..., k]
                parts |= code << np.uint32(shift) if shift >= 0 else code >> np.uint32(-shift)
        words.append(parts)
    return jnp.stack(words, -1).reshape(*lead, -1)


def unpack(words: UInt[Array, "*b words"], bits: int, n: int) -> UInt[Array, "*b n"]:
    """The first n codes, uint8: undoes `pack`."""
    *lead, total = words.shape
    mask = np.uint32(2**bits - 1)
    if 32 % bits == 0:
        shifts = _as_last(np.arange(0, 32, bits), len(lead) + 1)
        codes = words[..., None] >> shifts & mask
    else:
        starts = np.arange(GROUP) * bits
        first, shift = starts // 32, starts % 32
        parts, rank = words.reshape(*lead, total // bits, bits), len(lead) + 1
        low = parts[..., first] >> _as_last(shift, rank)
        high = parts[..., np.minimum(first + 1, bits - 1)] << _as_last(np.where(shift, 32 - shift, 0), rank)
        within = np.broadcast_to(_as_last(shift + bits <= 32, rank, bool), low.shape)
        codes = jnp.where(within, low, low | high) & mask
    return codes.astype(jnp.uint8).reshape(*lead, total // bits * GROUP)[..., :n]


def _as_last(x: np.ndarray, rank: int, dtype=np.uint32) -> np.ndarray:
    """A vector as the last axis after `rank` others."""
    return x.astype(dtype).reshape(*[1] * rank, -1)
