"""What a teacher makes of every token of a token store, kept beside it and read by memory map: the k likeliest tokens
to follow, and the logs of their probabilities.

    folder/<first 16 digits of the token store's hash>/
      meta.json          what it was made of and how, before the first label is
      00000.bin ...      shards, each of whole documents and there only when complete
      artifact.json      once all shards are there

A shard of n tokens holds ids [n, k], little-endian uint16 or, above 65,536 words, uint32, likeliest first; then codes
[n, k + 1], uint16 or uint8, of their log probabilities and, last, of the tail's: of all other tokens together.

    log p = -code / UNIT,    in nats, rounded to the nearest; of the tail the largest code is a mass of 0, and where all
                           codes are the largest nothing is known

Row i of the shards, one after the other, is what follows token i of the store. With 16 bits a log probability is off by
1/4096 at most, down to -32; with 8 bits by 1/32, down to -16. What is read adds up to 1 with the tail: where the k hold
half of the mass or more they are scaled to what the tail leaves, which rounding touched least.
Bytes per token: k (2 + 2) + 2 with 16 bits and a vocabulary of up to 65,536 words.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmx import artifact

from .store import TokenStore, explained

VERSION = 1
UNITS = {8: 16, 16: 2048}
"""Codes in a nat, by the bits of a code."""
HALF = 0.5


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher's labels of the training text, from `lmx distill label`: `Data(..., teacher=TeacherTopK("labels"))`.

    Batches then have `teacher_ids` int32 and `teacher_log_p` float32 [B, T, k], as `lmx.losses.Divergence` reads them,
    and `teacher_mask` float32 [B, T]: `loss_mask` where the teacher said something, which one of another tokenizer did
    not everywhere, for terms that learn from it: `Term(ForwardKL(), mask="teacher_mask")`.
    path: the folder, which names its parts by the texts they label. k: that many of the likeliest; None is all that
    are kept. teacher: the first digits of the teacher's hash, if no other will do. any_view: also takes labels of a
    teacher that saw less of a document before a token than the student will.
    """

    path: str
    k: int | None = None
    teacher: str = ""
    any_view: bool = False

    def __post_init__(self):
        if self.k is not None and self.k < 1:
            raise ValueError(f"TeacherTopK: k={self.k}; use 1 or more, or None for all that are kept")

    @property
    def width(self) -> int:
        """How many labels a token has. Raises: FileNotFoundError if that is to be looked up, and there are none."""
        if self.k is not None:
            return self.k
        found = sorted(Path(self.path).glob("*/meta.json"))
        if not found:
            raise FileNotFoundError(f"{self.path}: no labels here; make them with lmx distill label")
        return read_meta(found[0].parent)["k"]

    def opened(self, text: TokenStore, seq_len: int, packing: str) -> Taught:
        """The labels of a token store.

        Raises: FileNotFoundError if there are none; ValueError if they are of another teacher or tokenizer, not whole
          or damaged, fewer than k, or of a teacher that saw less than rows of seq_len tokens will show.
        """
        found = Taught(str(folder_of(self.path, text)), self.k)
        meta = found.meta
        for name, asked in (("text", text.hash), ("tokenizer", text.tokenizer_hash)):
            if meta[name] != asked:
                raise ValueError(
                    f"{found.path}: labels of another {name} ({meta[name][:12]}; the run's is {asked[:12]}); {_AGAIN}"
                )
        if not meta["teacher"].startswith(self.teacher):
            raise ValueError(
                f"{found.path}: labels of the teacher {meta['teacher'][:12]}, and teacher={self.teacher!r} is asked "
                "for; leave it out, or name a store of that teacher"
            )
        context, overlap, longest = meta["context"], meta["overlap"], meta["longest"]
        across = "teacher_tokenizer" in meta  # which cuts documents otherwise, whatever the settings
        same = context == seq_len and not overlap and packing == "best_fit"
        no_less = overlap >= seq_len - 1 or longest <= context
        if not (same or no_less or across or self.any_view):
            raise ValueError(
                f"{found.path}: its teacher read documents of up to {longest:,} tokens {context} at a time, "
                f"{overlap} of them again, and the student's rows of {seq_len} ({packing}) show it more before some "
                f"tokens; label with --context {seq_len} for best_fit, or --overlap {seq_len - 1} or more, or take "
                "these all the same with any_view=True"
            )
        return found


