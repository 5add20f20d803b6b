"""From a task to the text or the messages that a model reads, and to the exact tokens of answers that compare.

some = Shots(4, pick="balanced", seed=1)(task.examples("train"))
text = prompt_text(task, question, some)                                 instruction, examples, question
alternatives(tokenizer, text, [" negative", " positive"])                [(ids, start), (ids, start)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmx.data.chat_template import ChatTemplate
from lmx.data.encoded import Encoded, Prompt, encoded
from lmx.data.tokenizer_json import Tokenizer, common

from .task import Example, Task


@dataclass(frozen=True)
class Shots:
    """Which training examples are shown.

    k: how many; None takes as many as the budget has room for. pick: "random"; "balanced", one of each class (by the
    first reference) in turn, so that their numbers differ by one at most while there are enough; or "first", as they
    stand in the records. seed: of the pick. order: seed of the order they are shown in; None keeps that of the pick.
    budget: tokens they may take, each counted by itself; from the first that does not fit on they are left out.

    Any function (examples, n_tokens) -> examples serves in its place.
    Raises: ValueError for settings that mean nothing.
    """

    k: int | None = 0
    pick: Literal["random", "balanced", "first"] = "random"
    seed: int = 0
    order: int | None = None
    budget: int | None = None

    def __post_init__(self):
        if self.k is None and self.budget is None:
            raise ValueError("Shots: k=None needs a budget in tokens, such as budget=512")
        if (self.k or 0) < 0 or (self.budget or 0) < 0:
            raise ValueError(f"Shots: k={self.k}, budget={self.budget}; use 0 or more")
        if self.pick not in ("random", "balanced", "first"):
            raise ValueError(f"Shots: pick={self.pick!r}; use 'random', 'balanced' or 'first'")

    def __call__(
        self, examples: Iterable[Example], n_tokens: Callable[[Example], int] | None = None
    ) -> tuple[Example, ...]:
        """The examples to show, in their order. n_tokens: what an example takes, for the budget.

        Raises: ValueError if there are fewer than k, or a budget but nothing to count by.
        """
        if self.k == 0:
            return ()
        examples = list(examples)
        if self.k is not None and self.k > len(examples):
            raise ValueError(
                f"Shots: k={self.k}, and there are {len(examples)} training examples; use that or less"
            )
        rng = np.random.default_rng(self.seed)
        drawn = np.arange(len(examples)) if self.pick == "first" else rng.permutation(len(examples))
        if self.pick == "balanced":
            drawn = _in_turn([examples[i].references[0] for i in drawn], drawn)
        chosen = [examples[i] for i in drawn[: self.k]]
        if self.budget is not None:
            if n_tokens is None:
                raise ValueError("Shots: a budget needs n_tokens, which counts an example's tokens")
            chosen = _within(chosen, self.budget, n_tokens)
        if self.order is not None:
            chosen = [chosen[i] for i in np.random.default_rng(self.order).permutation(len(chosen))]
        return tuple(chosen)


def prompt_text(task: Task, question: str, shots: Sequence[Example] = ()) -> str:
    """Instruction, examples and the question, with the template's `between` between them; the answer follows.

    >>> from lmx.tasks import fruit
    >>> task = fruit()
    >>> peach, apple = list(task.examples("train"))[:2]
    >>> print(prompt_text(task, "quince:", [peach, apple]))
    peach: drupe
    apple: pome
    quince:
    """
    said = [task.instruction] if task.instruction else []
    return task.template.between.join([*said, *(shot.question + shot.answer for shot in shots), question])


def prompt_messages(task: Task, question: str, shots: Sequence[Example] = ()) -> list[dict[str, str]]:
    """The same as a conversation: the instruction is the system's, examples are earlier turns. Texts are stripped,
    since a chat template brings its own spaces."""
    turns = [("system", task.instruction)] if task.instruction else []
    for shot in shots:
        turns += [("user", shot.question), ("assistant", shot.answer)]
    return [{"role": role, "content": text.strip()} for role, text in [*turns, ("user", question)]]


def alternatives(
    tokenizer: Tokenizer, prompt: Prompt, answers: Sequence[str], chat: ChatTemplate | None = None
) -> list[Encoded]:
    """`encoded` of each answer, all from the same start, up to which their ids agree: so their likelihoods compare,
    where one answer grows together with the prompt's end and another does not."""
    found = [encoded(tokenizer, prompt, answer, chat) for answer in answers]
    start = min(common([x.ids for x in found]), *(x.start for x in found))
    return [Encoded(x.ids, start) for x in found]


def _in_turn(labels: Sequence[str], drawn: np.ndarray) -> np.ndarray:
    """The same numbers, sorted so that the first of each label come first, then the second ones."""
    seen: dict[str, int] = {}
    rounds = []
    for label in labels:
        rounds.append(seen.setdefault(label, 0))
        seen[label] += 1
    return drawn[np.argsort(rounds, kind="stable")]


def _within(chosen, budget, n_tokens):
    kept = []
    for example in chosen:
        budget -= n_tokens(example)
        if budget < 0:
            break
        kept.append(example)
    return kept
