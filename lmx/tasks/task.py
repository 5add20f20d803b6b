"""A task is a small frozen value: examples, how one is put into words, what its answer may be, and how it is judged.

    task = Task(
        "reviews",
        test=Records("reviews.csv"),
        template=Template("Review: {text}\nSentiment:", " {label}"),
        answer=Choices({"0": "negative", "1": "positive"}),
    )
    next(task.examples()).question

Templates and rows may come from anyone: a field is looked up by its whole name and put in once, as it is. There is no
attribute access, no index and no format, and braces in a row mean nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import regex

from lmx.data.records import Records, Value
from lmx.data.sources import NoDocument
from lmx.data.tally import Report
from lmx.text.scripts import words

from .metrics import F1, Accuracy, Calibration, Error, ExactMatch, Lengths, Metric, Ranking, ScoreError

SEVERAL = "\n\n"


@dataclass(frozen=True)
class Template:
    """question and answer, with fields as {name}; {{ and }} are braces. The answer has one field, and goes on where the
    question ends: give it the space between them, since a word's token mostly begins with it.

    between: what separates instruction, examples and question in plain text.

    >>> Template("{{{शब्द}}} is a", " {kind}").question_of({"शब्द": "{kind}", "kind": "?"})
    '{{kind}} is a'

    Raises: ValueError for a single brace, a field without a name, or an answer that has not one field.
    """

    question: str
    answer: str
    between: str = SEVERAL

    def __post_init__(self):
        if len(names := _fields(self.answer)) != 1:
            raise ValueError(
                f"Template: answer={self.answer!r} names {len(names)} fields; it needs one, such as ' {{label}}'"
            )
        if not _fields(self.question):
            raise ValueError(f"Template: question={self.question!r} names no field; write such as '{{text}}'")

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in the question."""
        return _fields(self.question)

    @property
    def target(self) -> str:
        """The name in the answer."""
        return _fields(self.answer)[0]

    def question_of(self, row: Mapping[str, Value]) -> str:
        return _filled(self.question, {name: shown(row[name]) for name in self.fields})

    def answer_of(self, text: str) -> str:
        return _filled(self.answer, {self.target: text})


@dataclass(frozen=True)
class Choices:
    """One of some labels. labels: label in the data -> the words that a model reads and writes; or the words alone.

    >>> Choices(("drupe", "pome")).labels
    {'drupe': 'drupe', 'pome': 'pome'}

    Raises: ValueError for fewer than two labels, or words that are empty or alike.
    """

    labels: Mapping[str, str] | Sequence[str]

    def __post_init__(self):
        pairs = self.labels.items() if isinstance(self.labels, Mapping) else zip(self.labels, self.labels)
        labels = {shown(label): word for label, word in pairs}
        object.__setattr__(self, "labels", labels)
        if len(labels) < 2:
            raise ValueError(f"Choices: labels={labels} leave no choice; give two or more")
        if len(set(labels.values())) < len(labels) or not all(w.strip() for w in labels.values()):
            raise ValueError(
                f"Choices: the words {', '.join(map(repr, labels.values()))} must differ and have text"
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        names = tuple(self.labels)
        return Accuracy(), F1(names), Calibration()

    def references(self, value: Value) -> tuple[str, ...] | tuple[None, str, str]:
        label = None if isinstance(value, list) else shown(value)
        if label not in self.labels:
            return None, "label_outside", f"holds {value!r:.99}; the labels are {', '.join(self.labels)}"
        return (label,)

    def words(self, reference: str) -> str:
        return self.labels[reference]


@dataclass(frozen=True)
class Free:
    """Text of at most max_tokens, ended by a stop string or the model's own end. A row may hold several references.

    pattern: a regular expression that all of it matches, also the space before it, as `Sampling` has it.
    """

    max_tokens: int = 128
    stop: tuple[str, ...] = ("\n",)
    pattern: str | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            raise ValueError(f"Free: stop={self.stop!r} is one string; write ({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.max_tokens < 1:
            raise ValueError(f"Free: max_tokens={self.max_tokens}; use 1 or more")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return ExactMatch(), Lengths()

    def references(self, value: Value) -> tuple[str, ...] | tuple[None, str, str]:
        texts = tuple(
            text for x in (value if isinstance(value, list) else [value]) if (text := shown(x).strip())
        )
        return texts or (None, "empty_answer", "has an empty answer")

    def words(self, reference: str) -> str:
        return reference


@dataclass(frozen=True)
class Number:
    """A number from low to high, written in at most max_tokens, in text that matches `pattern`; None is any text."""

    low: float
    high: float
    max_tokens: int = 8
    stop: tuple[str, ...] = ("\n",)
    pattern: str | None = None

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"Number: low={self.low}, high={self.high}; give two finite numbers, the lower one first"
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Error(),)

    def references(self, value: Value) -> tuple[str, ...] | tuple[None, str, str]:
        try:
            inside = self.low <= float(value) <= self.high
        except (TypeError, ValueError):
            inside = False
        if not inside:
            return None, "label_outside", f"holds {value!r:.99}; answers are {self.low:g} to {self.high:g}"
        return (shown(value).strip(),)

    def words(self, reference: str) -> str:
        return reference

    def read(self, text: str) -> str | None:
        """The first number of a model's text, if it lies in the range; digits of any script.

        >>> Number(0, 5).read("लगभग ३.५ अंक"), Number(0, 5).read("9"), Number(0, 5).read("many")
        ('3.5', None, None)
        """
        found = regex.search(r"[-−]?(?:\d+(?:\.\d+)?|\.\d+)", text)
        if not found:
            return None
        plain = "".join(str(unicodedata.decimal(c, c)) for c in found[0].replace("−", "-"))
        return plain if self.low <= float(plain) <= self.high else None


@dataclass(frozen=True)
class Score:
    """A number in [0, 1]: the share of annotators who say yes, or what a teacher makes of it. A head of two classes
    learns it (`Answers(task, head=True)`), and answers with its probability of the second.

    threshold: above it the answer is yes, for metrics that ask for that.
    """

    threshold: float = 0.5
    labels: ClassVar[tuple[str, ...]] = ("0", "1")

    def __post_init__(self):
        if not 0 <= self.threshold < 1:
            raise ValueError(f"Score: threshold={self.threshold}; use 0 up to, but not, 1")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Ranking(self.threshold), ScoreError()

    def references(self, value: Value) -> tuple[str, ...] | tuple[None, str, str]:
        try:
            inside = not isinstance(value, bool) and 0 <= float(value) <= 1
        except (TypeError, ValueError):
            inside = False
        if not inside:
            return None, "score_outside", f"holds {value!r:.99}; scores are numbers from 0 to 1"
        return (shown(value).strip(),)

    def words(self, reference: str) -> str:
        return reference


Answer = Choices | Free | Number | Score


class Example(NamedTuple):
    """where: its place, which names it. question, answer: in words. references: what is right: one label, texts, or
    one number."""

    where: str
    question: str
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """name: for reports. test: what is judged on. train: for shots and fine-tuning. instruction: what is said first.
    metrics: none means those of the answer's kind."""

    name: str
    test: Records
    template: Template
    answer: Answer
    train: Records | None = None
    instruction: str = ""
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "metrics", tuple(self.metrics) or self.answer.metrics)

    def examples(self, part: str = "test", report: Report | None = None) -> Iterator[Example]:
        """The usable examples of "test" or "train", in order, read as they are asked for.

        Counted in `report` and passed over, beside what `Records` does: labels outside the set, empty questions and
        answers.
        Raises: ValueError if there are no records, or if none is usable; as `Records.rows`.
        """
        if part not in ("test", "train"):
            raise ValueError(f'{self.name}: part={part!r}; use "test" or "train"')
        records = self.test if part == "test" else self.train
        if records is None:
            raise ValueError(f"{self.name}: it has no training records; give train=Records(...)")
        here, n = Report(), 0
        t = self.template
        for where, row in records.rows(dict.fromkeys((*t.fields, t.target)), here):
            if not any(shown(row[name]).strip() for name in t.fields):
                here.skip("empty_text", where)
                continue
            references = self.answer.references(row[t.target])
            if references[0] is None:
                here.skip(references[1], f"{where} {references[2]}")
                continue
            n += 1
            yield Example(
                where, t.question_of(row), t.answer_of(self.answer.words(references[0])), references
            )
        here.documents = n
        if report is not None:
            report.add(here)
        if not n:
            raise NoDocument(f"{self.name}: {records.label} has no usable example. {here}", here)

    def empty(self, word: str) -> str:
        """The question with `word` in every field: what the model thinks of the answers before it knows anything."""
        return self.template.question_of(dict.fromkeys(self.template.fields, word))


