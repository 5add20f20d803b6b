"""A teacher of another tokenizer: what it says at the places where both cut a text, in the words of the student.

    p(v) = sum of p_teacher(w) over the words w that the student begins with v

Two tokenizations of a document meet where tokens of both end at the same byte. What the teacher holds likely there is a
distribution over its own words; the student would write a word as one or more of its tokens, and has to say the first
of them next. So a teacher that cuts finer than the student names beginnings of its words; one that cuts as coarsely, or
more, loses only what lies between the meetings, where nothing is said. Ends of text are told as ends, and what the
teacher gives to its other special tokens is left to the tail.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from lmx.data import Tokenizer, TokenStore


class Crossed(NamedTuple):
    """Documents as the teacher reads them: tokens [n] and offsets; at [m]: for each token of the student's the one of
    them that ends at the same byte, or -1."""

    tokens: np.ndarray
    offsets: np.ndarray
    at: np.ndarray


class Bridge:
    """first [V] int32: of each word of the teacher the student's token that begins it, or the number of those that
    there are for none.

    Raises: ValueError unless both tokenizers keep every byte of a text.
    """

    def __init__(self, teacher: Tokenizer, student: Tokenizer):
        for whose, tokenizer in (("teacher", teacher), ("student", student)):
            if not tokenizer.lossless:
                raise ValueError(
                    f"the {whose}'s tokenizer changes texts ({tokenizer}), so that its tokens cannot be laid beside "
                    "another's; have the teacher write text that the student learns from: lmx distill write"
                )
        self.teacher, self.student = teacher, student
        self.first = _first(teacher, student)
        self._lengths = [
            np.array([len(one.token_bytes(i)) for i in range(one.vocab_size)], np.int64)
            for one in (student, teacher)
        ]

    def cross(self, store: TokenStore, start: int, stop: int) -> Crossed:
        """The documents that are tokens start to stop of a store of the student's."""
        first, last = np.searchsorted(store.offsets, [start, stop])
        offsets = np.asarray(store.offsets[first : last + 1], np.int64)
        ours = [store.tokens[a:b] for a, b in itertools.pairwise(offsets)]
        theirs = self.teacher.encode_batch([self.student.decode(ids.tolist()) for ids in ours])
        bos = [] if self.teacher.bos_id is None else [self.teacher.bos_id]
        end = (
            0 if self.teacher.eos_id is None else self.teacher.eos_id
        )  # read by none: the last of a document
        theirs = [np.array([*bos, *ids, end], np.int64) for ids in theirs]
        begins = np.cumsum([0, *map(len, theirs)])
        at = [np.zeros(0, np.int64)]
        for ids, others, begin in zip(ours, theirs, begins):
            here, there = np.cumsum(self._lengths[0][ids]), np.cumsum(self._lengths[1][others[:-1]])
            last = np.searchsorted(there, here, "right") - 1
            meet = (last >= 0) & (there[last] == here)
            at.append(np.where(meet, begin + last, -1))
        return Crossed(np.concatenate([[0][:0], *theirs]), begins, np.concatenate(at))


def _first(teacher: Tokenizer, student: Tokenizer) -> np.ndarray:
    none = student.vocab_size
    words = [teacher.token_bytes(i) for i in range(teacher.vocab_size)]
    known = {student.token_bytes(i): i for i in reversed(range(none))}
    longest = max(map(len, known))
    found = np.full(len(words), none, np.int32)
    texts = {i: word.decode("utf-8") for i, word in enumerate(words) if word and _is_text(word)}
    for i, ids in zip(texts, student.encode_batch(list(texts.values()))):
        found[i] = ids[0] if ids else none
    for i, word in enumerate(words):
        if word and i not in texts:  # a part of a character
            sizes = range(min(len(word), longest), 0, -1)
            found[i] = next((known[word[:n]] for n in sizes if word[:n] in known), none)
    if teacher.eos_id is not None and student.eos_id is not None:
        found[teacher.eos_id] = student.eos_id
    return found


def _is_text(word: bytes) -> bool:
    try:
        word.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
