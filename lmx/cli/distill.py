"""A teacher labels in bulk, for students to learn from.

  lmx distill label TEACHER corpus.txt --out labels             the 64 likeliest after every token, and the tail
  lmx distill label TEACHER "data/*.jsonl" --out labels --k 16 --context 512
  lmx distill label TEACHER experiment.py --out labels          the text of a run, tokenized and cut as that has it
  lmx distill score TEACHER new.csv --out scored.jsonl          a number in [0, 1] for each row, by its head of classes
  lmx distill score TEACHER new.jsonl --template "{title}: {body}" --out scored.jsonl
  lmx distill write TEACHER questions.jsonl --out written.jsonl    a reply to each row's text
  lmx distill write TEACHER new.csv --template "Translate into Hindi: {text}" --samples 4 --choose likeliest

TEACHER is a run's folder, quantized or not; but for scores also a Hugging Face folder or a .gguf file. If its tokenizer
is another than that of the experiment, it labels those tokens that end where its own do. Train on labels with
data.teacher=TeacherTopK("labels") and a divergence such as ForwardKL() in the objective, on scores with SoftLabels(),
on replies as on any conversations: data.train=(Chat("written.jsonl"),). Repeat the command to go on where it stopped.
Several processes may label the same text together; each takes shards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lmx import cli
from lmx.generate import Sampling


@dataclass(frozen=True)
class Label:
    """Keeps a teacher's likeliest tokens after every token of a text."""

    teacher: tyro.conf.Positional[Path]
    """A run's folder, a Hugging Face folder or a .gguf file."""
    text: tyro.conf.Positional[tuple[str, ...]]
    """Files, patterns, sources, or one experiment (.py) whose run is to learn from the labels."""
    out: Path = Path("labels")
    """The folder of labels."""
    k: int = 64
    """Tokens kept of each; 4 bytes each, and 2 more."""
    bits: int = 16
    """Of a log probability: 16, or 8."""
    context: int | None = None
    """Tokens read at once, as long as the student's rows; that of the experiment, or 256, or less if
    the teacher reads less."""
    overlap: int = 0
    """Tokens of a long document that are read again, so that the next ones see them."""
    batch_tokens: int = 4096
    shard_tokens: int = 1 << 17
    """What a kill costs at most."""
    variant: str = "base"
    """Of the experiment."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""


@dataclass(frozen=True)
class Score:
    """Writes rows with the teacher's score of each."""

    teacher: tyro.conf.Positional[Path]
    """A run's folder, with a head of two classes."""
    records: tyro.conf.Positional[str]
    """Rows: a file, a pattern or tfds:name."""
    out: Path = Path("scored.jsonl")
    """The file to make."""
    template: str = "{text}"
    """What the teacher reads of a row, as it was trained to; fields as {name}, \\n is a new line."""
    field: str = "score"
    """Of the score in what is written."""
    keep: tuple[str, ...] = ()
    """Fields that are written besides those of the template."""
    batch_tokens: int = 4096
    step: str = "latest"
    """Of the run's checkpoint: latest, best or a number."""


@dataclass(frozen=True)
class Write:
    """Writes the teacher's replies to rows of a file."""

    teacher: tyro.conf.Positional[Path]
    """A run's folder, a Hugging Face folder or a .gguf file."""
    records: tyro.conf.Positional[str]
    """Rows: a file, a pattern or tfds:name."""
    out: Path = Path("written.jsonl")
    """The file to make."""
    template: str = "{text}"
    """What the teacher is asked of a row; fields as {name}, \\n is a new line."""
    keep: tuple[str, ...] = ()
    """Fields that are written besides those of the template."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(temperature=0.8)
    samples: int = 1
    """Replies to each row."""
    choose: Literal["all", "likeliest", "vote"] = "all"
    """Of several: all that differ, the one of most probability per token, or the one that was written most often."""
    cut: bool = False
    """Keeps replies that --max-tokens cut, too."""
    loops: float = 0.5
    """Leaves out a reply of which more than this share repeats itself."""
    plain: bool = False
    """The teacher goes on from the text, instead of answering it in its chat format."""
    batch_size: int = 16
    """Replies that are computed at once."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""


Options = (
    Annotated[Label, tyro.conf.subcommand("label")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Write, tyro.conf.subcommand("write")]
)


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "distill")
    from lmx.train.loop import keep_compiled

    keep_compiled()
    {Label: label, Score: score, Write: write}[type(asked)](asked)


