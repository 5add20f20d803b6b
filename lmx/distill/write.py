"""What a teacher writes to many questions, for students to be trained on as on any conversations.

    write(Records("questions.jsonl"), ["text"], itemgetter("text"), read, reply, "written.jsonl", ...)

Each line of the file is a reply that was kept, {"prompt", "completion"} among its fields, which `lmx.data.Chat` reads.
Source: sequence-level distillation, Kim and Rush 2016, arXiv:1606.07947, section 3.2; the vote over several replies is
self-consistency, Wang et al. 2022, arXiv:2203.11171, section 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmx import artifact, values
from lmx.data import Records, Report

from .lines import lines
from .score import Seen

BLOCK = 64
"""Questions that are answered together, and lost at most by a kill."""
GRAM = 4
"""Tokens of what counts as said again."""
CHOICES = ("all", "likeliest", "vote")


class Reply(Protocol):
    """What is looked at of a completion (`lmx.generate.Completion`)."""

    text: str
    tokens: tuple[int, ...]
    reason: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Keep:
    """Which replies to a question are kept: of those that are left, all that differ, or one.

    choose: "likeliest" by the mean log probability of its tokens, "vote" the text that was written most often, the
    likeliest of equals. ended: leaves out replies that were cut at max_tokens. loops: leaves out those of which more
    than this share of their runs of 4 tokens had been in them before.
    """

    choose: str = "all"
    ended: bool = True
    loops: float = 0.5

    def __post_init__(self):
        if self.choose not in CHOICES:
            raise ValueError(f"Keep: choose={self.choose!r}; use {', '.join(map(repr, CHOICES))}")
        values.check(self, loops="[0, 1]")

    def of(self, replies: Sequence[Reply]) -> tuple[list[Reply], Counter[str]]:
        """Those that are kept, the likeliest first, and how many were left out why."""
        left, out = [], Counter()
        for reply in replies:
            why = self.objection(reply)
            if why:
                out[why] += 1
            else:
                left.append(reply)
        votes = Counter(reply.text.strip() for reply in left)
        left.sort(key=likelihood, reverse=True)
        first: dict[str, Reply] = {}
        for reply in left:
            first.setdefault(reply.text.strip(), reply)
        different = list(first.values())
        if self.choose == "vote":
            different.sort(key=lambda reply: -votes[reply.text.strip()])
        if len(left) > len(different):
            out["equal_replies"] += len(left) - len(different)
        if self.choose != "all" and len(different) > 1:
            out["not_chosen"] += len(different) - 1
            different = different[:1]
        return different, out

    def objection(self, reply: Reply) -> str | None:
        if not reply.text.strip():
            return "empty_reply"
        if self.ended and reply.reason == "length":
            return "reply_cut_at_max_tokens"
        grams = [reply.tokens[i : i + GRAM] for i in range(len(reply.tokens) - GRAM + 1)]
        if len(grams) - len(set(grams)) > self.loops * len(grams):
            return "reply_in_a_loop"
        return None


def likelihood(reply: Reply) -> float:
    """Nats per token."""
    return sum(reply.logprobs) / max(1, len(reply.logprobs))


def write(
    records: Records,
    fields: Sequence[str],
    question: Callable[[Mapping[str, Any]], str],
    read: Callable[[str], Sequence[int]],
    reply: Callable[[Sequence[Sequence[int]], Sequence[int]], Iterable[tuple[int, Reply]]],
    out: str | Path,
    *,
    how: str,
    origin: Sequence[str | Path | artifact.Artifact],
    samples: int = 1,
    keep: Keep = Keep(),
    seen: Seen = lambda done, of: None,
) -> Report:
    """Writes the replies to every row of `records` that are kept into a JSONL file; an earlier call's are gone on from.

    Args:
      fields: of a row that are written too. question: of a row what is asked.
      read: the ids that the teacher sees of a question; a ValueError leaves it out, counted. reply: of ids, and of the
        numbers of their random streams, as `lmx.generate.completions` gives them.
      how: what tells question, read and reply from others. origin: what the teacher was read from. samples: replies to
        each.
    Returns: what was left out, but by earlier calls. Raises: as `Records.rows`, `lines` and `reply`.
    """
    ours = {"prompt", "completion", "log_p", "row"}
    if taken := sorted(ours & set(fields)):
        raise ValueError(
            f"write: rows have a field {taken[0]!r}, which what is written has too; rename or leave it out"
        )
    parents = [artifact.find(x) for x in origin]
    of = {"teacher": [x.hash for x in parents], "records": records.fingerprint(), "prompt or sampling": how}
    of |= {"samples": samples, "keep": repr(keep), "fields": list(fields)}
    report = Report()
    with lines(out, "replies", of, [*parents, *records.files()]) as growing:
        if growing is None:
            return report
        rows = list(records.rows(fields, report))
        written = [line["row"] for line in growing.rows()]
        done = written[-1] if written else 0  # of which replies may be missing
        growing.cut(written.index(done) if written else 0)
        seen(done, len(rows))
        for first in range(done, len(rows), BLOCK):
            asked = {}
            for i, (where, row) in enumerate(rows[first : first + BLOCK], first):
                try:
                    asked[i] = read(question(row))
                except ValueError as error:
                    report.skip("question_that_cannot_be_read", f"{where} {error}")
            streams = [i * samples + s for i in asked for s in range(samples)]
            replies: dict[int, dict[int, Reply]] = {i: {} for i in asked}
            for n, found in reply([asked[stream // samples] for stream in streams], streams):
                replies[streams[n] // samples][streams[n]] = found
            new = []
            for i, of_row in replies.items():
                where, row = rows[i]
                kept, left_out = keep.of([of_row[stream] for stream in sorted(of_row)])
                for why, n in left_out.items():
                    report.skip(why, where, n)
                for one in kept:
                    said = {
                        "prompt": question(row),
                        "completion": one.text,
                        "log_p": round(likelihood(one), 4),
                    }
                    new.append({**row, **said, "row": i})
            growing.add(new)
            seen(min(first + BLOCK, len(rows)), len(rows))
    return report
