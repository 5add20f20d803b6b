"""One model, one task, several ways to fine-tune: what each learns, forgets and costs, side by side.

    run = tuning("SmolLM2.gguf", sst2("data/sst2"), epochs=2)
    found = compare({"full": full(run), "LoRA": lora(run, 16), "head": head(run)}, sst2("data/sst2"), "runs/sst2")
    print(table(found).text())

Each way is a function Run -> Run, so another is one more line. What is trained and judged lies below the folder, and is
not made again.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmx import adapt, artifact, evals, plan, tree, values
from lmx.adapt import Surgery
from lmx.data import Data, File, prepare
from lmx.evals.prompting import LESS, metric_of
from lmx.evals.tasks import judge as answered
from lmx.losses import Counted, NextToken, Term
from lmx.models import build, pretrained
from lmx.optim import AdamW, Linear
from lmx.report import page, plots
from lmx.report.runs import LOSS, read_json, read_metrics
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.run import Run, Trained, load, trained
from lmx.tasks import Answers, Shots, Task, overlap
from lmx.train import Load, Session, State, batch_shapes, cache_folder, metric_names, session
from lmx.train.checkpoint import find_step
from lmx.train.live import Live
from lmx.train.standard import finished
from lmx.train.standard import run as train

ADAPTERS = "*/w/[ab]"
EVALUATIONS = 8
"""Of the held-out loss, over a whole run."""
HELD = 200
"""Of the held-out examples, so many are answered at an evaluation that chooses by a task's metric."""
SHORT = 200
"""Characters of a line that is a heading rather than a paragraph."""


