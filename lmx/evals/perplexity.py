"""Perplexity per token and per word, and bits per byte, over documents, with bootstrap intervals.

    nats = -sum over documents and tokens t of log p(t | bos, the document's earlier tokens in view)
    perplexity = exp(nats / n_tokens)    word_perplexity = exp(nats / n_words)
    bits_per_byte = nats / (n_bytes ln 2)

A document is scored as [bos] ids: every id once, bos never. Its end counts as a token too if `eos` is set,
which makes p a distribution over whole documents; published figures mostly leave it out. Words are what
whitespace separates in the original text and bytes those of its UTF-8, so both compare across tokenizers;
tokens do not.

In view are at most seq_len tokens. Without a stride a longer document is cut into pieces that start afresh.
With stride s a window moves on by s and scores the tokens that no window scored before: each sees the
seq_len - s tokens before it or more, as far as there are any. Pieces of many documents share rows, kept apart
by segments.

The model runs in its own dtype with float32 log probabilities; sums over tokens and documents are float64, on
the host. A few numbers are kept of each document, so any number of texts may pass by.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.data.pack import BestFit
from lmx.losses import Chunked, NextToken
from lmx.ops.mask import Where, sees_next
from lmx.report.stats import Interval, drawn_interval, resampled_sums


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of some texts; 95 % intervals by bootstrap over documents, NaN for one document.

    sums [n_documents, 4] float64: nats, tokens, words and bytes of each document, in order.
    """

    nats_per_token: Interval
    perplexity: Interval
    word_perplexity: Interval
    bits_per_byte: Interval
    n_documents: int
    n_tokens: int
    n_words: int
    n_bytes: int
    sums: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Difference:
    """a - b, where each resample draws the same documents for both; below 0 means that a predicts better.

    nats_per_token is NaN where the two cut the texts into different numbers of tokens.
    """

    nats_per_token: Interval
    nats_per_word: Interval
    bits_per_byte: Interval


def perplexity(
    model,
    params,
    texts: Iterable[str],
    tokenizer,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int = 16,
    bootstrap: int = 1000,
    seed: int = 0,
    eos: bool = False,
    bos: int | None = None,
) -> Perplexity:
    """How well the model predicts the texts, each of which is one document.

    Args:
      params: on one device or spread over a mesh; batch_size must then suit the model's mesh.
      seq_len: tokens in view at most, bos included.
      stride: None cuts long documents into pieces; s in [1, seq_len] slides a window over them, at seq_len
        / s times the cost.
      batch_size: rows of seq_len tokens in a compiled call; all calls have one shape.
      bootstrap: resamples of documents for the intervals, drawn with `seed`.
      eos: whether the end of a document is scored as a token.
      bos: the id in front of each document; None means the tokenizer's.
    Raises: ValueError if there is nothing to score, no bos, an id outside the model's vocabulary, a mask that
      shows tokens what they are to predict, or a document whose loss is not finite.
    """
    stride = seq_len if stride is None else stride
    bos = tokenizer.bos_id if bos is None else bos
    end = (tokenizer.eos_id,) if eos else ()
    _check(model, seq_len, stride, batch_size, bootstrap, (bos, *end))
    counts: list[tuple[int, int, int]] = []
    documents = _documents(texts, tokenizer, bos, end, model.config.vocab_size, counts)
    score = _scorer(model.apply, model.config.vocab_size, batch_size, _mesh(params))
    owners, nats, running = [], [], None
    for batch, owner in _batches(_pieces(documents, seq_len, stride), seq_len, batch_size):
        following = score(params, batch), owner
        if running is not None:
            _collect(*running, owners, nats)
        running = following
    if running is None:
        raise ValueError(
            f"perplexity: nothing to score in {len(counts)} documents; give texts that are not empty"
        )
    _collect(*running, owners, nats)
    total = np.bincount(np.concatenate(owners), np.concatenate(nats), len(counts))
    if not np.isfinite(total).all():
        i = int(np.flatnonzero(~np.isfinite(total))[0])
        raise ValueError(
            f"perplexity: document {i} costs {total[i]} nats; the model's weights or outputs are not finite"
        )
    return summarize(np.column_stack([total, np.array(counts, np.float64)]), bootstrap, seed)