def drawn(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """At most `limit` of the examples, drawn by the seed, in their order. Raises: ValueError for a limit below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; use 1 or more")
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in np.sort(np.random.default_rng(seed).permutation(len(examples))[:limit])]


def overlap(train: Iterable[Example], test: Iterable[Example], of: str = "the task") -> tuple[str, ...]:
    """Places of the test examples whose question stands in the training examples too, but for case, punctuation,
    spaces and Unicode form. Warns with their number, since a score on them tells of memory.

    Only hashes of the training questions are held.
    """
    known = {key_of(example.question) for example in train}
    tested = [(example.where, key_of(example.question) in known) for example in test]
    found = tuple(where for where, seen in tested if seen)
    if found:
        warnings.warn(
            f"{of}: {len(found):,} of {len(tested):,} test questions ({len(found) / len(tested):.1%}) are in its "
            f"training records too ({', '.join(found[:3])}); leave them out of one, or say so beside the score",
            stacklevel=2,
        )
    return found


def shown(value: Value) -> str:
    """A field's value as text: JSON's spelling for truth values, a list's first text.

    >>> shown(True), shown(3), shown("क"), shown(["a", "b"])
    ('true', '3', 'क', 'a')
    """
    if isinstance(value, list):
        return value[0]
    return json.dumps(value) if isinstance(value, bool) else str(value)


_PART = regex.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@functools.lru_cache(maxsize=1024)
def _fields(template: str) -> tuple[str, ...]:
    """The names in a template, each once. Raises: ValueError, as `Template`."""
    names = {}
    for part in _PART.finditer(template):
        if part[0] in ("{", "}"):
            raise ValueError(
                f"Template: {template!r} has a single {part[0]} at character {part.start()}; write it twice for a brace"
            )
        if part[1] is not None:
            names[part[1]] = None
            if not part[1].strip():
                raise ValueError(f"Template: {template!r} has a field without a name; write such as {{text}}")
    return tuple(names)


def _filled(template: str, values: Mapping[str, str]) -> str:
    return _PART.sub(lambda part: part[0][0] if part[1] is None else values[part[1]], template)


def key_of(text: str) -> bytes:
    """The same for texts that differ in case, punctuation, spaces and Unicode form alone."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return hashlib.blake2b((" ".join(words(text)) or text).encode(), digest_size=12).digest()
