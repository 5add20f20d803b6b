"""Prompts are read in pieces of a few fixed sizes, by a loop within the compiled program: `read` serves any length.

    for i = 0, 1, ...:  cache += tokens[start + i size : start + (i + 1) size]

Axes: R rows, W tokens of the padded prompts, V vocab_size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmx.ops.mask import Mask, Where, sees_next

SIZES = (16, 64, 256, 1024)
"""Of a piece, in tokens."""
COST = 10
"""What it costs to read a piece beside its tokens, in tokens: on a CPU the time of fetching all weights once."""


@functools.lru_cache(maxsize=4096)
def keeps(mask: Mask, n: int) -> bool:
    """Whether what a model makes of a row's first n tokens serves whatever follows them.

    Not so within a prefix whose tokens see later ones.
    """
    end = jnp.full((1, 1), n - 1, jnp.int32)
    return n > 0 and not sees_next(mask, Where(end, jnp.ones_like(end))).any()


def piece(config, n: int, start: int = 0) -> int:
    """The size to read tokens number start to n in: the cheapest, or all of them where a piece would not keep."""
    limit = config.position.max_len()
    sizes = [size for size in SIZES if limit is None or size <= limit] or [limit]
    size = min(sizes, key=lambda size: -(-(n - start) // size) * (size + COST))
    kept = all(keeps(config.attention.mask, at) for at in range(start + size, n, size))
    return size if kept else bucket(n - start, limit)


def padded(ids: Sequence[Sequence[int]], width: int) -> tuple[Int[np.ndarray, "R W"], Int[np.ndarray, " R"]]:
    """Rows of ids as one array, and their lengths."""
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.full((len(ids), width), ids[0][0], np.int32)
    for row, values in zip(tokens, ids):
        row[: len(values)] = values
    return tokens, lengths


def read(
    model, params, cache, tokens: Int[Array, "R W"], start, lengths: Int[Array, " R"], size: int
) -> tuple[Float[Array, "R V"], Any]:
    """(logits after the last token of each row, the cache with tokens number `start` to `lengths` of each row).

    W is at least the longest of them and a piece more.
    """
    R = tokens.shape[0]
    within = jnp.arange(size, dtype=jnp.int32)[None]

    def more(carry):
        at, _, _ = carry
        return at < lengths.max()

    def one(carry):
        at, logits, cache = carry
        here = jax.lax.dynamic_slice_in_dim(tokens, at, size, 1)
        out, cache = model.step(params, cache, here, at + within < lengths[:, None])
        last = lengths - 1 - at
        hidden = out.hidden[jnp.arange(R), jnp.clip(last, 0, size - 1)]
        ends = ((last >= 0) & (last < size))[:, None]
        logits = jnp.where(ends, replace(out, hidden=hidden[:, None]).logits[:, 0], logits)
        return at + size, logits, cache

    logits = jnp.zeros((R, model.config.vocab_size), jnp.float32)
    _, logits, cache = jax.lax.while_loop(more, one, (jnp.asarray(start, jnp.int32), logits, cache))
    return logits, cache


def bucket(n: int, limit: int | None, parts: int = 4) -> int:
    """n, rounded up so that few programs are compiled: `parts` / 2 sizes between powers of two, and multiples of 16.

    limit: the model's positions, which no size exceeds.
    """
    step = max(16, (1 << (n - 1).bit_length()) // parts)
    size = -(-n // step) * step
    return size if limit is None else min(size, limit)