def summarize(sums: np.ndarray, bootstrap: int = 1000, seed: int = 0) -> Perplexity:
    """The measures and their intervals from nats, tokens, words and bytes of each document [n, 4]."""
    total, draws = sums.sum(0), resampled_sums(sums, bootstrap, seed)
    per_token, per_word, per_byte = (
        drawn_interval(_over(total, i), _over(draws, i), len(sums)) for i in (TOKENS, WORDS, BYTES)
    )
    return Perplexity(
        per_token,
        _map(np.exp, per_token),
        _map(np.exp, per_word),
        _map(lambda nats: nats / np.log(2), per_byte),
        len(sums),
        *(int(n) for n in total[1:]),
        sums=sums,
    )


def compare(a: Perplexity, b: Perplexity, bootstrap: int = 1000, seed: int = 0) -> Difference:
    """How much worse a does than b on the same documents; pairing them removes what makes a document hard.

    Raises: ValueError if the documents differ in number, words or bytes.
    """
    if a.sums.shape != b.sums.shape or (a.sums[:, WORDS:] != b.sums[:, WORDS:]).any():
        raise ValueError(
            f"compare: {a.n_documents} documents of {a.n_bytes} bytes and {b.n_documents} of {b.n_bytes} are "
            "not the same ones in the same order; evaluate both on the same texts"
        )
    both = np.concatenate([a.sums, b.sums], 1)
    total, draws = both.sum(0), resampled_sums(both, bootstrap, seed)

    def difference(i):
        value, drawn = (_over(x[..., :4], i) - _over(x[..., 4:], i) for x in (total, draws))
        return drawn_interval(value, drawn, len(both))

    same_tokens = (a.sums[:, TOKENS] == b.sums[:, TOKENS]).all()
    return Difference(
        difference(TOKENS) if same_tokens else Interval(np.nan, n=len(both)),
        difference(WORDS),
        _map(lambda nats: nats / np.log(2), difference(BYTES)),
    )


NATS, TOKENS, WORDS, BYTES = range(4)
GROUP = 64
BUFFER = 8


class _Piece(NamedTuple):
    """A stretch of one document: ids [n + 1], of which the last n are labels; the first `skip` of those were
    scored before."""

    document: int
    ids: np.ndarray
    skip: int


def _documents(texts, tokenizer, bos, end, vocab_size, counts) -> Iterator[np.ndarray]:
    """Ids of each text with bos in front; appends (tokens, words, bytes) of each to counts."""
    texts = iter(texts)
    while group := list(itertools.islice(texts, GROUP)):
        for text, ids in zip(group, tokenizer.encode_batch(group)):
            document = np.array([bos, *ids, *end], np.int32)
            if document.max() >= vocab_size:
                raise ValueError(
                    f"perplexity: document {len(counts)} holds token {document.max()}, outside the model's "
                    f"vocab_size={vocab_size}; use the tokenizer it was trained with"
                )
            counts.append((len(document) - 1, len(text.split()), len(text.encode())))
            yield document


def _pieces(documents: Iterable[np.ndarray], seq_len: int, stride: int) -> Iterator[_Piece]:
    for i, ids in enumerate(documents):
        n = len(ids) - 1
        for start in range(0, max(n - (seq_len - stride), min(n, 1)), stride):
            yield _Piece(i, ids[start : start + seq_len + 1], seq_len - stride if start else 0)


