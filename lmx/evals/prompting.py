"""How much a score depends on the prompt, and a search for a better one that does not flatter itself.

    found = sensitivity(trained("model.gguf"), sst2(folder), ks=(0, 2, 4), templates=[other], limit=100)
    print(found.table().text())

Which examples are shown, in which order and in which words moves a score by tens of points (Zhao et al. 2021,
arXiv:2102.09690; Lu et al. 2022, arXiv:2104.08786; Sclar et al. 2024, arXiv:2310.11324), so that a single prompt's
score tells little of a model. The search is successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all
candidates are scored on a few examples, the better half on more, and so on. Examples to show and examples to choose by
are two halves of the training records, and the winner meets the test once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lmx.artifact import hash_text
from lmx.data.store import explained
from lmx.data.tally import Report
from lmx.evals.likelihood import Seen
from lmx.evals.nearest import Nearest
from lmx.evals.tasks import TaskResult, judge, saved, shown
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.tasks import (
    Choices,
    Example,
    Number,
    Outcome,
    Records,
    Shots,
    Task,
    Template,
    average,
    difference,
    drawn,
    key_of,
    measure,
    overlap,
)
from lmx.tree import nodes

if TYPE_CHECKING:
    from lmx.run import Trained

LESS = ("mean_error", "calibration_error")
"""Values of which less is better."""


@dataclass(frozen=True)
class Prompted:
    """What came of one prompt. template: its number. k: examples it shows. seed: of their choice. order: of their
    order. The others as `TaskResult` has them."""

    template: int
    k: int
    seed: int
    order: int
    outcomes: tuple[Outcome, ...]
    shared_tokens: int
    saved_tokens: int
    saved_seconds: float
    seconds: float


@dataclass(frozen=True)
class Sensitivity:
    """Prompts of one task, judged on the same examples. metric: what is compared."""

    task: Task
    templates: tuple[Template, ...]
    metric: str
    prompts: tuple[Prompted, ...]
    resamples: int = 1000

    def groups(self) -> dict[tuple[int, int], tuple[Interval, list[float]]]:
        """(template, k) -> (mean over prompts, with its 95 % interval over examples; the value of each prompt)."""
        kept = _common([x.outcomes for x in self.prompts])
        found: dict[tuple[int, int], list] = {}
        for x, outcomes in zip(self.prompts, kept):
            found.setdefault((x.template, x.k), []).append(outcomes)
        return {
            key: (
                average(self.task.metrics, several, self.resamples)[self.metric],
                [_value(self.task, self.metric, outcomes) for outcomes in several],
            )
            for key, several in found.items()
        }

    def table(self) -> Table:
        """A row for each template and number of shots: the mean over prompts with its interval over examples, the
        standard deviation between prompts, that between orders of the same shots, the lowest and the highest."""
        rows = []
        for (template, k), (mean, values) in self.groups().items():
            here = [x for x in self.prompts if (x.template, x.k) == (template, k)]
            by_seed: dict[int, list[float]] = {}
            for x, value in zip(here, values):
                by_seed.setdefault(x.seed, []).append(value)
            of_order = [np.var(v, ddof=1) for v in by_seed.values() if len(v) > 1]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            order = float(np.sqrt(np.mean(of_order))) if of_order else None
            rows.append((self.label(template), k, len(values), mean, spread, order, min(values), max(values)))
        n, most = (f(len(x.outcomes) for x in self.prompts) for f in (min, max))
        told = f"{self.task.name}: {len(self.prompts):,} prompts on the same {n:,} examples"
        told += f" ({most - n:,} that not all prompts leave room for are left out)" if most > n else ""
        told += f", {sum(x.seconds for x in self.prompts):.0f} s"
        if tokens := sum(x.saved_tokens for x in self.prompts):
            told += f"; {saved(tokens, sum(x.saved_seconds for x in self.prompts))}"
        names = (
            "template",
            "shots",
            "prompts",
            self.metric,
            "sd of prompts",
            "sd of orders",
            "lowest",
            "highest",
        )
        return Table(names, tuple(rows), told)

    def label(self, template: int) -> str:
        """A template's question in one line."""
        text = self.templates[template].question + self.templates[template].answer
        return f"{template}: {text}".replace("\n", "⏎")

    def plot(self) -> str:
        """The value against the number of shots as SVG: a dot for each prompt, the mean with its interval."""
        from lmx.report import plots

        series: dict[str, dict[int, tuple[Interval, list[float]]]] = {}
        for (template, k), found in self.groups().items():
            series.setdefault(self.label(template)[:40], {})[k] = found
        return plots.spread(series, x_label="shots", y_label=self.metric)

    def save(self, path: str | Path) -> None:
        """Writes a prompt a line, as JSON."""
        rows = (json.dumps(asdict(x), ensure_ascii=False) + "\n" for x in self.prompts)
        Path(path).write_text("".join(rows), encoding="utf-8")


