"""A teacher reads a text once, and what it makes of every token is kept: top-k log probabilities and the tail's mass.

    made = prepare(Data(train=("text.txt",), tokenizer=File("teacher.gguf"), seq_len=256), cache)
    label(trained("teacher.gguf"), made, "labels", k=64, origin=["teacher.gguf"])
    Run(data=Data(..., teacher=TeacherTopK("labels")), objective={"kd": Term(ForwardKL())}, ...)

The teacher sees a document as a student in rows of `context` tokens does: positions from 0 in each piece of it, and
nothing of other documents. A longer document is cut where best-fit packing cuts it, each piece read afresh; of a
conversation the part that is learned is read. With an `overlap` of O every token but the first O has at least O before
it, at context / (context - O) of the cost. Pieces of documents share rows and all batches have one shape, so there is
one compiled program; logits stay on the device, a slice at a time.

A teacher of another tokenizer reads the documents as its own cuts them, `context` of its tokens at a time, and labels
the student's tokens where both end (see `bridge`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmx import artifact
from lmx.data import Batches, Prepared, TokenStore
from lmx.data.pack import BestFit
from lmx.data.taught import UNITS, TaughtWriter, folder_of

from .bridge import Bridge

CHUNK = 1 << 23
"""Logits that are held at once."""
Seen = Callable[[int, int], None]


def label(
    teacher: Any,
    prepared: Prepared,
    out: str | Path,
    *,
    origin: Sequence[str | Path | artifact.Artifact],
    k: int = 64,
    bits: int = 16,
    context: int | None = None,
    overlap: int = 0,
    batch_tokens: int = 4096,
    shard_tokens: int = 1 << 17,
    seen: Seen = lambda done, of: None,
) -> list[Path]:
    """Labels the training part of `prepared`, a store for each of its texts; shards that are there are kept.

    Repeat the call to go on after an end of any kind. Several processes may label the same text together, such as one
    for each accelerator: each takes shards that no other has.
    Args:
      teacher: model, params, tokenizer and context, as `lmx.run.trained` gives them. origin: what it was read from,
        by whose hashes it is known.
      k: likeliest tokens kept of each; up to the words of the tokenizer. bits: of a log probability, 16 or 8.
      context: tokens it reads at once, `prepared.data.seq_len` if None. overlap: of them those read again.
      batch_tokens: in a batch. shard_tokens: in a shard, about; what a kill loses at most.
      seen: called with tokens that are labelled, and with all.
    Raises: ValueError for settings that cannot be met, tokenizers that cannot be laid beside each other, a teacher that
      cannot read so far, or a folder that holds other labels; OSError that names the path.
    """
    context = prepared.data.seq_len if context is None else context
    words = prepared.tokenizer.vocab_size
    _check(teacher, prepared, k, bits, context, overlap)
    same = teacher.tokenizer.hash == prepared.tokenizer.hash
    bridge = None if same else Bridge(teacher.tokenizer, prepared.tokenizer)
    parents = [artifact.find(x) for x in origin]
    known = [parent.hash for parent in parents]
    settings = {
        "teacher": known[0] if len(known) == 1 else artifact.hash_text(" ".join(known)),
        "dtype": teacher.model.config.dtype,
        "words": words,
        "k": k,
        "ids": "<u2" if words <= 1 << 16 else "<u4",
        "bits": bits,
        "context": context,
        "overlap": overlap,
    } | ({} if same else {"teacher_tokenizer": teacher.tokenizer.hash})
    done, of = 0, sum(store.n_tokens for store in prepared.train_stores)
    paths = []
    for store in prepared.train_stores:
        writer = TaughtWriter(folder_of(out, store), settings | _of_text(store, prepared, shard_tokens))
        work = _Work(teacher, store, writer, batch_tokens, bridge)
        facts = {name: settings[name] for name in ("k", "bits", "context", "overlap")}
        facts |= {"tokens": store.n_tokens, "source": store.meta.get("source", "")}
        for n in work.run():
            done += n
            seen(done, of)
        writer.finish([*parents, Path(store.path)], facts)
        paths.append(writer.path)
    return paths


def _of_text(store: TokenStore, prepared: Prepared, shard_tokens: int) -> dict[str, Any]:
    """What the labels of this text are made of; shards end with documents."""
    offsets = np.asarray(store.offsets, np.int64)
    ends, at = [0], 0
    while ends[-1] < store.n_tokens:
        at = int(np.searchsorted(offsets, ends[-1] + shard_tokens))
        ends.append(int(offsets[min(at, len(offsets) - 1)]))
    return {
        "text": store.hash,
        "tokenizer": store.tokenizer_hash,
        "n_tokens": store.n_tokens,
        "longest": int(np.diff(offsets).max(initial=1)) - 1,
        "starts": ends,
    }


def _check(teacher, prepared: Prepared, k: int, bits: int, context: int, overlap: int) -> None:
    words = prepared.tokenizer.vocab_size
    if not 1 <= k <= words:
        raise ValueError(f"label: k={k}; use 1 to {words:,}, the words of the tokenizer")
    if bits not in UNITS:
        raise ValueError(f"label: bits={bits}; use 16, or 8 for about a quarter less to keep")
    if context < 1 or not 0 <= overlap < context:
        raise ValueError(f"label: context={context}, overlap={overlap}; use an overlap from 0 to context - 1")
    if teacher.tokenizer.hash != prepared.tokenizer.hash and any(
        x.mask is not None for x in prepared.train_stores
    ):
        raise ValueError(
            f"label: the teacher's tokenizer ({teacher.tokenizer.hash[:12]}) is not that of the data "
            f"({prepared.tokenizer.hash[:12]}), and conversations are labelled in one alone; give the data the "
            "teacher's, tokenizer=File(its path)"
        )
    has, own = teacher.model.config.vocab_size, teacher.tokenizer.vocab_size
    if has < own:
        raise ValueError(f"label: the teacher has {has:,} words and its tokenizer {own:,}; they do not fit")
    limits = [
        ("has positions for", teacher.model.config.position.max_len()),
        ("was made to read", teacher.context),
    ]
    for what, limit in limits:
        if limit is not None and context > limit:
            raise ValueError(
                f"label: context={context}, and the teacher {what} {limit} tokens; use {limit}, with an overlap "
                "so that it sees enough of long documents"
            )


class _Text(NamedTuple):
    """What the teacher reads."""

    tokens: np.ndarray
    offsets: np.ndarray
    pieces: _Pieces


class _Pieces(NamedTuple):
    """Stretches of a text: begin and length [P]; the first `skip` positions of each were labelled by the one before."""

    begin: np.ndarray
    length: np.ndarray
    skip: np.ndarray


class _Work:
    """The labels of one text, under way."""

    def __init__(
        self, teacher, store: TokenStore, writer: TaughtWriter, batch_tokens: int, bridge: Bridge | None
    ):
        self.store, self.writer, self.meta, self.bridge = store, writer, writer.meta, bridge
        self.params = teacher.params
        self.width = self.meta["context"]
        if bridge is None:
            pieces = _pieces(store, self.meta["context"], self.meta["overlap"])
            self.text = _Text(store.tokens, store.offsets, pieces)
            longest = int(pieces.length.max(initial=1))
            self.width = min(self.width, max(16, 1 << (longest - 1).bit_length()))
        self.first = None if bridge is None else jnp.asarray(bridge.first)
        self.rows = max(1, batch_tokens // self.width)
        self.program = _program(teacher.model, self.meta["words"], self.meta["k"], self.meta["bits"])

    def run(self):
        """Yields how many tokens more are labelled, whoever did it. Shards that others hold come last."""
        todo = list(range(self.writer.n_shards))
        with ThreadPoolExecutor(1) as disk:
            writing: Future | None = None
            for wait in (False, True):
                left = []
                for i in todo:
                    size = self.meta["starts"][i + 1] - self.meta["starts"][i]
                    if self.writer.done(i):
                        yield size
                        continue
                    with ExitStack() as held:
                        if not held.enter_context(self.writer.claimed(i, wait)):
                            if self.writer.done(i):
                                yield size
                            else:
                                left.append(i)
                            continue
                        buffers = yield from self._shard(i)
                        if writing:
                            writing.result()
                        writing = disk.submit(self._write, i, *buffers, held.pop_all())
                todo = left
            if writing:
                writing.result()

    def _write(self, i, ids, codes, held: ExitStack) -> None:
        with held:
            self.writer.write(i, ids, codes)

    def _shard(self, i: int):
        """Labels of a shard: (ids, codes). Yields tokens as they are labelled."""
        start, stop = self.meta["starts"][i : i + 2]
        if self.bridge is None:
            return (yield from self._labelled(self.text, start, stop, 1.0))
        crossed = self.bridge.cross(self.store, start, stop)
        n = len(crossed.tokens)
        pieces = _cut(crossed.offsets, self.meta["context"], self.meta["overlap"])
        share = (stop - start) / max(1, n)
        found = yield from self._labelled(_Text(crossed.tokens, crossed.offsets, pieces), 0, n, share)
        ids, codes = (x[np.maximum(crossed.at, 0)] if n else x for x in found)
        codes[crossed.at < 0] = (1 << self.meta["bits"]) - 1
        return ids, codes

    def _labelled(self, text: _Text, start: int, stop: int, share: float):
        """Labels of a part of a text: (ids, codes). share: the student's tokens for one that is read."""
        k, bits = self.meta["k"], self.meta["bits"]
        ids = np.zeros((stop - start, k), self.meta["ids"])
        codes = np.full((stop - start, k + 1), (1 << bits) - 1, f"<u{bits // 8}")
        told, running = 0, None
        for batch, at, source in self._batches(text, start, stop):
            following = self.program(self.params, batch, self.first), at, source - start
            if running is not None:
                told += yield from self._collect(*running, ids, codes, share)
            running = following
        if running is not None:
            told += yield from self._collect(*running, ids, codes, share)
        yield round((stop - start) * share) - told
        return ids, codes

    def _collect(self, found, at, source, ids, codes, share):
        """Puts a batch's labels, positions `at` of it, where they belong."""
        for kept, new in zip((ids, codes), found):
            kept[source] = np.asarray(new).reshape(-1, new.shape[-1])[at]
        yield int(len(at) * share)
        return int(len(at) * share)

    def _batches(self, text: _Text, start: int, stop: int):
        """(batch, places in it [n], indices in the text [n]) of what is to be labelled."""
        p = text.pieces
        here = slice(*np.searchsorted(p.begin, [start, stop]))
        begin, length, skip = p.begin[here], p.length[here], p.skip[here]
        if not len(begin):
            return
        packed = BestFit(text.offsets, self.width, (begin, length.astype(np.int32)))
        found = packed.pieces(np.arange(packed.n_rows), np.zeros(packed.n_rows, np.int64))
        skip = skip[np.searchsorted(begin, found.begin)]
        ends = np.cumsum(found.counts)
        for first in range(0, packed.n_rows, self.rows):
            counts = found.counts[first : first + self.rows]
            of = slice(ends[first] - found.counts[first], ends[first + len(counts) - 1])
            yield self._batch(text.tokens, counts, found.begin[of], found.length[of], skip[of])

    def _batch(self, tokens, counts, begin, length, skip):
        total = int(length.sum())
        row = np.repeat(np.arange(len(counts)), counts)
        before = np.cumsum(length) - length  # of each piece, in all rows
        first = np.cumsum(counts) - counts  # piece of each row
        place = row * self.width + before - before[first][row]
        within = np.arange(total) - np.repeat(before, length)
        at, source = np.repeat(place, length) + within, np.repeat(begin, length) + within
        batch = {
            name: np.zeros(self.rows * self.width, np.int32)
            for name in ("tokens", "positions", "segment_ids")
        }
        batch["tokens"][at] = tokens[source]
        batch["positions"][at] = within
        batch["segment_ids"][at] = np.repeat(np.arange(len(row)) - first[row] + 1, length)
        new = within >= np.repeat(skip, length)
        return {name: x.reshape(self.rows, self.width) for name, x in batch.items()}, at[new], source[new]


