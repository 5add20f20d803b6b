"""From a regular expression to a table over bytes that tells whether a UTF-8 text matches it, as a whole.

    expression --parse--> tree --Thompson--> states with several ways --subsets--> states with one way

Nothing here tries and goes back, so the alternatives of a|ab are equal, and what is greedy or lazy makes no difference.
Source: Thompson 1968, "Regular expression search algorithm"; Rabin & Scott 1959, definition 11, for the subsets.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import regex
from jaxtyping import Bool, Int

MOST_CHARS = 2**16
"""Of an expression."""
MOST_DEPTH = 100
"""Of groups within groups."""
MOST_PARTS = 2**17
"""Of an expression whose repetitions are written out: edges between states with several ways."""
MOST_STATES = 2**16
"""With one way each; the table over bytes takes 1 KiB for one."""
MOST_WORK = 2**22
"""Edges followed while subsets are made: seconds."""

Ranges = tuple[tuple[int, int], ...]


class Chars(NamedTuple):
    """One character, of code points first..last, both in it."""

    ranges: Ranges


class Chain(NamedTuple):
    parts: tuple[Node, ...]


class Either(NamedTuple):
    parts: tuple[Node, ...]


class Repeat(NamedTuple):
    """part, from `least` to `most` times; None is any number."""

    part: Node
    least: int
    most: int | None


Node = Chars | Chain | Either | Repeat


@dataclass(frozen=True, eq=False)
class Automaton:
    """next: the state after each byte, -1 where no matching text goes on so; the first state is 0.
    final: whether a text may end in a state."""

    next: Int[np.ndarray, "S 256"]
    final: Bool[np.ndarray, " S"]

    def matches(self, text: bytes) -> bool:
        """
        >>> automaton("(हाँ|ना)+").matches("हाँना".encode()), automaton("a|ab").matches(b"abb")
        (True, False)
        """
        state = 0
        for byte in text:
            state = self.next[state, byte]
            if state < 0:
                return False
        return bool(self.final[state])


@functools.lru_cache(maxsize=16)
def automaton(pattern: str) -> Automaton:
    r"""The automaton of a regular expression, which a text must match from its first to its last character.

    It may have characters, `.` (all but a line break), sets [...] and escapes as the package regex reads them
    (\d \w \s \p{Devanagari} \u0915 ...), groups (...) and (?:...), alternatives, and * + ? {m} {m,} {m,n}.

    Raises: ValueError for another expression, naming the place, or for one that would need too large an automaton.
    """
    tree = parse(pattern)
    ways, start, end = _thompson(tree, pattern)
    return _subsets(ways, start, end, pattern)


def parse(pattern: str) -> Node:
    """The tree of a regular expression. Raises: ValueError, as `automaton`."""
    if len(pattern) > MOST_CHARS:
        raise ValueError(
            f"pattern: {len(pattern):,} characters; {MOST_CHARS:,} at most, so allow less variety in the text"
        )
    try:
        pattern.encode()
    except UnicodeEncodeError as error:
        raise _wrong(pattern, error.start, "half a surrogate pair is no character; write all of it") from None
    node, at = _either(pattern, 0, 0)
    if at < len(pattern):
        raise _wrong(pattern, at, "a ) without its (; write \\) for the character")
    return node


# One character, or a set of them, which the package regex then reads.
_ATOM = regex.compile(
    r"\\(?:[pP](?:\{[^{}]*\}|[A-Z])|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[dDwWsSnrtfv]|[^0-9A-Za-z])"
    r"|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]"
    r"|[^\\\[(){*+?^$|]",
    regex.DOTALL,
)
_TIMES = regex.compile(r"(?:([*+?])|\{(\d*)(,?)(\d*)\})\??")
_GROUP = regex.compile(r"\((?:\?:|\?P?<\w+>|(?!\?))")


def _either(pattern: str, at: int, depth: int) -> tuple[Node, int]:
    if depth > MOST_DEPTH:
        raise _wrong(pattern, at, f"more than {MOST_DEPTH} groups within each other; write fewer")
    chains, parts = [], []
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            chains.append(Chain(tuple(parts)))
            parts, at = [], at + 1
            continue
        part, at = _one(pattern, at, depth)
        times = _TIMES.match(pattern, at)
        if times and times[0] not in ("{}", "{,}"):
            at = times.end()
            if pattern.startswith("+", at):
                raise _wrong(pattern, at, "a repetition that gives nothing back; leave this + out")
            part = Repeat(part, *_bounds(pattern, times))
        parts.append(part)
    chains.append(Chain(tuple(parts)))
    return (chains[0] if len(chains) == 1 else Either(tuple(chains))), at


def _one(pattern: str, at: int, depth: int) -> tuple[Node, int]:
    if group := _GROUP.match(pattern, at):
        node, end = _either(pattern, group.end(), depth + 1)
        if end == len(pattern):
            raise _wrong(pattern, at, "a ( without its ); write \\( for the character")
        return node, end + 1
    if atom := _ATOM.match(pattern, at):
        try:
            return Chars(_ranges(atom[0])), atom.end()
        except regex.error as error:
            raise _wrong(pattern, at, f"{atom[0]!r:.80} is no set of characters ({error.msg})") from None
    what = {
        "(": "this kind of group is not supported; use (...), (?:...) and alternatives",
        "[": "a [ without its ]; write \\[ for the character",
        "{": "{ stands for a repetition such as {2,3}; write \\{ for the character",
        "\\": "this escape is not supported: what it means is not one character",
        "^": "the whole text must match, from its start; leave ^ out, or write \\^ for the character",
        "$": "the whole text must match, to its end; leave $ out, or write \\$ for the character",
    }.get(pattern[at], f"nothing to repeat before {pattern[at]}; write \\{pattern[at]} for the character")
    raise _wrong(pattern, at, what)


def _bounds(pattern: str, times: regex.Match) -> tuple[int, int | None]:
    sign, least, comma, most = times.groups()
    if sign:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
    if max(len(least), len(most)) > 9:
        raise _wrong(pattern, times.start(), "more than 999,999,999 times; ask for less")
    low = int(least or 0)
    high = low if not comma else int(most) if most else None
    if high is not None and high < low:
        raise _wrong(pattern, times.start(), f"from {low} to {high} times; give the lower number first")
    return low, high


def _wrong(pattern: str, at: int, what: str) -> ValueError:
    near = pattern[max(0, at - 20) : at + 20]
    return ValueError(f"pattern: at character {at}, in {near!r}: {what}")


def _too_large(pattern: str, what: str) -> ValueError:
    return ValueError(
        f"pattern: {pattern!r:.80} needs {what}; repeat fewer times, such as {{0,20}}, or name fewer alternatives"
    )


@functools.lru_cache(maxsize=1)
def _every() -> str:
    """All code points that UTF-8 has, in order."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


