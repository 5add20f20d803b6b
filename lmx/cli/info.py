"""Says what a trained run, a preset or this machine is.

Nothing is trained or loaded; shapes are enough.

  lmx info                                 this machine: jax, devices, packages
  lmx info runs/quickstart/model           a run: parameters, memory, FLOPs, tokenizer, how far it is trained
  lmx info SmolLM2-135M-Instruct.gguf      a released model: a GGUF file or a Hugging Face folder
  lmx info --preset 1b                     a model shape known by name
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lmx import cli


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path | None] = None
    """A run's folder, a Hugging Face folder or a .gguf file."""
    preset: str | None = None
    """A model shape known by name."""
    source: Path | None = None
    """The experiment that defines the run's own classes; it is executed."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "info")
    if asked.source is not None:
        from lmx import run as runs

        runs.experiment(asked.source)
    if asked.model is not None:
        from lmx.models import about, pretrained

        released = pretrained.is_released(asked.model)
        rows = about.released(pretrained.find(asked.model)) if released else _run(asked.model)
    elif asked.preset:
        from lmx.models import about, preset

        rows = about.shape(preset(asked.preset), 2048)
    else:
        rows = _machine()
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


def _machine() -> dict[str, str]:
    import os
    import platform

    import jax

    from lmx.train import cache_folder
    from lmx.train.record import PACKAGES, version

    devices = jax.devices()
    packages = ", ".join(f"{name} {v}" for name in PACKAGES if (v := version(name)))
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": packages,
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": str(jax.process_count()),
        "cpus": str(os.cpu_count()),
        "cache": str(cache_folder()),
    }


def _run(folder: Path) -> dict[str, str]:
    from lmx import run as runs
    from lmx.models import about
    from lmx.train import checkpoint, stored

    run = runs.load(folder / "run.txt")
    steps = checkpoint.steps(folder / checkpoint.FOLDER)
    rows = {"run": str(folder)} | about.shape(run.model, run.data.seq_len)
    if steps:
        about = stored.about(folder / checkpoint.FOLDER / str(max(steps)))
        if leaves := Counter(_leaves(about["meta"].get("weights"))):
            rows["weights"] = ", ".join(f"{n} {kind}" for kind, n in leaves.items())
        if head := stored.parameters(about).get("classes"):
            tasks = (getattr(source, "task", None) for source in run.data.train)
            labels = [
                label for task in tasks if task for label in getattr(task.answer, "labels", {}).values()
            ]
            named = f": {', '.join(labels)}" if labels else ""
            rows["head"] = f"{head[1][1][-1]} classes in place of words{named}"
    rows["tokenizer"] = f"{run.data.tokenizer}"
    batch = f"{run.data.batch_size} x {run.data.seq_len} tokens"
    rows["trained"] = f"{max(steps, default=0)} of {run.steps} steps of {batch}"
    if (folder / "data.json").exists():
        share = json.loads((folder / "data.json").read_text(encoding="utf-8")).get("loss_share")
        rows |= {} if share is None else {"trained on": f"{share:.1%} of the tokens of a batch"}
    rows["checkpoints"] = f"{steps}, best {checkpoint.best_step(folder / checkpoint.FOLDER)}"
    return rows


def _leaves(described: Any) -> Iterator[str]:
    """What `lmx.weights.describe` says of the leaves that are no plain arrays, each in words."""
    if isinstance(described, list):
        described = dict(enumerate(described))
    if not isinstance(described, dict):
        return
    if isinstance(described.get("weight"), str):
        bits = described["settings"].get("bits")
        yield described["weight"] + (f" of {bits} bits" if bits else "")
        described = described["arrays"]
    for inner in described.values():
        yield from _leaves(inner)
