"""Prompts: what a model sees, how well it answers, how much that depends on the prompt, and a search for a better one.

  lmx prompt try MODEL fruit --shots 4                 a prompt, its exact tokens, the model's answer
  lmx prompt try MODEL fruit --shots 4 --chat          the same through the model's chat template
  lmx prompt score MODEL sst2 --data FOLDER --shots 8 --pick balanced --limit 200 --calibrate
  lmx prompt score MODEL sst2 --data FOLDER --shots 4 --pick nearest      for each question its own examples
  lmx prompt sweep MODEL sst2 --data FOLDER --shots 0 1 4 --limit 100     shots x seeds x orders: mean and spread
  lmx prompt search MODEL fruit --budget 600 --instructions "Name the kind of fruit." --shots 0 4

Tasks by name: fruit, sst2, summarization, translation-hi-en and other pairs; all but fruit read --data FOLDER. One of
your own is two files of records (CSV, TSV, JSONL, Parquet) and a template with their fields:

  lmx prompt score MODEL --test dev.csv --train train.csv --template "{text}\\nMood:" --labels 0=bad,1=good --shots 4

The answer goes on with " {label}", or with --answer " {field}". Without --labels it is free text, with --number LOW
HIGH a number. Sweep and search keep what they have done in --out: repeat the command to go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lmx import cli
from lmx.cli.task import OfTask, escaped, task_of, with_question

if TYPE_CHECKING:
    from lmx.evals import Nearest
    from lmx.report.page import Page
    from lmx.run import Trained
    from lmx.tasks import Shots, Task

DONE = "prompts.jsonl"


@dataclass(frozen=True)
class Asked(OfTask):
    """What all verbs share."""

    pick: Literal["random", "balanced", "first", "nearest"] = "random"
    """Which shots: by seed, as many of each label, as they stand, or for each question those nearest to it."""
    seed: int = 0
    """Of shots, of the examples of --limit, of votes."""
    limit: int | None = None
    """Judges that many test examples, drawn by the seed."""
    chat: bool = False
    """Asks in messages, through the model's chat template."""
    per: Literal["answer", "token", "byte"] = "answer"
    """What the log likelihood of a choice is divided by."""
    calibrate: bool = False
    """Weighs choices against what the model thinks of them before it knows the question."""
    votes: int = 0
    """Draws that many answers of text or numbers and takes the most frequent one; 0 writes one greedily."""
    temperature: float = 0.7
    """Of votes."""
    bootstrap: int = 1000
    """Resamples for the intervals."""
    batch_tokens: int = 2048
    """Read at once."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of a run's parameters."""
    source: Path | None = None
    """The experiment that defines the run's own classes; it is executed."""


@dataclass(frozen=True)
class Score(Asked):
    """Judges one prompt on the test records."""

    shots: int | None = None
    """Examples to show; none if not given, or as many as --shot-tokens has room for."""
    shot_tokens: int | None = None
    """Tokens that shots may take."""
    order: int | None = None
    """Seed of the order of the shots; that of the pick if not given."""
    out: Path | None = None
    """A .jsonl file for the answers, an example a line."""


@dataclass(frozen=True)
class Try(Asked):
    """Shows a prompt for one test example, its tokens, and what the model makes of it."""

    shots: int | None = None
    """Examples to show; none if not given, or as many as --shot-tokens has room for."""
    shot_tokens: int | None = None
    """Tokens that shots may take."""
    order: int | None = None
    """Seed of the order of the shots; that of the pick if not given."""
    example: int = 1
    """Number of the test example, from 1."""


@dataclass(frozen=True)
class Sweep(Asked):
    """Judges prompts on the same examples: shots x templates x seeds x orders."""

    shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Numbers of examples to show."""
    templates: tuple[str, ...] = ()
    """More templates, of the same fields."""
    seeds: int = 3
    """Choices of shots."""
    orders: int = 3
    """Orders of each choice."""
    metric: str | None = None
    """What is compared; the task's first if not given."""
    out: Path | None = None
    """Folder for the report, and for what is done; runs/prompts/TASK if not given."""


@dataclass(frozen=True)
class Search(Asked):
    """Looks for a better instruction, template and shots on training records; the winner is judged once on the test."""

    budget: int = 500
    """Examples that are scored in all; the test, which is read twice, is not counted."""
    instructions: tuple[str, ...] = ()
    """Others than --instruction."""
    templates: tuple[str, ...] = ()
    """Others than the task's."""
    shots: tuple[int, ...] = (0, 4)
    """Numbers of examples to show; the first is the baseline's."""
    seeds: int = 3
    """Choices of each number of shots."""
    metric: str | None = None
    """What is compared; the task's first if not given."""
    out: Path | None = None
    """Folder for the report, and for what is done; runs/prompts/TASK if not given."""


