"""Functions of LLVM's language, line by line: what `lmx.ops.tiles` and `lmx.ops.one_query` are written with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Lines:
    """The lines of an LLVM function. Values get their names as they come; variables lie on the stack until LLVM finds
    registers for them."""

    entry: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    names: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))

    def __call__(self, instruction: str) -> str:
        """The value of one instruction."""
        name = f"%v{next(self.names)}"
        self.body.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        self.body.append(f"  {instruction}")

    def at(self, kind: str, pointer: str, *terms: str) -> str:
        """pointer + the sum of terms, counted in numbers of that kind."""
        for term in terms:
            pointer = self(f"getelementptr {kind}, ptr {pointer}, i64 {term}")
        return pointer

    def read(self, kind: str, pointer: str, *terms: str) -> str:
        """A vector from where it need not be aligned; its numbers are counted in `terms`."""
        return self(f"load {kind}, ptr {self.at(kind.split()[-1].strip('>'), pointer, *terms)}, align 1")

    def variable(self, kind: str, value: str) -> str:
        name = f"%at{next(self.names)}"
        self.entry.append(f"  {name} = alloca {kind}, align 64")
        self.put(kind, value, name)
        return name

    def get(self, kind: str, at: str) -> str:
        return self(f"load {kind}, ptr {at}")

    def put(self, kind: str, value: str, at: str) -> None:
        self.do(f"store {kind} {value}, ptr {at}")

    @contextlib.contextmanager
    def loop(self, begin: str, end: str, step: int) -> Iterator[str]:
        """for i in range(begin, end, step)"""
        n = next(self.names)
        at = self.variable("i64", begin)
        self.body += [f"  br label %test{n}", f"test{n}:"]
        i = self.get("i64", at)
        self.do(f"br i1 {self(f'icmp slt i64 {i}, {end}')}, label %do{n}, label %done{n}")
        self.body.append(f"do{n}:")
        yield i
        self.put("i64", self(f"add i64 {i}, {step}"), at)
        self.body += [f"  br label %test{n}", f"done{n}:"]

    def __str__(self) -> str:
        return "\n".join((*self.entry, *self.body))


def whole(f: Lines, n: str, step: int) -> str:
    """n rounded down to a multiple of `step`, a power of two."""
    return f(f"and i64 {n}, {-step}")


def pointers(f: Lines, kind: str, base: str, index: str, n: int, length: str) -> list[str]:
    """To rows index, index + 1, ... of a matrix of rows of `length` numbers."""
    first = f.at(kind, base, f(f"mul i64 {index}, {length}"))
    found = [first]
    for _ in range(n - 1):
        found.append(f.at(kind, found[-1], length))
    return found


def shuffle(f: Lines, kind: str, length: int, a: str, b: str, which: Sequence[int]) -> str:
    vector = f"<{length} x {kind}>"
    return f(f"shufflevector {vector} {a}, {vector} {b}, <{len(which)} x i32> {numbers('i32', which)}")


def everywhere(f: Lines, kind: str, one: str, lanes: int) -> str:
    """A vector of `lanes` times one number."""
    first = f(f"insertelement <{lanes} x {kind}> poison, {kind} {one}, i32 0")
    return shuffle(f, kind, lanes, first, "poison", [0] * lanes)


def numbers(kind: str, values: Sequence[int | str]) -> str:
    return "<" + ", ".join(f"{kind} {n}" for n in values) + ">"
