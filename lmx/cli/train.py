"""Trains the run of an experiment file.

Repeat a command to go on where it stopped: a run resumes from its newest checkpoint, bit for bit.

  lmx train experiments/shakespeare_char.py
  lmx train experiments/positions.py --variant alibi --set seed=1 --set optim.lr=3e-4
  lmx train experiments/positions.py --tiny                  any run in CPU minutes
  lmx train experiments/shakespeare_char.py --show           the resolved run, without training
  lmx train FILE --set mesh.fsdp=4 --set mesh.data=-1        on a mesh; --distributed on several hosts
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lmx import cli


@dataclass(frozen=True)
class Options:
    file: tyro.conf.Positional[Path]
    """The experiment: a Python file with base() and perhaps variants()."""
    variant: str = "base"
    set: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="PATH=VALUE")] = field(
        default_factory=list
    )
    """Changes a setting; repeat it for more."""
    out: Path | None = None
    """Folder of the results; runs/NAME/VARIANT if not given, with the changed settings in its name."""
    tiny: bool = False
    """Shrinks the run to CPU minutes."""
    show: bool = False
    """Prints the resolved run and stops."""
    tensorboard: bool = False
    """Also writes TensorBoard events."""
    wandb: str | None = None
    """Also logs to this Weights & Biases project, if it is installed."""
    distributed: bool = False
    """Joins the other processes of this run through jax.distributed before anything else."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "train")
    from lmx import run as runs
    from lmx import values

    experiment = runs.experiment(asked.file)
    changes = cli.changes(asked.set)
    run = experiment.variant(asked.variant)
    run = (run.tiny() if asked.tiny else run).override(changes)
    if asked.show:
        print(values.show(run))
        return
    out = asked.out or Path("runs", experiment.name, "-".join([asked.variant, *(["tiny"] if asked.tiny else []), *_name(changes)]))
    train(run, out, asked.file, tensorboard=asked.tensorboard, wandb=asked.wandb, distributed=asked.distributed)


def train(run, out: Path, source: Path | None, *, tensorboard=False, wandb=None, distributed=False) -> None:
    """Trains with the live display, then writes and names the report."""
    import jax

    if distributed:
        jax.distributed.initialize()
    from lmx import train as training
    from lmx.report import run_report
    from lmx.train.live import Live
    from lmx.train.metrics import TensorBoard, Wandb
    from lmx.train.standard import run as run_standard

    session = training.session(run)
    sinks = [Live(run.steps)] if jax.process_index() == 0 else []
    if tensorboard:
        sinks.append(TensorBoard(out / "tensorboard"))
    if wandb:
        sinks.append(Wandb(wandb, name=str(out)))
    result = run_standard(session, out, sinks=sinks, source=source)
    if jax.process_index() == 0:
        page = out / "report.html"
        page.write_text(run_report(out), encoding="utf-8")
        state = "stopped at" if result.interrupted else "done:"
        valid = result.metrics.get("valid/loss", result.metrics.get("loss", float("nan")))
        print(f"{state} step {result.step}, loss {valid:.4f}; report {page}")


def _name(changes: dict[str, str]) -> list[str]:
    return [f"{path.split('.')[-1]}={text}".replace("/", "_") for path, text in changes.items()]