def _pieces(store: TokenStore, context: int, overlap: int) -> _Pieces:
    """What is read, in the order of the text; of conversations what is learned."""
    if overlap or store.mask is None:
        return _cut(store.offsets, context, overlap)
    (plan,) = Batches((store,), context, 1).plans
    return _whole(plan)


def _whole(plan: BestFit) -> _Pieces:
    found = plan.pieces(np.arange(plan.n_rows), np.zeros(plan.n_rows, np.int64))
    order = np.argsort(found.begin)
    return _Pieces(found.begin[order], found.length[order], np.zeros(len(order), np.int64))


def _cut(offsets: np.ndarray, context: int, overlap: int) -> _Pieces:
    """Documents `context` tokens at a time, `overlap` of them again."""
    if not overlap:
        return _whole(BestFit(offsets, context))
    offsets = np.asarray(offsets, np.int64)
    n = np.maximum(np.diff(offsets) - 1, 0)
    step = context - overlap
    counts = np.where(n > 0, 1 + -(-np.maximum(n - context, 0) // step), 0)
    document = np.repeat(np.arange(len(n)), counts)
    rank = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = np.minimum(context, n[document] - rank * step)
    return _Pieces(offsets[document] + rank * step, length, np.where(rank > 0, overlap, 0))


@functools.lru_cache(maxsize=8)
def _program(model, words: int, k: int, bits: int):
    """(params, batch, first) -> ids [R, T, k] uint16 or uint32, codes [R, T, k + 1] uint16 or uint8. first: None, or as
    `Bridge` has it, where words are the student's."""
    id_type = jnp.uint16 if words <= 1 << 16 else jnp.uint32
    unit, most = UNITS[bits], (1 << bits) - 1

    def across(logits, first):
        p = jax.nn.softmax(logits[:, : len(first)])
        p = jnp.zeros((len(p), words + 1)).at[:, first].add(p)
        return jnp.log(p)

    @jax.jit
    def answers(params, batch, first):
        out = model.apply(params, batch)
        R, T, D = out.hidden.shape
        size = max(1, min(R * T, CHUNK // words))
        short = -(R * T) % size
        hidden = jnp.pad(out.hidden.reshape(R * T, D), ((0, short), (0, 0))).reshape(-1, 1, size, D)

        def part(hidden):
            logits = replace(out, hidden=hidden).logits[0]
            logits = logits[:, :words] if first is None else across(logits, first)
            top, ids = jax.lax.top_k(logits[:, :words], k)
            log_p = top - jax.nn.logsumexp(logits, -1, keepdims=True)
            rest = 1.0 - jnp.exp(log_p).sum(-1, keepdims=True)
            if k == words and first is None:
                rest = jnp.zeros_like(rest)
            log_p = jnp.concatenate([log_p, jnp.log(jnp.maximum(rest, 0.0))], -1)
            codes = jnp.clip(jnp.round(log_p * -unit), 0, most)
            return ids.astype(id_type), codes.astype(jnp.uint16 if bits == 16 else jnp.uint8)

        found = jax.lax.map(part, hidden)
        return tuple(x.reshape(-1, x.shape[-1])[: R * T].reshape(R, T, -1) for x in found)

    return answers
