"""Tasks: examples, prompts, the answer's form and its metrics, as small frozen values.

A task of one's own is five lines (`lmx.evals.score` then judges a model on it):

>>> import json, pathlib, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "reviews.jsonl"
>>> path.write_text(json.dumps({"text": "बहुत अच्छी फ़िल्म", "label": 1}), encoding="utf-8") > 0
True
>>> task = Task(
...     "reviews", test=Records(path), template=Template("Review: {text}\\nSentiment:", " {label}"),
...     answer=Choices({"0": "negative", "1": "positive"}),
... )
>>> example = next(task.examples())
>>> print(prompt_text(task, example.question) + example.answer)
Review: बहुत अच्छी फ़िल्म
Sentiment: positive
"""

from lmx.data.encoded import Encoded, Prompt, encoded, ids_of
from lmx.data.records import Records

from .answers import Answers
from .builtin import fruit, sst2, summarization, translation
from .metrics import (
    F1,
    Accuracy,
    Bleu,
    Calibration,
    Chrf,
    Error,
    ExactMatch,
    Expected,
    Lengths,
    Metric,
    Outcome,
    Ranking,
    Rouge,
    ScoreError,
    average,
    average_difference,
    difference,
    measure,
)
from .prompt import Shots, alternatives, prompt_messages, prompt_text
from .task import Choices, Example, Free, Number, Score, Task, Template, drawn, key_of, overlap
from .tokens import named_tokens, prompt_parts, shown_piece

__all__ = [
    "F1",
    "Accuracy",
    "Answers",
    "Bleu",
    "Calibration",
    "Choices",
    "Chrf",
    "Encoded",
    "Error",
    "ExactMatch",
    "Example",
    "Expected",
    "Free",
    "Lengths",
    "Metric",
    "Number",
    "Outcome",
    "Prompt",
    "Ranking",
    "Records",
    "Rouge",
    "Score",
    "ScoreError",
    "Shots",
    "Task",
    "Template",
    "alternatives",
    "average",
    "average_difference",
    "difference",
    "drawn",
    "encoded",
    "fruit",
    "ids_of",
    "key_of",
    "measure",
    "named_tokens",
    "overlap",
    "prompt_messages",
    "prompt_parts",
    "prompt_text",
    "shown_piece",
    "sst2",
    "summarization",
    "translation",
]
