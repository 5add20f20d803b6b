"""Trains every variant of an experiment with several seeds, and compares them with intervals.

Stop it and repeat the command: finished runs are kept, the one at hand goes on from its checkpoint.

  lmx sweep experiments/positions.py --seeds 3
  lmx sweep experiments/positions.py --seeds 3 --variants RoPE ALiBi --set steps=500
  lmx sweep experiments/positions.py --tiny                  see in CPU minutes that all of it runs
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
    """The experiment: a Python file with base() and variants()."""
    seeds: int = 3
    """Seeds 0 .. N - 1."""
    variants: tuple[str, ...] = ()
    """Only these; all if not given. base is left out when there are others."""
    set: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="PATH=VALUE")] = field(
        default_factory=list
    )
    """Changes a setting of every run; repeat it for more."""
    out: Path | None = None
    """Folder of the results; runs/NAME/sweep if not given."""
    tiny: bool = False
    """Shrinks every run to CPU minutes."""
    metric: str = "valid/loss"
    """What the table and the plot compare."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "sweep")
    from lmx import run as runs
    from lmx import sweep as sweeps
    from lmx import train as training
    from lmx.cli.report import write
    from lmx.report import sweep_report
    from lmx.report.sweeps import sweep_text
    from lmx.train.live import Live
    from lmx.train.standard import finished
    from lmx.train.standard import run as run_standard

    if asked.seeds < 1:
        raise ValueError(f"--seeds {asked.seeds}: at least 1")
    changes = cli.changes(asked.set)
    if "seed" in changes:
        raise ValueError(f"--set seed={changes['seed']}: a sweep sets it; --seeds N gives 0 to N - 1")
    experiment = runs.experiment(asked.file)
    names = asked.variants or tuple(v for v in experiment.runs if v != "base" or len(experiment.runs) == 1)
    chosen = {}
    for name in names:
        run = experiment.variant(name)
        chosen[name] = (run.tiny() if asked.tiny else run).override(changes)
        if asked.metric not in (measured := training.metric_names(chosen[name])):
            raise ValueError(f"--metric {asked.metric}: {name} measures {', '.join(measured)}")
    folder = cli.folder_name("sweep", asked.tiny, changes, chosen.values())
    out = asked.out or Path("runs", experiment.name, folder)
    total = len(chosen) * asked.seeds

    def train(run, folder: Path):
        session = training.session(run)
        if finished(session, folder):
            return
        sinks = [Live(run.steps, title=str(folder.relative_to(out)))]
        base = experiment.runs["base"]
        result = run_standard(session, folder, sinks=sinks, source=experiment.path, base=base)
        if result.interrupted:
            raise KeyboardInterrupt(f"saved step {result.step} of {folder}; repeat the command to go on")

    failed = []
    cells = sweeps.sweep(chosen, range(asked.seeds), out, train, asked.metric, _texts)
    for i, cell in enumerate(cells, 1):
        problem = cli.one_line(cell.error, cli.MOST)
        print(f"[{i}/{total}] {cell.path}: {cell.status} {problem}".rstrip(), flush=True)
        failed += [cell.path] if cell.status == "failed" else []
    page = out / "report.html"
    write(page, sweep_report(out))
    print(sweep_text(out))
    print(f"report {page}")
    if failed:
        again = "repeat the command to try them again"
        cli.fail(f"sweep: {len(failed)} of {total} runs failed: {', '.join(failed)}; {again}")


def _texts(run) -> str:
    """A hash of the texts that a run reads, and of what teaches it; empty where one is missing, which the run itself
    then tells."""
    from lmx import artifact
    from lmx.data import source

    try:
        texts = [source(x).fingerprint() for x in (*run.data.train, *run.data.valid)]
        return artifact.hash_text(" ".join([*texts, *(artifact.find(x).hash for x in run.enrich.files())]))
    except (ValueError, OSError):
        return ""
