"""Writes text with a trained model. One prompt is shown while it is written, in whole graphemes.

lmx generate runs/shakespeare_char/base "KING."
lmx generate RUN "भारत के " --temperature 0.7 --top-p 0.95 --max-tokens 200
lmx generate RUN "To be" --samples 4 --seed 1 --stop "." --step best
lmx generate SmolLM2-135M-Instruct.gguf "The capital of India is"       a released model, GGUF or Hugging Face folder
lmx generate BIG.gguf "Once" --draft SMALL.gguf       a smaller model of the same tokenizer drafts tokens
lmx generate RUN --file prompts.txt --save            a prompt a line, as a batch; kept in RUN/samples.jsonl
echo "Once upon" | lmx generate RUN - --json          the prompt from standard input; a JSON object a line
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lmx import cli
from lmx.generate import Completion, Sampling


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """A run's folder, a Hugging Face folder or a .gguf file."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to go on from, - for standard input; without any, the model begins by itself."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(temperature=0.8)
    file: Path | None = None
    """A file with a prompt a line."""
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
    from lmx.run import experiment, trained
    from lmx.text.normalize import normalize, strip_controls

    if asked.samples < 1 or asked.batch_size < 1:
        raise ValueError(f"--samples {asked.samples} --batch-size {asked.batch_size}: give at least 1")
    prompts = [prompt for prompt in _prompts(asked) for _ in range(asked.samples)]
    if asked.source is not None:
        experiment(asked.source)
    step = cli.step_of(asked.run, asked.step)
    model = trained(asked.run, step, asked.ema)
    if model.run.data.clean:  # as the text it was trained on
        prompts = [strip_controls(normalize(prompt)) for prompt in prompts]
    written = []
    write = _written if asked.draft is None else _drafted
    for prompt, completion in write(model, prompts, asked):
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


def _written(model, prompts: list[str], asked: Options) -> Iterator[tuple[str, Completion]]:
    """Each prompt and its completion; prints them unless JSON was asked for."""
    from lmx.generate import generate, stream

    parts = model.model, model.params, model.tokenizer
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True) if not asked.json else None
        pieces = stream(*parts, prompts[0], asked.sampling)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                print() if not asked.json else None
                yield prompts[0], end.value
                return
            print(piece, end="", flush=True) if not asked.json else None
    for start in range(0, len(prompts), asked.batch_size):
        some = prompts[start : start + asked.batch_size]
        rows = range(start, start + len(some))
        for row, prompt, completion in zip(rows, some, generate(*parts, some, asked.sampling, rows=rows)):
            if not asked.json:
                print(f"── {row + 1} of {len(prompts)}, ended by {completion.reason}")
                print(f"{prompt}{completion.text}\n", flush=True)
            yield prompt, completion


def _drafted(model, prompts: list[str], asked: Options) -> Iterator[tuple[str, Completion]]:
    """As `_written`, one prompt after another, with a draft; tells on stderr how much of it was accepted."""
    from lmx.generate import Acceptance, Draft, speculate
    from lmx.run import trained

    small = trained(asked.draft)
    if small.tokenizer.hash != model.tokenizer.hash:
        raise ValueError(
            f"--draft {asked.draft}: its tokenizer is not that of {asked.run} ({small.tokenizer}, "
            f"{model.tokenizer}); give a model of the same tokenizer"
        )
    draft = Draft(small.model, small.params, asked.draft_tokens)
    total = Acceptance(0, 0, 0)

    def show(row: int, text: str) -> None:
        print(text, end="", flush=True) if not asked.json else None

    for row, prompt in enumerate(prompts):
        show(row, f"── {row + 1} of {len(prompts)}\n{prompt}" if len(prompts) > 1 else prompt)
        parts = model.model, model.params, model.tokenizer, [prompt], asked.sampling
        (completion,), acceptance = speculate(*parts, draft=draft, rows=[row], chunk=1, show=show)
        show(row, "\n\n" if len(prompts) > 1 else "\n")
        total += acceptance
        yield prompt, completion
    print(f"draft: {total}", file=sys.stderr)