@functools.lru_cache(maxsize=1024)
def _ranges(atom: str) -> Ranges:
    """The code points that an atom matches."""
    if len(atom) == 1 and atom != ".":
        return ((ord(atom), ord(atom)),)
    every = _every()
    spans = (match.span() for match in regex.finditer(f"{atom}+", every))
    gap = 0xD800
    cut = ((a, b) for i, j in spans for a, b in ((i, min(j, gap)), (max(i, gap), j)) if a < b)
    return tuple((ord(every[a]), ord(every[b - 1])) for a, b in cut)


Bytes = tuple[tuple[int, int], ...]


def spelled(first: int, last: int) -> Iterator[Bytes]:
    """The UTF-8 of code points first..last, as sequences of byte ranges.

    >>> list(spelled(ord("क"), ord("ह")))
    [((224, 224), (164, 164), (149, 185))]
    """
    for lead_last in (0x7F, 0x7FF, 0xFFFF):
        if first <= lead_last < last:
            yield from spelled(first, lead_last)
            yield from spelled(lead_last + 1, last)
            return
    n = len(chr(first).encode())
    for i in range(1, n):  # whole blocks of 64 ** i code points have free last bytes
        block = 64**i
        if first // block != last // block:
            if first % block:
                middle = (first // block + 1) * block
            elif (last + 1) % block:
                middle = (last + 1) // block * block
            else:
                continue
            yield from spelled(first, middle - 1)
            yield from spelled(middle, last)
            return
    yield tuple(zip(chr(first).encode(), chr(last).encode()))


def _thompson(tree: Node, pattern: str) -> tuple[list[list[tuple[int, int, int]]], int, int]:
    """(edges (first byte, last byte, state) of each state, the first state, the last). An edge with first byte -1 is
    free. Built from the end to the start, each part on the state that follows it."""
    ways: list[list[tuple[int, int, int]]] = [[]]
    n_edges = 0

    def state(edges: list[tuple[int, int, int]]) -> int:
        nonlocal n_edges
        n_edges += len(edges) + 1
        if n_edges > MOST_PARTS:
            raise _too_large(pattern, f"more than {MOST_PARTS:,} parts")
        ways.append(edges)
        return len(ways) - 1

    def free(*targets: int) -> list[tuple[int, int, int]]:
        return [(-1, -1, target) for target in targets]

    def chars(sequences: tuple[Bytes, ...], made: dict[tuple[Bytes, ...], int]) -> int:
        """made: the states before ends of characters, so that ends that are alike are made once."""
        if sequences not in made:
            rest: dict[tuple[int, int], list[Bytes]] = {}
            for first, *more in sequences:
                rest.setdefault(first, []).append(tuple(more))
            made[sequences] = state([(*first, chars(tuple(ends), made)) for first, ends in rest.items()])
        return made[sequences]

    def build(node: Node, after: int) -> int:
        match node:
            case Chars(ranges):
                return chars(tuple(s for pair in ranges for s in spelled(*pair)), {((),): after})
            case Chain(parts):
                for part in reversed(parts):
                    after = build(part, after)
                return after
            case Either(parts):
                return state(free(*(build(part, after) for part in parts)))
            case Repeat(part, least, most):
                end = after
                if most is None:
                    after = state(free(end))
                    inside = build(part, after)
                    ways[after] += free(inside)
                    if least:  # once is done by the part itself
                        after, least = inside, least - 1
                for _ in range(0 if most is None else most - least):
                    inside = build(part, after)
                    if inside == after:  # the part is nothing
                        break
                    after = state(free(inside, end))
                for _ in range(least):
                    inside = build(part, after)
                    if inside == after:
                        break
                    after = inside
                return after

    return ways, build(tree, 0), 0


def _subsets(ways: list[list[tuple[int, int, int]]], start: int, end: int, pattern: str) -> Automaton:
    work = 0

    def reached(states: Iterable[int]) -> frozenset[int]:
        """With what free edges lead to."""
        nonlocal work
        found, waiting = set(states), list(states)
        while waiting:
            edges = ways[waiting.pop()]
            work += len(edges) + 1
            for first, _, target in edges:
                if first < 0 and target not in found:
                    found.add(target)
                    waiting.append(target)
        if work > MOST_WORK:
            raise _too_large(pattern, f"more than {MOST_WORK:,} steps to be made")
        return frozenset(s for s in found if s == end or any(first >= 0 for first, _, _ in ways[s]))

    numbers = {reached([start]): 0}
    waiting = list(numbers)
    rows = []
    for subset in waiting:  # grows
        row = np.full(256, -1, np.int32)
        edges = {edge for s in subset for edge in ways[s] if edge[0] >= 0}
        cuts = sorted({first for first, _, _ in edges} | {last + 1 for _, last, _ in edges})
        begins: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for first, last, target in edges:
            begins.setdefault(first, []).append(target)
            ends.setdefault(last + 1, []).append(target)
        open_: dict[int, int] = {}
        known: dict[frozenset[int], int] = {}
        for low, high in pairwise(cuts):
            for target in ends.get(low, ()):
                open_[target] -= 1
            for target in begins.get(low, ()):
                open_[target] = open_.get(target, 0) + 1
            targets = frozenset(t for t, n in open_.items() if n)
            if not targets:
                continue
            if targets not in known:
                after = reached(targets)
                if after not in numbers:
                    if len(numbers) == MOST_STATES:
                        raise _too_large(pattern, f"more than {MOST_STATES:,} states")
                    numbers[after] = len(numbers)
                    waiting.append(after)
                known[targets] = numbers[after]
            row[low:high] = known[targets]
        rows.append(row)
    return Automaton(np.stack(rows), np.array([end in subset for subset in waiting]))
