"""The task that a command line names: one that is known, or records and a template of one's own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from lmx.tasks import Answer, Task

NAMED = "fruit, sst2, summarization, translation-hi-en"


@dataclass(frozen=True)
class OfTask:
    """A model and what it is asked."""

    model: tyro.conf.Positional[Path]
    """A run's folder, a Hugging Face folder or a .gguf file."""
    task: tyro.conf.Positional[str] = ""
    """By name; leave it out for one of your own."""
    data: Path | None = None
    """Folder of the data of a named task."""
    test: str | None = None
    """Records to judge by: a file, a pattern or tfds:name."""
    train: str | None = None
    """Records to show."""
    template: str | None = None
    """The question, with fields of the records as {name}; \\n is a new line. Of a named task, another than its own."""
    answer: str | None = None
    """How an answer goes on after it, with the field that holds it; " {label}" if not given."""
    labels: str | None = None
    """The choices: negative,positive or, where records hold something else, 0=negative,1=positive."""
    number: tuple[float, float] | None = None
    """Answers are numbers from the first to the second."""
    max_tokens: int | None = None
    """Of a written answer; 64 for text, 8 for numbers."""
    instruction: str | None = None
    """Said before everything."""


def task_of(asked: OfTask) -> Task:
    """Raises: ValueError naming the option that is missing or too much."""
    from lmx import tasks

    own = {name: getattr(asked, name) for name in ("test", "train", "labels", "number")}
    given = [f"--{name}" for name, value in own.items() if value is not None]
    if asked.task and given:
        raise ValueError(
            f"{asked.task} is a task by name, and {given[0]} describes one of your own; give one of them"
        )
    if asked.task:
        task = _named(asked)
        if asked.max_tokens is not None:
            if isinstance(task.answer, tasks.Choices):
                raise ValueError(
                    f"--max-tokens {asked.max_tokens}: the choices of {task.name} are not written"
                )
            task = replace(task, answer=replace(task.answer, max_tokens=asked.max_tokens))
    else:
        for name in ("test", "template"):
            if getattr(asked, name) is None:
                raise ValueError(
                    f"--{name} is missing; give a task by name ({NAMED}), or one of your own with --test FILE "
                    '--template "Review: {text}\\nSentiment:" --labels negative,positive'
                )
        task = tasks.Task(
            Path(asked.test).name.split(".")[0] or "task",
            test=tasks.Records(asked.test),
            train=None if asked.train is None else tasks.Records(asked.train),
            template=tasks.Template(escaped(asked.template), " {label}"),
            answer=_answer(asked),
        )
    if asked.answer is not None:
        task = replace(task, template=replace(task.template, answer=escaped(asked.answer)))
    if asked.template is not None:
        task = replace(task, template=with_question(task.template, asked.template))
    if asked.instruction is not None:
        task = replace(task, instruction=escaped(asked.instruction))
    return task


def _named(asked: OfTask) -> Task:
    from lmx import tasks

    if asked.task == "fruit":
        return tasks.fruit()
    pair = re.fullmatch(r"translation-([a-z]+)-([a-z]+)", asked.task)
    if asked.task not in ("sst2", "summarization") and not pair:
        raise ValueError(
            f"no task {asked.task!r}; by name there are {NAMED}, and --test FILE makes one of your own"
        )
    if asked.data is None:
        raise ValueError(f"{asked.task} reads data; give the folder it lies in: --data FOLDER")
    if pair:
        return tasks.translation(asked.data, *pair.groups())
    return getattr(tasks, asked.task)(asked.data)


def _answer(asked: OfTask) -> Answer:
    from lmx.tasks import Choices, Free, Number

    if asked.labels is not None and asked.number is not None:
        raise ValueError("--labels are choices and --number is written; give one of them")
    if asked.labels is not None:
        if asked.max_tokens is not None:
            raise ValueError(f"--max-tokens {asked.max_tokens}: choices are not written")
        pairs = [one.partition("=") for one in asked.labels.split(",")]
        return Choices({label.strip(): (word if sign else label).strip() for label, sign, word in pairs})
    if asked.number is not None:
        return Number(*asked.number, max_tokens=8 if asked.max_tokens is None else asked.max_tokens)
    return Free(64 if asked.max_tokens is None else asked.max_tokens)


def with_question(template, question: str):
    return replace(template, question=escaped(question))


def escaped(text: str) -> str:
    """A shell's \\n and \\t as what they mean."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
