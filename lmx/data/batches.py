"""Training batches: batch n is a function of (seed, n), so any position is reached at once and nothing is to
be saved.

The global batch n is rows [n * B, (n + 1) * B) of an endless sequence of rows; a process takes its slice of
them, so the batch does not depend on how many processes there are. The sequence is made of blocks that hold
quota_c rows of store c each, in an order keyed by (seed, block). With k the number of rows of store c before
a place in it, the row there is

  epoch, i = divmod(k, n_rows_c);  row = permute(i, n_rows_c, key=(seed, c, epoch))

so every store gives every row once before any row again, in a new order each time. Without weights a block is
one pass over all stores (quota_c = n_rows_c). With weights it is 4096 rows, shared out by largest remainders.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .pack import BestFit, Concat, Pieces, plan, windows
from .permutation import fold, permute
from .store import TokenStore
from .taught import Taught

BLOCK = 4096


@dataclass(frozen=True)
class Batches:
    """An endless sequence of packed batches from one or more stores.

    Args:
      stores: where rows come from.
      seq_len: tokens in a row (T).
      batch_size: rows in a global batch (B). More than there are rows is fine: rows go around.
      seed: any integer; orders, the mix and window shifts follow from it alone.
      weights: shares of rows drawn from each store, normalised; () takes every row of every store once an
      epoch.
      packing: "best_fit" or "concat" (see pack.py); stores of conversations take "best_fit" alone.
      shuffle: False gives the rows in stored order (for evaluation).
      taught: what a teacher makes of each store; () adds nothing to batches.
    Raises: ValueError on settings that cannot be met, or when the stores hold no position to train on.
    """

    stores: tuple[TokenStore, ...]
    seq_len: int
    batch_size: int
    seed: int = 0
    weights: tuple[float, ...] = ()
    packing: str = "best_fit"
    shuffle: bool = True
    taught: tuple[Taught, ...] = ()
    plans: tuple[BestFit | Concat, ...] = field(init=False, repr=False, compare=False)
    quotas: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"Batches: batch_size={self.batch_size}; use at least 1")
        if not self.stores:
            raise ValueError("Batches: no stores; give at least one")
        if self.taught and len(self.taught) != len(self.stores):
            raise ValueError(
                f"Batches: labels of {len(self.taught)} stores, and there are {len(self.stores)}; give one each"
            )
        if len({one.k for one in self.taught}) > 1:
            raise ValueError(
                f"Batches: {[one.k for one in self.taught]} labels of a token; use as many of each store"
            )
        plans = tuple(map(self._plan, self.stores))
        for store, made in zip(self.stores, plans):
            if not made.n_rows:
                raise ValueError(
                    f"Batches: {store.path} holds no document to train on ({len(store)} documents)"
                )
        object.__setattr__(self, "plans", plans)
        rows = tuple(made.n_rows for made in plans)
        object.__setattr__(self, "quotas", _quotas(self.weights, len(plans)) if self.weights else rows)
        object.__setattr__(self, "_places", functools.lru_cache(maxsize=8)(self._find_places))

    def _plan(self, store: TokenStore) -> BestFit | Concat:
        if store.mask is None:
            return plan(self.packing, store.offsets, self.seq_len)
        if self.packing != "best_fit":
            raise ValueError(
                f"Batches: packing={self.packing!r} would cut replies in {store.path} from their prompts; use "
                "'best_fit'"
            )
        found = windows(store.offsets, store.mask, self.seq_len, store.meta["keep"])
        return BestFit(store.offsets, self.seq_len, (found.begin, found.length))

    @property
    def n_rows(self) -> int:
        """Rows of all stores together: an epoch, when there are no weights."""
        return sum(made.n_rows for made in self.plans)

    @property
    def n_batches(self) -> int:
        """Batches in one pass over all rows, the last one perhaps not full."""
        return -(-self.n_rows // self.batch_size)

    @property
    def padding_share(self) -> float:
        """Share of padding among all tokens served, in [0, 1]."""
        total = sum(self.quotas)
        return sum(made.padding_share * quota / total for made, quota in zip(self.plans, self.quotas))

    @functools.cached_property
    def loss_share(self) -> float:
        """Share of the positions served that are trained on, in [0, 1]: those with a label, and of conversations those
        whose label is of a reply."""
        shares = []
        for store, made in zip(self.stores, self.plans):
            if store.mask is None:
                shares.append(1.0 - made.padding_share)
            else:
                found = windows(store.offsets, store.mask, self.seq_len, store.meta["keep"])
                shares.append(found.n_counted / (made.n_rows * self.seq_len))
        return sum(share * quota for share, quota in zip(shares, self.quotas)) / sum(self.quotas)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the batches but n: the stores' contents and the settings."""
        settings = (self.seq_len, self.batch_size, self.seed, self.weights, self.packing, self.shuffle)
        hashes = [store.hash + store.meta.get("keep", "") for store in self.stores]
        labels = tuple(one.fingerprint for one in self.taught)
        return hashlib.sha256(repr((*hashes, settings, *labels)).encode()).hexdigest()

    def batch(self, n: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Global batch n, or the given rows of it.

        Returns: arrays [rows, seq_len]: tokens, labels, positions, segment_ids int32 and loss_mask float32.
          labels[t] follows tokens[t] in its document; positions restart at 0 in every segment, also where a
          piece continues a document cut in another row; segment_ids count 1, 2, ... within a row, 0 is
          padding; loss_mask is 1 on every position that has a label, of conversations one of a reply, and 0 on
          padding. With a store of pairs also rejected_mask and pair_mask float32, see `Preferences`; with a
          store of scores also scores float32, each where its document's label is; with labels of
          a teacher also teacher_ids int32 and teacher_log_p float32 [rows, seq_len, k], and teacher_mask, see
          `TeacherTopK`.
        Raises: ValueError if n is negative.
        """
        if n < 0:
            raise ValueError(f"Batches: batch {n}; batches are numbered from 0")
        start, stop, step = (rows or slice(None)).indices(self.batch_size)
        if step != 1:
            raise ValueError(f"Batches: rows={rows}; a process takes consecutive rows")
        return self._serve(n * self.batch_size + start, n * self.batch_size + max(start, stop))

    def once(self) -> Iterator[dict[str, np.ndarray]]:
        """Every row of every store exactly once, in batches; the last is filled up with rows of padding."""
        if self.weights:
            raise ValueError(
                "Batches: one pass is defined without weights only; use dataclasses.replace(b, weights=())"
            )
        for n in range(self.n_batches):
            out = self._serve(n * self.batch_size, min((n + 1) * self.batch_size, self.n_rows))
            short = self.batch_size - len(out["tokens"])
            yield {name: _filled(value, short) for name, value in out.items()} if short else out

    def epochs(self, n: int) -> tuple[float, ...]:
        """How often each store has been gone through when batches 0..n-1 are done."""
        share = n * self.batch_size / sum(self.quotas)
        return tuple(share * quota / made.n_rows for made, quota in zip(self.plans, self.quotas))

    def _serve(self, start: int, stop: int) -> dict[str, np.ndarray]:
        parts = []
        while start < stop:
            chunk, skip = divmod(start, BLOCK)
            size = min(stop - start, BLOCK - skip)
            parts.append([value[skip : skip + size] for value in self._places(chunk)])
            start += size
        if not parts:
            parts.append([value[:0] for value in self._places(0)])
        which, rows, shifts = parts[0] if len(parts) == 1 else [np.concatenate(p) for p in zip(*parts)]
        mine = [np.flatnonzero(which == c) for c in range(len(self.stores))]
        pieces = [made.pieces(rows[m], shifts[m]) for made, m in zip(self.plans, mine)]
        return _gather(self.stores, mine, pieces, self.seq_len, self.taught)

    def _find_places(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [chunk * BLOCK, (chunk + 1) * BLOCK) of the sequence: store, row in it, window shift, all
        [BLOCK]."""
        quotas, size = np.asarray(self.quotas), sum(self.quotas)
        first, slot = divmod(chunk * BLOCK, size)
        slot = slot + np.arange(BLOCK)
        block, slot = first + slot // size, slot % size
        starts = np.concatenate([[0], np.cumsum(quotas)])
        if len(self.stores) > 1 and (self.shuffle or self.weights):
            slot = permute(slot, size, fold(self.seed, 0, block))
        which = np.searchsorted(starts, slot, "right") - 1
        rows, shifts = np.empty(BLOCK, np.int64), np.zeros(BLOCK, np.int64)
        for c, made in enumerate(self.plans):
            mine = np.flatnonzero(which == c)
            rank = np.arange(len(mine)) if self.weights else slot[mine] - starts[c]
            epoch, row = np.divmod(block[mine] * quotas[c] + rank, made.n_rows)
            if self.shuffle:
                key = fold(self.seed, 1 + c, epoch)
                row = permute(row, made.n_rows, key)
                shifts[mine] = (fold(key, 0) % np.uint64(self.seq_len)).astype(np.int64)
            rows[mine] = row
        return which, rows, shifts


def iterate(
    batches: Batches,
    start: int = 0,
    stop: int | None = None,
    rows: slice | None = None,
    depth: int = 2,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (n, batch n) for n = start, start + 1, ..., made ahead by a thread.

    Args:
      rows: of each batch, those this process is to make; all of them if None.
      depth: batches kept ready; 0 makes each one when it is asked for.
    Raises: whatever making a batch raised, at the batch it belongs to.
    """
    numbers = iter(range(start, stop)) if stop is not None else iter(_count(start))
    made = ((n, batches.batch(n, rows)) for n in numbers)
    return ahead(made, depth) if depth else made


def ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same items, made up to `depth` ahead by a thread that ends when the caller stops or closes the
    iterator."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(entry) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return True
        return False

    def work():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="lmx-batches")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()


def _count(start):
    while True:
        yield start
        start += 1


def _quotas(weights: Sequence[float], n: int) -> tuple[int, ...]:
    """Rows of each store in a block of BLOCK rows, by largest remainders."""
    if len(weights) != n:
        raise ValueError(f"Batches: {len(weights)} weights for {n} stores; give one each")
    share = np.asarray(weights, np.float64)
    if not np.isfinite(share).all() or (share <= 0).any():
        raise ValueError(
            f"Batches: weights={tuple(weights)}; each must be positive (leave out a source instead of 0)"
        )
    share = share / share.sum() * BLOCK
    quotas = np.floor(share).astype(np.int64)
    order = np.argsort(-(share - quotas), kind="stable")
    quotas[order[: BLOCK - quotas.sum()]] += 1
    if (quotas == 0).any():
        small = float(np.asarray(weights)[quotas == 0][0])
        raise ValueError(
            f"Batches: weight {small} is less than 1/{BLOCK} of the sum; raise it or leave the source out"
        )
    return tuple(quotas.tolist())


def _filled(value: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(value, ((0, rows), *((0, 0),) * (value.ndim - 1)))


def _gather(
    stores: Sequence[TokenStore],
    mine: list[np.ndarray],
    pieces: list[Pieces],
    seq_len: int,
    taught: Sequence[Taught] = (),
) -> dict:
    """The arrays of a batch. Store c fills rows mine[c] with pieces[c], laid one after the other; the rest of
    each row is a piece of padding."""
    tokens = [store.tokens for store in stores]
    n = sum(map(len, mine))
    counts = np.zeros(n, np.int64)
    for m, (count, _, _) in zip(mine, pieces):
        counts[m] = count
    last = np.cumsum(counts + 1) - 1
    first = last - counts
    size, source, segment = (np.zeros(len(first) + counts.sum(), np.int64) for _ in range(3))
    padding = np.full(n, seq_len)
    for m, (count, begin, length) in zip(mine, pieces):
        ends = np.cumsum(count)
        rank = np.arange(len(begin)) - np.repeat(ends - count, count)
        index = np.repeat(first[m], count) + rank
        size[index], source[index], segment[index] = length, begin, rank + 1
        filled = np.concatenate([[0], np.cumsum(length)])
        padding[m] -= filled[ends] - filled[ends - count]
    size[last] = padding
    start = np.cumsum(size) - size
    flat = np.arange(n * seq_len)
    segment_ids = np.repeat(segment.astype(np.int32), size)
    out = {
        "positions": (flat - np.repeat(start, size)).astype(np.int32),
        "segment_ids": segment_ids,
        "loss_mask": np.ones(n * seq_len, np.float32),
    }
    at = flat + np.repeat(source - start, size)
    if len(tokens) == 1:
        out["tokens"] = tokens[0].take(at, mode="clip").astype(np.int32)
        out["labels"] = tokens[0][1:].take(at, mode="clip").astype(np.int32)
    else:
        at = at.reshape(n, seq_len)
        out["tokens"], out["labels"] = np.empty((n, seq_len), np.int32), np.empty((n, seq_len), np.int32)
        for m, source_tokens in zip(mine, tokens):
            out["tokens"][m] = source_tokens.take(at[m], mode="clip")
            out["labels"][m] = source_tokens[1:].take(at[m], mode="clip")
    out = {name: value.reshape(n, seq_len) for name, value in out.items()}
    at = at.reshape(n, seq_len)
    if any(store.of_pairs for store in stores):
        out |= {name: np.zeros((n, seq_len), np.float32) for name in ("rejected_mask", "pair_mask")}
    if any(store.scores is not None for store in stores):
        out["scores"] = np.zeros((n, seq_len), np.float32)
    if taught:
        k = taught[0].k
        out["teacher_ids"], out["teacher_log_p"] = (np.empty((n, seq_len, k), x) for x in ("i4", "f4"))
        known = np.empty((n, seq_len), bool)
        for m, one in zip(mine, taught):
            out["teacher_ids"][m], out["teacher_log_p"][m], known[m] = one.read(at[m])
    for m, store in zip(mine, stores):
        if store.mask is not None:
            out["loss_mask"][m] = store.mask[1:].take(at[m], mode="clip")
        if store.scores is not None:
            document = np.searchsorted(store.offsets, at[m].clip(0), "right") - 1
            scores = store.scores.take(document, mode="clip")
            out["scores"][m] = np.where(out["loss_mask"][m] > 0, scores, 0)
        if store.of_pairs:
            segments = out["segment_ids"][m]
            rejected = segments % 2 == 0
            out["rejected_mask"][m] = out["loss_mask"][m] * rejected
            out["loss_mask"][m] *= ~rejected
            following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
            out["pair_mask"][m] = rejected & (segments > 0) & (segments != following)
    if taught:
        out["teacher_mask"] = out["loss_mask"] * known
    if padding.any():
        real = out["segment_ids"] > 0
        for name, value in out.items():
            if name != "segment_ids":
                value *= real.reshape(*real.shape, *[1] * (value.ndim - 2))
    return out
