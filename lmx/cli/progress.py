"""How far a long reading of text has come: in place on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO


class Progress:
    """Call it as progress(stage, bytes done, bytes in all or None); silent while a stage is short.

    On a terminal it keeps one line up to date and removes it at the end.
    """

    def __init__(self, file: TextIO | None = None, quiet_seconds: float = 1.0, every_seconds: float = 10.0):
        self._file = file or sys.stderr
        self._in_place = self._file.isatty()
        self._quiet, self._every = quiet_seconds, 0.2 if self._in_place else every_seconds
        self._stage, self._began, self._next, self._width = "", 0.0, 0.0, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *problem) -> None:
        self._clear()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._clear()
            self._stage, self._began, self._next = stage, now, now + self._quiet
        if now < self._next:
            return
        self._next = now + self._every
        share = f" of {_size(total)} ({100 * done / total:.0f} %)" if total else ""
        self.show(f"{stage}: {_size(done)}{share}, {_size(done / max(now - self._began, 1e-9))}/s")

    def show(self, line: str) -> None:
        """This line now."""
        if self._in_place:
            self._file.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._file.write(line + "\n")
        self._file.flush()

    def watch(self, documents: Iterable[dict], stage: str, total: int | None) -> Iterator[dict]:
        """The same documents, their text counted."""
        done = 0
        for document in documents:
            done += len(document["text"].encode("utf-8"))
            self(stage, done, total)
            yield document

    def _clear(self) -> None:
        if self._in_place and self._width:
            self._file.write("\r" + " " * self._width + "\r")
            self._file.flush()
            self._width = 0


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


class Steps:
    """How many of some long steps are done, and how long the rest will take: call it as steps(done, of). Silent for a
    second, and then as often as `Progress`."""

    def __init__(self, what: str):
        self._what, self._progress = what, Progress()

    def __enter__(self) -> Steps:
        self._began = time.monotonic()
        self._next = self._began + self._progress._quiet
        return self

    def __exit__(self, *problem) -> None:
        self._progress._clear()

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._progress._every
        left = (now - self._began) / max(done, 1) * (of - done)
        self._progress.show(f"{self._what}: {done} of {of}, about {left:.0f} s left")


class Tokens(Steps):
    """How many of many tokens are done, how fast, and how long the rest will take; what was done before it was first
    called does not count for its speed."""

    _first: tuple[int, float] | None = None

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        if now < self._next:
            return
        self._next = now + self._progress._every
        speed = (done - self._first[0]) / max(now - self._first[1], 1e-9)
        left = f", about {(of - done) / speed:,.0f} s left" if speed else ""
        share = 100 * done / max(of, 1)
        self._progress.show(
            f"{self._what}: {done:,} of {of:,} tokens ({share:.0f} %), {speed:,.0f} tokens/s{left}"
        )