def _batches(pieces: Iterator[_Piece], seq_len: int, batch_size: int):
    """(batch, owner): arrays [batch_size, seq_len], owner -1 where nothing is scored, else the document.

    Pieces are packed best-fit as they come, BUFFER batches at a time; those in rows that fill no whole batch
    wait for the next ones. Only the last batch has empty rows.
    """
    waiting: list[_Piece] = []
    room = BUFFER * batch_size * seq_len
    more = True
    while more:
        size = sum(len(piece.ids) - 1 for piece in waiting)
        more = False
        for piece in pieces:
            waiting.append(piece)
            size += len(piece.ids) - 1
            if size >= room:
                more = True
                break
        rows = _rows(waiting, seq_len)
        whole = len(rows) // batch_size * batch_size if more else len(rows)
        waiting = [piece for row in rows[whole:] for piece in row]
        for start in range(0, whole, batch_size):
            yield _batch(rows[start : min(start + batch_size, whole)], seq_len, batch_size)


def _rows(pieces: list[_Piece], seq_len: int) -> list[list[_Piece]]:
    """The pieces put together into rows of at most seq_len positions."""
    offsets = np.cumsum([0, *(len(piece.ids) for piece in pieces)])
    packed = BestFit(offsets, seq_len)
    found = packed.pieces(np.arange(packed.n_rows), np.zeros(packed.n_rows, np.int64))
    which = iter(np.searchsorted(offsets, found.begin, "right") - 1)
    return [[pieces[next(which)] for _ in range(count)] for count in found.counts]


def _batch(rows: list[list[_Piece]], seq_len: int, batch_size: int):
    shape = batch_size, seq_len
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "labels", "positions", "segment_ids")}
    owner = np.full(shape, -1)
    for b, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row, 1):
            n = len(piece.ids) - 1
            at = slice(start, start + n)
            batch["tokens"][b, at] = piece.ids[:-1]
            batch["labels"][b, at] = piece.ids[1:]
            batch["positions"][b, at] = np.arange(n)
            batch["segment_ids"][b, at] = segment
            owner[b, start + piece.skip : start + n] = piece.document
            start += n
    return batch, owner


@functools.lru_cache(maxsize=16)
def _scorer(apply, vocab_size: int, batch_size: int, mesh):
    """The compiled function (params, batch) -> nats of each label [B, T] float32; never holds [B, T, V]."""
    loss = Chunked.fitting(NextToken(), batch_size, vocab_size)
    everywhere = None if mesh is None else NamedSharding(mesh, P())
    return jax.jit(lambda params, batch: loss(apply(params, batch), batch), out_shardings=everywhere)


def _mesh(params):
    """The mesh the parameters are spread over, or None."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(params))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def _collect(out, owner, owners, nats) -> None:
    """Appends document numbers and float64 sums of one batch."""
    scored = owner >= 0
    documents, inverse = np.unique(owner[scored], return_inverse=True)
    owners.append(documents)
    nats.append(np.bincount(inverse, np.asarray(out, np.float64)[scored]))


def _over(sums: np.ndarray, i: int) -> np.ndarray | np.floating:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., NATS] / sums[..., i]


def _map(fn, x: Interval) -> Interval:
    """An increasing function of an interval."""
    with np.errstate(over="ignore"):
        return dataclasses.replace(
            x, **{name: float(fn(getattr(x, name))) for name in ("value", "low", "high")}
        )


def _check(model, seq_len, stride, batch_size, bootstrap, specials) -> None:
    if not 1 <= stride <= seq_len:
        raise ValueError(
            f"perplexity: stride={stride} is outside [1, seq_len={seq_len}]; None cuts without overlap"
        )
    if batch_size < 1 or bootstrap < 0:
        raise ValueError(f"perplexity: {batch_size=} and {bootstrap=}; use at least 1 and 0")
    if None in specials:
        name = "bos" if specials[0] is None else "eos"
        way_out = "say which id stands first, such as bos=eos_id" if name == "bos" else "use eos=False"
        raise ValueError(f"perplexity: the tokenizer has no {name} token; {way_out}")
    places = jnp.arange(8, dtype=jnp.int32)[None]
    mask = model.config.attention.mask
    if np.asarray(sees_next(mask, Where(places, jnp.ones_like(places)))).any():
        raise ValueError(
            f"perplexity: {mask} lets a token see later ones, so it would be told what it is to predict"
        )
