"""Fine-tunes a model for a task in several ways, and compares what each learns, forgets and costs.

  lmx tune MODEL sst2 --data FOLDER                            in full and by adapters, on all training records
  lmx tune MODEL sst2 --data FOLDER --ways full lora:4 lora:64 qlora:16 head --examples 1000
  lmx tune MODEL --test dev.csv --train train.csv --template "{text}\\nMood:" --labels 0=bad,1=good
  lmx tune MODEL sst2 --data FOLDER --shots 8 --text general.txt --limit 200
  lmx tune MODEL sst2 --data FOLDER --best accuracy --patience 3 --noise 5 --smoothing 0.1

A way is full, lora:RANK, qlora:RANK (on a base in 4 bits) or head (a linear layer on the last hidden state, for tasks
of choices); RATE@WAY sets a learning rate: 1e-4@full. Of the training records some are held out, to find the best
step by; the test records judge that step, next to the model as it was with --shots of them in its prompt. --text is
what it shall not forget. Repeat the command to go on where it stopped: what is done is not done again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmx import cli
from lmx.cli.task import OfTask, task_of

if TYPE_CHECKING:
    from lmx.run import Run

WAYS = ("full", "lora", "qlora", "head")
CHARACTERS = 40_000


@dataclass(frozen=True)
class Options(OfTask):
    ways: tuple[str, ...] = ("full", "lora:16")
    """full, lora:RANK, qlora:RANK, head; RATE@WAY sets a learning rate."""
    examples: int | None = None
    """Training records to learn from, drawn by the seed; all if not given."""
    epochs: float = 2.0
    """How often each is seen."""
    seq_len: int = 128
    """Tokens in a row, which holds several examples."""
    batch_size: int = 8
    """Rows in a step."""
    shots: tuple[int, ...] = ()
    """Also judges the untrained model with so many balanced examples in its prompt."""
    limit: int | None = None
    """Judges that many test examples, drawn at random."""
    text: Path | None = None
    """Other text, of which the first paragraphs show what is forgotten."""
    valid_share: float = 0.05
    """Of the training records, held out to find the best step by."""
    best: str = "loss"
    """What the best step is chosen by on them: loss, or a metric of the task, as accuracy."""
    patience: int | None = None
    """Ends a way after so many of its 8 evaluations without a new best."""
    noise: float = 0.0
    """On embeddings while training (NEFTune): 5 is usual."""
    smoothing: float = 0.0
    """Share of the target spread over all words: 0.1 is usual."""
    seed: int = 0
    out: Path | None = None
    """Folder of runs and report; runs/tune/TASK if not given."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "tune")
    task = task_of(asked)
    ways = {name: way(name) for name in asked.ways}
    from lmx import tune
    from lmx.tasks import Shots
    from lmx.train.loop import keep_compiled

    keep_compiled()
    text = tune.paragraphs(asked.text, CHARACTERS) if asked.text else ()
    run = tune.tuning(
        asked.model,
        task,
        examples=asked.examples,
        epochs=asked.epochs,
        seq_len=asked.seq_len,
        batch_size=asked.batch_size,
        valid_share=asked.valid_share,
        best=asked.best,
        patience=asked.patience,
        noise=asked.noise,
        smoothing=asked.smoothing,
        seed=asked.seed,
    )
    out = asked.out or Path("runs", "tune", task.name)
    shots = {f"{k} shots": Shots(k, "balanced", asked.seed) for k in asked.shots}
    runs = {name.replace(":", "-"): make(run) for name, make in ways.items()}
    found = tune.compare(runs, task, out, text=text, shots=shots, limit=asked.limit)
    print(tune.table(found).text())
    print(f"report {out / 'report.html'}")


def way(text: str) -> Callable[[Run], Run]:
    """The function that makes a run of this way. Raises: ValueError naming what it cannot read."""
    rate, _, rest = text.rpartition("@")
    name, _, rank = rest.partition(":")
    ranked = name in ("lora", "qlora")
    try:
        settings = {"lr": float(rate)} if rate else {}
        settings |= {"rank": int(rank)} if rank else {}
    except ValueError:
        settings = None
    if name not in WAYS or settings is None or (rank and not ranked):
        raise ValueError(
            f"--ways {text}: write {', '.join(WAYS)}, with a rank as lora:16, a rate as 1e-4@full"
        )

    def make(run: Run) -> Run:
        from lmx import tune

        return getattr(tune, name)(run, **settings)

    return make
