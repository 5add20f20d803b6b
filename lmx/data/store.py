"""Tokenized documents in a folder, read by memory map: `tokens.bin`, `offsets.bin`, `meta.json`.

`tokens.bin` holds every document one after the other, each as [bos] ids [eos], little-endian uint16 or
uint32; `offsets.bin` holds n_documents + 1 little-endian int64: document i is tokens[offsets[i]:offsets[i +
1]]. A store of conversations has `mask.bin` too: a byte per token, 1 where it is of a reply. Documents 2 i and
2 i + 1 of a store of pairs are the chosen and the rejected one of pair i. A store of scores has `scores.bin`: of each
document a little-endian float32 in [0, 1]. A folder exists only when it is complete: it
is written under a temporary name and then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1


@dataclass(frozen=True)
class TokenStore:
    """A finished store, opened by memory map.

    Raises: FileNotFoundError if `path` is not a store, ValueError if a file has not the size that meta.json
    says.
    """

    path: str
    meta: dict[str, Any] = field(init=False, repr=False, compare=False)
    tokens: np.ndarray = field(init=False, repr=False, compare=False)
    offsets: np.ndarray = field(init=False, repr=False, compare=False)
    mask: np.ndarray | None = field(init=False, repr=False, compare=False)
    scores: np.ndarray | None = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        folder = Path(self.path)
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no token store here (meta.json is missing); make one with lmx.data.prepare"
            )
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            version, dtype = meta["version"], np.dtype(meta["dtype"])
            n_tokens, n_documents = meta["n_tokens"], meta["n_documents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}/meta.json is damaged ({error!r}); {_AGAIN}") from None
        if version != VERSION:
            raise ValueError(
                f"{folder}: store version {version}, this code reads version {VERSION}; {_AGAIN}"
            )
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "meta", meta)
        object.__setattr__(self, "tokens", _map(folder / "tokens.bin", dtype, n_tokens))
        object.__setattr__(self, "offsets", _map(folder / "offsets.bin", np.dtype("<i8"), n_documents + 1))
        masked = "n_counted" in meta
        mask = _map(folder / "mask.bin", np.dtype("u1"), n_tokens) if masked else None
        object.__setattr__(self, "mask", mask)
        scored = meta.get("scored", False)
        scores = _map(folder / "scores.bin", np.dtype("<f4"), n_documents) if scored else None
        object.__setattr__(self, "scores", scores)

    def __len__(self) -> int:
        """How many documents."""
        return self.meta["n_documents"]

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of document i with its bos and eos, [n] of the stored dtype (a view of the file)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.path}")
        i %= len(self)
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def n_tokens(self) -> int:
        """Tokens stored, bos and eos included."""
        return self.meta["n_tokens"]

    @property
    def hash(self) -> str:
        """sha256 of the tokens and offsets, and of the mask, taken while they were written."""
        return self.meta["hash"]

    @property
    def of_pairs(self) -> bool:
        """Whether its documents are pairs, the chosen one before the rejected one."""
        return self.meta.get("keep") == "pair"

    @property
    def tokenizer_hash(self) -> str:
        return self.meta["tokenizer"]


class Writer:
    """Writes a store; the folder appears at `path` when the `with` block ends without an error.

    After an error, or when the disk fills up, nothing is left behind. When another process finished the same
    folder first, that one is kept: paths are named by content, so both hold the same.

    Args:
      vocab_size: ids must lie below it; up to 65,536 they take two bytes each, else four.
      tokenizer: hash of the tokenizer the ids belong to.
      masked: whether documents come with a mask. scored: whether with a score.
    Raises: OSError that names the path and the way out, when the disk is full or the folder may not be
    written.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_size: int,
        tokenizer: str = "",
        masked: bool = False,
        scored: bool = False,
    ):
        self.path = Path(path)
        self.facts: dict[str, Any] = {}
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:12]}.tmp")
        self._n_tokens = self._n_documents = 0
        self._open = False
        self._masked, self._n_counted = masked, 0
        self._scores: list[float] | None = [] if scored else None
        self._hash = hashlib.sha256()

    def __enter__(self) -> Writer:
        with explained(self.path):
            self._partial.mkdir(parents=True)
            try:
                self._tokens = (self._partial / "tokens.bin").open("wb", buffering=1 << 20)
                self._offsets = (self._partial / "offsets.bin").open("wb", buffering=1 << 16)
                self._mask = (self._partial / "mask.bin").open("wb") if self._masked else None
            except OSError:
                shutil.rmtree(self._partial, ignore_errors=True)
                raise
        return self

    def add(
        self,
        ids: Sequence[int] | np.ndarray,
        more: bool = False,
        mask: np.ndarray | None = None,
        score: float | None = None,
    ) -> None:
        """Appends a document, or a part of one when `more` says that the next call continues it.

        Raises: ValueError if an id lies outside the vocabulary, or a mask is missing, too much or of another length.
        """
        ids = np.asarray(ids)
        if ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self._vocab_size:
                raise ValueError(
                    f"{self.path}: token id {low if low < 0 else high} outside [0, {self._vocab_size})"
                )
        if (mask is not None) != self._masked or (mask is not None and len(mask) != len(ids)):
            raise ValueError(
                f"{self.path}: {len(ids)} ids with {'no mask' if mask is None else f'a mask of {len(mask)}'}; "
                f"a store is to have masks for all documents or for none, and this one was begun masked={self._masked}"
            )
        if (score is not None) != (self._scores is not None):
            raise ValueError(
                f"{self.path}: score={score}; a store is to have scores for all documents or for none"
            )
        data = ids.astype(self._dtype).tobytes()
        if score is not None:
            self._scores.append(score)
        if mask is not None:
            self._add_mask(np.asarray(mask, np.uint8))
        with explained(self.path):
            self._tokens.write(data)
            if not self._open:
                self._offsets.write(self._n_tokens.to_bytes(8, "little"))
                self._n_documents += 1
        self._hash.update(data)
        self._n_tokens += ids.size
        self._open = more

    def _add_mask(self, mask: np.ndarray) -> None:
        with explained(self.path):
            self._mask.write(mask.tobytes())
        self._n_counted += int(np.count_nonzero(mask))

    def append(self, store: TokenStore, chunk: int = 1 << 22) -> None:
        """Copies all documents of a store to the end of this one, `chunk` tokens at a time."""
        if (store.mask is not None) != self._masked:
            raise ValueError(f"{store.path} has {'no' if self._masked else 'a'} mask, unlike {self.path}")
        if (store.scores is not None) != (self._scores is not None):
            raise ValueError(
                f"{store.path} has {'no' if store.scores is None else ''} scores, unlike {self.path}"
            )
        if store.scores is not None:
            self._scores += store.scores.tolist()
        if store.tokens.dtype != self._dtype:
            raise ValueError(f"{store.path} holds {store.tokens.dtype}, {self.path} {self._dtype}")
        for start in range(0, store.n_tokens, chunk):
            data = store.tokens[start : start + chunk].tobytes()
            self._hash.update(data)
            with explained(self.path):
                self._tokens.write(data)
            if self._masked:
                self._add_mask(store.mask[start : start + chunk])
        for start in range(0, len(store), chunk):
            with explained(self.path):
                self._offsets.write(
                    (store.offsets[start : min(start + chunk, len(store))] + self._n_tokens).tobytes()
                )
        self._n_tokens += store.n_tokens
        self._n_documents += len(store)

    def __exit__(self, kind, value, trace) -> None:
        try:
            with explained(self.path) if kind is None else contextlib.suppress(OSError):
                if kind is None:
                    self._offsets.write(self._n_tokens.to_bytes(8, "little"))
                try:
                    self._tokens.close()
                finally:
                    self._offsets.close()
                    if self._masked:
                        self._mask.close()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _publish(self) -> None:
        offsets = np.memmap(self._partial / "offsets.bin", "<i8", mode="r")
        self._hash.update(offsets)
        del offsets
        if self._masked and self._n_tokens:
            self._hash.update(np.memmap(self._partial / "mask.bin", "u1", mode="r"))
        if self._scores is not None:
            scores = np.array(self._scores, "<f4").tobytes()
            self._hash.update(scores)
            with explained(self.path):
                (self._partial / "scores.bin").write_bytes(scores)
        meta = {
            "version": VERSION,
            "dtype": self._dtype.str,
            "vocab_size": self._vocab_size,
            "tokenizer": self._tokenizer,
            "n_tokens": self._n_tokens,
            "n_documents": self._n_documents,
            "hash": self._hash.hexdigest(),
            **({"n_counted": self._n_counted} if self._masked else {}),
            **({"scored": True} if self._scores is not None else {}),
            **self.facts,
        }
        with explained(self.path):
            (self._partial / "meta.json").write_text(
                json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8"
            )
            publish(self._partial, self.path)


