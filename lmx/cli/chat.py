"""Talks with a model that was trained to converse, in its own format.

  lmx chat SmolLM2-135M-Instruct.gguf                    a released model: GGUF or Hugging Face folder, or a run of it
  lmx chat MODEL --system "You answer in Hindi." --temperature 0.3 --max-tokens 200
  lmx chat RUN --template chat_template.jinja            a model that came without a chat template, or another one
  printf 'नमस्ते\\n/retry\\n' | lmx chat MODEL             lines from standard input; replies on standard output

Type a message; end a line with \\ to go on in the next. Ctrl-C stops a reply and keeps what was shown of it, at the
prompt it ends the chat, as Ctrl-D does. Commands begin with /:

  /help                    all of them
  /retry, /undo            another reply; takes the last exchange back
  /system TEXT, /reset     another instruction; a new conversation
  /set temperature=0.2     any setting of sampling
  /save FILE.jsonl, /load FILE.jsonl, /history, /tokens, /stats, /quit

When a conversation outgrows what the model reads at once, its oldest messages are left out, and that is said.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lmx import cli
from lmx.generate import Sampling


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A Hugging Face folder, a .gguf file or a run's folder."""
    system: str | None = None
    """What the model is told before everything."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(temperature=0.8, max_tokens=512)
    template: Path | None = None
    """A file with a chat template (Jinja), instead of the model's own."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of a run's parameters."""
    cache: Literal["float", "int8"] = "float"
    """How keys and values of what was read are kept: int8 takes about a quarter of the memory, and rounds them."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "chat")
    from lmx.cli.conversation import Conversation
    from lmx.run import trained
    from lmx.train.loop import keep_compiled

    keep_compiled()
    model = trained(asked.model, cli.step_of(asked.model, asked.step), asked.ema).for_decoding(asked.cache)
    ids = messages_to_ids(model, asked.model, asked.template)
    context = min(model.context, model.model.config.position.max_len() or model.context)
    talk(Conversation(ids, context, asked.sampling, asked.system), model)


def messages_to_ids(model, path: Path, file: Path | None) -> Callable[[list[dict[str, str]]], list[int]]:
    """Messages -> the ids of a prompt, by the template in `file` or the model's own.

    Raises: ValueError if there is neither.
    """
    from lmx.data import ChatTemplate
    from lmx.text.normalize import normalize, strip_controls

    template = model.chat
    if file is not None:
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
        named = {role: token for role, token in model.tokenizer.roles.items() if token}
        template = ChatTemplate(source, template.specials if template else named, str(file))
    if template is None:
        raise ValueError(
            f"{path} has no chat template, so it was hardly trained to converse; `lmx generate {path}` goes on from "
            "a text, and --template FILE gives a template to use (Jinja, as in a chat_template.jinja)"
        )

    def ids(messages: list[dict[str, str]]) -> list[int]:
        if model.run.data.clean:  # as the text it was trained on
            messages = [m | {"content": strip_controls(normalize(m["content"]))} for m in messages]
        found = template.ids(model.tokenizer, messages)
        if not found:
            raise ValueError(
                f"{template.name} writes nothing for these messages; give another with --template FILE"
            )
        return found

    return ids


def talk(conversation, model) -> None:
    """Reads lines and shows replies until the end of input."""
    from lmx.generate import Memory

    terminal, memory = sys.stdin.isatty() and sys.stdout.isatty(), Memory()
    if terminal:
        with contextlib.suppress(ImportError):  # line editing and history, where the system has them
            import readline  # noqa: F401
        print(_dim(f"context {conversation.context:,} tokens; /help for commands", terminal))
    while not conversation.over:
        try:
            line = _line("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            print() if terminal else None
            return
        try:
            said = conversation.say(line)
        except (ValueError, OSError) as error:
            _note(cli.sentence(error), terminal)
            continue
        if said:
            print(said, flush=True)
        if conversation.due:
            _reply(conversation, model, memory, terminal)


def _reply(conversation, model, memory, terminal: bool) -> None:
    from lmx.generate import stream

    before, start, text, completion = conversation.left_out, time.perf_counter(), "", None
    try:
        ids, sampling = conversation.prompt()
        if conversation.left_out > before:
            _note(
                f"the conversation outgrew the context: its oldest {conversation.left_out} messages are left out "
                "of what the model sees; /reset begins a new one",
                terminal,
            )
        parts = model.model, model.params, model.tokenizer
        pieces = stream(*parts, ids, sampling, row=conversation.reply_number, memory=memory)
        while True:
            piece = next(pieces)
            text += piece
            print(piece, end="", flush=True)
    except StopIteration as end:
        completion = end.value
    except KeyboardInterrupt:
        pass  # what was shown stays said
    except ValueError as error:
        conversation.take_back()
        _note(f"{cli.sentence(error)} (your message is taken back)", terminal)
        return
    print(flush=True)
    if completion is None and not text:
        _note("stopped before the first word; your message is taken back", terminal)
    conversation.reply(text, completion, time.perf_counter() - start)
    if terminal:
        print(_dim(conversation.say("/stats"), terminal))


def _line(prompt: str) -> str:
    """A message, of several lines where they end with a backslash. Raises: EOFError."""
    lines = []
    while True:
        line = input(prompt)
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
        prompt = prompt and ". "


def _note(text: str, terminal: bool) -> None:
    print(_dim(text, terminal), file=sys.stderr, flush=True)


def _dim(text: str, terminal: bool) -> str:
    return f"\x1b[2m{text}\x1b[0m" if terminal else text
