"""Packing: which stretches of which documents make up each row of seq_len tokens.

A document of n tokens gives n - 1 training positions: inputs d[0..n-2], labels d[1..n-1]. A piece is a
stretch of positions of one document; a row holds pieces one after the other, each its own segment, then
padding. Both plans place every position of every document in exactly one row: no token is lost, no label is
counted twice.

`BestFit` cuts only documents longer than a row, into full rows and a remainder, and puts pieces together by
best-fit
decreasing: the longest first, each into the fullest row that still has room (Ding et al. 2024,
arXiv:2404.10830, section 3). `Concat` cuts the concatenated documents every seq_len positions, as GPT-2 did,
and so pads nothing. Conversations are never cut in two, since a reply would lose its prompt: of one longer than a row
the head or the tail is a piece, see `windows`. The two of a pair lie side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """The pieces of some rows, in row order: counts [R] pieces in each row; begin [P] index of the first
    input token in the store; length [P] positions. All int64."""

    counts: np.ndarray
    begin: np.ndarray
    length: np.ndarray


class BestFit:
    """Rows by best-fit decreasing; the same documents always give the same rows.

    Pieces are bucketed by length and rows by the room they have left, so the time is O(N log N) for the sort
    plus at most one step per pair of bucket sizes met: about a second per million documents. Memory: 12 bytes
    a piece.

    Args:
      offsets: [n_documents + 1] where documents start in the store, ascending from 0.
      seq_len: positions in a row.
      whole: the pieces, begin and length [P], where they are not to be cut from the documents; or [P, 2] of pieces
        that lie side by side in one row.
    """

    def __init__(self, offsets: np.ndarray, seq_len: int, whole: tuple[np.ndarray, np.ndarray] | None = None):
        begin, length = whole or _cut(np.asarray(offsets, np.int64), _checked(seq_len))
        begin, length = (x if x.ndim == 2 else x[:, None] for x in (begin, length))
        row, self.n_rows = _best_fit(length.sum(1), seq_len)
        order = np.argsort(row, kind="stable")
        self._begin, self._length = begin[order], length[order]
        self._first = np.zeros(self.n_rows + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=self.n_rows), out=self._first[1:])
        self.padding_share = _padding_share(int(length.sum()), self.n_rows, seq_len)

    def pieces(self, rows: np.ndarray, shift: np.ndarray) -> Pieces:
        """The pieces of rows [R]; `shift` is not used: rows are the same in every epoch."""
        first = self._first[rows]
        counts = self._first[rows + 1] - first
        at = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        begin, length = self._begin[at], self._length[at].astype(np.int64)
        return Pieces(counts * begin.shape[1], begin.ravel(), length.ravel())


class Concat:
    """Rows are consecutive windows of all documents, one after the other; segments still part at each
    document.

    The windows of an epoch start `shift` positions late, around the end of the data and back to its
    beginning, so that a long document is cut elsewhere in each epoch. Nothing is stored: pieces are found by
    bisection.
    """

    def __init__(self, offsets: np.ndarray, seq_len: int):
        self._offsets = np.asarray(offsets, np.int64)
        self._seq_len = _checked(seq_len)
        self._starts = np.zeros(len(offsets), np.int64)
        np.cumsum(np.maximum(np.diff(self._offsets) - 1, 0), out=self._starts[1:])
        self._total = int(self._starts[-1])
        self.n_rows = -(-self._total // seq_len)
        self.padding_share = _padding_share(self._total, self.n_rows, seq_len)

    def pieces(self, rows: np.ndarray, shift: np.ndarray) -> Pieces:
        """The pieces of rows [R], each in an epoch whose windows are moved by shift [R], 0 <= shift <
        seq_len."""
        circle = self.n_rows * self._seq_len
        start = rows * self._seq_len + shift
        end = start + self._seq_len
        owner = np.arange(len(rows))
        around = np.flatnonzero(end > circle)
        if len(around):
            order = np.argsort(np.concatenate([owner, around]), kind="stable")
            owner = np.concatenate([owner, around])[order]
            start = np.concatenate([start, np.zeros_like(around)])[order]
            end = np.concatenate([end, end[around] - circle])[order]
        end = np.minimum(end, self._total)
        first = np.searchsorted(self._starts, start, "right") - 1
        last = np.searchsorted(self._starts, end - 1, "right") - 1
        counts = np.where(end > start, last - first + 1, 0)
        document = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        begin = np.maximum(self._starts[document], np.repeat(start, counts))
        length = np.minimum(self._starts[document + 1], np.repeat(end, counts)) - begin
        owner = np.repeat(owner, counts)
        begin += self._offsets[document] - self._starts[document]
        if length.size and not length.all():
            real = length > 0
            owner, begin, length = owner[real], begin[real], length[real]
        return Pieces(np.bincount(owner, minlength=len(rows)), begin, length)


def plan(packing: str, offsets: np.ndarray, seq_len: int) -> BestFit | Concat:
    """The plan of that name: "best_fit" or "concat"."""
    plans = {"best_fit": BestFit, "concat": Concat}
    if packing not in plans:
        raise ValueError(f"packing={packing!r}; use one of {sorted(plans)}")
    return plans[packing](offsets, seq_len)


class Windows(NamedTuple):
    """Of each conversation that is used one piece, begin and length [P] as in `Pieces`, or [P, 2] of pairs. n_cut: how
    many of them are not whole; n_unused: conversations of which no reply was left, or pairs too long; n_counted: labels
    that are of replies."""

    begin: np.ndarray
    length: np.ndarray
    n_cut: int
    n_unused: int
    n_counted: int


def windows(offsets: np.ndarray, mask: np.ndarray, seq_len: int, keep: str) -> Windows:
    """The first or last seq_len positions of each conversation, or pairs of them that are no longer together.

    A tail begins where the next label is not of a reply: one that began before is not learned without its prompt.

    Args:
      mask: [n_tokens] 1 on tokens of replies.
      keep: "head", "tail", or "pair" of documents 2 i and 2 i + 1.
    """
    offsets = np.asarray(offsets, np.int64)
    if keep == "pair":
        return _pairs(offsets, mask, _checked(seq_len))
    begin = offsets[:-1].copy()
    length = np.maximum(np.diff(offsets) - 1, 0)
    long = np.flatnonzero(length > _checked(seq_len))
    n_counted = int(np.count_nonzero(mask)) - int(np.count_nonzero(mask[begin[np.diff(offsets) > 0]]))
    for i in long:
        start, end = int(offsets[i]), int(offsets[i + 1])
        first = start if keep == "head" else end - 1 - seq_len
        last = min(first + seq_len, end - 1)
        if keep == "tail" and mask[first + 1]:
            rest = np.flatnonzero(mask[first + 1 : end] == 0)
            first = first + int(rest[0]) if len(rest) else last
        kept = int(np.count_nonzero(mask[first + 1 : last + 1]))
        n_counted -= int(np.count_nonzero(mask[start + 1 : end])) - kept
        begin[i], length[i] = first, last - first if kept else 0
    used = length > 0
    n_unused = int(np.count_nonzero(length[long] == 0))
    return Windows(begin[used], length[used].astype(np.int32), len(long) - n_unused, n_unused, n_counted)


def _pairs(offsets, mask, seq_len):
    begin, length = (x.reshape(-1, 2) for x in (offsets[:-1], np.diff(offsets) - 1))
    used = length.sum(1) <= seq_len
    counted = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    of_each = counted[begin + 1 + length] - counted[begin + 1]
    found = begin[used], length[used].astype(np.int32)
    return Windows(*found, 0, int(np.count_nonzero(~used)), int(of_each[used].sum()))


def _cut(offsets, seq_len):
    """Pieces in document order: begin and length [P], none longer than seq_len."""
    positions = np.maximum(np.diff(offsets) - 1, 0)
    counts = -(-positions // seq_len)
    document = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = offsets[document] + rank * seq_len
    length = np.minimum(positions[document] - rank * seq_len, seq_len).astype(np.int32)
    return begin, length


def _best_fit(length, seq_len):
    """The row of each piece [P] int64, and the number of rows.

    Pieces of equal length are placed together. The fullest row with room r >= n takes r // n of them: after
    each it has the least room of all rows that fit. So whole groups of rows with equal room move at once.
    """
    order = np.argsort(seq_len - length, kind="stable")
    row = np.empty(len(length), np.int64)
    by_room: dict[int, list[np.ndarray]] = {}
    rooms = 0
    n_rows = at = 0
    sizes, counts = np.unique(length, return_counts=True)
    for n, left in zip(sizes[::-1].tolist(), counts[::-1].tolist()):
        while left:
            fitting = rooms >> n
            if fitting:
                room = (fitting & -fitting).bit_length() - 1 + n
                each = room // n
                rows = _take(by_room, room, -(-left // each))
                if room not in by_room:
                    rooms &= ~(1 << room)
            else:
                room, each = seq_len, seq_len // n
                rows = np.arange(n_rows, n_rows + -(-left // each))
                n_rows += len(rows)
            placed = min(left, len(rows) * each)
            row[order[at : at + placed]] = np.repeat(rows, each)[:placed]
            at, left = at + placed, left - placed
            full = placed // each
            for group, used in ((rows[:full], each), (rows[full:], placed - full * each)):
                rest = room - used * n
                if len(group) and rest:
                    by_room.setdefault(rest, []).append(group)
                    rooms |= 1 << rest
    return row, n_rows


def _take(by_room, room, n):
    """Removes and returns up to n rows of a group, the most recent first."""
    taken, have = [], 0
    groups = by_room[room]
    while groups and have < n:
        group = groups.pop()
        if len(group) > n - have:
            groups.append(group[n - have :])
            group = group[: n - have]
        taken.append(group)
        have += len(group)
    if not groups:
        del by_room[room]
    return np.concatenate(taken) if len(taken) > 1 else taken[0]


def _checked(seq_len):
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}; a row needs at least one token")
    return seq_len


def _padding_share(positions, n_rows, seq_len):
    return 1.0 - positions / (n_rows * seq_len) if n_rows else 0.0
