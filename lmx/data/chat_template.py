"""A conversation as the text that a model was trained to go on from, by the template that comes with the model.

    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    template.render([{"role": "user", "content": "नमस्ते"}])
    template.ids(tokenizer, [{"role": "user", "content": "नमस्ते"}])        a prompt for generate

A template is a Jinja program from whoever made the model. It runs in a process of its own (chat_worker.py), which is
started with the first call, answers the following ones too, and has limits on time and memory.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import regex

from .tokenizer_json import Tokenizer

SECONDS = 5.0
"""That one rendering may take, the compilation of the template included."""
START = 60.0
"""Seconds that the process may take to start."""
SOURCE, MOST = 1 << 20, 1 << 24
"""Characters of a template; of the messages as JSON, and of the text it makes of them."""
Messages = Sequence[Mapping[str, Any]]


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

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of the messages, each {"role": "system" | "user" | "assistant", "content": text}.

        Args:
          add_generation_prompt: end with the beginning of a reply.
          variables: more names for the template, such as tools or enable_thinking.
        Raises: ValueError for a template that is no Jinja, fails, refuses these messages (as one that wants user and
          assistant in turn), or takes too much time or memory; and for what JSON cannot hold.
        Source: transformers, apply_chat_template, with the same names defined.
        """
        names = {"tools": None, "documents": None, **self.specials, **variables}
        names |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        request = {"source": self.source, "names": names, "most": MOST, "seconds": SECONDS + 1}
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.name}: these messages are no JSON ({error}); give text") from None
        if len(line) > MOST:
            raise ValueError(
                f"{self.name}: messages of {len(line):,} characters; at most {MOST:,} are taken, leave some out"
            )
        found = _PROCESS.ask(line)
        if "text" in found:
            return found["text"]
        raise ValueError(f"{self.name} {_told(found)}")

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


def _marked(messages: Messages, specials: Sequence[str], source: str) -> tuple[Messages, str]:
    """The messages with a mark in every special token that they spell, and the mark; "" if they spell none.

    A spelling is also found where it is spread over neighbouring texts, which a template may join.
    """
    if not specials:
        return messages, ""
    texts = list(_texts(messages))
    whole = "".join(texts)
    found = regex.finditer("|".join(map(regex.escape, specials)), whole, overlapped=True)
    cut = set()
    for match in found:
        if len(match[0]) == 1:
            raise ValueError(
                f"a message spells the special token {match[0]!r}, which cannot be written otherwise"
            )
        cut.add(match.start())
    if not cut:
        return messages, ""
    used = {*whole, *source}
    mark = next((char for char in map(chr, range(0xE000, 0xF900)) if char not in used), None)
    if mark is None:
        raise ValueError(
            "the messages spell a special token, and hold every private-use character; leave some out"
        )
    starts = list(accumulate(map(len, texts), initial=0))
    parts = iter(
        "".join(char + mark if start + i in cut else char for i, char in enumerate(text))
        for start, text in zip(starts, texts)
    )
    return _with_texts(messages, parts), mark


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

    def ask(self, line: str) -> dict[str, Any]:
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