Options = (
    Annotated[Try, tyro.conf.subcommand("try")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Search, tyro.conf.subcommand("search")]
)


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "prompt")
    task = task_of(asked)
    verb = {Try: try_, Score: score, Sweep: sweep, Search: search}[type(asked)]
    from lmx.run import experiment, trained
    from lmx.train.loop import keep_compiled

    if asked.source is not None:
        experiment(asked.source)
    step = cli.step_of(asked.model, asked.step)
    keep_compiled()
    verb(asked, task, trained(asked.model, step, asked.ema))


def try_(asked: Try, task: Task, model: Trained) -> None:
    from itertools import islice

    from lmx.evals.tasks import judge, shown
    from lmx.generate import Sampling, generate
    from lmx.report.table import Table
    from lmx.tasks import (
        Choices,
        alternatives,
        ids_of,
        named_tokens,
        prompt_messages,
        prompt_parts,
        prompt_text,
    )

    if asked.example < 1:
        raise ValueError(f"--example {asked.example}: they are counted from 1")
    example = next(islice(task.examples(), asked.example - 1, None), None)
    if example is None:
        raise ValueError(f"--example {asked.example}: {task.name} has {sum(1 for _ in task.examples()):,}")
    model, shots = model.for_decoding(), _shots(asked)
    train = list(task.examples("train")) if shots is not None else []
    some = shown(model, task, shots, train, [example])[0] if train else ()
    chat, tokenizer = model.chat if asked.chat else None, model.tokenizer
    prompt = (prompt_messages if asked.chat else prompt_text)(task, example.question, some)
    found = judge(model, task, [example], [some], **_how(asked), seed=asked.seed, resamples=0).outcomes[0]
    choices, head = isinstance(task.answer, Choices), "classes" in model.params
    ids = ids_of(tokenizer, prompt, chat)
    parts = prompt_parts(task, example.question, some, chat)
    print("".join(text for _, text in parts), end="\n\n")
    rows = [(at, *token) for at, token in enumerate(named_tokens(tokenizer, ids, parts, chat))]
    if not any(row[-1] for row in rows):
        rows = [(*row[:-1], None) for row in rows]
    told = f"{len(ids):,} tokens that the model sees, of example {asked.example} ({example.where})"
    print(Table(("position", "id", "piece", "part"), tuple(rows), told).text(), end="\n\n")
    if choices:
        words = [task.template.answer_of(w) for w in task.answer.labels.values()]
        answers = []
        for (label, p), one in zip(found.probabilities.items(), alternatives(tokenizer, prompt, words, chat)):
            tokens = [] if head else named_tokens(tokenizer, one.ids[one.start :], ())
            right = label in example.references
            answers.append((label, " ".join(f"{t.piece} ({t.id})" for t in tokens), p, right))
        print(Table(("choice", "tokens", "probability", "right"), tuple(answers)).text(), end="\n\n")
    if head:
        print(f"answer of the head of classes: {found.prediction}   right: {' | '.join(example.references)}")
        return
    most = 16 if choices else task.answer.max_tokens
    rule = Sampling(temperature=0.0, max_tokens=most, stop=() if choices else task.answer.stop)
    (written,) = generate(model.model, model.params, tokenizer, [ids], rule)
    print(f"written greedily: {written.text!r}")
    print(f"answer: {found.prediction}   right: {' | '.join(example.references)}")


def score(asked: Score, task: Task, model: Trained) -> None:
    from lmx.cli.progress import Steps
    from lmx.data.store import explained
    from lmx.evals import score as judged
    from lmx.tasks import Shots

    if asked.out is not None:
        with explained(asked.out):
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.touch()
    with Steps("prompts") as progress:
        result = judged(
            model,
            task,
            _shots(asked) or Shots(),
            limit=asked.limit,
            seed=asked.seed,
            resamples=asked.bootstrap,
            seen=progress,
            **_how(asked),
        )
    print(result.table().text())
    for name, signature in result.signatures.items():
        print(f"{name}: {signature}")
    if asked.out is not None:
        result.save(asked.out)
        print(f"wrote {asked.out}")


