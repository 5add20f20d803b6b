"""Writes one HTML page about a run or a sweep, from the files in its folder.

The page needs nothing beside it. A run in progress can be looked at.

  lmx report runs/shakespeare_char/base
  lmx report runs/positions/sweep --out positions.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lmx import artifact, cli


@dataclass(frozen=True)
class Options:
    folder: tyro.conf.Positional[Path]
    """A run's folder, or a sweep's."""
    out: Path | None = None
    """The page; report.html in the folder if not given."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "report")
    from lmx.report import run_report, sweep_report

    if not asked.folder.is_dir():
        raise FileNotFoundError(f"{asked.folder}: no such folder; give a run's or a sweep's")
    is_sweep = (asked.folder / "sweep.json").exists()
    write(asked.out or asked.folder / "report.html", (sweep_report if is_sweep else run_report)(asked.folder))
    print(asked.out or asked.folder / "report.html")


def write(page: Path, html: str) -> None:
    """Writes a page whole or not at all."""
    page.parent.mkdir(parents=True, exist_ok=True)
    artifact.write(page, html)
