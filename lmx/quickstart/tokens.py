"""Chapter: which tokenizer, and how large; then one for both languages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from lmx import artifact
from lmx.data import Bpe, Byte, Jsonl
from lmx.data.compare import Row, compare
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page, plots
from lmx.report.table import Table

SHARE_BYTES = 400_000
FILE = "tokenizer.json"


def run(tour: Tour) -> dict:
    size = tour.options.vocab_size
    texts = list(_balanced(tour))
    tokenizer = Bpe(size).train(texts)
    path = tour.folder / FILE
    tokenizer.save(path)
    sources = [p["parts"]["train"]["path"] for p in tour.facts["text"]["languages"].values()]
    artifact.record(path, "tokenizer", made_from=sources, facts={"vocab_size": tokenizer.vocab_size})
    rows = compare(texts, [Byte(), *(Bpe(max(300, size * share // 4)) for share in (1, 2, 4, 8))])
    return {"path": str(path), "vocab_size": tokenizer.vocab_size, "rows": [asdict(row) for row in rows]}


def show(tour: Tour, facts: dict) -> tuple:
    rows = [Row(**row) for row in facts["rows"]]
    curves: dict[str, list] = {}
    for row in rows:
        if row.tokenizer.startswith("bpe") and row.script in ("Latin", "Devanagari"):
            curves.setdefault(row.script, []).append((row.vocab_size, row.tokens_per_word))
    cells = tuple(
        (r.tokenizer, r.vocab_size, r.script, r.tokens_per_word, r.bytes_per_token, f"{r.whole:.0%}")
        for r in rows
        if r.script in ("Latin", "Devanagari")
    )
    return (
        page.Text(
            f"A larger vocabulary writes the same text in fewer tokens, and costs parameters. This tour goes on with "
            f"{facts['vocab_size']} byte-level BPE tokens, learned from equal shares of both languages; no text is "
            "outside it, and its pattern keeps Devanagari vowel signs with their consonants."
        ),
        page.Figure(
            plots.lines_with_points(curves, x_label="vocabulary size", y_label="tokens per word", log_x=True),
            "Tokens per word on lines that the tokenizers were not trained on.",
        ),
        page.Fold(
            "The numbers",
            (
                Table(
                    (
                        "tokenizer",
                        "vocabulary",
                        "script",
                        "tokens per word",
                        "bytes per token",
                        "words whole",
                    ),
                    cells,
                ),
            ),
        ),
    )


CHAPTER = Chapter("tokens", "Tokens: how text is cut", run, show)


def _balanced(tour: Tour) -> Iterator[str]:
    """Training text, at most SHARE_BYTES of each language."""
    for found in tour.facts["text"]["languages"].values():
        left = SHARE_BYTES
        for document in Jsonl(found["parts"]["train"]["path"]):
            text = document["text"].encode("utf-8")[:left].decode("utf-8", "ignore")
            left -= len(text.encode("utf-8"))
            yield text
            if left <= 0:
                break
