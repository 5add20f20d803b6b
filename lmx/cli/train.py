"""Trains the run of an experiment file.

Ctrl-C saves the step at hand. Repeat a command to go on where it stopped: a run resumes from its newest
checkpoint, bit for bit. A run that is complete is left as it is.

  lmx train experiments/shakespeare_char.py
  lmx train experiments/positions.py --variant ALiBi --set seed=1 --set optim.lr=3e-4
  lmx train FILE --set 'data.train=("a.txt", "b/*.jsonl.zst")' --set 'model.position=RoPE(theta=5e5)'
  lmx train experiments/positions.py --tiny                  any run in CPU minutes
  lmx train experiments/shakespeare_char.py --show           the resolved run, without training
  lmx train FILE --set mesh.fsdp=4 --set mesh.data=-1        on a mesh; --distributed on several hosts
"""

from __future__ import annotations

import signal
import sys
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
    folder = cli.folder_name(asked.variant, asked.tiny, changes, [run])
    out = asked.out or Path("runs", experiment.name, folder)
    more = {"tensorboard": asked.tensorboard, "wandb": asked.wandb, "distributed": asked.distributed}
    train(experiment, run, out, **more)


def train(experiment, run, out: Path, *, tensorboard=False, wandb=None, distributed=False) -> None:
    """Trains with the live display, then writes and names the report.

    Raises: KeyboardInterrupt, after a checkpoint, if it was asked to stop.
    """
    import jax

    if distributed:
        jax.distributed.initialize()
    from lmx import train as training
    from lmx.cli.progress import Progress
    from lmx.train.checkpoint import FOLDER, steps
    from lmx.train.standard import finished
    from lmx.train.standard import run as run_standard

    first = jax.process_index() == 0
    with Progress() as progress:
        session = training.session(run, progress=progress if first else None)
    if finished(session, out):
        if first:
            step = max(steps(out / FOLDER))
            print(f"{out} is complete at step {step}; nothing to do. To train anew, give another --out")
        return
    sinks = _sinks(run, out, tensorboard, wandb) if first else []
    result = run_standard(session, out, sinks=sinks, source=experiment.path, base=experiment.runs["base"])
    page = _report(out) if first else None
    if result.interrupted:
        saved = f"saved step {result.step} of {run.steps} in {out}"
        if result.interrupted == signal.SIGINT:
            raise KeyboardInterrupt(f"{saved}; repeat the command to go on")
        print(f"{saved} on SIGTERM; repeat the command to go on", flush=True)
        return
    if first:
        valid = result.metrics.get("valid/loss")
        held_out = f", held out {valid:.4f}" if valid is not None else ""
        named = f"; report {page}" if page else ""
        early = f" of {run.steps}, stopped early: {result.early};" if result.early else ","
        print(f"{out}: {result.step} steps{early} loss {result.metrics['loss']:.4f}{held_out}{named}")


def _sinks(run, out: Path, tensorboard: bool, wandb: str | None) -> list:
    from lmx import artifact, values
    from lmx.train.live import Live
    from lmx.train.metrics import TensorBoard, Wandb

    sinks = [Live(run.steps, title=str(out))]
    if tensorboard:
        sinks.append(TensorBoard(out / "tensorboard"))
    if wandb:
        run_id = artifact.hash_text(str(out.resolve()))[:16]
        sinks.append(Wandb(wandb, name=str(out), config=values.leaves(run), run_id=run_id))
    return sinks


def _report(out: Path) -> Path | None:
    """Writes the page. Whatever fails here is said, and takes nothing from the run, which is on disk."""
    from lmx.cli.report import write
    from lmx.report import run_report

    page = out / "report.html"
    try:
        write(page, run_report(out))
    except Exception as error:  # a page is never worth a finished run
        problem = cli.one_line(f"{type(error).__name__}: {error}", cli.MOST)
        print(f"the run is whole, but its report failed: {problem}", file=sys.stderr)
        print(f"try again: lmx report {out}", file=sys.stderr)
        return None
    return page
