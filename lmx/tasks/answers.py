"""A task as text to learn its answers from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lmx.data.sources import Document, Source
from lmx.data.tally import Report

from .prompt import prompt_messages, prompt_text
from .task import Choices, Score, Task, drawn


@dataclass(frozen=True)
class Answers(Source):
    """The examples of a task, of which the answers alone are learned.

        Data(train=(Answers(task),), tokenizer=File("model.gguf"), seq_len=128)

    part: "train" or "test". limit: that many, drawn by `seed`; None is all. chat: in messages through the chat template
    rather than in plain text. head: the answer is the number of its class, for the head of `lmx.adapt.Classes`; if the
    task's answer is a `Score`, also that score, for `lmx.losses.SoftLabels`.
    Of a question that is longer than a row the end is kept, with the answer.
    Raises: ValueError for settings that do not go together.
    """

    task: Task
    part: str = "train"
    limit: int | None = None
    seed: int = 0
    chat: bool = False
    head: bool = False
    masked: ClassVar[bool] = True
    keep: ClassVar[str] = "tail"

    def __post_init__(self):
        if self._records is None:
            raise ValueError(f"{self.task.name}: it has no training records; give train=Records(...)")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"Answers: limit={self.limit}; use 1 or more, or None for all")
        if self.head and not isinstance(self.task.answer, Choices | Score):
            raise ValueError(
                f"Answers: head=True needs classes, and {self.task.name} has {self.task.answer}; leave it off"
            )
        if isinstance(self.task.answer, Score) and not self.head:
            raise ValueError(
                f"Answers: {self.task.name} has scores, which a head of two classes learns; set head=True"
            )
        if self.head and self.chat:
            raise ValueError("Answers: head=True reads plain text; leave chat off")

    @property
    def scored(self) -> bool:
        return isinstance(self.task.answer, Score)

    @property
    def conversations(self) -> bool:
        return self.chat

    def files(self) -> tuple[Path, ...]:
        return self._records.files()

    def fingerprint(self) -> str:
        t = self.task
        settings = (
            t.template,
            t.answer,
            t.instruction,
            self.part,
            self.limit,
            self.seed,
            self.chat,
            self.head,
        )
        records = self._records.fingerprint()
        return hashlib.sha256(repr((type(self).__name__, settings, records)).encode()).hexdigest()

    @property
    def _records(self):
        return self.task.test if self.part == "test" else self.task.train

    def _read(self, report: Report) -> Iterator[Document]:
        examples = self.task.examples(self.part, report)
        if self.limit is not None:
            examples = drawn(list(examples), self.limit, self.seed)
        for example in examples:
            document = {"id": example.where}
            if self.chat:
                reply = {"role": "assistant", "content": example.answer.strip()}
                yield document | {"messages": [*prompt_messages(self.task, example.question), reply]}
                continue
            answer = example.answer
            if self.scored:
                score = float(example.references[0])
                document |= {"score": score}
                answer = int(score > self.task.answer.threshold)
            elif self.head:
                answer = list(self.task.answer.labels).index(example.references[0])
            yield document | {"text": prompt_text(self.task, example.question), "answer": answer}
