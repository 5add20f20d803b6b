"""A model judged on a task: what it answers to every example, how good that is, and what it cost.

    result = score(trained("model.gguf"), sst2(folder), Shots(4, pick="balanced"), limit=200)
    print(result.table().text())

Choices are not written but weighed: of a choice's tokens a_1 .. a_n after the prompt,

    log p(choice) = sum_i log p(a_i | prompt, a_1 .. a_{i-1})

or that per token or per byte, which does not prefer short ones (Gao 2021, "Multiple choice normalization in LM
evaluation"). Calibrated, the log of a choice's mean probability after questions without content is taken off (Zhao et
al. 2021, arXiv:2102.09690). What all prompts begin with is read once. Text and numbers are written greedily.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.tally import Report
from lmx.generate import Sampling, generate
from lmx.generate.reading import bucket, keeps, padded
from lmx.generate.rows import Decoder
from lmx.report.stats import Interval
from lmx.report.table import Table
from lmx.tasks import (
    Choices,
    Encoded,
    Example,
    Number,
    Outcome,
    Prompt,
    Shots,
    Task,
    alternatives,
    ids_of,
    measure,
    overlap,
    prompt_messages,
    prompt_text,
)

if TYPE_CHECKING:
    from lmx.run import Trained

EMPTY = ("N/A", "[MASK]", "")
"""Questions without content (Zhao et al. 2021, section 5)."""
KEPT = 8
"""Tokens that caches of a batch may hold, for each token of it."""


@dataclass(frozen=True)
class TaskResult:
    """metrics: with 95 % intervals over examples. outcomes: of each example, in order. signatures: of metrics that have
    one. prompt_tokens: of all prompts and choices; shared_tokens: of those, the first ones of each that were read once
    for all; drawn_tokens: written. seconds: from the first encoded prompt to the last answer, compilation included.
    report: what was passed over."""

    task: str
    metrics: dict[str, Interval]
    outcomes: tuple[Outcome, ...]
    signatures: dict[str, str]
    prompt_tokens: int
    shared_tokens: int
    drawn_tokens: int
    seconds: float
    report: Report

    def table(self) -> Table:
        caption = f"{self.task}: {len(self.outcomes):,} examples, {self.prompt_tokens:,} tokens, {self.seconds:.1f} s"
        return Table(("metric", "value"), tuple(self.metrics.items()), caption)

    def save(self, path: str | Path) -> None:
        """Writes an outcome a line, as JSON."""
        rows = (json.dumps(vars(x), ensure_ascii=False) + "\n" for x in self.outcomes)
        Path(path).write_text("".join(rows), encoding="utf-8")


def score(
    model: Trained,
    task: Task,
    shots: Shots | Callable = Shots(),
    *,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    per: Literal["answer", "token", "byte"] = "answer",
    calibrate: bool = False,
    batch_tokens: int = 2048,
    resamples: int = 1000,
) -> TaskResult:
    """How well the model does the task.

    Args:
      shots: which training examples it is shown.
      limit: that many examples, drawn by `seed`; None is all.
      chat: ask in messages through the model's chat template rather than in plain text.
      per: what the log likelihood of a choice is divided by.
      calibrate: weigh choices against what the model thinks of them before it knows the question.
      batch_tokens: read at once, padding included.
    Examples longer than the model's positions are counted and left out; those longer than it was made to read are
    counted. Warns where test questions are among the training examples.
    Raises: ValueError for options that do not suit the task, or if no example is left; as `Task.examples`.
    """
    choices = isinstance(task.answer, Choices)
    if calibrate and not choices:
        raise ValueError(
            f"score: calibrate=True weighs choices, and {task.name} has {task.answer}; leave it off"
        )
    if per not in _LENGTHS:
        raise ValueError(f"score: per={per!r}; use 'answer', 'token' or 'byte'")
    if limit is not None and limit < 1:
        raise ValueError(f"score: limit={limit}; use 1 or more, or None for all")
    report = Report()
    examples = list(task.examples("test", report))
    if limit is not None and limit < len(examples):
        examples = [
            examples[i] for i in np.sort(np.random.default_rng(seed).permutation(len(examples))[:limit])
        ]
    tokenizer = model.tokenizer
    shown = ()
    if shots != Shots():
        train = list(task.examples("train", report))
        overlap(train, examples, task.name)
        shown = shots(train, lambda x: len(tokenizer.encode(x.question + x.answer + task.template.between)))
    begun = time.perf_counter()
    model = model.for_decoding()
    prompt = functools.partial(prompt_messages if chat else prompt_text, task, shots=shown)
    ask = functools.partial(_weighed if choices else _written, model, task, batch_tokens)
    template = model.chat if chat else None
    kept, encoded = _encoded(model, task, examples, prompt, template, report)
    if calibrate:
        blank = [alternatives(tokenizer, prompt(task.empty(x)), _answers(task), template) for x in EMPTY]
        encoded += blank
    answers, costs = ask(encoded)
    if choices:
        weights = np.array(answers) / _LENGTHS[per](task, encoded)
        outcomes = _chosen(task, kept, weights[: len(kept)], weights[len(kept) :])
    else:
        outcomes = [Outcome(x.where, x.references, answer) for x, answer in zip(kept, answers)]
    seconds = time.perf_counter() - begun
    report.warn(task.name)
    signed = {type(m).__name__: s for m in task.metrics if (s := m.signature(outcomes))}
    metrics = measure(task.metrics, outcomes, resamples, seed)
    return TaskResult(task.name, metrics, tuple(outcomes), signed, *costs, seconds, report)


class Likelihoods(NamedTuple):
    """nats: log p of each token of each answer, float32. likeliest: whether it has no better one. shared: how many
    first tokens all have and were read once."""

    nats: list[np.ndarray]
    likeliest: list[np.ndarray]
    shared: int


def log_likelihoods(
    model, params: Any, tokenizer, asked: Sequence[Encoded], *, batch_tokens: int = 2048
) -> Likelihoods:
    """What the model makes of the tokens ids[start:] of every one, given those before it.

    Answers that begin with the same tokens share a row: those of one token after one prompt cost one row together.
    Raises: ValueError for an answer that nothing comes before, or that the model's mask shows to the prompt.
    """
    for x in asked:
        if x.start < 1:
            raise ValueError(
                "log_likelihoods: nothing comes before the answer, and the tokenizer has no bos; give a prompt"
            )
        if not keeps(model.config.attention.mask, x.start):
            raise ValueError(
                f"log_likelihoods: {model.config.attention.mask} lets tokens before the answer see it; use a causal one"
            )
    rows, row_of = _rows([tuple(x.ids[:-1]) for x in asked])
    pairs = [[] for _ in rows]  # (position in the row, label, answer, place in it)
    for i, (x, row) in enumerate(zip(asked, row_of)):
        pairs[row] += [(at - 1, x.ids[at], i, at - x.start) for at in range(x.start, len(x.ids))]
    heads = [list(row[: min(at for at, *_ in found) + 1]) for row, found in zip(rows, pairs)]
    known = Decoder(model, params, tokenizer, Sampling(temperature=0.0, max_tokens=1)).shared(heads)
    nats = [np.zeros(len(x.ids) - x.start, np.float32) for x in asked]
    likeliest = [np.zeros(len(x), bool) for x in nats]
    width = 1 << (max(map(len, pairs)) - 1).bit_length()
    limit = model.config.position.max_len()
    for batch in _batches([len(row) - known.n for row in rows], known.n, batch_tokens, limit):
        tokens, lengths = padded([rows[i][known.n :] for i in batch.rows], batch.size)
        at, labels = np.zeros((2, len(batch.rows), width), np.int32)
        for b, i in enumerate(batch.rows):
            at[b, : len(pairs[i])] = [p[0] - known.n for p in pairs[i]]
            labels[b, : len(pairs[i])] = [p[1] for p in pairs[i]]
        slots = bucket(known.n + batch.size, limit)
        found = _program(model)(params, known.cache, tokens, lengths, at, labels, slots=slots)
        values, tops = map(np.asarray, found)
        for b, i in enumerate(batch.rows[: batch.real]):
            for value, top, (_, _, answer, place) in zip(values[b], tops[b], pairs[i]):
                nats[answer][place], likeliest[answer][place] = value, top
    return Likelihoods(nats, likeliest, known.n)


class _Batch(NamedTuple):
    rows: list[int]  # the last ones repeat the first, so that batches of a size have one shape
    real: int
    size: int


def _batches(lengths: Sequence[int], before: int, batch_tokens: int, limit: int | None):
    """Rows of so many tokens after `before` others, those of like length together."""
    room = None if limit is None else limit - before
    by_size: dict[int, list[int]] = {}
    for i in np.argsort(lengths, kind="stable"):
        by_size.setdefault(bucket(lengths[i], room, parts=2), []).append(int(i))
    for size, rows in by_size.items():
        most = max(1, min(batch_tokens // size, KEPT * batch_tokens // (before + size)))
        n = min(most, 1 << (len(rows) - 1).bit_length())
        for start in range(0, len(rows), n):
            real = rows[start : start + n]
            yield _Batch(real + real[:1] * (n - len(real)), len(real), size)


def _rows(contexts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """(those contexts that are not the beginning of another, the number of the one that each is or begins)."""
    rows, row_of = [], [0] * len(contexts)
    for i in sorted(range(len(contexts)), key=contexts.__getitem__, reverse=True):
        if not rows or rows[-1][: len(contexts[i])] != contexts[i]:
            rows.append(contexts[i])
        row_of[i] = len(rows) - 1
    return rows, row_of


@functools.lru_cache(maxsize=16)
def _program(model):
    @functools.partial(jax.jit, static_argnames="slots")
    def log_p(params, cache, tokens, lengths, at, labels, *, slots):
        R, t = tokens.shape
        if cache is None:
            cache = model.new_cache(R, slots, params)
        else:
            cache = cache.take(jnp.zeros(R, jnp.int32)).resize(slots)
        valid = jnp.arange(t, dtype=jnp.int32)[None] < lengths[:, None]
        out, _ = model.step(params, cache, tokens, valid)
        logits = replace(out, hidden=out.hidden[jnp.arange(R)[:, None], at]).logits  # [R, answers, V]
        said = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return said - jax.nn.logsumexp(logits, -1), said >= logits.max(-1)

    return log_p


def _answers(task: Task) -> list[str]:
    return [task.template.answer_of(words) for words in task.answer.labels.values()]


def _encoded(model, task: Task, examples, prompt, chat, report):
    """(the examples that fit, for each its ids; with choices, the ids of all)."""
    limit = model.model.config.position.max_len()
    kept: list[Example] = []
    found = []
    for example in examples:
        asked: Prompt = prompt(example.question)
        if isinstance(task.answer, Choices):
            ids = alternatives(model.tokenizer, asked, _answers(task), chat)
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
        kept.append(example)
        found.append(ids)
    if not kept:
        raise ValueError(
            f"{task.name}: no example fits the model's {limit:,} positions; show fewer or shorter examples"
        )
    return kept, found


def _weighed(model, task, batch_tokens, encoded):
    """([examples, choices] log likelihoods, costs)."""
    flat = [x for group in encoded for x in group]
    found = log_likelihoods(model.model, model.params, model.tokenizer, flat, batch_tokens=batch_tokens)
    ends = accumulate(map(len, encoded), initial=0)
    sums = [[float(x.sum(dtype=np.float64)) for x in found.nats[a:b]] for a, b in pairwise(ends)]
    return sums, (sum(len(x.ids) for x in flat), found.shared, 0)


def _written(model, task, batch_tokens, prompts):
    """(texts, costs); of numbers those that could be read."""
    answer = task.answer
    sampling = Sampling(
        temperature=0.0, max_tokens=answer.max_tokens, stop=answer.stop, pattern=answer.pattern
    )
    n_rows = max(1, KEPT * batch_tokens // (max(map(len, prompts)) + answer.max_tokens))
    done = generate(model.model, model.params, model.tokenizer, prompts, sampling, batch_size=n_rows)
    texts = [x.text.strip() for x in done]
    texts = [answer.read(text) for text in texts] if isinstance(answer, Number) else texts
    decoder = Decoder(model.model, model.params, model.tokenizer, sampling)
    shared = decoder.shared_length(prompts)
    return texts, (sum(map(len, prompts)), shared, sum(len(x.tokens) for x in done))


_LENGTHS = {
    "answer": lambda task, encoded: 1,
    "token": lambda task, encoded: np.array([[len(x.ids) - x.start for x in group] for group in encoded]),
    "byte": lambda task, encoded: np.array([len(answer.encode()) for answer in _answers(task)])[None],
}


def _chosen(task: Task, examples, weights: np.ndarray, blank: np.ndarray) -> list[Outcome]:
    """weights, blank: [examples, choices] log weights; those of questions without content are taken off."""
    if len(blank):
        weights = weights - np.log(_softmax(blank).mean(0))[None]
    labels = tuple(task.answer.labels)
    return [
        Outcome(x.where, x.references, labels[int(p.argmax())], dict(zip(labels, map(float, p))))
        for x, p in zip(examples, _softmax(weights))
    ]


def _softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
