"""How likely a model finds answers, token by token: what all of them begin with is read once.

log p(answer) = sum_i log p(a_i | prompt, a_1 .. a_{i-1})
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmx.generate import Sampling
from lmx.generate.reading import bucket, keeps, padded
from lmx.generate.rows import Decoder
from lmx.tasks import Encoded

KEPT = 8
"""Tokens that caches of a batch may hold, for each token of it."""
ONE = Sampling(temperature=0.0, max_tokens=1)
Seen = Callable[[int, int], None]
"""Called with how much of how much is done."""


class Likelihoods(NamedTuple):
    """nats: log p of each token of each answer, float32. likeliest: whether it has no better one. shared: how many
    first tokens all have and were read once. rows: that were read after them."""

    nats: list[np.ndarray]
    likeliest: list[np.ndarray]
    shared: int
    rows: int


def log_likelihoods(
    model,
    params: Any,
    tokenizer,
    asked: Sequence[Encoded],
    *,
    batch_tokens: int = 2048,
    seen: Seen = lambda done, of: None,
) -> Likelihoods:
    """What the model makes of the tokens ids[start:] of every one, given those before it.

    Answers that begin with the same tokens share a row: those of one token after one prompt cost one row together.
    Raises: ValueError for an answer that nothing comes before, or that the model's mask shows to the prompt.
    """
    for x in asked:
        if x.start < 1:
            raise ValueError(
                "log_likelihoods: nothing comes before the answer, and the tokenizer has no bos; give a prompt"
            )
        if not keeps(model.config.attention.mask, x.start):
            raise ValueError(
                f"log_likelihoods: {model.config.attention.mask} lets tokens before the answer see it; use a causal one"
            )
    rows, row_of = _rows([tuple(x.ids[:-1]) for x in asked])
    pairs = [[] for _ in rows]  # (position in the row, label, answer, place in it)
    for i, (x, row) in enumerate(zip(asked, row_of)):
        pairs[row] += [(at - 1, x.ids[at], i, at - x.start) for at in range(x.start, len(x.ids))]
    heads = [list(row[: min(at for at, *_ in found) + 1]) for row, found in zip(rows, pairs)]
    known = Decoder(model, params, tokenizer, ONE).shared(heads)
    done = 0
    nats = [np.zeros(len(x.ids) - x.start, np.float32) for x in asked]
    likeliest = [np.zeros(len(x), bool) for x in nats]
    width = 1 << (max(map(len, pairs)) - 1).bit_length()
    limit = model.config.position.max_len()
    for batch in batches([len(row) - known.n for row in rows], known.n, batch_tokens, limit):
        tokens, lengths = padded([rows[i][known.n :] for i in batch.rows], batch.size)
        at, labels = np.zeros((2, len(batch.rows), width), np.int32)
        for b, i in enumerate(batch.rows):
            at[b, : len(pairs[i])] = [p[0] - known.n for p in pairs[i]]
            labels[b, : len(pairs[i])] = [p[1] for p in pairs[i]]
        slots = bucket(known.n + batch.size, limit)
        found = _program(model)(params, known.cache, tokens, lengths, at, labels, slots=slots)
        values, tops = map(np.asarray, found)
        for b, i in enumerate(batch.rows[: batch.real]):
            for value, top, (_, _, answer, place) in zip(values[b], tops[b], pairs[i]):
                nats[answer][place], likeliest[answer][place] = value, top
        seen(done := done + batch.real, len(rows))
    return Likelihoods(nats, likeliest, known.n, len(rows))


class Batch(NamedTuple):
    rows: list[int]  # the last ones repeat the first, so that batches of a size have one shape
    real: int
    size: int


def batches(lengths: Sequence[int], before: int, batch_tokens: int, limit: int | None) -> Iterator[Batch]:
    """Rows of so many tokens after `before` others, those of like length together."""
    room = None if limit is None else limit - before
    by_size: dict[int, list[int]] = {}
    for i in np.argsort(lengths, kind="stable"):
        by_size.setdefault(bucket(lengths[i], room, parts=2), []).append(int(i))
    for size, rows in by_size.items():
        most = max(1, min(batch_tokens // size, KEPT * batch_tokens // (before + size)))
        n = min(most, 1 << (len(rows) - 1).bit_length())
        for start in range(0, len(rows), n):
            real = rows[start : start + n]
            yield Batch(real + real[:1] * (n - len(real)), len(real), size)


def _rows(contexts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """(those contexts that are not the beginning of another, the number of the one that each is or begins)."""
    rows, row_of = [], [0] * len(contexts)
    for i in sorted(range(len(contexts)), key=contexts.__getitem__, reverse=True):
        if not rows or rows[-1][: len(contexts[i])] != contexts[i]:
            rows.append(contexts[i])
        row_of[i] = len(rows) - 1
    return rows, row_of


@functools.lru_cache(maxsize=16)
def _program(model):
    @functools.partial(jax.jit, static_argnames="slots")
    def log_p(params, cache, tokens, lengths, at, labels, *, slots):
        R, t = tokens.shape
        if cache is None:
            cache = model.new_cache(R, slots, params)
        else:
            cache = cache.take(jnp.zeros(R, jnp.int32)).resize(slots)
        valid = jnp.arange(t, dtype=jnp.int32)[None] < lengths[:, None]
        out, _ = model.step(params, cache, tokens, valid)
        logits = replace(out, hidden=out.hidden[jnp.arange(R)[:, None], at]).logits  # [R, answers, V]
        said = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return said - jax.nn.logsumexp(logits, -1), said >= logits.max(-1)

    return log_p