def sweep(asked: Sweep, task: Task, model: Trained) -> None:
    from lmx.cli.progress import Steps
    from lmx.evals import sensitivity
    from lmx.report.page import Figure, Page, Section

    if asked.pick == "nearest":
        raise ValueError(
            "--pick nearest has one choice of shots for a question; sweep random or balanced ones"
        )
    folder = _folder(asked, task)
    with _kept(folder), Steps("prompts") as progress:
        found = sensitivity(
            model,
            task,
            asked.shots,
            [with_question(task.template, text) for text in asked.templates],
            seeds=asked.seeds,
            orders=asked.orders,
            pick=asked.pick,
            limit=asked.limit,
            seed=asked.seed,
            metric=asked.metric,
            out=folder / DONE,
            resamples=asked.bootstrap,
            seen=progress,
            **_how(asked),
        )
    print(found.table().text())
    svg = found.plot()
    (folder / "prompts.svg").write_text(svg, encoding="utf-8")
    caption = "A dot for each prompt; the line joins their means, with 95 % intervals over the examples."
    sections = (
        Section("Score by shots", (Figure(svg, caption),)),
        Section("Every kind of prompt", (found.table(),)),
    )
    _write(folder, Page(f"{task.name}: how much the prompt decides", sections, _told(asked)))


def search(asked: Search, task: Task, model: Trained) -> None:
    from lmx.cli.progress import Steps
    from lmx.evals import Nearest
    from lmx.evals import search as searched
    from lmx.report.page import Code, Page, Section
    from lmx.tasks import Shots, prompt_text

    folder = _folder(asked, task)
    shots: list[Shots | Nearest] = []
    for k in asked.shots:
        if k and asked.pick == "nearest":
            shots.append(Nearest(k))
        else:
            fixed = k == 0 or asked.pick == "first"
            seeds = range(asked.seed, asked.seed + (1 if fixed else asked.seeds))
            shots += [Shots(k, "random" if k == 0 else asked.pick, seed) for seed in seeds]
    with _kept(folder), Steps("scored examples") as progress:
        found = searched(
            model,
            task,
            budget=asked.budget,
            instructions=[escaped(text) for text in asked.instructions],
            templates=[with_question(task.template, text) for text in asked.templates],
            shots=shots,
            limit=asked.limit,
            seed=asked.seed,
            metric=asked.metric,
            out=folder / DONE,
            resamples=asked.bootstrap,
            seen=progress,
            **_how(asked),
        )
    rebuilt = f"task = {found.task!r}\nshots = {found.shots!r}\n"
    print(found.table().text())
    print(
        f"\ninstruction {found.task.instruction!r}, template {found.task.template.question!r}, {found.shots}"
    )
    (folder / "winner.txt").write_text(rebuilt, encoding="utf-8")
    said = [found.table(), Code(rebuilt)]
    if isinstance(found.shots, Shots):
        example = next(found.task.examples())
        some = found.shots(found.task.examples("train")) if found.shots.k else ()
        said.insert(1, Code(prompt_text(found.task, example.question, some)))
    sections = (Section("Winner", tuple(said)), Section("Candidates", (found.candidates(),)))
    _write(folder, Page(f"{task.name}: a search for a prompt", sections, _told(asked)))


def _shots(asked: Score | Try) -> Shots | Nearest | None:
    """Raises: ValueError for settings that do not go together."""
    from lmx.evals import Nearest
    from lmx.tasks import Shots

    k = (0 if asked.shot_tokens is None else None) if asked.shots is None else asked.shots
    if k == 0:
        return None
    if asked.pick != "nearest":
        return Shots(k, asked.pick, asked.seed, asked.order, asked.shot_tokens)
    if asked.order is not None or asked.shot_tokens is not None:
        raise ValueError("--pick nearest takes --shots in its own order; leave --order and --shot-tokens out")
    return Nearest(k)


def _how(asked: Asked) -> dict[str, Any]:
    names = ("chat", "per", "calibrate", "votes", "temperature", "batch_tokens")
    return {name: getattr(asked, name) for name in names}


def _folder(asked: Sweep | Search, task: Task) -> Path:
    from lmx.data.store import explained

    folder = asked.out or Path("runs", "prompts", task.name)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """One process at a time; one that is stopped says how to go on."""
    from lmx import artifact

    with artifact.alone(folder / ".lock"):
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{folder / DONE} has what is done; repeat the command to go on"
            ) from None


def _told(asked: Sweep | Search) -> str:
    how = [name if value is True else f"{name} {value}" for name, value in _how(asked).items() if value]
    return f"{asked.model}, shots picked {asked.pick}, seed {asked.seed}, {', '.join(how)}"


def _write(folder: Path, page: Page) -> None:
    from lmx.cli.report import write

    write(folder / "report.html", page.html())
    print(f"report {folder / 'report.html'}")