def label(asked: Label) -> None:
    from lmx import data, distill
    from lmx.cli.progress import Progress, Tokens
    from lmx.train.loop import cache_folder

    teacher, origin = _teacher(asked)
    found = _data(asked, teacher.context)
    with Progress() as progress:
        prepared = data.prepare(found, cache_folder() / "data", progress=progress)
    prepared.report.warn("the text")
    has, words = teacher.model.config.vocab_size, teacher.tokenizer.vocab_size
    if has > words:
        print(
            f"the teacher has {has - words} words beyond the tokenizer's {words}; what they hold is left out"
        )
    with Tokens("labels") as seen:
        paths = distill.label(
            teacher,
            prepared,
            asked.out,
            origin=origin,
            k=asked.k,
            bits=asked.bits,
            context=asked.context,
            overlap=asked.overlap,
            batch_tokens=asked.batch_tokens,
            shard_tokens=asked.shard_tokens,
            seen=seen,
        )
    n = sum(store.n_tokens for store in prepared.train_stores)
    size = sum(x.stat().st_size for path in paths for x in path.glob("*.bin"))
    print(f"{asked.out}: {n:,} tokens, {size / n:.0f} bytes each; data.teacher=TeacherTopK('{asked.out}')")
    if teacher.tokenizer.hash != prepared.tokenizer.hash:
        known = sum(data.Taught(str(path)).n_known for path in paths) / n
        print(
            f"the teacher's tokens end where the student's do at {known:.0%} of them; the others say nothing: learn "
            'with mask="teacher_mask"'
        )


def score(asked: Score) -> None:
    from lmx import distill
    from lmx.cli.progress import Steps
    from lmx.cli.task import escaped
    from lmx.tasks import Records, Template

    template = Template(escaped(asked.template), f"{{{asked.field}}}")
    teacher, origin = _teacher(asked)
    with Steps("scores") as seen:
        report = distill.score_records(
            teacher,
            Records(asked.records),
            tuple(dict.fromkeys((*template.fields, *asked.keep))),
            template.question_of,
            asked.out,
            how=template.question,
            origin=origin,
            field=asked.field,
            batch_tokens=asked.batch_tokens,
            seen=seen,
        )
    report.warn(asked.records)
    print(f"wrote {asked.out}")


def write(asked: Write) -> None:
    from lmx import distill
    from lmx.cli.chat import messages_to_ids
    from lmx.cli.progress import Steps
    from lmx.cli.task import escaped
    from lmx.generate import completions
    from lmx.generate.decode import prompt_ids
    from lmx.tasks import Records, Template

    if asked.samples < 1 or asked.batch_size < 1:
        raise ValueError(f"--samples {asked.samples} --batch-size {asked.batch_size}: give at least 1")
    template = Template(escaped(asked.template), "{completion}")
    teacher, origin = _teacher(asked)
    if not asked.plain:
        ids = messages_to_ids(teacher, asked.teacher, None)
    teacher = teacher.for_decoding()
    parts = teacher.model, teacher.params, teacher.tokenizer

    def read(text: str):
        shown = text if asked.plain else ids([{"role": "user", "content": text}])
        (found,) = prompt_ids(teacher.model, teacher.tokenizer, [shown], asked.sampling.max_tokens)
        if len(found) + asked.sampling.max_tokens > teacher.context:
            raise ValueError(f"{len(found)} tokens leave no room for a reply in {teacher.context}")
        return found

    def reply(prompts, streams):
        return completions(*parts, prompts, asked.sampling, rows=streams, batch_size=asked.batch_size)

    with Steps("rows") as seen:
        report = distill.write(
            Records(asked.records),
            tuple(dict.fromkeys((*template.fields, *asked.keep))),
            template.question_of,
            read,
            reply,
            asked.out,
            how=f"{'text' if asked.plain else 'chat'}: {template.question}; {asked.sampling}",
            origin=origin,
            samples=asked.samples,
            keep=distill.Keep(asked.choose, not asked.cut, asked.loops),
            seen=seen,
        )
    report.warn(asked.records)
    print(f"wrote {asked.out}; data.train=(Chat({str(asked.out)!r}),)")


def _teacher(asked):
    """(the model, what it was read from)."""
    from lmx.run import trained
    from lmx.train import Load

    step = cli.step_of(asked.teacher, asked.step) if (asked.teacher / "run.txt").exists() else "latest"
    return trained(asked.teacher, step), Load(str(asked.teacher), step).files()


def _data(asked: Label, context: int):
    from lmx import run as runs
    from lmx.data import Data, File

    if not asked.text:
        raise ValueError(
            "distill label: name a text, or the experiment whose run is to learn from the labels"
        )
    if len(asked.text) == 1 and asked.text[0].endswith(".py"):
        found = runs.experiment(asked.text[0]).variant(asked.variant).data
        return replace(found, teacher=None)
    sources = tuple(map(cli.source_of, asked.text))
    length = min(256, context) if asked.context is None else asked.context
    return Data(sources, valid_share=0.0, tokenizer=File(str(asked.teacher)), seq_len=length)