def sensitivity(
    model: Trained,
    task: Task,
    ks: Sequence[int] = (0, 1, 2, 4, 8),
    templates: Sequence[Template] = (),
    *,
    seeds: int = 3,
    orders: int = 3,
    pick: str = "random",
    limit: int | None = None,
    seed: int = 0,
    metric: str | None = None,
    out: str | Path | None = None,
    resamples: int = 1000,
    seen: Seen = lambda done, of: None,
    **how: Any,
) -> Sensitivity:
    """The task's score for each number of shots, template, choice of shots and order of them, on the same examples.

    Prompts that show the same are one: without shots there is one for each template, with one shot `seeds`.
    Args:
      templates: other ones than the task's, which is the first.
      seeds: choices of shots, as `pick` has it. orders: of each choice.
      limit, seed: the examples, as `score` draws them.
      metric: a value of the task's metrics; the first one if not given.
      out: a file of JSON lines that grows with every prompt; what it holds of this model, task and settings is not done
        again.
      seen: called with the prompts that are done, and with all.
      how: chat, per, calibrate, votes, temperature, batch_tokens as `score` has them.
    Raises: ValueError for numbers below what means anything, an unknown metric, or a damaged file; as `score`.
    """
    for name, value in {"seeds": seeds, "orders": orders}.items():
        if value < 1:
            raise ValueError(f"sensitivity: {name}={value}; use 1 or more")
    if not ks or len(set(ks)) < len(ks):
        raise ValueError(f"sensitivity: ks={tuple(ks)}; give different numbers of shots, such as (0, 1, 4)")
    done = _Done(out)
    all_templates = (task.template, *(x for x in templates if x != task.template))
    plan = {}
    for number, template in enumerate(all_templates):
        here = replace(task, template=template)
        report = Report()
        examples = drawn(list(here.examples("test", report)), limit, seed)
        train = list(here.examples("train", report)) if any(ks) else []
        if not number:
            report.warn(task.name)
            overlap(train, examples, task.name)
        for k, s, order in itertools.product(ks, range(seeds), range(orders)):
            some = shown(model, here, Shots(k, pick, s, order), train, examples)
            plan.setdefault((number, k, some[0]), (here, examples, some, s, order))
    metric = metric_of(task, metric)
    ready = model.for_decoding()
    key = _key(model, how, seed)
    found = []
    for (number, k, _), (here, examples, some, s, order) in plan.items():
        make = functools.partial(_judged, ready, here, examples, some, seed, how)
        found.append(Prompted(number, k, s, order, **done.get(key(here, examples, some), make)))
        seen(len(found), len(plan))
    return Sensitivity(task, all_templates, metric, tuple(found), resamples)


@dataclass(frozen=True)
class Trial:
    """A candidate of a search. outcomes: of the training examples it was scored on."""

    task: Task
    shots: Shots | Nearest
    outcomes: tuple[Outcome, ...]
    value: float


