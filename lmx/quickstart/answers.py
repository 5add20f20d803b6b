"""Chapter: a question answered with none, one and a few examples in the prompt, and by an adapter that learned it."""

from __future__ import annotations

import random
import zipfile
from dataclasses import asdict
from pathlib import Path

from lmx import tune
from lmx.quickstart.packages import fetch
from lmx.quickstart.text import ELD
from lmx.quickstart.tour import Chapter, Tour
from lmx.report import page, plots
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.tasks import Accuracy, Choices, Records, Shots, Task, Template

LANGUAGES = {"hi": "Hindi", "mr": "Marathi"}
WORDS = 6
"""Of each sentence; their ends would tell the language by the full stop."""
TRAIN, TEST = 128, 60
SHOTS = (1, 8)
RANK, EPOCHS = 8, 3.0


def run(tour: Tour) -> dict:
    released = tour.facts["released"]
    model = tour.facts["pretrain"]["folder"] if "skipped" in released else released["path"]
    try:
        task = question(fetch(ELD, tour.say), tour.options.seed)
    except ConnectionError as error:
        tour.say(f"   skipped: {error}; the next tour tries again")
        return {"skipped": str(error)}
    plan = tune.tuning(model, task, epochs=EPOCHS, valid_share=0.1, seed=tour.options.seed)
    folder = tour.folder / f"answers-{tour.made_from[:8]}"
    shots = {f"{k} in the prompt": Shots(k, "balanced", tour.options.seed) for k in SHOTS}
    found = tune.compare({"an adapter": tune.lora(plan, RANK)}, task, folder, shots=shots)
    for x in found:
        tour.say(f"   {x.name}: {x.metrics['accuracy']} right")
    ways = {x.name: {"right": asdict(x.metrics["accuracy"]), "numbers": x.trained} for x in found}
    return {"folder": str(folder), "ways": ways, "released": "skipped" not in released}


def question(archive: Path, seed: int) -> Task:
    """Whether the beginning of a sentence is Hindi or Marathi, which share their letters."""
    with zipfile.ZipFile(archive) as wheel:
        lines = wheel.read("eld/tests/data/big-test.txt").decode("utf-8").splitlines()
    rows = {}
    for code, _, text in (line.partition("\t") for line in lines):
        if code in LANGUAGES:
            rows[" ".join(text.split()[:WORDS])] = LANGUAGES[code]
    mixed = [{"text": text, "language": language} for text, language in sorted(rows.items())]
    random.Random(seed).shuffle(mixed)
    return Task(
        "Hindi or Marathi",
        test=Records(mixed[:TEST]),
        train=Records(mixed[TEST : TEST + TRAIN]),
        template=Template("{text}\nLanguage:", " {language}"),
        answer=Choices(tuple(LANGUAGES.values())),
        metrics=(Accuracy(),),
    )


def show(tour: Tour, facts: dict) -> tuple:
    if "skipped" in facts:
        return (page.Text(f"Left out: {facts['skipped']}.", "quiet"),)
    right = {name: Interval(**x["right"]) for name, x in facts["ways"].items()}
    rows = tuple((name, right[name], x["numbers"] or None) for name, x in facts["ways"].items())
    model = "SmolLM2-135M-Instruct" if facts["released"] else "The model of this tour"
    return (
        page.Text(
            f"{model} is asked whether {WORDS} words are Hindi or Marathi, which share their letters: with no example, "
            f"with one, with {SHOTS[-1]}, and after an adapter learned from {TRAIN}. Guessing is right half of the "
            f"time; intervals are of 95 % over {TEST} sentences."
        ),
        page.Figure(plots.bars_with_intervals(right, x_label="share of right answers")),
        Table(("", "right", "numbers that learned"), rows),
    )


CHAPTER = Chapter("answers", "Answers: none, one, a few examples, or an adapter", run, show)
