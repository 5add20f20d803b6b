"""Trains, compares and inspects tokenizers on your own text.

What is compared was held out of training. Words of each script have their own rows, so that the cost of a
vocabulary on Devanagari does not hide in an average.

  lmx tokenizer compare input.txt                                  kinds x vocabulary sizes, with a plot
  lmx tokenizer compare hindi.txt english.txt --sizes 1000 4000 16000 --kinds bpe unigram
  lmx tokenizer compare hindi.txt --kinds bpe other/tokenizer.json   against one that exists
  lmx tokenizer train hindi.txt --spec "Bpe(vocab_size=8000)" --out tokenizer.json
  lmx tokenizer show tokenizer.json --text "क्षत्रिय नमस्ते"
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
    """Kinds, or paths of tokenizer.json files."""
    sizes: tuple[int, ...] = (1000, 4000, 16000)
    """Vocabulary sizes of the kinds that have one."""
    scripts: tuple[str, ...] = ("Latin", "Devanagari")
    """Scripts whose words have rows of their own."""
    valid: float = 0.1
    """Share of the lines that is held out and measured."""
    out: Path = Path("runs/tokenizers")
    """Folder for compare.json, compare.svg and compare.png."""


@dataclass(frozen=True)
class Train:
    """Trains one tokenizer and writes its tokenizer.json."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """Files, patterns, or tfds:name."""
    spec: str = "Bpe(vocab_size=4096)"
    """Byte(), Char(), Grapheme(), Word(vocab_size=N), Bpe(vocab_size=N), Unigram(vocab_size=N)."""
    out: Path = Path("tokenizer.json")
    """A .json file, or a folder."""


@dataclass(frozen=True)
class Show:
    """Says what a tokenizer is, and how it cuts a text."""

    path: tyro.conf.Positional[Path]
    """A tokenizer.json, or a folder with one, such as a run's."""
    text: str = ""
    """Cut into tokens, one a line."""


Options = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "tokenizer")
    {Compare: compare, Train: train, Show: show}[type(asked)](asked)


def compare(asked: Compare) -> None:
    from lmx import artifact
    from lmx.cli.progress import Progress
    from lmx.data.compare import compare as measured
    from lmx.data.compare import grid, plot
    from lmx.data.store import explained
    from lmx.report.table import Table

    specs = grid(asked.kinds, asked.sizes)
    with explained(asked.out):
        asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with Progress() as progress:
        for i, spec in enumerate(specs, 1):
            texts = _Texts(asked.texts, progress, f"[{i}/{len(specs)}] {spec}")
            rows += measured(texts, [spec], asked.valid, asked.scripts)
    texts.report.warn("the texts")
    figure = plot(rows)
    for ending in ("svg", "png"):
        figure.savefig(asked.out / f"compare.{ending}")
    found = asked.out / "compare.json"
    found.write_text(
        json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    artifact.record(found, "comparison", _Texts(asked.texts).artifacts(), {"valid": asked.valid})
    columns = ("tokenizer", "vocabulary", "words", "tokens per word", "bytes per token", "whole", "unknown")
    for script in dict.fromkeys(row.script for row in rows):
        here = tuple(
            (
                r.tokenizer,
                r.vocab_size,
                r.words,
                r.tokens_per_word,
                r.bytes_per_token,
                f"{r.whole:.1%}",
                f"{r.unknown:.1%}",
            )
            for r in rows
            if r.script == script
        )
        print(
            Table(columns, here, caption=f"{script} words" if script != "all" else "the whole text").text()
            + "\n"
        )
    print(f"plot {asked.out / 'compare.svg'}")


def train(asked: Train) -> None:
    from lmx import artifact, values
    from lmx.cli.progress import Progress
    from lmx.data import TokenizerSpec
    from lmx.data.store import explained

    spec = values.parse(asked.spec, TokenizerSpec, "--spec")
    with explained(asked.out):
        asked.out.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        texts = _Texts(asked.texts, progress, str(spec))
        tokenizer = spec.train(document["text"] for document in texts)
    texts.report.warn("the texts")
    path = tokenizer.save(asked.out)
    artifact.record(path, "tokenizer", texts.artifacts(), {**tokenizer.facts, "spec": repr(spec)})
    print(f"{path}: {tokenizer}")


def show(asked: Show) -> None:
    from lmx.data import Tokenizer
    from lmx.report.table import Table

    tokenizer = Tokenizer.load(asked.path)
    facts = {name: value for name, value in tokenizer.facts.items() if value is not None}
    special = {
        name: f"{getattr(tokenizer, name)}  {tokenizer.token(getattr(tokenizer, name))}"
        for name in ("pad_id", "bos_id", "eos_id", "unk_id")
        if getattr(tokenizer, name) is not None
    }
    facts |= {"lossless": "yes" if tokenizer.lossless else "no"} | special
    width = max(map(len, facts))
    print("\n".join(f"{name:{width}}  {value}" for name, value in facts.items()))
    if not asked.text:
        return
    raw = asked.text.encode("utf-8")
    spans = tokenizer.spans(asked.text)
    rows = tuple((i, str(tokenizer.token(i)), _readable(raw[a:b]), raw[a:b].hex(" ")) for i, a, b in spans)
    print("\n" + Table(("id", "token", "text", "bytes"), rows).text())
    words = len(asked.text.split())
    print(f"\n{len(rows)} tokens for {words} words, {len(raw) / max(1, len(rows)):.2f} bytes per token")


class _Texts:
    """The documents of named sources, cleaned as for training, as often as they are asked for."""

    def __init__(self, names: tuple[str, ...], progress=None, stage: str = ""):
        from lmx.data import Data

        if not names:
            raise ValueError("give at least one text file, pattern or tfds:name")
        self._sources = tuple(map(cli.source_of, names))
        self._data = Data(train=self._sources, valid_share=0.0)
        self._progress, self._stage = progress, stage
        self.report = None

    def __iter__(self) -> Iterator[dict]:
        """Counts what is left out in `report`, which begins anew each time."""
        from lmx.data.tally import Report

        self.report = Report()
        documents = self._data.documents("train", self.report)
        if self._progress is None:
            return documents
        return self._progress.watch(documents, self._stage, self._bytes())

    def artifacts(self) -> list:
        return [found for one in self._sources for found in one.artifacts()]

    def _bytes(self) -> int | None:
        """Of the files; None where they are packed."""
        paths = [path for one in self._sources for path in one.files()]
        if any(path.suffix in (".gz", ".zst", ".parquet") or path.is_dir() for path in paths):
            return None
        return sum(path.stat().st_size for path in paths)


def _readable(raw: bytes) -> str:
    """The text of a token, or what shows that it is part of a character."""
    try:
        return repr(raw.decode("utf-8"))[1:-1]
    except UnicodeDecodeError:
        return "part of a character"
