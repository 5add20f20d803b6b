"""Chapter: how well the held-out text is predicted, with intervals, beside what a general compressor needs."""

from __future__ import annotations

import lzma

from lmx.data import Jsonl
from lmx.evals import perplexity
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.run import trained

MOST_BYTES = 300_000


def run(tour: Tour) -> dict:
    model = trained(tour.facts["pretrain"]["folder"])
    languages = {}
    for language, found in tour.facts["text"]["languages"].items():
        texts = _texts(found["parts"]["valid"]["path"])
        measured = perplexity(
            model.model,
            model.params,
            texts,
            model.tokenizer,
            seq_len=model.run.data.seq_len,
            seed=tour.options.seed,
        )
        raw = "\n".join(texts).encode("utf-8")
        languages[language] = {
            "documents": measured.n_documents,
            "bytes": measured.n_bytes,
            "lzma_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
        } | {name: _plain(getattr(measured, name)) for name in ("perplexity", "bits_per_byte")}
        tour.say(f"   {language}: {languages[language]['bits_per_byte']['value']:.3f} bits per byte")
    return {"languages": languages}


def show(tour: Tour, facts: dict) -> tuple:
    rows = tuple(
        (
            language,
            found["documents"],
            found["bytes"],
            *(Interval(**found[name]) for name in ("perplexity", "bits_per_byte")),
            round(found["lzma_bits_per_byte"], 3),
        )
        for language, found in facts["languages"].items()
    )
    columns = ("held out", "documents", "bytes", "perplexity per token", "bits per byte", "xz")
    return (
        page.Text(
            "Perplexity on documents the model has not seen, with 95 % intervals from a bootstrap over documents. "
            "Only bits per byte compares across tokenizers and scripts: a Devanagari letter is three bytes. "
            "The last column is the bits per byte of the compressor xz, which has seen no training text."
        ),
        Table(columns, rows),
    )


CHAPTER = Chapter("evaluate", "Judgement: perplexity on text never seen", run, show)


def _texts(path: str) -> list[str]:
    texts, left = [], MOST_BYTES
    for document in Jsonl(path):
        texts.append(document["text"])
        left -= len(document["text"].encode("utf-8"))
        if left <= 0:
            break
    return texts


def _plain(interval) -> dict:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
