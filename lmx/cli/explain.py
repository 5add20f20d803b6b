"""Prints where something came from: its whole ancestry, from the model down to the raw text.

Whatever of it is still in its place is compared with the hash it had then; what is no longer the same is told
in capitals.

  lmx explain runs/quickstart/model                    a run: its newest checkpoint
  lmx explain runs/quickstart/model/checkpoints/400
  lmx explain runs/quickstart/tokenizer.json
  lmx explain runs/quickstart/model/results.json       an evaluation: of which checkpoint, on which text
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lmx import cli


@dataclass(frozen=True)
class Options:
    path: tyro.conf.Positional[Path]
    """A run, checkpoint, tokenizer, prepared data set or result."""


def main(argv: list[str]) -> None:
    from lmx import artifact

    path = cli.options(Options, argv, __doc__, "explain").path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "run.txt").exists():
        saved = [folder for folder in (path / "checkpoints").glob("*") if folder.name.isdecimal()]
        newest = max(saved, key=lambda folder: int(folder.name), default=None)
        path = path / "run.txt" if newest is None else newest
    print(artifact.explain(path, check_parents=True))
