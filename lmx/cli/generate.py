"""Writes text with a trained model. One prompt is shown while it is written, in whole graphemes.

lmx generate runs/shakespeare_char/base "KING."
lmx generate RUN "भारत के " --temperature 0.7 --top-p 0.95 --max-tokens 200
lmx generate RUN "To be" --samples 4 --seed 1 --stop "." --step best
lmx generate SmolLM2-135M-Instruct.gguf "The capital of India is"       a released model, GGUF or Hugging Face folder
lmx generate MODEL "What is a tokenizer?" --chat       a question, in the format the model was trained to converse in
lmx generate BIG.gguf "Once" --draft SMALL.gguf       a smaller model of the same tokenizer drafts tokens
lmx generate MODEL "Is it good? " --pattern "yes|no"       only what matches a regular expression, as a whole
lmx generate MODEL "नाम, उम्र: " --schema FILE.json       only JSON that satisfies a schema
lmx generate RUN --file prompts.txt --save            a prompt a line, as a batch; kept in RUN/samples.jsonl
echo "Once upon" | lmx generate RUN - --json          the prompt from standard input; a JSON object a line
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lmx import cli
from lmx.generate import Completion, Sampling, json_pattern

MOST_BYTES = 2**20
"""Of a schema."""


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """A run's folder, a Hugging Face folder or a .gguf file."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to go on from, - for standard input; without any, the model begins by itself."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(temperature=0.8)
    file: Path | None = None
    """A file with a prompt a line."""
    chat: bool = False
    """Each prompt is a user's message, and a reply is written: the model's chat template is put around it."""
    system: str | None = None
    """With --chat: what the model is told before everything."""
    template: Path | None = None
    """With --chat: a file with a chat template (Jinja), instead of the model's own."""
    schema: Path | None = None
    """A file with a JSON schema, which what is written satisfies: --pattern with `lmx.generate.json_pattern` of it."""
    samples: int = 1
    """Completions of each prompt."""
    batch_size: int = 16
    """Completions that are computed at once; one with --draft."""
    step: str = "latest"
    """Of the checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of the parameters, which a run with optim.ema keeps."""
    source: Path | None = None
    """The experiment that defines the run's own classes; it is executed."""
    cache: Literal["float", "int8"] = "float"
    """How keys and values of what was read are kept: int8 takes about a quarter of the memory, and rounds them."""
    draft: Path | None = None
    """A smaller model of the same tokenizer, which drafts tokens that RUN checks; what is written follows RUN."""
    draft_tokens: int = 4
    """Tokens drafted between two checks."""
    save: bool = False
    """Adds what was written to RUN/samples.jsonl, for the report."""
    json: bool = False
    """Prints a JSON object a line: prompt, text, reason, tokens."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "generate")
    from lmx.cli.chat import messages_to_ids
    from lmx.generate.decode import prompt_ids
    from lmx.run import experiment, trained
    from lmx.text.normalize import normalize, strip_controls
    from lmx.train.loop import keep_compiled

    if asked.samples < 1 or asked.batch_size < 1:
        raise ValueError(f"--samples {asked.samples} --batch-size {asked.batch_size}: give at least 1")
    if not asked.chat and (asked.system is not None or asked.template is not None):
        raise ValueError("--system and --template say how a message is put to the model; add --chat")
    if asked.save and asked.run.is_file():
        raise ValueError(
            f"--save writes into a run's folder, and {asked.run} is a file; use --json, or convert it"
        )
    if asked.schema is not None:
        asked = replace(asked, sampling=replace(asked.sampling, pattern=_schema(asked)))
    if asked.draft is not None and asked.sampling.pattern is not None:
        raise ValueError("--draft is not supported with --pattern or --schema; leave one of the two out")
    prompts = [prompt for prompt in _prompts(asked) for _ in range(asked.samples)]
    if asked.source is not None:
        experiment(asked.source)
    step = cli.step_of(asked.run, asked.step)
    keep_compiled()
    model = trained(asked.run, step, asked.ema).for_decoding(asked.cache)
    if model.run.data.clean:  # as the text it was trained on
        prompts = [strip_controls(normalize(prompt)) for prompt in prompts]
    written = []
    read = prompts
    if asked.chat:
        ids = messages_to_ids(model, asked.run, asked.template)
        system = [] if asked.system is None else [{"role": "system", "content": asked.system}]
        read = [ids([*system, {"role": "user", "content": prompt}]) for prompt in prompts]
    read = prompt_ids(model.model, model.tokenizer, read, asked.sampling.max_tokens)  # before one is shown
    write = _written if asked.draft is None else _drafted
    for prompt, completion in write(model, prompts, read, asked):
        written.append({"prompt": prompt, "text": completion.text, "reason": completion.reason})
        if asked.json:
            print(json.dumps({**written[-1], "tokens": completion.tokens}, ensure_ascii=False), flush=True)
    if asked.save:
        path = asked.run / "samples.jsonl"
        with path.open("a", encoding="utf-8") as file:
            for sample in written:
                note = f"temperature {asked.sampling.temperature:g}, ended by {sample['reason']}"
                record = {"step": step, "prompt": sample["prompt"], "text": sample["text"], "note": note}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"saved {path}", file=sys.stderr)


def _schema(asked: Options) -> str:
    """The pattern of the schema's file."""
    if asked.sampling.pattern is not None:
        raise ValueError("--pattern and --schema both say what is written; give one")
    with asked.schema.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{asked.schema}: more than {MOST_BYTES:,} bytes; give a smaller schema")
    try:
        return json_pattern(json.loads(text))
    except RecursionError:
        raise ValueError(f"{asked.schema}: too many brackets within each other; nest less") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{asked.schema} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{asked.schema}: {error}") from None


