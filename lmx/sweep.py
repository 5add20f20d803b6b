"""Variants x seeds, one after the other, resumable at any point: a question asked often enough to trust the answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: `path` is its folder below the sweep's; status is planned, running, done or failed."""

    variant: str
    seed: int
    path: str
    status: str = "planned"
    error: str = ""


def sweep(
    runs: dict[str, Any],
    seeds: Iterable[int],
    out: str | Path,
    train: Callable[[Any, Path], Any],
    metric: str = "valid/loss",
) -> Iterator[Cell]:
    """Trains every run with every seed and yields each cell as it ends. Cells that are done are not run again.

    A cell that fails is recorded and does not stop the others; ask again and it is tried again from its checkpoint.
    Args:
      runs: by variant.
      train: (run, folder) -> anything; trains to the end, or goes on from what is in the folder.
      metric: the one the sweep's report compares.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    cells = [Cell(variant, seed, f"{variant}/seed{seed}") for seed in seeds for variant in runs]
    done = {(cell.variant, cell.seed): cell for cell in read(out) if cell.status == "done"}
    cells = [done.pop((cell.variant, cell.seed), cell) for cell in cells]
    others = list(done.values())
    for i, cell in enumerate(cells):
        if cell.status != "done":
            run = replace(runs[cell.variant], seed=cell.seed)
            _write(out, metric, [*cells[:i], replace(cell, status="running"), *cells[i + 1 :], *others])
            try:
                train(run, out / cell.path)
                cells[i] = replace(cell, status="done", error="")
            except (ValueError, OSError, RuntimeError) as error:
                cells[i] = replace(cell, status="failed", error=str(error))
            _write(out, metric, [*cells, *others])
        yield cells[i]


def read(out: str | Path) -> list[Cell]:
    """The cells of a sweep's folder as they stand; none for a new folder."""
    file = Path(out) / "sweep.json"
    if not file.exists():
        return []
    try:
        return [Cell(**cell) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not a sweep's file ({error}); remove it and repeat the command") from None


def _write(out: Path, metric: str, cells: list[Cell]) -> None:
    partial = out / f"sweep.json.{os.getpid()}.tmp"
    partial.write_text(
        json.dumps({"metric": metric, "cells": [asdict(c) for c in cells]}, indent=1, ensure_ascii=False),
        encoding="utf-8",
    )
    os.replace(partial, out / "sweep.json")