def publish(partial: Path, path: Path) -> None:
    """Renames a finished temporary folder to `path`; if another process got there first, its folder stays."""
    try:
        os.rename(partial, path)
    except OSError:
        if not path.is_dir() or not any(path.iterdir()):
            raise
        shutil.rmtree(partial)


@contextlib.contextmanager
def explained(path: str | Path):
    """Any OSError inside the block is raised again, of the same class, naming `path` and a way out."""
    try:
        yield
    except OSError as error:
        if isinstance(error.__cause__, OSError):
            raise
        way_out = (
            "make room, or choose a folder on another disk, and run again: what was finished before is kept"
        )
        if isinstance(error, PermissionError | NotADirectoryError | FileNotFoundError | FileExistsError):
            way_out = "choose a folder that you may write to"
        raise type(error)(
            error.errno, f"cannot write {path}: {error.strerror or error}; {way_out}"
        ) from error


_AGAIN = "delete the folder and prepare the data again"


def _map(path: Path, dtype: np.dtype, n: int) -> np.ndarray:
    size = path.stat().st_size if path.exists() else 0
    if size != n * dtype.itemsize:
        raise ValueError(f"{path}: {size} bytes where meta.json says {n * dtype.itemsize}; {_AGAIN}")
    return np.asarray(np.memmap(path, dtype, mode="r")) if n else np.zeros(0, dtype)
