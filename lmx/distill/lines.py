"""A file of JSON lines that grows a block at a time, and that is gone on with after any end: `out.part` until it is
whole, then `out`, with its artifact file beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmx import artifact
from lmx.data.store import explained


class Lines:
    """`n` lines are there; `add` appends more, all of them on disk when it returns."""

    def __init__(self, path: Path):
        self.n = 0
        with path.open("a+b") as file:
            file.seek(0)
            whole = 0
            for line in file:
                if line.endswith(b"\n"):
                    self.n, whole = self.n + 1, whole + len(line)
            file.truncate(whole)  # what was cut short is made anew
        self._file = path.open("ab")

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with explained(self._file.name):
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.n += len(lines)

    def rows(self) -> list[dict[str, Any]]:
        """What the lines hold."""
        with open(self._file.name, "rb") as file:
            return [json.loads(line) for line in file]

    def cut(self, n: int) -> None:
        """Keeps the first n lines alone."""
        with open(self._file.name, "rb") as file:
            whole = sum(len(next(file)) for _ in range(n))
        self._file.truncate(whole)
        self.n = n

    def close(self) -> None:
        self._file.close()


@contextmanager
def lines(out: str | Path, kind: str, of: dict[str, Any], made_from: Iterable[Any]) -> Iterator[Lines | None]:
    """The lines to go on with, or None if the file is whole. It is whole when the block ends without an error.

    Args:
      of: all that decides the lines.
    Raises: ValueError if another process writes it, or if what is there was made of something else; OSError that names
      the path.
    """
    out = Path(out)
    part, about = (out.with_name(out.name + end) for end in (".part", ".part.json"))
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    with artifact.alone(lock):
        if out.exists():
            found = artifact.read(out)
            _check_same(out, found.facts.get("of") if found else None, of)
            yield None
            return
        if part.exists():
            try:
                there = json.loads(about.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                there = None
            _check_same(part, there, of)
        else:
            with explained(out):
                artifact.write(about, json.dumps(of, ensure_ascii=False))
        with explained(out):
            growing = Lines(part)
        try:
            yield growing
        finally:
            growing.close()
        with explained(out):
            os.replace(part, out)
            artifact.record(out, kind, made_from, {"rows": growing.n, "of": of})
        about.unlink(missing_ok=True)


def _check_same(path: Path, there: Any, of: dict[str, Any]) -> None:
    if there == json.loads(json.dumps(of)):
        return
    changed = [k for k in of if not isinstance(there, dict) or there.get(k) != of[k]]
    raise ValueError(
        f"{path} is there, and was made with another {', '.join(changed) or 'setting'}; name another file, or remove it"
    )