@dataclass(frozen=True)
class Found:
    """What a search came to.

    task, shots: the winner; `score(model, task, shots)` is its prompt. searched: its value during the search, on
    examples it was chosen by, with what that flatters. held_out, baseline: the winner and the first candidate on the
    test. difference: winner minus baseline, paired by example, with 95 % intervals. trials: best first. spent: scored
    examples, the test not counted, of budget.
    """

    task: Task
    shots: Shots | Nearest
    metric: str
    searched: Interval
    held_out: TaskResult
    baseline: TaskResult
    difference: dict[str, Interval]
    trials: tuple[Trial, ...]
    spent: int
    budget: int

    def table(self) -> Table:
        """The winner during the search and on the test, beside the baseline."""
        told = (
            f"{self.task.name}: the best of {len(self.trials)} prompts, chosen with {self.spent:,} scored training "
            f"examples of a budget of {self.budget:,}; then the test, twice {len(self.held_out.outcomes):,}"
        )
        rows = (
            ("winner, on the examples it was chosen by", self.searched),
            ("winner, held out", self.held_out.metrics[self.metric]),
            ("unsearched, held out", self.baseline.metrics[self.metric]),
            ("winner - unsearched, paired", self.difference[self.metric]),
        )
        return Table(("", self.metric), rows, told)

    def candidates(self) -> Table:
        """Every candidate, and how it did on how many examples."""
        rows = tuple(
            (
                x.task.instruction,
                x.task.template.question + x.task.template.answer,
                repr(x.shots),
                len(x.outcomes),
                x.value,
            )
            for x in self.trials
        )
        return Table(("instruction", "template", "shots", "examples", self.metric), rows)


def search(
    model: Trained,
    task: Task,
    *,
    budget: int,
    instructions: Sequence[str] = (),
    templates: Sequence[Template] = (),
    shots: Sequence[Shots | Nearest] = (Shots(),),
    limit: int | None = None,
    seed: int = 0,
    metric: str | None = None,
    out: str | Path | None = None,
    resamples: int = 1000,
    seen: Seen = lambda done, of: None,
    **how: Any,
) -> Found:
    """The best prompt among all instructions x templates x shots, by successive halving.

    Of n candidates each round keeps the better half, rounded up, so that there are R = ceil(log2 n) rounds; each scores
    floor(budget / (R candidates)) more training examples, the same for all, and goes by all that were scored so far.
    Training questions are parted in two halves by `seed`: from one come the shots, on the other prompts are scored; a
    question that stands in the test is in neither.

    Args:
      budget: examples that are scored in all, a prompt each time. The test is not counted: the winner and the
        unsearched baseline are judged on it once.
      instructions, templates: others than the task's. shots: of the first half. The baseline is the task as it is,
        with the first of them.
      limit, seed: the test examples, as `score` draws them.
      metric: a value of the task's metrics; the first one if not given.
      out, seen, how: as `sensitivity`; seen is called with scored examples.
    Raises: ValueError if there is one candidate, a budget too small for it, or a prompt that is longer than the model's
      positions; as `score`.
    """
    metric = metric_of(task, metric)
    done = _Done(out)
    tasks = [
        replace(task, instruction=instruction, template=template)
        for instruction in dict.fromkeys((task.instruction, *instructions))
        for template in dict.fromkeys((task.template, *templates))
    ]
    candidates = [(one, some) for one in tasks for some in dict.fromkeys(shots)]
    rounds = math.ceil(math.log2(len(candidates))) if candidates else 0
    if not rounds:
        raise ValueError(
            "search: one candidate leaves nothing to search; give instructions, templates or shots"
        )
    if budget < rounds * len(candidates):
        raise ValueError(
            f"search: budget={budget} for {len(candidates)} candidates in {rounds} rounds; give "
            f"{rounds * len(candidates):,} or more, or fewer candidates"
        )
    halves = _halves(task, seed)
    train = {one.template: {x.where: x for x in one.examples("train")} for one in tasks}
    usable = set.intersection(*map(set, train.values()))
    parts = {
        template: [[by_place[where] for where in half if where in usable] for half in halves]
        for template, by_place in train.items()
    }
    n = len(parts[task.template][1])
    ready = model.for_decoding()
    key = _key(model, how, seed)

    @functools.cache
    def before(template: Template, some: Shots | Nearest) -> list[tuple[Example, ...]]:
        pool, chosen = parts[template]
        return shown(ready, replace(task, template=template), some, pool, chosen[: min(n, budget // rounds)])

    for one, some in candidates:  # too many shots are told before anything is scored
        before(one.template, some)

    def judged(one: Task, some: Shots | Nearest, start: int, stop: int) -> tuple[Outcome, ...]:
        examples, their = parts[one.template][1][start:stop], before(one.template, some)[start:stop]
        make = functools.partial(_judged, ready, one, examples, their, seed, how)
        got = done.get(key(one, examples, their), make)
        if len(got["outcomes"]) < len(examples):
            raise ValueError(
                f"search: {len(examples) - len(got['outcomes'])} of {len(examples)} examples do not fit the model's "
                f"positions with instruction {one.instruction!r:.40} and {some}; show fewer or shorter examples"
            )
        return got["outcomes"]

    outcomes: list[tuple[Outcome, ...]] = [()] * len(candidates)
    values = [math.nan] * len(candidates)
    alive, ranked, used, spent = list(range(len(candidates))), [], 0, 0
    for _ in range(rounds):
        more = min(budget // (rounds * len(alive)), n - used)
        for i in alive if more else ():
            outcomes[i] += judged(*candidates[i], used, used + more)
            values[i] = _value(task, metric, outcomes[i])
            spent += more
            seen(spent, budget)
        used += more
        alive.sort(key=lambda i: _rank(metric, values[i]))
        ranked = alive[-(-len(alive) // 2) :] + ranked
        alive = alive[: -(-len(alive) // 2)]
    ranked = alive + ranked

    def on_the_test(i: int) -> TaskResult:
        one, some = candidates[i]
        examples = drawn(list(one.examples("test")), limit, seed)
        their = shown(ready, one, some, parts[one.template][0], examples)
        return judge(ready, one, examples, their, seed=seed, resamples=resamples, **how)

    best, first = on_the_test(alive[0]), on_the_test(0)
    pair = _common([best.outcomes, first.outcomes])
    winner, its_shots = candidates[alive[0]]
    winner, its_shots = _alone(ready, winner, its_shots, parts[winner.template][0])
    return Found(
        task=winner,
        shots=its_shots,
        metric=metric,
        searched=measure(task.metrics, outcomes[alive[0]], resamples)[metric],
        held_out=best,
        baseline=first,
        difference=difference(task.metrics, *pair, resamples),
        trials=tuple(Trial(*candidates[i], outcomes[i], values[i]) for i in ranked),
        spent=spent,
        budget=budget,
    )


def fingerprint(model: Trained) -> str:
    """The same for models that answer alike: of weights, configuration, tokenizer and chat template."""
    total = hashlib.sha256(
        repr(
            (model.model.config, model.tokenizer.hash, model.chat and model.chat.source, model.context)
        ).encode()
    )
    for path, x in nodes(model.params).items():
        x = np.ascontiguousarray(jax.device_get(x))
        total.update(f"{path} {x.dtype} {x.shape}".encode() + x.tobytes())
    return total.hexdigest()


class _Done:
    """What was judged, by key; kept in a file of JSON lines if there is a path."""

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        self._rows: dict[str, dict] = {}
        if self._path is None:
            return
        with explained(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            raw = self._path.read_bytes() if self._path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]  # what follows was being written when the process ended
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                outcomes = (Outcome(**x | {"references": tuple(x["references"])}) for x in row["outcomes"])
                key = row.pop("key")
                self._rows[key] = row | {"outcomes": tuple(outcomes)}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self._path}:{number} is no line of this command ({error}); name another file, or delete this one"
                ) from None
        if len(whole) < len(raw):
            self._path.write_bytes(whole)

    def get(self, key: str, make: Callable[[], dict]) -> dict:
        if key not in self._rows:
            row = self._rows[key] = make()
            if self._path is not None:
                plain = {"key": key, **row, "outcomes": [vars(x) for x in row["outcomes"]]}
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(plain, ensure_ascii=False) + "\n")
        return self._rows[key]


def _key(model: Trained, how: dict, seed: int) -> Callable[..., str]:
    """(task, examples, what is shown before each) -> what identifies their outcomes."""
    of_model = fingerprint(model)

    def key(task: Task, examples: Sequence[Example], some: Sequence[tuple[Example, ...]]) -> str:
        asked = (task.instruction, task.template, task.answer, sorted(how.items()), seed)
        return hash_text(
            repr((of_model, asked, examples, list(dict.fromkeys(some)) if len(set(some)) == 1 else some))
        )

    return key


def _judged(model: Trained, task: Task, examples, some, seed: int, how: dict) -> dict:
    """What is kept of a `judge`, by name."""
    found = judge(model, task, examples, some, seed=seed, resamples=0, **how)
    names = ("outcomes", "shared_tokens", "saved_tokens", "saved_seconds", "seconds")
    return {name: getattr(found, name) for name in names}


def _halves(task: Task, seed: int) -> tuple[list[str], list[str]]:
    """Places of training examples, in a random order: those to show and those to score. A question stands in one half.

    Raises: ValueError if one has none.
    """
    report = Report()
    tested = {key_of(x.question) for x in task.examples("test")}
    places: dict[bytes, list[str]] = {}
    for x in task.examples("train", report):
        if (key := key_of(x.question)) in tested:
            report.skip("in_the_test", x.where)
        else:
            places.setdefault(key, []).append(x.where)
    report.warn(task.name)
    groups = list(places.values())
    mixed = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    halves = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
    if not all(halves):
        raise ValueError(
            f"search: {task.name} has {len(groups)} different training questions; it needs 2 or more"
        )
    return tuple([where for group in half for where in group] for half in halves)


def _alone(
    model: Trained, task: Task, shots: Shots | Nearest, pool: Sequence[Example]
) -> tuple[Task, Shots | Nearest]:
    """The same prompt, of a task whose training records are no more than it needs."""
    nearest = isinstance(shots, Nearest)
    some = pool if nearest else shown(model, task, shots, pool, pool[:1])[0]
    if not some:
        return task, Shots()
    names = dict.fromkeys((*task.template.fields, task.template.target))
    rows = dict(task.train.rows(names))
    task = replace(task, train=Records([rows[x.where] for x in some]))
    return task, shots if nearest else Shots(len(some), "first")


def metric_of(task: Task, name: str | None) -> str:
    """A value of the task's metrics, by its name; the first one if none is given.

    Raises: ValueError for a name that the task's metrics do not give.
    """
    said = "x"
    if isinstance(task.answer, Choices):
        said = next(iter(task.answer.labels))
    elif isinstance(task.answer, Number):
        said = str(task.answer.low)
    known = list(measure(task.metrics, [Outcome("", (said,), said, {said: 1.0})], 0))
    if name not in (None, *known):
        raise ValueError(f"metric={name!r}: {task.name} is judged by {', '.join(known)}")
    return name or known[0]


def _value(task: Task, metric: str, outcomes: Sequence[Outcome]) -> float:
    return measure(task.metrics, outcomes, 0)[metric].value


def _rank(metric: str, value: float) -> float:
    """Less is better; what has no value is the last."""
    return math.inf if math.isnan(value) else value if metric in LESS else -value


def _common(systems: Sequence[Sequence[Outcome]]) -> list[list[Outcome]]:
    """Of each, the outcomes of those examples that all have."""
    shared = set.intersection(*({x.where for x in outcomes} for outcomes in systems))
    return [[x for x in outcomes if x.where in shared] for outcomes in systems]
