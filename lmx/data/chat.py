"""Conversations to learn replies from: a source of documents {"messages": [{"role", "content"}, ...], "id": str}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .sources import Document, _Files, array_hint, encodable, json_objects, opened_parquet, parquet_rows
from .tally import Report

ROLES = ("system", "user", "assistant", "tool")
NAMES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
"""Who speaks -> the role; the first two are ShareGPT's."""
SHAPES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""The fields by which the shape of a row is known."""


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
        rows = _parquet(path, report) if path.suffix == ".parquet" else json_objects(path, report)
        for where, row in rows:
            try:
                messages = messages_of(row)
            except _Bad as bad:
                report.skip(bad.reason, f"{where} {bad}")
                continue
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant") + 1
            if last < len(messages):
                report.note("messages_after_the_last_reply", where, len(messages) - last)
            yield {"messages": messages[:last], "id": where}

    def _hint(self) -> str:
        first = self.files()[0]
        shapes = "; ".join(", ".join(map(repr, shape)) for shape in SHAPES)
        return (
            first.suffix != ".parquet" and array_hint(first)
        ) or f"\nEach row is to have one of: {shapes}."


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


def _parquet(path: Path, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a Parquet file, of those columns that make a shape."""
    known = {name for shape in (*SHAPES, ("input",)) for name in shape}
    with opened_parquet(path) as file:
        names = file.schema_arrow.names
        found = [name for name in names if name in known]
        if not found or len(set(found)) < len(found):
            raise ValueError(
                f"{path}: it has the columns {', '.join(map(repr, names))}, of which Chat reads each of "
                f"{', '.join(sorted(known))} once; rename them"
            )
        yield from parquet_rows(file, path, found, report)
