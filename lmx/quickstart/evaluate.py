"""Chapter: how well the held-out text is predicted, with intervals, beside what a general compressor needs."""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict
from pathlib import Path

from lmx.evals.perplexity import perplexity
from lmx.quickstart.pretrain import MODEL
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page, plots
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.run import trained

MOST_BYTES = 400_000


def run(tour: Tour) -> dict:
    model = trained(tour.folder / MODEL)
    languages = {}
    for language, found in tour.facts["text"]["languages"].items():
        texts = _texts(Path(found["parts"]["valid"]["path"]))
        tour.say(f"   {language}: {len(texts)} held-out documents")
        measured = perplexity(model.model, model.params, texts, model.tokenizer, seq_len=model.run.data.seq_len)
        joined = "\n".join(texts).encode("utf-8")
        languages[language] = asdict(measured) | {"lzma_bits_per_byte": 8 * len(lzma.compress(joined)) / len(joined)}
    return {"languages": languages}
