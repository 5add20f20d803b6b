"""Prints where an artifact came from: its whole ancestry, from the raw text to the model.

Whatever of it is still in its place is compared with the hash it had then.

  lmx explain runs/quickstart/english/checkpoints/400
  lmx explain runs/quickstart/tokenizer.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lmx import cli


@dataclass(frozen=True)
class Options:
    path: tyro.conf.Positional[Path]
    """A dataset, tokenizer, checkpoint, run or report."""


def main(argv: list[str]) -> None:
    from lmx import artifact

    print(artifact.explain(cli.options(Options, argv, __doc__, "explain").path))
