"""A conversation as the text that a model was trained to go on from, by the template that comes with the model.

    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    template.render([{"role": "user", "content": "नमस्ते"}])
    template.ids(tokenizer, [{"role": "user", "content": "नमस्ते"}])        a prompt for generate
    template.replies(tokenizer, conversations)        ids to train on, and which of them are the assistant's

A template is a Jinja program from whoever made the model. It runs in a process of its own (chat_worker.py), which is
started with the first call, answers the following ones too, and has limits on time and memory.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from .tokenizer_json import Tokenizer

SECONDS = 5.0
"""That one rendering may take, the compilation of the template included."""
START = 60.0
"""Seconds that the process may take to start."""
SOURCE, MOST = 1 << 20, 1 << 24
"""Characters of a template; of the messages as JSON, and of the text it makes of them."""
GROUP = 1 << 19
"""Characters of JSON above which no further conversation joins a request."""
Messages = Sequence[Mapping[str, Any]]
PLAIN = """{{ bos_token }}{% for message in messages %}{{ message.role + ':\n' + message.content + eos_token + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"""
"""The template of a model that has none: each message is its role, a colon, its text and the end token.

    <|bos|>user:
    नमस्ते<|eos|>
    assistant:
    नमस्ते!<|eos|>
"""


class Replies(NamedTuple):
    """ids [n] of a conversation up to its last reply; mask [n] uint8, 1 on the tokens of replies, the end token of each
    included; left_out: replies that are not among them, since the template rewrites them once more is said."""

    ids: list[int]
    mask: np.ndarray
    left_out: int


@dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja, as in a chat_template.jinja. specials: what it may name, bos_token and others. name: for errors.

    Raises: ValueError for a template that is too long.
    """

    source: str
    specials: Mapping[str, str] = field(default_factory=dict)
    name: str = "the chat template"

    def __post_init__(self):
        if len(self.source) > SOURCE:
            raise ValueError(f"{self.name} has {len(self.source):,} characters; at most {SOURCE:,} are read")

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the text it makes."""
        return hashlib.sha256(repr((self.source, sorted(self.specials.items()))).encode()).hexdigest()

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of the messages, each {"role": "system" | "user" | "assistant", "content": text}.

        Args:
          add_generation_prompt: end with the beginning of a reply.
          variables: more names for the template, such as tools or enable_thinking.
        Raises: ValueError for a template that is no Jinja, fails, refuses these messages (as one that wants user and
          assistant in turn), or takes too much time or memory; and for what JSON cannot hold.
        Source: transformers, apply_chat_template, with the same names defined.
        """
        renders = [(len(messages), add_generation_prompt)]
        found = self._ask([_Asked(messages, renders, ("", ""))], variables)
        ((answer,),) = found
        if "text" in answer:
            return answer["text"]
        raise ValueError(f"{self.name} {_told(answer)}")

    def ids(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        add_generation_prompt: bool = True,
        reply: str = "",
        **variables: Any,
    ) -> list[int]:
        """The token ids of `render`, and of a reply that goes on with its text. The template's special tokens are
        special; those that a message or the reply spells are text.

        Without such spellings these are the ids of the whole rendered text; no bos is added to the template's own.
        With them, a private-use character that occurs nowhere else is put behind the first character of each spelling
        before rendering. The text is cut, and encoded, at these marks, so that no spelling reaches the tokenizer whole.

        Raises: ValueError as `render`, and for a text that the tokenizer cannot encode.
        """
        ends = (tokenizer.token(i) for i in tokenizer.end_ids)
        written = [*messages, {"content": reply}]
        marked, mark = _marked(written, (*tokenizer.specials, *filter(None, ends)), self.source)
        *marked, begun = marked
        text = self.render(marked, add_generation_prompt, **variables) + begun["content"]
        first, *others = text.split(mark) if mark else [text]
        ids = tokenizer.encode(first, specials=True)
        for part in others:
            ids += tokenizer.encode(part, specials=True, begins=False)
        return ids

    def replies(
        self, tokenizer: Tokenizer, conversations: Iterable[Messages], **variables: Any
    ) -> Iterator[Replies | str]:
        """For each conversation its ids, as `ids` has them, and which are of the assistant's replies; or, as a text,
        why the template cannot say so.

        A template with {% generation %} says itself what a reply is. Of any other, a reply is what stands after the
        messages before it and the beginning of a reply, up to its end token: the first special token after its text, or
        all that the template writes of it if there is none. Both are looked up in renderings of the conversation's
        first messages, which must be what the whole begins with. Where they are not, as with a template that leaves
        out what was thought before earlier answers, the reply is not marked, but counted in `left_out`.
        A token never belongs to a reply in part: one that would is cut in two, as in a prompt that ends there.

        Raises: ValueError for a template that is no Jinja, or takes too much time or memory.
        """
        ends = (tokenizer.token(i) for i in tokenizer.end_ids)
        specials = tuple(dict.fromkeys((*tokenizer.specials, *filter(None, ends))))
        for group in _groups(conversations):
            asked = [self._asked(messages, specials) for messages in group]
            fine = [one for one in asked if not isinstance(one[0], str)]
            answers = iter(self._ask_each([one for one, _ in fine], variables))
            for one, mark in asked:
                yield (
                    one
                    if isinstance(one, str)
                    else self._found(tokenizer, one, mark, next(answers), specials)
                )

    def _asked(self, messages: Messages, specials: Sequence[str]) -> tuple[_Asked | str, str]:
        """(what to ask of a conversation or why there is nothing to ask, the mark in what its messages spell)"""
        at = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not at:
            return "it holds no reply", ""
        try:
            marked, mark = _marked(messages[: at[-1] + 1], specials, self.source)
            if not _GENERATION.search(self.source):
                renders = [render for i in at for render in ((i, True), (i + 1, False))]
                return _Asked(marked, renders, ("", "")), mark
            used = {*"".join(_texts(marked)), *self.source}
            return _Asked(
                marked, [(len(marked), False)], (_unused(used), _unused({*used, _unused(used)}))
            ), mark
        except ValueError as error:
            return str(error), ""

    def _found(
        self, tokenizer: Tokenizer, asked: _Asked, mark: str, answers: list[dict], specials: Sequence[str]
    ) -> Replies | str:
        if bad := next((answer for answer in answers if "text" not in answer), None):
            return f"{self.name} {_told(bad)}"
        texts = [answer["text"] for answer in answers]
        if asked.marks[0]:
            text, spans = _between(texts[0], *asked.marks)
            n_replies = len(spans)
        else:
            text, n_replies = texts[-1], len(texts) // 2
            spans = _spans(texts, specials)
        if not spans:
            return (
                f"{self.name} writes no reply that could be told apart: what it begins one with is not what it writes "
                "of one that was given; put {% generation %} and {% endgeneration %} around replies in it"
            )
        ids, mask = _masked(tokenizer, text, mark, spans)
        return Replies(ids, mask, n_replies - len(spans))

    def _ask_each(self, asked: list[_Asked], variables: Mapping[str, Any]) -> list[list[dict]]:
        """As `_ask`; where one of several takes too much, they are asked one by one. Raises: ValueError for a template
        that no conversation can use."""
        found = self._ask(asked, variables)
        if len(asked) > 1 and any(answer.get("kind") in ("slow", "died") for answer in found[0]):
            found = [self._ask([one], variables)[0] for one in asked]
        for answer in (answer for answers in found for answer in answers):
            if answer.get("kind") in ("syntax", "slow", "memory", "deep", "died"):
                raise ValueError(f"{self.name} {_told(answer)}")
        return found

    def _ask(self, asked: Sequence[_Asked], variables: Mapping[str, Any]) -> list[list[dict]]:
        """For each conversation an answer to each of its renders: {"text"}, or what `_told` tells."""
        if not asked:
            return []
        request = {
            "source": self.source,
            "names": {"tools": None, "documents": None, **self.specials, **variables},
            "most": MOST,
            "seconds": SECONDS + 1,
        }
        each = [one._asdict() | {"messages": list(one.messages)} for one in asked]
        try:
            line = json.dumps(request | {"conversations": each})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.name}: these messages are no JSON ({error}); give text") from None
        if len(line) > MOST:
            raise ValueError(
                f"{self.name}: messages of {len(line):,} characters; at most {MOST:,} are taken, leave some out"
            )
        found = _PROCESS.ask(line)
        return found if isinstance(found, list) else [[found] * len(one.renders) for one in asked]


_GENERATION = regex.compile(r"\{%[-+]?\s*generation\b")


def _groups(conversations: Iterable[Messages]) -> Iterator[list[Messages]]:
    group, size = [], 0
    for messages in conversations:
        length = len(json.dumps(messages))
        if group and size + length > GROUP:
            yield group
            group, size = [], 0
        group.append(messages)
        size += length
    if group:
        yield group


def _between(text: str, before: str, after: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and [start, end) of what stood between two."""
    kept, spans, at, start = [], [], 0, None
    for part in regex.split(f"([{before}{after}])", text):
        if part == before:
            start = at
        elif part == after:
            if start is not None and at > start:
                spans.append((start, at))
            start = None
        else:
            kept.append(part)
            at += len(part)
    return "".join(kept), spans


def _spans(texts: Sequence[str], specials: Sequence[str]) -> list[tuple[int, int]]:
    """[start, end) of the replies in the last text. For each reply there are two: what stands before it with the
    beginning of a reply, and all up to it."""
    whole, spans = texts[-1], []
    for before, upto in zip(texts[::2], texts[1::2]):
        start, end = len(before), _end_of_turn(upto, len(before), specials)
        if end > start and upto.startswith(before) and whole.startswith(upto[:end]):
            spans.append((start, end))
    return spans


def _end_of_turn(text: str, start: int, specials: Sequence[str]) -> int:
    """Where a reply ends, of which `text` is all from `start` on: behind the first of the special tokens at its end."""
    at, first = len(text), len(text)
    while True:
        at = max(start, len(text[start:at].rstrip()) + start)
        token = next((x for x in specials if text.endswith(x, start, at)), None)
        if token is None:
            return first
        first, at = at, at - len(token)


def _masked(
    tokenizer: Tokenizer, text: str, mark: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], np.ndarray]:
    """The ids of a text that is cut at each mark, and whether a token is of one of the spans."""
    at = [i for i, char in enumerate(text) if char == mark] if mark else []
    cuts = {i - n for n, i in enumerate(at)}
    bounds = [b - sum(i < b for i in at) for span in spans for b in span]
    text = text.replace(mark, "") if mark else text
    while True:
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for a, b in pairwise([0, *sorted(cuts - {0, len(text)}), len(text)]):
            found, where = tokenizer.located(text[a:b], begins=a == 0)
            ids += found
            places += [(a + start, a + end) for start, end in where]
        start, end = np.array(places, np.int64).reshape(-1, 2).T
        special = np.isin(ids, tokenizer.special_ids)  # which may take spaces beside them
        crossed = {b for b in bounds if ((start < b) & (b < end) & ~special).any()} - cuts
        if not crossed:
            break
        cuts |= crossed
    mask = np.zeros(len(ids), np.uint8)
    for a, b in zip(bounds[::2], bounds[1::2]):
        mask[(start >= a) & (start < b)] = 1
    return ids, mask


class _Asked(NamedTuple):
    """renders: (so many messages, with the beginning of a reply); marks: around {% generation %}."""

    messages: Messages
    renders: list[tuple[int, bool]]
    marks: tuple[str, str]


def _marked(messages: Messages, specials: Sequence[str], source: str) -> tuple[Messages, str]:
    """The messages with a mark in every special token that they spell, and the mark; "" if they spell none.

    A spelling is also found where it is spread over neighbouring texts, which a template may join.
    """
    if not specials:
        return messages, ""
    texts = list(_texts(messages))
    whole = "".join(texts)
    cut = set()
    for match in _any_of(tuple(specials)).finditer(whole, overlapped=True):
        if len(match[0]) == 1:
            raise ValueError(
                f"a message spells the special token {match[0]!r}, which cannot be written otherwise"
            )
        cut.add(match.start())
    if not cut:
        return messages, ""
    mark = _unused({*whole, *source})
    starts = list(accumulate(map(len, texts), initial=0))
    parts = iter(
        "".join(char + mark if start + i in cut else char for i, char in enumerate(text))
        for start, text in zip(starts, texts)
    )
    return _with_texts(messages, parts), mark


@functools.lru_cache(maxsize=8)
def _any_of(names: tuple[str, ...]) -> regex.Pattern:
    return regex.compile("|".join(map(regex.escape, names)))


def _unused(used: set[str]) -> str:
    """A private-use character that is not in use."""
    mark = next((char for char in map(chr, range(0xE000, 0xF900)) if char not in used), None)
    if mark is None:
        raise ValueError("the messages hold every private-use character, and one is needed; leave some out")
    return mark


NOT_WRITTEN = ("role", "type")
"""Keys whose values a program chose: they decide what a template does, and are not marked."""


def _texts(value: Any) -> Iterator[str]:
    """Every string that a person or model may have written, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in NOT_WRITTEN:
                yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _with_texts(value: Any, texts: Iterator[str]) -> Any:
    """The same, with other strings."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {key: item if key in NOT_WRITTEN else _with_texts(item, texts) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_with_texts(item, texts) for item in value]
    return value


def _told(found: Mapping[str, Any]) -> str:
    at = f" at its line {found['line']}" if found.get("line") else ""
    match found["kind"]:
        case "syntax":
            return f"is not Jinja{at}: {found['message']}; mend it, or give another"
        case "refused":
            return f"refuses these messages: {found['message']}"
        case "slow":
            return f"took more than {SECONDS:g} s and was stopped; it may never end: give another"
        case "memory":
            return "took more memory than it may have; give another"
        case "deep":
            return "nests or calls itself too deep; give another"
        case "long":
            return f"writes more than {MOST:,} characters; give another"
        case "died":
            return f"ended the process that renders it (status {found['status']}); give another"
    return f"fails{at}: {found['message']}; it may want other messages, or is broken: give another"


class _Process:
    """The process that renders, started when it is first asked, again after it was ended, and for each fork."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: subprocess.Popen | None = None
        self._owner = 0

    def ask(self, line: str) -> Any:
        with self._lock:
            if self._running is None or self._owner != os.getpid() or self._running.poll() is not None:
                self._start()
            answer, slow = self._exchange(line, SECONDS)
            if answer and not slow:
                return json.loads(answer)
            status = self._end()
            return {"kind": "slow"} if slow else {"kind": "died", "status": status}

    def _start(self) -> None:
        found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        if None in found:
            raise ImportError("chat templates need jinja2; `pip install jinja2`", name="jinja2")
        folders = dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found)
        worker = Path(__file__).with_name("chat_worker.py")
        self._running = subprocess.Popen(
            [sys.executable, "-I", str(worker), *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        if self._exchange("", START)[0] != "ready\n":
            raise RuntimeError(f"{worker} did not start in {START:g} s (status {self._end()})")

    def _exchange(self, line: str, seconds: float) -> tuple[str, bool]:
        """(the answer or "", whether the process was stopped for its time)"""
        process, slow = self._running, threading.Event()

        def stop():
            slow.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            if line:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            return process.stdout.readline(), slow.is_set()
        except BrokenPipeError:
            return "", slow.is_set()
        except BaseException:  # such as Ctrl-C: the next question must not read this one's answer
            self._end()
            raise
        finally:
            timer.cancel()

    def _end(self) -> int:
        """Ends the process; its exit status."""
        process, self._running = self._running, None
        process.kill()
        status = process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # of what was not read
            process.stdin.close()
        return status

    def close(self) -> None:
        if self._running is not None and self._owner == os.getpid():
            self._end()


_PROCESS = _Process()
atexit.register(_PROCESS.close)