@dataclass(frozen=True)
class Taught:
    """A finished store of labels, opened by memory map. k: the likeliest of those that are kept.

    Raises: FileNotFoundError if there is none; ValueError if it is not whole, or damaged.
    """

    path: str
    k: int | None = None
    meta: dict[str, Any] = field(init=False, repr=False, compare=False)
    starts: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "meta", read_meta(Path(self.path)))
        object.__setattr__(self, "starts", np.asarray(self.meta["starts"], np.int64))
        kept = self.meta["k"]
        if self.k is None:
            object.__setattr__(self, "k", kept)
        if self.k > kept:
            raise ValueError(f"{self.path}: k={self.k}, and {kept} are kept of each token; use that or less")
        lacking = [i for i in range(self.n_shards) if not shard_path(self.path, i).exists()]
        if lacking:
            raise ValueError(
                f"{self.path}: {len(lacking)} of {self.n_shards} shards are missing, the first {lacking[0]}; repeat "
                "the `lmx distill label` that made it, and it makes those alone"
            )
        for i in range(self.n_shards):
            check_size(self.path, self.meta, i)

    @property
    def n_shards(self) -> int:
        return len(self.starts) - 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what it was made of and how, and of how much of it is read."""
        return hashlib.sha256(json.dumps([self.meta, self.k], sort_keys=True).encode()).hexdigest()

    def read(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What follows tokens at [...] of the text: ids int32 and log probabilities float32 in nats, both [..., k], and
        whether it is known, bool [...]. The tail has the rest of the mass. Indices beyond the text are those of its
        ends."""
        flat = np.clip(at, 0, self.starts[-1] - 1).ravel()
        shard = np.searchsorted(self.starts, flat, "right") - 1
        ids = np.empty((len(flat), self.k), np.int32)
        log_p = np.empty((len(flat), self.k), np.float32)
        known, nothing = np.empty(len(flat), bool), (1 << self.meta["bits"]) - 1
        for i in np.unique(shard):
            here = np.flatnonzero(shard == i)
            local = flat[here] - self.starts[i]
            kept_ids, codes = self._shards[i]
            ids[here] = kept_ids[local, : self.k]
            log_p[here] = decoded(codes[local], self.meta["bits"])[:, : self.k]
            known[here] = (codes[local] != nothing).any(1)
        return ids.reshape(*at.shape, self.k), log_p.reshape(*at.shape, self.k), known.reshape(at.shape)

    @property
    def n_known(self) -> int:
        """Of how many tokens something is known."""
        nothing = (1 << self.meta["bits"]) - 1
        return sum(int((codes != nothing).any(1).sum()) for _, codes in self._shards)

    @functools.cached_property
    def _shards(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [mapped(self.path, self.meta, i) for i in range(self.n_shards)]


def coded(log_p: np.ndarray, bits: int) -> np.ndarray:
    """Codes of log probabilities in nats, the last of each row of the tail. Oracle of what a device does."""
    most = (1 << bits) - 1
    return np.clip(np.round(-log_p * UNITS[bits]), 0, most).astype(f"<u{bits // 8}")


def decoded(codes: np.ndarray, bits: int) -> np.ndarray:
    """Log probabilities [n, k] float32 of codes [n, k + 1], see above."""
    log_p = codes.astype(np.float32) / np.float32(-UNITS[bits])
    log_p, tail = log_p[:, :-1], np.exp(log_p[:, -1:])
    tail[codes[:, -1:] == (1 << bits) - 1] = 0.0
    mass = np.exp(log_p).sum(1, keepdims=True)
    scaled = (tail < HALF) & (mass >= HALF / 2)
    return log_p + np.where(scaled, np.log1p(-np.where(scaled, tail, 0)) - np.log(mass), 0).astype(np.float32)


def folder_of(path: str | Path, text: TokenStore) -> Path:
    """Where the labels of a token store lie below a folder."""
    return Path(path) / text.hash[:16]


def shard_path(folder: str | Path, i: int) -> Path:
    return Path(folder) / f"{i:05}.bin"


def read_meta(folder: Path) -> dict[str, Any]:
    """Raises: FileNotFoundError if there is no store; ValueError if its meta.json is damaged or of another version."""
    path = folder / "meta.json"
    if not path.is_file():
        others = sorted(x.parent.name for x in folder.parent.glob("*/meta.json"))
        has = f" (there are labels of the texts {', '.join(others)})" if others else ""
        raise FileNotFoundError(f"{folder}: no labels of this text{has}; make them with lmx distill label")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["version"] == VERSION:
            numbers = [meta[x] for x in ("k", "bits", "context", "overlap", "longest", "n_tokens")]
            words = [meta[x] for x in ("text", "tokenizer", "teacher", "ids")]
            if not all(isinstance(x, int) for x in (*numbers, *meta["starts"])) or meta["bits"] not in UNITS:
                raise TypeError("its numbers are whole")
            if not all(isinstance(x, str) for x in words):
                raise TypeError("its hashes are words")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {_AGAIN}") from None
    if meta["version"] != VERSION:
        raise ValueError(f"{path}: version {meta['version']}, this code reads {VERSION}; {_AGAIN}")
    return meta


def n_bytes(meta: dict[str, Any], i: int) -> int:
    """Of shard i."""
    n, k = meta["starts"][i + 1] - meta["starts"][i], meta["k"]
    return n * (k * np.dtype(meta["ids"]).itemsize + (k + 1) * meta["bits"] // 8)


def check_size(folder: str | Path, meta: dict[str, Any], i: int) -> None:
    path = shard_path(folder, i)
    if path.stat().st_size != n_bytes(meta, i):
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes where meta.json says {n_bytes(meta, i)}: cut short? Delete "
            "it and repeat the `lmx distill label` that made it"
        )


def mapped(folder: str | Path, meta: dict[str, Any], i: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [n, k], codes [n, k + 1]) of shard i, views of its file."""
    n, k = meta["starts"][i + 1] - meta["starts"][i], meta["k"]
    raw = np.memmap(shard_path(folder, i), np.uint8, mode="r") if n else np.zeros(0, np.uint8)
    cut = n * k * np.dtype(meta["ids"]).itemsize
    codes = np.dtype(f"<u{meta['bits'] // 8}")
    return (
        np.asarray(raw[:cut]).view(meta["ids"]).reshape(n, k),
        np.asarray(raw[cut:]).view(codes).reshape(n, k + 1),
    )


class TaughtWriter:
    """Writes a store of labels shard by shard, each whole or not at all; what is there already is kept.

    Several processes may write to one store: each takes shards that no other holds, and one that is killed leaves its
    shard to the others.
    Args:
      meta: all that decides the labels.
    Raises: ValueError if there is a store of other labels; OSError that names the path and the way out.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any]):
        self.path, self.meta = Path(path), {"version": VERSION, **meta}
        self._locks = self.path.with_name(f".{self.path.name}.locks")
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)
        with artifact.alone(self._locks / "meta", wait=True):
            if not (self.path / "meta.json").exists():
                with explained(self.path):
                    artifact.write(self.path / "meta.json", json.dumps(self.meta, indent=1))
        found = read_meta(self.path)
        for name, asked in self.meta.items():
            if found.get(name) != asked:
                there, here = (str(x)[:12] for x in (found.get(name), asked))
                raise ValueError(
                    f"{self.path} holds labels with another {name} ({there} there, {here} asked); choose another "
                    "folder, or the same settings"
                )

    @property
    def n_shards(self) -> int:
        return len(self.meta["starts"]) - 1

    def done(self, i: int) -> bool:
        """Whether shard i is there. Raises: ValueError if it is not whole."""
        there = shard_path(self.path, i).exists()
        if there:
            check_size(self.path, self.meta, i)
        return there

    @contextlib.contextmanager
    def claimed(self, i: int, wait: bool = False) -> Iterator[bool]:
        """Whether shard i is this process's to write while the block lasts: it is not there, and no other has it."""
        lock = self._locks / f"{i:05}"
        with contextlib.ExitStack() as held:
            try:
                with explained(self.path):
                    self._locks.mkdir(exist_ok=True)
                    held.enter_context(artifact.alone(lock, wait=wait))
            except ValueError:
                yield False
                return
            mine = not self.done(i)
            if mine:
                for abandoned in self.path.glob(f".{shard_path(self.path, i).name}.*.tmp"):
                    abandoned.unlink(missing_ok=True)
            yield mine

    def write(self, i: int, ids: np.ndarray, codes: np.ndarray) -> None:
        """Shard i, which this process has claimed: ids [n, k], codes [n, k + 1]."""
        path = shard_path(self.path, i)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        with explained(path):
            try:
                with partial.open("wb") as file:
                    file.write(np.ascontiguousarray(ids, self.meta["ids"]).data)
                    file.write(np.ascontiguousarray(codes, f"<u{self.meta['bits'] // 8}").data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def finish(self, made_from: Sequence[Any], facts: dict[str, Any]) -> None:
        """Writes the artifact file, once: all shards are there."""
        with artifact.alone(self._locks / "meta", wait=True):
            if artifact.read(self.path) is None:
                with explained(self.path):
                    artifact.record(self.path, "labels", made_from, facts)
            for lock in self._locks.iterdir():
                if lock.name != "meta":
                    lock.unlink(missing_ok=True)


_AGAIN = "delete the folder and label again, or name another"