def _prompts(asked: Options) -> list[str]:
    prompts = [sys.stdin.read().removesuffix("\n") if p == "-" else p for p in asked.prompts]
    if asked.file is not None:
        try:
            lines = asked.file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{asked.file}: not UTF-8 text (byte {error.start})") from None
        prompts += [line for line in lines if line]
        if not prompts:
            raise ValueError(f"{asked.file}: no prompt in it; write one a line")
    return prompts or [""]


def _written(model, prompts: list[str], read: list, asked: Options) -> Iterator[tuple[str, Completion]]:
    """Each prompt and its completion; prints them unless JSON was asked for. read: what the model reads of each."""
    from lmx.generate import completions, stream

    parts = model.model, model.params, model.tokenizer
    if len(prompts) == 1:
        show = _shower(asked)
        show("" if asked.chat else prompts[0])
        pieces = stream(*parts, read[0], asked.sampling)
        while True:
            try:
                show(next(pieces))
            except StopIteration as end:
                show("\n")
                yield prompts[0], end.value
                return
    done: dict[int, Completion] = {}
    order = iter(range(len(prompts)))
    row = next(order)
    for i, completion in completions(*parts, read, asked.sampling, batch_size=asked.batch_size):
        done[i] = completion
        while row in done:
            prompt, completion = prompts[row], done.pop(row)
            if not asked.json:
                print(f"── {row + 1} of {len(prompts)}, ended by {completion.reason}")
                print(prompt, completion.text, sep="\n" if asked.chat else "", end="\n\n", flush=True)
            yield prompt, completion
            row = next(order, -1)


def _drafted(model, prompts: list[str], read: list, asked: Options) -> Iterator[tuple[str, Completion]]:
    """As `_written`, one prompt after another, with a draft; tells on stderr how much of it was accepted."""
    from lmx.generate import Acceptance, Draft, speculate
    from lmx.run import trained

    small = trained(asked.draft).for_decoding(asked.cache)
    if small.tokenizer.hash != model.tokenizer.hash:
        raise ValueError(
            f"--draft {asked.draft}: its tokenizer is not that of {asked.run} ({small.tokenizer}, "
            f"{model.tokenizer}); give a model of the same tokenizer"
        )
    draft = Draft(small.model, small.params, asked.draft_tokens)
    total, show = Acceptance(0, 0, 0), _shower(asked)

    def show_row(_, text: str) -> None:
        show(text)

    for row, prompt in enumerate(prompts):
        show(f"── {row + 1} of {len(prompts)}\n" if len(prompts) > 1 else "")
        show("" if asked.chat else prompt)
        parts = model.model, model.params, model.tokenizer, [read[row]], asked.sampling
        (completion,), acceptance = speculate(*parts, draft=draft, rows=[row], chunk=1, show=show_row)
        show("\n\n" if len(prompts) > 1 else "\n")
        total += acceptance
        yield prompt, completion
    print(f"draft: {total}", file=sys.stderr)


def _shower(asked: Options) -> Callable[[str], None]:
    """Prints text as it comes, unless JSON was asked for."""
    return lambda text: None if asked.json else print(text, end="", flush=True)