def tuning(
    path: str | Path,
    task: Task,
    *,
    examples: int | None = None,
    epochs: float = 2.0,
    seq_len: int = 128,
    batch_size: int = 8,
    valid_share: float = 0.05,
    best: str = "loss",
    patience: int | None = None,
    noise: float = 0.0,
    smoothing: float = 0.0,
    seed: int = 0,
) -> Run:
    """The run that `full`, `lora` and the others vary: a model, released or of a run, that learns a task's answers.

    Rows hold several examples each, and the loss is computed on answers alone. Some training examples are held out; the
    task's test records are never seen.
    Args:
      examples: so many of the task's training records, drawn by `seed`. epochs: how often each is seen.
      best: what the best step is chosen by on the held-out examples: "loss", or a metric of the task.
      patience: evaluations, of EVALUATIONS in a whole run, without a new best after which a run ends; None is never.
      noise: on embeddings while training (NEFTune, `TransformerConfig.embed_noise`). smoothing: of `NextToken`.
    Raises: FileNotFoundError, ValueError as the files say; ValueError if there is less than one step to make, or for a
      metric that the task has not.
    """
    path = Path(path)
    config = pretrained.find(path).config if pretrained.is_released(path) else load(path / "run.txt").model
    if best != "loss":
        best = metric_of(task, best)
    more = best != "loss" and best not in LESS
    data = Data(
        train=(Answers(task, limit=examples, seed=seed),),
        valid_share=valid_share,
        tokenizer=File(str(path)),
        seq_len=seq_len,
        batch_size=batch_size,
    )
    steps = round(epochs * prepare(data, Path(cache_folder())).train.n_rows / batch_size)
    if steps < 1:
        raise ValueError(f"tuning: epochs={epochs} is less than one step of {batch_size} rows; raise it")
    return Run(
        model=replace(config, embed_noise=noise),
        data=data,
        objective={"ce": Term(Counted(NextToken(smoothing)))},
        start=(Load(str(path)),),
        steps=steps,
        eval_every=max(1, steps // EVALUATIONS),
        best=f"{'-' if more else ''}valid/{best}",
        patience=patience,
        save_every=steps,
        keep=1,
        seed=seed,
    )


def full(run: Run, lr: float = 5e-5) -> Run:
    """Every number learns."""
    return replace(run, optim=_optim(lr))


def lora(run: Run, rank: int = 16, lr: float = 1e-3) -> Run:
    """Adapters on every matrix of the layers."""
    return _more(run, adapt.Lora(rank=rank), trainable=ADAPTERS, lr=lr)


def qlora(run: Run, rank: int = 16, lr: float = 1e-3) -> Run:
    """The same adapters on matrices in 4 bits."""
    return _more(run, adapt.Nf4(), adapt.Lora(rank=rank), trainable=ADAPTERS, lr=lr)


def head(run: Run, lr: float = 5e-3) -> Run:
    """A linear layer on the last hidden state of the model as it is. Raises: ValueError for a task without classes."""
    (answers,) = run.data.train
    data = replace(run.data, train=(replace(answers, head=True),))
    n = len(answers.task.answer.labels)
    return _more(replace(run, data=data), adapt.Classes(n), trainable="classes", lr=lr)


def _optim(lr: float) -> AdamW:
    return AdamW(lr=lr, schedule=Linear(warmup=0.1))


def _more(run: Run, *start: Surgery, trainable: str, lr: float) -> Run:
    return replace(run, start=(*run.start, *start), trainable=trainable, optim=_optim(lr))


@dataclass(frozen=True)
class Tuned:
    """What came of one way. metrics: of the task. general: bits per byte of other text. trained: numbers that learned.
    bytes: of the compiled step, by what holds them. seconds: of all steps. valid, train: (step, loss)."""

    name: str
    metrics: dict[str, Interval]
    general: Interval | None
    trained: int
    bytes: dict[str, int]
    seconds: float
    valid: list[tuple[int, float]]
    train: list[tuple[int, float]]


def compare(
    runs: Mapping[str, Run],
    task: Task,
    out: str | Path,
    *,
    text: Sequence[str] = (),
    shots: Mapping[str, Shots] = {},
    limit: int | None = None,
) -> list[Tuned]:
    """Trains each run below `out` and judges its best checkpoint on the task, and by bits per byte on `text`, which
    shows what it forgets.

    The first of the list are the model as it was, prompted with the task alone or with `shots`, by name. `limit`
    examples are judged, drawn at random. Writes report.html into `out`. Warns where test questions are among the
    training examples.
    Raises: ValueError if a folder holds another run; KeyboardInterrupt when it is stopped, with the step saved.
    """
    out = Path(out)
    overlap(task.examples("train"), task.examples("test"), task.name)
    first = next(iter(runs.values()))
    judge = _Judge(task, tuple(text), limit)
    model = first.start[0]
    content = repr((model, [artifact.find(path).hash for path in model.files()]))
    start = functools.cache(lambda: trained(model.path))
    found = []
    for name, some in {"0 shots": Shots(), **shots}.items():
        scores = judge(out / name, start, f"{content} {some}", some)
        found.append(Tuned(name, *scores, 0, {}, 0.0, [], []))
    start.cache_clear()
    for name, run in runs.items():
        made, folder = session(run), out / name
        if not finished(made, folder):
            sinks = [Live(run.steps, title=name)]
            result = train(made, folder, sinks=sinks, judge=_held_out_judge(made, task))
            if result.interrupted:
                raise KeyboardInterrupt(f"saved step {result.step} of {folder}; repeat the command to go on")
        model.check_unchanged(find_step(folder.absolute(), "latest"))
        scores = judge(folder, lambda at=folder: trained(at, step="best"), content + values.show(run))
        series = read_metrics(folder)
        seconds = sum(x for _, x in series["step_seconds"])
        held = _held(folder, made)
        found.append(
            Tuned(name, *scores, held.pop("trained"), held, seconds, series["valid/loss"], series["loss"])
        )
        artifact.write(out / "report.html", report(found, task).html())
    return found


def _held_out_judge(made: Session, task: Task) -> Callable[[State], dict[str, float]] | None:
    """Scores the task on training examples that the run holds out, if its best step is chosen by that."""
    run = made.run
    if run.best.removeprefix("-") in metric_names(run):
        return None
    held = {document["id"] for document in run.data.documents("valid")}
    examples = [x for x in task.examples("train") if x.where in held][:HELD]
    ready = Trained(run, build(run.model), None, made.prepared.tokenizer, None, run.data.seq_len)

    def scores(state: State) -> dict[str, float]:
        model = ready._replace(params=state.params).for_decoding()
        found = answered(model, task, examples, [()] * len(examples), resamples=0)
        return {name: x.value for name, x in found.metrics.items()}

    return scores


@dataclass(frozen=True)
class _Judge:
    """Scores a model once: what it says is kept beside it, under the hash of all that decides it."""

    task: Task
    text: tuple[str, ...]
    limit: int | None

    def __call__(
        self, folder: Path, model: Callable[[], Trained], of: str, shots: Shots = Shots()
    ) -> tuple[dict[str, Interval], Interval | None]:
        records = self.task.test.fingerprint()
        key = artifact.hash_text(
            repr((of, self.task, records, artifact.hash_text("".join(self.text)), self.limit))
        )
        known = read_json(folder / "score.json")
        if known is None or known["of"] != key:
            known = {"of": key, **self._scores(model(), folder, shots)}
            artifact.write(folder / "score.json", json.dumps(known, ensure_ascii=False))
        metrics = {name: Interval(**x) for name, x in known["metrics"].items()}
        return metrics, known["general"] and Interval(**known["general"])

    def _scores(self, model: Trained, folder: Path, shots: Shots) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        result = evals.score(model, self.task, shots, limit=self.limit)
        result.save(folder / "outcomes.jsonl")
        general = None
        if self.text and shots == Shots():
            words = {name: x for name, x in model.params.items() if name != "classes"}
            bos = model.tokenizer.bos_id
            general = evals.perplexity(
                model.model,
                words,
                self.text,
                model.tokenizer,
                seq_len=256,
                batch_size=4,
                bos=model.tokenizer.eos_id if bos is None else bos,
            ).bits_per_byte
        return {
            "metrics": {name: asdict(x) for name, x in result.metrics.items()},
            "general": general and asdict(general),
        }


def paragraphs(path: str | Path, characters: int) -> tuple[str, ...]:
    """The first lines of a text file that are not headings, each a document, of so many characters in all.

    Raises: FileNotFoundError; ValueError if it is not UTF-8.
    """
    found, left = [], characters
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if len(line) > SHORT and left > 0:
            found.append(line.strip())
            left -= len(line)
    return tuple(found)


def _held(folder: Path, made) -> dict[str, int]:
    """Numbers that learn, and bytes that the compiled step holds."""
    known = read_json(folder / "memory.json")
    if known is None:
        state = made.program.shapes
        mesh = made.program.mesh
        with plan.quick_compilation():
            compiled = plan.plan(made.program.step, (state, batch_shapes(made.run, mesh)), "", mesh.size, 0.0)
        known = {
            "trained": tree.count(state.trainable),
            "parameters": tree.nbytes(state.params),
            "gradients": tree.nbytes(state.trainable),
            "optimizer": tree.nbytes(state.opt_state),
            "activations and others": compiled.temporary_bytes,
        }
        artifact.write(folder / "memory.json", json.dumps(known))
    return known


def table(found: Iterable[Tuned]) -> Table:
    """Quality, forgetting and costs, a row for each way."""
    found = list(found)
    names = tuple(dict.fromkeys(name for x in found for name in x.metrics))
    general = any(x.general for x in found)
    rows = [
        (
            x.name,
            *(x.metrics.get(name) for name in names),
            *([x.general] if general else []),
            x.trained or None,
            sum(x.bytes.values()) / 2**20 or None,
            x.seconds / 60 or None,
        )
        for x in found
    ]
    extra = ("bits per byte of other text",) if general else ()
    return Table(("", *names, *extra, "numbers trained", "MiB", "minutes"), tuple(rows))


def passing(a: Tuned, b: Tuned) -> int | None:
    """The first evaluation from which on a's held-out loss is above b's, after it was not; None if there is none."""
    steps = [(step, x > y) for (step, x), (_, y) in zip(a.valid, b.valid)]
    after = next((i for i, (_, above) in enumerate(steps) if not above), len(steps))
    return next((step for step, above in steps[after:] if above), None)


def report(found: Sequence[Tuned], task: Task) -> page.Page:
    """One page: the table, what each way learns, and where it begins to learn by heart."""
    tuned = [x for x in found if x.valid]
    losses = {f"{x.name}, held out": x.valid for x in tuned}
    smooth = {f"{x.name}, trained on": _means(x.train, len(x.valid)) for x in tuned}
    crossed = [
        f"{a.name} passes {b.name} in held-out loss at step {step:,}."
        for a in tuned
        for b in tuned
        if a is not b and (step := passing(a, b))
    ]
    first = next(iter(found[0].metrics))
    quality = {x.name: x.metrics[first] for x in found if first in x.metrics}
    known = {name: x for name, x in quality.items() if math.isfinite(x.value)}
    bars = page.Text(f"No way has a {first}: nothing that was written could be read.")
    if known:
        bars = page.Figure(plots.bars_with_intervals(known, x_label=first))
    return page.Page(
        f"{task.name}: ways to fine-tune",
        (
            page.Section("Side by side", (table(found), bars)),
            page.Section(
                "Learned, and by heart",
                (
                    page.Figure(plots.curves(losses | smooth, y_label=LOSS)),
                    page.Text(
                        " ".join(crossed) or "No way passes another in held-out loss after being below it."
                    ),
                ),
            ),
        ),
    )


def _means(series: Sequence[tuple[int, float]], n: int) -> list[tuple[int, float]]:
    """Means over n stretches, each at its last step."""
    size = max(1, len(series) // max(1, n))
    parts = [series[i : i + size] for i in range(0, len(series), size)]
    return [(part[-1][0], sum(x for _, x in part) / len(part)) for part in parts]
