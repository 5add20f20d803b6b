"""Trains, compares and inspects tokenizers on your own text.

  lmx tokenizer compare input.txt                                  kinds x vocabulary sizes, per script, with a plot
  lmx tokenizer compare hindi.txt english.txt --sizes 1000 4000 16000 --kinds bpe unigram
  lmx tokenizer train hindi.txt --spec "Bpe(vocab_size=8000)" --out tokenizer.json
  lmx tokenizer show tokenizer.json --text "क्षत्रिय नमस्ते"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lmx import cli


@dataclass(frozen=True)
class Compare:
    """Tables vocabulary size against tokens per word, bytes per token and words kept whole, per script."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """Files (text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), patterns, or tfds:name."""
    kinds: tuple[str, ...] = ("byte", "char", "grapheme", "word", "bpe", "unigram")
    sizes: tuple[int, ...] = (1000, 4000, 16000)
    """Vocabulary sizes of the kinds that have one."""
    out: Path = Path("runs/tokenizers")
    """Folder for the table and the plot."""


@dataclass(frozen=True)
class Train:
    """Trains one tokenizer and writes its tokenizer.json."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    spec: str = "Bpe(vocab_size=4096)"
    """Byte(), Char(), Grapheme(), Word(vocab_size=N), Bpe(vocab_size=N), Unigram(vocab_size=N)."""
    out: Path = Path("tokenizer.json")


@dataclass(frozen=True)
class Show:
    """Says what a tokenizer.json is, and how it cuts a text."""

    path: tyro.conf.Positional[Path]
    text: str = ""


Options = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "tokenizer")
    {Compare: compare, Train: train, Show: show}[type(asked)](asked)
