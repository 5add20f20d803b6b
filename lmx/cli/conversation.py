"""A conversation and the commands in it, apart from who types and what answers.

A line is a message or, with a / in front, a command. When the last message is the user's, a reply is due.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lmx import values
from lmx.generate import Completion, Sampling

COMMANDS = {
    "/help": "these commands",
    "/system TEXT": "what the model is told before everything; without TEXT, nothing",
    "/retry": "another reply to the last message",
    "/undo": "takes back the last message and its reply",
    "/reset": "forgets all messages but the system's",
    "/set NAME=VALUE": "a setting of sampling, such as temperature=0.2; alone, shows them",
    "/history": "all messages",
    "/save FILE.jsonl": "keeps the messages, one a line",
    "/load FILE.jsonl": "goes on with messages that were kept",
    "/tokens": "how full the context is",
    "/stats": "tokens and speed of the last reply",
    "/quit": "ends; so do Ctrl-D and Ctrl-C",
}
HELP = "A line that ends with \\ goes on in the next one; // begins a message with /. Ctrl-C stops a reply."
ROLES = ("system", "user", "assistant")
Message = dict[str, str]


class Conversation:
    """messages: what was said so far, the system's first. reply_number: that of the next reply's random stream.

    context: tokens that the model reads and writes at most. left_out: messages that the last reply no longer saw, for
    want of room. over: whether /quit was said.
    """

    def __init__(
        self,
        ids: Callable[[Sequence[Message]], list[int]],
        context: int,
        sampling: Sampling,
        system: str | None = None,
    ):
        """ids: the prompt of messages, as token ids."""
        self.messages: list[Message] = []
        self.sampling, self.reply_number, self.left_out, self.over = sampling, 0, 0, False
        self._ids, self.context = ids, context
        self._stats: str | None = None
        self._own_files: set[Path] = set()
        self._system(system or "")

    @property
    def due(self) -> bool:
        """Whether the model has to reply."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def say(self, line: str) -> str:
        """Takes a message or does a command; what there is to show. Raises: ValueError, OSError for a bad command."""
        if not line.startswith("/") or line.startswith("//"):
            if line.strip():
                self.messages.append({"role": "user", "content": line.removeprefix("/")})
            return ""
        name, _, rest = line.strip().partition(" ")
        return self._command(name, rest.strip())

    def prompt(self) -> tuple[list[int], Sampling]:
        """The ids to go on from and how; the oldest exchanges are left out if the context has no room for them.

        Raises: ValueError if the last message alone is too long, or the template refuses the messages.
        """
        room = min(self.sampling.max_tokens, self.context // 2)
        first = next(i for i, message in enumerate(self.messages) if message["role"] != "system")
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        for start in [first, *(i for i in starts if i > first)]:
            ids = self._ids([*self.messages[:first], *self.messages[start:]])
            if len(ids) + room <= self.context:
                self.left_out = start - first
                most = min(self.sampling.max_tokens, self.context - len(ids))
                return ids, replace(self.sampling, max_tokens=most)
        raise ValueError(
            f"this message makes {len(ids):,} tokens, and a reply needs {room:,} of the {self.context:,} that the "
            "model reads; shorten it, or /set max_tokens to less"
        )

    def reply(self, text: str, completion: Completion | None, seconds: float) -> None:
        """Keeps the reply; completion is None for one that was stopped."""
        self.reply_number += 1
        if text or completion:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
        if completion:
            n = len(completion.tokens)
            end = "cut at max_tokens" if completion.reason == "length" else "ended by itself"
            self._stats = f"{n:,} tokens in {seconds:.2f} s, {n / max(seconds, 1e-9):.1f} tokens/s, {end}"
        else:
            self._stats = "stopped"

    def take_back(self) -> None:
        """Forgets the message that no reply can follow."""
        self.messages.pop()

    def _command(self, name: str, rest: str) -> str:
        match name:
            case "/help":
                width = max(map(len, COMMANDS))
                return "\n".join(
                    [*(f"{command:{width}}  {does}" for command, does in COMMANDS.items()), HELP]
                )
            case "/system":
                self._system(rest)
                return f"system: {rest}" if rest else "no system message"
            case "/retry":
                self._last_exchange()
                if self.messages[-1]["role"] == "assistant":
                    self.messages.pop()
                return ""
            case "/undo":
                at = self._last_exchange()
                told = f"taken back: {self.messages[at]['content']}"
                del self.messages[at:]
                return told
            case "/reset":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                return "a new conversation"
            case "/set":
                return self._set(rest)
            case "/history":
                return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages) or "nothing was said"
            case "/save":
                return self._save(rest)
            case "/load":
                return self._load(rest)
            case "/tokens":
                return self._tokens()
            case "/stats":
                return self._stats or "no reply yet"
            case "/quit":
                self.over = True
                return ""
        names = [command.split()[0] for command in COMMANDS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"no command {name}; {hint} (a message that begins with / is written with //)")

    def _system(self, text: str) -> None:
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *others]

    def _last_exchange(self) -> int:
        """Where the last message of the user is."""
        at = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not at:
            raise ValueError("nothing was said yet; write a message first")
        return at[-1]

    def _set(self, text: str) -> str:
        if text:
            name, sign, value = text.partition("=")
            if not sign:
                raise ValueError(f"/set {text}: write /set NAME=VALUE, such as /set temperature=0.2")
            self.sampling = values.override(self.sampling, {name.strip(): value.strip()})
        return values.show(self.sampling)

    def _tokens(self) -> str:
        if not self.messages:
            return f"0 of {self.context:,} tokens"
        n = len(self._ids(self.messages))
        told = f"{n:,} of {self.context:,} tokens ({n / self.context:.0%})"
        return told + (
            f"; the last reply saw all but the oldest {self.left_out} messages" if self.left_out else ""
        )

    def _save(self, name: str) -> str:
        path = self._file("/save", name)
        if path.exists() and path.resolve() not in self._own_files:
            raise ValueError(f"/save {path}: it is already there; name a new file")
        lines = (json.dumps(message, ensure_ascii=False) for message in self.messages)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._own_files.add(path.resolve())
        return f"saved {len(self.messages)} messages as {path}"

    def _load(self, name: str) -> str:
        path = self._file("/load", name)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
        found = [_message(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
        late = [i for i, message in enumerate(found) if i and message["role"] == "system"]
        if not found or late:
            raise ValueError(
                f"{path}: " + ("a system message stands first or nowhere" if late else "no messages in it")
            )
        self.messages = found
        self._own_files.add(path.resolve())
        return f"loaded {len(found)} messages from {path}"

    @staticmethod
    def _file(command: str, name: str) -> Path:
        if not name:
            raise ValueError(f"{command}: name a file, such as {command} chat.jsonl")
        return Path(name).expanduser()


def _message(line: str, where: str) -> Message:
    """A line of a file of messages. Raises: ValueError naming the line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error!s:.100})") from None
    content = found.get("content") if isinstance(found, dict) else None
    if not isinstance(content, str) or found.get("role") not in ROLES:
        raise ValueError(
            f'{where}: {line!r:.99} is no message; write {{"role": "user", "content": "..."}}, with a role of '
            f"{', '.join(ROLES)}"
        )
    return {"role": found["role"], "content": content}
