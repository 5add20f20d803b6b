"""Conversations to learn replies from: a source of documents {"messages": [{"role", "content"}, ...], "id": str}.

Pairs of them to learn a preference from have "rejected" too: the messages of the one that is worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .sources import Document, _Files, array_hint, encodable, json_objects, opened_parquet, parquet_rows
from .tally import Report

ROLES = ("system", "user", "assistant", "tool")
NAMES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
"""Who speaks -> the role; the first two are ShareGPT's."""
SHAPES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""The fields by which the shape of a row is known."""
PAIR = ("prompt", "chosen", "rejected")
"""The fields of a pair, of which the first may be missing."""


@dataclass(frozen=True)
class Chat(_Files):
    """Conversations of which the assistant's replies alone are learned: JSONL, plain, .gz or .zst, or Parquet.

    A row is one of these, told by its fields:
      {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
      {"prompt": "...", "completion": "..."}        each a text or a list of messages
      {"instruction": "...", "input": "...", "output": "..."}        Alpaca; the input, if any, follows a blank line
      {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}        ShareGPT

    Counted and passed over: rows of no such shape, with a role that is none of ROLES, with an empty reply or none at
    all, with a reply to nothing, with content that is not text. Messages after the last reply are left out, and
    counted.
    keep: which end of a conversation that is longer than a row is kept, "head" or "tail". The tail begins outside of
    replies, and a conversation of which no reply is left is not used (see windows in pack.py).
    """

    keep: str = "head"
    masked: ClassVar[bool] = True
    conversations: ClassVar[bool] = True

    def __post_init__(self):
        if self.keep not in ("head", "tail"):
            raise ValueError(f"Chat: keep={self.keep!r}; use 'head' or 'tail'")

    def _read_file(self, path: Path, report: Report) -> Iterator[Document]:
        rows = self._parquet(path, report) if path.suffix == ".parquet" else json_objects(path, report)
        for where, row in rows:
            try:
                document = self._document(row)
            except _Bad as bad:
                report.skip(bad.reason, f"{where} {bad}")
                continue
            for name, messages in document.items():
                last = max(i for i, message in enumerate(messages) if message["role"] == "assistant") + 1
                if last < len(messages):
                    report.note("messages_after_the_last_reply", where, len(messages) - last)
                document[name] = messages[:last]
            yield {**document, "id": where}

    def _parquet(self, path: Path, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) of a Parquet file, of those columns that make a shape."""
        known = {name for shape in self._shapes() for name in shape}
        with opened_parquet(path) as file:
            names = file.schema_arrow.names
            found = [name for name in names if name in known]
            if not found or len(set(found)) < len(found):
                raise ValueError(
                    f"{path}: it has the columns {', '.join(map(repr, names))}, of which {type(self).__name__} reads "
                    f"each of {', '.join(sorted(known))} once; rename them"
                )
            yield from parquet_rows(file, path, found, report)

    def _document(self, row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
        return {"messages": messages_of(row)}

    def _shapes(self) -> tuple[tuple[str, ...], ...]:
        return (*SHAPES, ("instruction", "input", "output"))

    def _hint(self) -> str:
        first = self.files()[0]
        shapes = "; ".join(", ".join(map(repr, shape)) for shape in self._shapes())
        return (
            first.suffix != ".parquet" and array_hint(first)
        ) or f"\nEach row is to have one of: {shapes}."


@dataclass(frozen=True)
class Preferences(Chat):
    """Pairs of conversations with a common beginning, of which one is preferred: files as those of `Chat`.

    A row is one of these:
      {"prompt": "...", "chosen": "...", "rejected": "..."}        each a text or a list of messages
      {"chosen": [messages], "rejected": [messages]}        whole conversations; a prompt beside them is in both

    Counted and passed over: what `Chat` passes over, in either; two that are equal, or differ in more than what the
    assistant says first and in what follows it; a prompt that is not in both; a pair that is longer than a row, of
    which neither is cut.

    A pair lies in one row, the chosen one before the rejected one, as two segments. Their batches have two more
    entries, [B, T] float32: `rejected_mask` is 1 on labels of rejected replies, as `loss_mask` is on those of chosen
    ones; `pair_mask` is 1 on the last token of each pair. So a term over `loss_mask` learns chosen replies alone.
    """

    keep: str = field(default="pair", init=False, repr=False)

    def __post_init__(self):
        pass

    def _document(self, row):
        chosen, rejected = pair_of(row)
        return {"messages": chosen, "rejected": rejected}

    def _shapes(self):
        return PAIR, PAIR[1:]


class _Bad(ValueError):
    """Why a row is of no use: `reason` to count it by."""

    def __init__(self, reason: str, what: str):
        super().__init__(what)
        self.reason = reason


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a row of any of the shapes. Raises: ValueError saying what it lacks."""
    shape = next((shape for shape in SHAPES if all(row.get(name) is not None for name in shape)), None)
    match shape:
        case ("messages",) | ("conversations",):
            messages = _listed(row[shape[0]], shape[0])
        case ("prompt", "completion"):
            messages = _spoken(row, "prompt", "user") + _spoken(row, "completion", "assistant")
        case ("instruction", "output"):
            asked = [_text(row[name], name) for name in ("instruction", "input") if row.get(name)]
            messages = [("user", "\n\n".join(asked)), ("assistant", _text(row["output"], "output"))]
        case _:
            raise _Bad("field_missing", f"has {', '.join(map(repr, row)) or 'no field'}")
    return _conversation(messages)


def pair_of(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The messages of the chosen and of the rejected conversation of a row. Raises: ValueError saying what it lacks."""
    if any(row.get(name) is None for name in PAIR[1:]):
        raise _Bad("field_missing", f"has {', '.join(map(repr, row)) or 'no field'}")
    prompt = _spoken(row, "prompt", "user") if row.get("prompt") is not None else []
    chosen, rejected = (_answering(prompt, _spoken(row, name, "assistant"), name) for name in PAIR[1:])
    pair = _conversation(chosen), _conversation(rejected)
    if pair[0] == pair[1]:
        raise _Bad("equal_replies", "has a chosen one that is the rejected one")
    first = next((both for both in zip(*pair) if both[0] != both[1]), None)
    if first is None or any(message["role"] != "assistant" for message in first):
        raise _Bad("different_prompts", "has two that differ in more than replies")
    return pair


def _answering(prompt: list, said: list, name: str) -> list[tuple[str, str]]:
    """What was said with the prompt before it, unless it begins with one itself."""
    if not said or said[0][0] in ("assistant", "tool"):
        return prompt + said
    if any(message not in said for message in prompt):
        raise _Bad("different_prompts", f"has a prompt that its {name} conversation lacks")
    return said


def _conversation(messages: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Raises: ValueError if there is nothing to learn from it."""
    for i, (role, text) in enumerate(messages):
        if not text.strip() and role in ("user", "assistant"):
            raise _Bad("empty_reply" if role == "assistant" else "empty_text", f"in message {i + 1}")
        if not encodable(text):
            raise _Bad("invalid_unicode", f"holds half of a surrogate pair in message {i + 1}")
    roles = [role for role, _ in messages]
    if "assistant" not in roles:
        raise _Bad("no_reply", f"is of {', '.join(roles) or 'no message'} alone")
    if roles[0] == "assistant":
        raise _Bad("reply_to_nothing", "begins with the assistant")
    return [{"role": role, "content": text} for role, text in messages]


def _listed(found: Any, where: str) -> list[tuple[str, str]]:
    """(role, text) of a list of messages, in the words of OpenAI or of ShareGPT."""
    if not isinstance(found, list):
        raise _Bad("not_text", f"holds {type(found).__name__} as its {where}, not a list of messages")
    messages = []
    for i, one in enumerate(found, 1):
        names = ("role", "content") if isinstance(one, Mapping) and one.get("role") else ("from", "value")
        if not isinstance(one, Mapping) or names[0] not in one or names[1] not in one:
            raise _Bad("field_missing", f"has no {names[0]!r} and {names[1]!r} in message {i} of its {where}")
        role = NAMES.get(one[names[0]]) if isinstance(one[names[0]], str) else None
        if role is None:
            raise _Bad("wrong_role", f"says {one[names[0]]!r:.40} in message {i}; known: {', '.join(NAMES)}")
        messages.append((role, _text(one[names[1]], f"message {i}")))
    return messages


def _spoken(row: Mapping[str, Any], name: str, role: str) -> list[tuple[str, str]]:
    return [(role, row[name])] if isinstance(row[name], str) else _listed(row[name], name)


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str):
        raise _Bad("not_text", f"holds {type(found).__name__} in {where}")
    return found
