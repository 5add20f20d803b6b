"""Which tokenizer, and how large a vocabulary? Measured on a text of one's own, script by script.

A vocabulary learned from English cuts Devanagari into crumbs, and an average over both hides it: tokens are
counted for the words of each script. What is measured was held out of training: a vocabulary that knows its
text by heart would look better the larger it is.

    rows = compare(texts, grid(["byte", "bpe", "unigram"], [1024, 4096, 16384]))
    plot(rows).savefig("vocabulary.svg")
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from lmx.text.scripts import OTHER, SCRIPTS, word_script, word_spans

from .tokenizer import Bpe, Byte, Char, File, Grapheme, Tokenizer, TokenizerSpec, Unigram, Word

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"byte": Byte, "char": Char, "grapheme": Grapheme, "word": Word, "bpe": Bpe, "unigram": Unigram}
ALL = "all"
MAX_LINE = 1 << 14

_LINE = regex.compile(rf"[^\n]{{{MAX_LINE}}}|[^\n]*\n+|[^\n]+")


@dataclass(frozen=True)
class Row:
    """One tokenizer on the held-out words of one script, or of all.

    tokenizer: its kind and what it departs in from the defaults.
    vocab_size: reached, not asked for.
    script: "Latin", ...; "other" for words in scripts not asked for, and numbers; "all" for the whole text.
    tokens_per_word: tokens that touch a word, on average.
    bytes_per_token: UTF-8 bytes of the text per token; what stands before a word counts with it.
    whole: share of words that one known token covers, with or without the space before them.
    unknown: share of tokens that are the unknown token, their text lost.
    """

    tokenizer: str
    vocab_size: int
    script: str
    words: int
    tokens_per_word: float
    bytes_per_token: float
    whole: float
    unknown: float


def grid(kinds: Sequence[str], vocab_sizes: Sequence[int]) -> list[TokenizerSpec]:
    """Every kind, a name in KINDS or the path of a tokenizer.json, with every size if it has one to choose.

    Raises: ValueError for an unknown kind, or a size that is too small for its kind.
    """
    specs: list[TokenizerSpec] = []
    for kind in kinds:
        if kind not in KINDS and not Path(kind).exists():
            raise ValueError(
                f"unknown tokenizer {kind!r}; use {', '.join(KINDS)}, or the path of a tokenizer.json"
            )
        if kind not in KINDS:
            specs.append(File(kind))
        elif KINDS[kind] in (Word, Bpe, Unigram):
            specs.extend(KINDS[kind](vocab_size=size) for size in vocab_sizes)
        else:
            specs.append(KINDS[kind]())
    return specs


def compare(
    texts: Iterable[str | dict[str, Any]],
    specs: Sequence[TokenizerSpec],
    valid: float = 0.1,
    scripts: Sequence[str] = ("Latin", "Devanagari"),
) -> list[Row]:
    """Trains each tokenizer on all but a share of the lines, and measures it on these.

    Args:
      texts: texts, or documents with a "text"; iterated anew for each tokenizer, never held in memory.
      valid: share of the lines to hold out, chosen by a hash of the line, so that no line is on both sides.
      scripts: those with rows of their own; a script without held-out words has none.
    Raises: ValueError if there is nothing to train on or to measure; TypeError for texts that run out.
    """
    if not specs:
        raise ValueError("compare: no tokenizer to compare; grid(['bpe'], [4096]) makes one")
    if iter(texts) is texts:
        raise TypeError(
            f"compare: texts are read once for each tokenizer, but {texts!r:.60} can be read only once"
        )
    if not 0 < valid < 1:
        raise ValueError(f"compare: valid={valid} is not between 0 and 1; 0.1 holds out a tenth of the lines")
    for script in scripts:
        if script not in SCRIPTS:
            raise ValueError(f"compare: unknown script {script!r}; use {', '.join(SCRIPTS)}")
    names = [*scripts, OTHER]
    rows = []
    for spec in specs:
        with warnings.catch_warnings():  # a row says how many tokens the text supports
            warnings.filterwarnings("ignore", ".*more than this text supports", UserWarning)
            tokenizer = spec.train(line for line in _lines(texts) if not _held_out(line, valid))
        sums = sum(_measure(tokenizer, line, names) for line in _lines(texts) if _held_out(line, valid))
        if not np.any(sums):
            raise ValueError(
                f"compare: no line of the text fell into the held-out share {valid}; give more lines"
            )
        rows += [_row(spec, tokenizer, name, s) for name, s in zip(names, sums) if s[_WORDS]]
        rows.append(_row(spec, tokenizer, ALL, sums.sum(0)))
    return rows


def plot(rows: Sequence[Row]) -> Figure:
    """Each measure (down) for each script (across) against vocabulary size, one line per kind."""
    from matplotlib.figure import Figure

    scripts = list(dict.fromkeys(row.script for row in rows))
    tokenizers = list(dict.fromkeys(row.tokenizer for row in rows))
    measures = {
        "tokens_per_word": "tokens per word",
        "bytes_per_token": "bytes per token",
        "whole": "words whole",
    }
    figure = Figure(figsize=(1.5 + 2.6 * len(scripts), 7.5), layout="constrained")
    panels = figure.subplots(len(measures), len(scripts), sharex=True, sharey="row", squeeze=False)
    for across, (measure, label) in zip(panels, measures.items()):
        for panel, script in zip(across, scripts):
            for tokenizer in tokenizers:
                here = [row for row in rows if (row.tokenizer, row.script) == (tokenizer, script)]
                here.sort(key=lambda row: row.vocab_size)
                x, y = [row.vocab_size for row in here], [getattr(row, measure) for row in here]
                panel.plot(x, y, marker="o", markersize=4, label=tokenizer)
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
        across[0].set_ylabel(label)
        across[0].set_ylim(bottom=0)
    for panel, script in zip(panels[0], scripts):
        panel.set_title(script)
    for panel in panels[-1]:
        panel.set_xlabel("vocabulary size")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(tokenizers)
    )
    return figure


_WORDS, _TOUCHING, _WHOLE, _BYTES, _TOKENS, _UNKNOWN = range(6)


def _lines(texts: Iterable[str | dict[str, Any]]) -> Iterator[str]:
    for text in texts:
        yield from _LINE.findall(text if isinstance(text, str) else text["text"])


def _held_out(line: str, valid: float) -> bool:
    return zlib.crc32(line.encode()) < valid * 2**32


def _measure(tokenizer: Tokenizer, line: str, names: Sequence[str]) -> np.ndarray:
    """Sums over the line, int64 [len(names), 6]: of each script, the columns _WORDS ... _UNKNOWN.

    The line falls into one stretch for each word, which ends with the word; the last one reaches to the end
    of the line. A line without words is one stretch of "other". A token belongs to the stretch it ends in.
    """
    raw = np.frombuffer(line.encode(), np.uint8)
    at = np.append(np.flatnonzero(raw & 0xC0 != 0x80), raw.size)
    words = word_spans(line)
    start, end = at[np.array(words, int).reshape(-1, 2)].T
    ids, token_start, token_end = np.array(tokenizer.spans(line), int).reshape(-1, 3).T
    unknown = np.append(ids == tokenizer.unk_id, False)

    scripts = [_index(word_script(line[a:b]), names) for a, b in words] or [len(names) - 1]
    stretches = np.append(end[:-1], raw.size)
    upto = np.searchsorted(token_end, stretches, "right")
    sums = np.zeros((len(scripts), 6), int)
    sums[:, _BYTES] = np.diff(stretches, prepend=0)
    sums[:, _TOKENS] = np.diff(upto, prepend=0)
    sums[:, _UNKNOWN] = np.diff(np.append(0, unknown.cumsum())[upto], prepend=0)
    if words:
        first = np.searchsorted(token_end, start, "right")
        touching = np.searchsorted(token_start, end, "left") - first
        sums[:, _WORDS] = 1
        sums[:, _TOUCHING] = touching
        sums[:, _WHOLE] = (touching == 1) & ~unknown[first]
    by_script = np.zeros((len(names), 6), int)
    np.add.at(by_script, scripts, sums)
    return by_script


def _index(script: str, names: Sequence[str]) -> int:
    return names.index(script) if script in names else len(names) - 1


def _row(spec: TokenizerSpec, tokenizer: Tokenizer, script: str, sums: np.ndarray) -> Row:
    def ratio(a: int, b: int) -> float:
        return float(sums[a] / sums[b]) if sums[b] else 0.0

    return Row(
        tokenizer=_label(spec),
        vocab_size=tokenizer.vocab_size,
        script=script,
        words=int(sums[_WORDS]),
        tokens_per_word=ratio(_TOUCHING, _WORDS),
        bytes_per_token=ratio(_BYTES, _TOKENS),
        whole=ratio(_WHOLE, _WORDS),
        unknown=ratio(_UNKNOWN, _TOKENS),
    )


def _label(spec: TokenizerSpec) -> str:
    changed = (f for f in fields(spec) if f.name != "vocab_size" and getattr(spec, f.name) != f.default)
    return " ".join([type(spec).__name__.lower(), *(f"{f.name}={getattr(spec, f.name)}" for f in changed)])
