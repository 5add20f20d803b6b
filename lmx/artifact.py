"""Where a result came from: datasets, tokenizers, checkpoints and reports name their parents by hash.

A folder `x` carries `x/artifact.json`; a file `y.json` carries `y.json.artifact.json` beside it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "artifact.json"
OWN = re.compile(r"(^|\.)artifact\.json(\.\d+\.tmp)?$")
JOINERS = "\u200c\u200d"
SET = "files"
"""Kind of an artifact that stands for many files, by a hash that is not that of its path."""


@dataclass(frozen=True)
class Artifact:
    """kind: what it is ("corpus", "tokenizer", ...); hash: sha256 of its content; path: where it was then."""

    kind: str
    hash: str
    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    made_from: tuple[Artifact, ...] = ()


def record(
    path: str | Path,
    kind: str,
    made_from: Iterable[str | Path | Artifact] = (),
    facts: dict[str, Any] | None = None,
    at: str | Path | None = None,
) -> Artifact:
    """Hashes the file or folder at `path` and writes its artifact file, with all ancestry of its parents.

    A parent given as a path uses its own artifact file if it has one; else it is raw, known by its hash.
    Args:
      at: the path to write down, where the folder gets its final name only after its artifact is inside.
    Raises: FileNotFoundError if `path` or a parent does not exist.
    """
    path = Path(path)
    where = str(Path(at or path).absolute())
    made = Artifact(kind, hash_path(path), where, facts or {}, tuple(find(p) for p in made_from))
    target = _file_of(path)
    write(target, json.dumps(asdict(made), indent=1, ensure_ascii=False))
    return made


def write(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all: beside its place, then renamed. Raises: OSError that names it."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def find(path: str | Path | Artifact) -> Artifact:
    """What is recorded for a file or folder, or else the raw file itself, known by its hash."""
    return path if isinstance(path, Artifact) else read(path) or _raw(Path(path))


def read(path: str | Path) -> Artifact | None:
    """The artifact recorded for a file or folder, or None if it has none.

    Raises: ValueError if the artifact file is damaged.
    """
    target = _file_of(Path(path))
    if not target.exists():
        return None
    try:
        return _from_json(json.loads(target.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{target}: not an artifact file ({error}); remove it and make {path} again"
        ) from None


def ancestors(made: Artifact) -> Iterator[Artifact]:
    """All that it was made from, at any depth."""
    for parent in made.made_from:
        yield parent
        yield from ancestors(parent)


@contextmanager
def alone(path: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from the same block: a lock on a file at `path` that ends with the process at the latest.

    Raises: ValueError if another process holds it and `wait` is not set.
    """
    with path.open("a+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(20).strip() or "?"
            raise ValueError(
                f"{path.parent} is in use by process {holder}; wait until it ends, or choose another folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def explain(path: str | Path, check_parents: bool = False) -> str:
    """The ancestry of an artifact as an indented tree, from itself down to raw files.

    Says whether the content still has the recorded hash.
    Args:
      check_parents: say so of all its ancestors too, which reads every one of them.
    Raises: FileNotFoundError if there is no artifact at `path`.
    """
    path = Path(path)
    found = read(path)
    if found is None:
        raise FileNotFoundError(f"{path}: no artifact here ({_file_of(path)} is missing)")
    lines: list[str] = []
    _describe(found, path, 0, lines, set(), check_parents)
    return "\n".join("".join(c if c.isprintable() or c in JOINERS else "\ufffd" for c in x) for x in lines)


def hash_path(path: str | Path) -> str:
    """sha256 of a file's bytes, or of a folder's relative names and bytes in sorted order.

    Artifact files do not count. Raises: FileNotFoundError.
    """
    path = Path(path)
    if path.is_file():
        return _hash_file(path).hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not OWN.search(p.name)):
        total.update(os.fsencode(file.relative_to(path).as_posix()) + b"\0" + _hash_file(file).digest())
    return total.hexdigest()


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _hash_file(path: Path):
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256")


def _file_of(path: Path) -> Path:
    return path / FILE if path.is_dir() else path.with_name(f"{path.name}.{FILE}")


def _raw(path: Path) -> Artifact:
    where = str(path.absolute())
    if path.is_dir():
        return Artifact("folder", hash_path(path), where)
    return Artifact("file", hash_path(path), where, {"bytes": path.stat().st_size})


def _from_json(found: dict) -> Artifact:
    parents = tuple(_from_json(p) for p in found["made_from"])
    words = [found[name] for name in ("kind", "hash", "path")]
    if not all(isinstance(word, str) for word in words) or not isinstance(found["facts"], dict):
        raise TypeError("kind, hash and path are words, facts are named")
    return Artifact(*words, found["facts"], parents)


def _describe(made: Artifact, at: Path, depth: int, lines: list[str], told: set[tuple], check: bool) -> None:
    name = f"{'   ' * depth}{made.kind}  {made.hash[:12]}  {made.path}"
    if (made.hash, made.path) in told:
        lines.append(f"{name}  (above)")
        return
    told.add((made.hash, made.path))
    facts = [f"{k}={_short(v)}" for k, v in made.facts.items() if not isinstance(v, dict | list)]
    lines.append("  ".join([name, *facts, *([_now(made, at)] if check or not depth else [])]))
    for parent in made.made_from:
        _describe(parent, Path(parent.path), depth + 1, lines, told, check)


def _now(made: Artifact, at: Path) -> str:
    """What has become of an artifact since it was recorded."""
    if made.kind == SET:
        return "not compared"
    if not at.exists():
        return "no longer there"
    return "content unchanged" if hash_path(at) == made.hash else "CONTENT CHANGED since it was recorded"


def _short(fact: Any) -> str:
    text = str(fact)
    return text if len(text) <= 48 else f"{text[:44]}…"
