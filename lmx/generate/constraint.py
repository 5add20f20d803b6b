"""Which tokens may follow, so that a completion matches a regular expression.

    allowed(state) = {t : next[state, kind[t]] >= 0}         state' = next[state, kind[t]]

The automaton reads bytes and a token is several, perhaps parts of characters, so `next` leads a state over all bytes
of a token at once. Tokens that lead each state to the same one are of one kind, and kinds are few.
Source: Willard & Louf 2023, arXiv:2307.09702, section 3, where each state has a list of its tokens.
Axes: B rows, V ids, S states, C kinds.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lmx.generate.automaton import Automaton, automaton
from lmx.weights import leaf

MOST_BYTES = 2**28
"""Of a table, on the device; and of the one it is made from, on the host."""


@leaf
class Constraint:
    """The tokens of a tokenizer under one pattern. The first state is 0; kind 0 is never allowed."""

    kind: Int[Array, " V"]
    next: Int[Array, "S C"]

    def allowed(self, state: Int[Array, " B"]) -> Bool[Array, "B V"]:
        """The tokens after which the text can still come to match; at least one."""
        return (self.next[state] >= 0)[:, self.kind]

    def after(self, state: Int[Array, " B"], tokens: Int[Array, " B"]) -> Int[Array, " B"]:
        """The states after tokens that were allowed."""
        return self.next[state, self.kind[tokens]]


@functools.lru_cache(maxsize=16)
def constraint(pattern: str, tokenizer, vocab_size: int) -> Constraint:
    """The constraint of a pattern, as `automaton` reads it, for a tokenizer and a model of vocab_size.

    An end token is allowed exactly where the text matches. Of a token that is none of them and adds no bytes, such as a
    special one, nothing is allowed.

    Raises: ValueError as `automaton`; if the tokenizer has no end token, or its tokens can spell no text that matches;
      if the table would take more than MOST_BYTES.
    """
    ends = [i for i in tokenizer.end_ids if i < vocab_size]
    if not ends:
        raise ValueError(
            "pattern: the tokenizer has no end token, which says that a text is whole; name one with ending_with"
        )
    machine = automaton(pattern)
    words = [tokenizer.token_bytes(i) for i in range(min(vocab_size, tokenizer.vocab_size))]
    for i in ends:
        words[i] = b""
    tree, spelling = _tree(machine, words)
    next, final = _over_words(machine, tree, pattern)
    if not _without_dead_ends(next, final):
        raise ValueError(
            f"pattern: {pattern!r:.80} matches nothing that the tokenizer's {len(words):,} tokens can spell; "
            "use a pattern of its characters, or a tokenizer that knows all bytes"
        )
    firsts, kind_of = _alike(next.T)
    # kind 0 leads nowhere, kind 1 are the end tokens
    S, C = len(next), 2 + len(firsts)
    shape = _rounded(S), _rounded(C)
    if 4 * shape[0] * shape[1] > MOST_BYTES:
        raise _too_large(pattern, S, C)
    table = np.full(shape, -1, np.int32)
    table[:S, 1] = np.where(final, np.arange(S), -1)
    table[:S, 2:C] = next[:, firsts]
    kind = np.zeros(vocab_size, np.int32)
    kind[: len(words)] = np.append(2 + np.array(kind_of, np.int32), 0)[spelling]
    kind[ends] = 1
    return Constraint(jnp.asarray(kind), jnp.asarray(table))


class _Tree(NamedTuple):
    """All beginnings of words, of which the root, 0, is empty.

    byte: the last of each node. children: nodes 1.. in the order of their parents; those of node i are number start[i]
    to start[i + 1]. leaves: the nodes that are whole words.
    """

    byte: Int[np.ndarray, " n"]
    children: Int[np.ndarray, " n-1"]
    start: Int[np.ndarray, " n+1"]
    leaves: Int[np.ndarray, " U"]


def _tree(machine: Automaton, words: list[bytes]) -> tuple[_Tree, Int[np.ndarray, " V"]]:
    """(the tree, which of its leaves each word is, or -1). Bytes that the automaton does not tell apart are one, and
    a word without bytes or with one that leads nowhere is none."""
    firsts, kind = _alike(machine.next.T)
    alike = bytes(firsts[k] for k in kind)
    dead = bytes(np.flatnonzero((machine.next < 0).all(0)).tolist())
    nodes: dict[tuple[int, int], int] = {}
    at_end = np.full(len(words), -1)
    for i, word in enumerate(words):
        if word and len(word.translate(None, dead)) == len(word):
            node = 0
            for byte in word.translate(alike):
                node = nodes.setdefault((node, byte), len(nodes) + 1)
            at_end[i] = node
    parent, byte = np.array([(-1, 0), *nodes]).T
    order = np.argsort(parent, kind="stable")
    start = np.searchsorted(parent[order][1:], np.arange(len(parent) + 1))
    leaves, leaf_of = np.unique(at_end[at_end >= 0], return_inverse=True)
    spelling = np.full(len(words), -1)
    spelling[at_end >= 0] = leaf_of
    return _Tree(byte, order[1:], start, leaves), spelling


def _over_words(
    machine: Automaton, tree: _Tree, pattern: str
) -> tuple[Int[np.ndarray, "S U"], Bool[np.ndarray, " S"]]:
    """(the state after each word, -1 for none; whether a text may end), of states that words lead to from the first."""
    number = np.full(len(machine.next) + 1, -1, np.int32)  # the last is that of no state
    number[0] = 0
    states, rows = [0], []
    for state in states:  # grows
        at = np.full(len(tree.byte), -1, np.int32)
        nodes, here = np.array([0]), np.array([state])
        while len(nodes):
            first, n = tree.start[nodes], tree.start[nodes + 1] - tree.start[nodes]
            nodes = tree.children[np.arange(n.sum()) + np.repeat(first - np.cumsum(n) + n, n)]
            here = machine.next[np.repeat(here, n), tree.byte[nodes]]
            nodes, here = nodes[here >= 0], here[here >= 0]
            at[nodes] = here
        row = at[tree.leaves]
        new = np.unique(row[(row >= 0) & (number[row] < 0)])
        number[new] = np.arange(len(states), len(states) + len(new))
        states += new.tolist()
        rows.append(number[row])
        if 4 * len(states) * len(row) > MOST_BYTES:
            raise _too_large(pattern, len(states), len(row))
    return np.stack(rows), machine.final[states]


def _alike(rows: np.ndarray) -> tuple[list[int], list[int]]:
    """(the first of each kind of equal rows, the kind of each row)."""
    found: dict[bytes, int] = {}
    kinds = [found.setdefault(row.tobytes(), len(found)) for row in rows]
    firsts = np.unique(kinds, return_index=True)[1]
    return firsts.tolist(), kinds


def _without_dead_ends(next: Int[np.ndarray, "S U"], final: Bool[np.ndarray, " S"]) -> bool:
    """Takes words out of `next`, in place, after which no text can come to match; whether any text can."""
    before: list[list[int]] = [[] for _ in next]
    for state, row in enumerate(next):
        for after in np.unique(row[row >= 0]).tolist():
            before[after].append(state)
    alive, waiting = final.copy(), np.flatnonzero(final).tolist()
    while waiting:
        for state in before[waiting.pop()]:
            if not alive[state]:
                alive[state] = True
                waiting.append(state)
    next[~np.append(alive, False)[next]] = -1
    return bool(alive[0])


def _rounded(n: int) -> int:
    """Up to a power of two, so that patterns share programs."""
    return 1 << max(3, (n - 1).bit_length())


def _too_large(pattern: str, n_states: int, n_kinds: int) -> ValueError:
    return ValueError(
        f"pattern: {pattern!r:.80} needs a table of {n_states:,} states and {n_kinds:,} kinds of tokens, more than "
        f"{MOST_BYTES / 2**20:.0f} MiB; repeat fewer times, such as {{0,20}}, or name fewer alternatives"
    )
