"""Grapheme clusters: what a reader takes for one character (Unicode Standard Annex 29).

A cluster may hold many code points: a Devanagari conjunct with its vowel sign (स्त्री is one cluster of
six), an emoji family, a flag, a letter with its accents. Text that is shown as it arrives must end at a
cluster's end, or the reader sees it change under their eyes.

`regex` follows rule GB9c, so a conjunct such as क्ष is one cluster (Unicode 15.1 and later).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

import regex

_CLUSTER = regex.compile(r"\X")


def clusters(text: str) -> list[str]:
    """The grapheme clusters of the text; joined again they are the text.

    >>> clusters("नमस्ते")
    ['न', 'म', 'स्ते']
    """
    return _CLUSTER.findall(text)


def split_complete(text: str) -> tuple[str, str]:
    """(whole, rest): the clusters that nothing appended can change, and the last one, which may still grow.

    The last cluster is always held back: a vowel sign, a virama, a joiner or an accent may follow.

    >>> split_complete("नमस्")
    ('नम', 'स्')
    """
    start = 0
    for match in _CLUSTER.finditer(text):
        start = match.start()
    return text[:start], text[start:]


def assemble(pieces: Iterable[bytes]) -> Iterator[str]:
    """The text of a stream of UTF-8 pieces, in parts that split no character and no grapheme cluster.

    A piece may end anywhere, inside a character too. The parts joined are
    `b"".join(pieces).decode("utf-8", "replace")`; no part is empty. The text lags one cluster behind.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    for piece in pieces:
        whole, rest = split_complete(rest + decoder.decode(piece))
        if whole:
            yield whole
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest
