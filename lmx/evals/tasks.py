"""A model judged on a task: what it answers to every example, how good that is, and what it cost.

    result = score(trained("model.gguf"), sst2(folder), Shots(4, pick="balanced"), limit=200)
    print(result.table().text())

Choices are not written but weighed: of a choice's tokens a_1 .. a_n after the prompt,

    log p(choice) = sum_i log p(a_i | prompt, a_1 .. a_{i-1})

or that per token or per byte, which does not prefer short ones (Gao 2021, "Multiple choice normalization in LM
evaluation"). Calibrated, the log of a choice's mean probability after questions without content is taken off (Zhao et
al. 2021, arXiv:2102.09690). What all prompts begin with is read once. Text and numbers are written greedily, or several
times and voted on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import numpy as np

from lmx.data.tally import Report
from lmx.evals.likelihood import KEPT, ONE, Seen, log_likelihoods
from lmx.evals.nearest import Nearest
from lmx.generate import Sampling, completions
from lmx.generate.rows import Decoder, Known
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.tasks import (
    Answers,
    Choices,
    Encoded,
    Example,
    Number,
    Outcome,
    Prompt,
    Score,
    Shots,
    Task,
    alternatives,
    drawn,
    ids_of,
    measure,
    overlap,
    prompt_messages,
    prompt_text,
)
from lmx.tasks.metrics import plain
from lmx.weights import shape_of

if TYPE_CHECKING:
    from lmx.run import Trained

EMPTY = ("N/A", "[MASK]", "")
"""Questions without content (Zhao et al. 2021, section 5)."""


@dataclass(frozen=True)
class TaskResult:
    """metrics: with 95 % intervals over examples. outcomes: of each example, in order. signatures: of metrics that have
    one. prompt_tokens: of all prompts and choices; shared_tokens: of those, the first ones of each that were read once
    for all; saved_tokens: that all rows but one would have read again; saved_seconds: what that would have taken, one
    row after another, at the speed at which the shared ones were read; a batch may read faster. drawn_tokens: written.
    seconds: from the first encoded prompt to the last answer, compilation included. report: what was passed over."""

    task: str
    metrics: dict[str, Interval]
    outcomes: tuple[Outcome, ...]
    signatures: dict[str, str]
    prompt_tokens: int
    shared_tokens: int
    saved_tokens: int
    saved_seconds: float
    drawn_tokens: int
    seconds: float
    report: Report

    def table(self) -> Table:
        caption = f"{self.task}: {len(self.outcomes):,} examples, {self.prompt_tokens:,} tokens, {self.seconds:.1f} s"
        if self.saved_tokens:
            caption += f"; {saved(self.saved_tokens, self.saved_seconds)}"
        return Table(("metric", "value"), tuple(self.metrics.items()), caption)

    def save(self, path: str | Path) -> None:
        """Writes an outcome a line, as JSON."""
        rows = (json.dumps(vars(x), ensure_ascii=False) + "\n" for x in self.outcomes)
        Path(path).write_text("".join(rows), encoding="utf-8")


def score(
    model: Trained,
    task: Task,
    shots: Shots | Nearest | Callable = Shots(),
    *,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    per: Literal["answer", "token", "byte"] = "answer",
    calibrate: bool = False,
    votes: int = 0,
    temperature: float = 0.7,
    batch_tokens: int = 2048,
    resamples: int = 1000,
    seen: Seen = lambda done, of: None,
) -> TaskResult:
    """How well the model does the task. One with a head of classes (`lmx.adapt.Classes`) answers by it.

    Args:
      shots: which training examples it is shown. With `Nearest` every question has its own: the training questions are
        read once more to find them, and prompts share only what stands before the examples.
      limit: that many examples, drawn by `seed`; None is all.
      chat: ask in messages through the model's chat template rather than in plain text.
      per: what the log likelihood of a choice is divided by.
      calibrate: weigh choices against what the model thinks of them before it knows the question, after the same
        examples; with `Nearest` that is four prompts in place of one.
      votes: so many answers are drawn at `temperature` for each example, and the most frequent one that can be read
        counts (Wang et al. 2022, arXiv:2203.11171), the first drawn of equally frequent ones; 0 writes one greedily.
      batch_tokens: read at once, padding included.
      seen: called with the prompts that are done, and with all.
    Examples longer than the model's positions are counted and left out; those longer than it was made to read are
    counted. Warns where test questions are among the training examples.
    Raises: ValueError for options that do not suit the task, or if no example is left; as `Task.examples`.
    """
    report = Report()
    examples = drawn(list(task.examples("test", report)), limit, seed)
    train = list(task.examples("train", report)) if shots != Shots() else []
    if train:
        overlap(train, examples, task.name)
    model = model.for_decoding()
    return judge(
        model,
        task,
        examples,
        shown(model, task, shots, train, examples, batch_tokens),
        report,
        seed=seed,
        chat=chat,
        per=per,
        calibrate=calibrate,
        votes=votes,
        temperature=temperature,
        batch_tokens=batch_tokens,
        resamples=resamples,
        seen=seen,
    )


def shown(
    model: Trained,
    task: Task,
    shots: Shots | Nearest | Callable,
    train: Sequence[Example],
    examples: Sequence[Example],
    batch_tokens: int = 2048,
) -> list[tuple[Example, ...]]:
    """The training examples that stand before each example. Raises: ValueError, as `shots`."""
    if isinstance(shots, Nearest):
        return shots(model, train, [x.question for x in examples], batch_tokens=batch_tokens)
    tokenizer, between = model.tokenizer, task.template.between
    some = shots(train, lambda x: len(tokenizer.encode(x.question + x.answer + between)))
    return [tuple(some)] * len(examples)


def judge(
    model: Trained,
    task: Task,
    examples: Sequence[Example],
    shown: Sequence[tuple[Example, ...]],
    report: Report | None = None,
    *,
    seed: int = 0,
    chat: bool = False,
    per: Literal["answer", "token", "byte"] = "answer",
    calibrate: bool = False,
    votes: int = 0,
    temperature: float = 0.7,
    batch_tokens: int = 2048,
    resamples: int = 1000,
    seen: Seen = lambda done, of: None,
) -> TaskResult:
    """`score` of these very examples, each after those of `shown`, by a model that is ready: `model.for_decoding()`.

    Raises: as `score`.
    """
    report = Report() if report is None else report
    choices = isinstance(task.answer, Choices | Score)
    if isinstance(task.answer, Score) and "classes" not in model.params:
        raise ValueError(f"{task.name}: scores are answered by a head of two classes, and the model has none")
    if calibrate and not choices:
        raise ValueError(
            f"score: calibrate=True weighs choices, and {task.name} has {task.answer}; leave it off"
        )
    if "classes" in model.params:
        _check_head(model, task, chat, per)
        if any(shown):
            raise ValueError(
                "score: a head of classes has learned to read questions alone; leave the examples before them out"
            )
    if per not in _LENGTHS:
        raise ValueError(f"score: per={per!r}; use 'answer', 'token' or 'byte'")
    if votes and choices:
        raise ValueError(
            f"score: votes={votes} are counted of written answers, and the choices of {task.name} are weighed; leave "
            "votes off"
        )
    if votes < 0 or (votes and temperature <= 0):
        raise ValueError(
            f"score: votes={votes}, temperature={temperature}; use 1 vote or more and a temperature above 0, since "
            "greedy answers are all the same"
        )
    begun = time.perf_counter()
    template = model.chat if chat else None

    def prompt(question, some):
        return (prompt_messages if chat else prompt_text)(task, question, some)

    kept, encoded = _encoded(model, task, examples, shown, prompt, template, report)
    if choices:
        contexts = list(dict.fromkeys(some for _, some in kept)) if calibrate else []
        blank = [
            _choices(model, task, prompt(task.empty(x), some), template) for some in contexts for x in EMPTY
        ]
        sums, costs = _weighed(model, batch_tokens, encoded + blank, seen)
        weights = np.array(sums) / _LENGTHS[per](task, encoded + blank)
        if calibrate:
            before = _softmax(weights[len(kept) :]).reshape(len(contexts), len(EMPTY), -1).mean(1)
            number = {some: i for i, some in enumerate(contexts)}
            weights = weights[: len(kept)] - np.log(before)[[number[some] for _, some in kept]]
        outcomes = _chosen(task, [x for x, _ in kept], weights)
    else:
        answers, costs = _written(model, task, batch_tokens, encoded, votes, temperature, seed, seen)
        outcomes = [Outcome(x.where, x.references, *answer) for (x, _), answer in zip(kept, answers)]
    seconds = time.perf_counter() - begun
    report.warn(task.name)
    signed = {type(m).__name__: s for m in task.metrics if (s := m.signature(outcomes))}
    metrics = measure(task.metrics, outcomes, resamples, seed)
    return TaskResult(task.name, metrics, tuple(outcomes), signed, *costs, seconds, report)


def _check_head(model, task: Task, chat: bool, per: str) -> None:
    """Raises: ValueError if the task's answers are not the classes of the model's head."""
    n, labels = shape_of(model.params["classes"])[1], tuple(getattr(task.answer, "labels", ()))
    learned = [x.task.answer.labels for x in model.run.data.train if isinstance(x, Answers) and x.head]
    if learned and tuple(learned[0]) != labels:
        raise ValueError(
            f"{task.name}: the model has a head of the classes {', '.join(learned[0])}, and the task has "
            f"{', '.join(labels) or 'none'}; give the same ones in the same order"
        )
    if len(labels) != n:
        raise ValueError(
            f"{task.name}: the model has a head of {n} classes, and the task {len(labels)} labels"
        )
    if chat or per != "answer":
        raise ValueError(
            "score: a head of classes reads plain text, and has nothing to divide by; leave chat and per"
        )


def saved(tokens: int, seconds: float) -> str:
    """What shared beginnings saved, in words."""
    return f"what prompts begin with was read once: {tokens:,} tokens, about {seconds:.1f} s, not read again"


class _Costs(NamedTuple):
    """As `TaskResult` has them."""

    prompt_tokens: int
    shared_tokens: int
    saved_tokens: int
    saved_seconds: float
    drawn_tokens: int


def _answers(task: Task) -> list[str]:
    return [task.template.answer_of(words) for words in task.answer.labels.values()]


def _choices(model, task: Task, asked: Prompt, chat) -> list[Encoded]:
    """The prompt with each of the choices, which to a head of classes are numbers."""
    if "classes" not in model.params:
        return alternatives(model.tokenizer, asked, _answers(task), chat)
    ids = ids_of(model.tokenizer, asked)
    return [Encoded([*ids, i], len(ids)) for i in range(len(task.answer.labels))]


def _encoded(model, task: Task, examples, shown, prompt, chat, report):
    """((example, what is shown before it) of those that fit, for each its ids; with choices, the ids of all)."""
    limit = model.model.config.position.max_len()
    kept: list[tuple[Example, tuple[Example, ...]]] = []
    found = []
    for example, some in zip(examples, shown, strict=True):
        asked = prompt(example.question, some)
        if isinstance(task.answer, Choices | Score):
            ids = _choices(model, task, asked, chat)
            n = max(len(x.ids) for x in ids)
        else:
            ids = ids_of(model.tokenizer, asked, chat)
            n = len(ids) + task.answer.max_tokens
        if limit is not None and n > limit:
            report.skip("longer_than_positions", f"{example.where}: {n:,} tokens for {limit:,} positions")
            continue
        if n > model.context:
            report.note(
                "longer_than_context", f"{example.where}: {n:,} tokens, and it was made for {model.context:,}"
            )
        kept.append((example, some))
        found.append(ids)
    if not kept:
        raise ValueError(
            f"{task.name}: no example fits the model's {limit:,} positions; show fewer or shorter examples"
        )
    return kept, found


def _weighed(model, batch_tokens, encoded, seen):
    """([examples, choices] log likelihoods, costs)."""
    flat = [x for group in encoded for x in group]
    found = log_likelihoods(
        model.model, model.params, model.tokenizer, flat, batch_tokens=batch_tokens, seen=seen
    )
    ends = accumulate(map(len, encoded), initial=0)
    sums = [[float(x.sum(dtype=np.float64)) for x in found.nats[a:b]] for a, b in pairwise(ends)]
    decoder = Decoder(model.model, model.params, model.tokenizer, ONE)
    again = (found.rows - 1) * found.shared, (found.rows - 1) * _seconds(decoder, flat[0].ids[: found.shared])
    return sums, _Costs(sum(len(x.ids) for x in flat), found.shared, *again, 0)


def _written(model, task, batch_tokens, prompts, votes, temperature, seed, seen):
    """((text, or number if it could be read; shares of votes) of each prompt, costs)."""
    answer, n = task.answer, max(1, votes)
    rule = {"max_tokens": answer.max_tokens, "stop": answer.stop, "pattern": answer.pattern, "seed": seed}
    sampling = Sampling(temperature=temperature if votes else 0.0, **rule)
    prompts = [ids for ids in prompts for _ in range(n)]
    n_rows = max(1, KEPT * batch_tokens // (max(map(len, prompts)) + answer.max_tokens))
    parts = model.model, model.params, model.tokenizer
    done = {}
    for i, completion in completions(*parts, prompts, sampling, batch_size=n_rows):
        done[i] = completion
        seen(len(done), len(prompts))
    texts = [done[i].text.strip() for i in range(len(prompts))]
    texts = [answer.read(text) for text in texts] if isinstance(answer, Number) else texts
    decoder = Decoder(*parts, sampling)
    shared = decoder.shared_length(prompts)
    again = (len(prompts) - 1) * shared, (len(prompts) - 1) * _seconds(decoder, prompts[0][:shared])
    costs = _Costs(sum(map(len, prompts)), shared, *again, sum(len(x.tokens) for x in done.values()))
    if not votes:
        return [(text, {}) for text in texts], costs
    key = float if isinstance(answer, Number) else plain
    return [_most(texts[i : i + n], key) for i in range(0, len(texts), n)], costs


def _most(texts: Sequence[str | None], key: Callable) -> tuple[str | None, dict[str, float]]:
    """(the first text of those that most agree by `key`, the share of all that each has); those that could not be read
    or are empty have no vote, and one of them is the answer only where there is no other."""
    counts: dict = {}
    firsts = {}
    for text in filter(None, texts):
        counts[key(text)] = counts.get(key(text), 0) + 1
        firsts.setdefault(key(text), text)
    if not counts:
        return texts[0], {}
    return firsts[max(counts, key=counts.get)], {firsts[k]: n / len(texts) for k, n in counts.items()}


def _seconds(decoder: Decoder, ids: Sequence[int]) -> float:
    """What reading the ids takes, with programs that have read them before."""
    if not ids:
        return 0.0
    begun = time.perf_counter()
    jax.block_until_ready(decoder.begin([ids], [0], Known()).cache)
    return time.perf_counter() - begun


_LENGTHS = {
    "answer": lambda task, encoded: 1,
    "token": lambda task, encoded: np.array([[len(x.ids) - x.start for x in group] for group in encoded]),
    "byte": lambda task, encoded: np.array([len(answer.encode()) for answer in _answers(task)])[None],
}


def _chosen(task: Task, examples: Sequence[Example], weights: np.ndarray) -> list[Outcome]:
    """weights: [examples, choices] log weights."""
    labels = tuple(task.answer.labels)
    if isinstance(task.answer, Score):
        said = zip(examples, _softmax(weights)[:, 1])
        return [Outcome(x.where, x.references, repr(float(p)), {labels[1]: float(p)}) for x, p in said]
    return [
        Outcome(x.where, x.references, labels[int(p.argmax())], dict(zip(labels, map(float, p))))
        for x, p in zip(examples, _softmax(weights))
    ]


def _softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
