"""Variants x seeds, one after the other, resumable at any point: a question asked often enough to trust it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmx import artifact, values
from lmx.data.store import explained


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: `path` is its folder below the sweep's; status is planned, running, done or failed.

    run: hash of the run's settings and texts, so that a cell is known to be done with these very ones.
    """

    variant: str
    seed: int
    path: str
    status: str = "planned"
    error: str = ""
    run: str = ""


def sweep(
    runs: dict[str, Any],
    seeds: Iterable[int],
    out: str | Path,
    train: Callable[[Any, Path], Any],
    metric: str = "valid/loss",
    texts: Callable[[Any], str] = lambda run: "",
) -> Iterator[Cell]:
    """Trains every run with every seed and yields each cell as it ends. Cells that are done are not run again.

    A cell that fails is recorded and does not stop the others; ask again and it, or one that was killed, is
    tried again from its checkpoint.
    Args:
      runs: by variant.
      train: (run, folder) -> anything; trains to the end, or goes on from what is in the folder. Only an
        exception that is no `Exception`, such as KeyboardInterrupt, ends the sweep.
      metric: the one the sweep's report compares.
      texts: a run -> a hash of the texts it reads, so that cells trained on other text are not compared.
    Raises: ValueError if the sweep's file is damaged, a cell is done with other settings or other text, or
      another process sweeps there.
    """
    out = Path(out)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    asked = [(replace(runs[variant], seed=seed), variant, seed) for seed in seeds for variant in runs]
    with artifact.alone(out / ".lock"):
        yield from _sweep(asked, out, train, metric, texts)


def _sweep(
    asked: list[tuple[Any, str, int]], out: Path, train: Callable, metric: str, texts: Callable
) -> Iterator[Cell]:
    earlier = {(cell.variant, cell.seed): cell for cell in read(out)}
    cells = []
    for run, variant, seed in asked:
        cell = Cell(
            variant, seed, f"{variant}/seed{seed}", run=artifact.hash_text(values.show(run) + texts(run))
        )
        before = earlier.pop((variant, seed), cell)
        if before.status == "done" and before.run != cell.run:
            raise ValueError(
                f"{out / cell.path} was done with other settings or other text; give another folder, or remove this one"
            )
        cells.append(before if before.status == "done" else cell)
    others = list(earlier.values())
    for i, (run, *_) in enumerate(asked):
        cell = cells[i]
        if cell.status != "done":
            _write(out, metric, [*cells[:i], replace(cell, status="running"), *cells[i + 1 :], *others])
            try:
                train(run, out / cell.path)
                cells[i] = replace(cell, status="done")
            except (ValueError, OSError, RuntimeError) as error:
                cells[i] = replace(cell, status="failed", error=str(error))
            except Exception as error:  # a bug in one variant must not cost the others
                cells[i] = replace(cell, status="failed", error=f"{type(error).__name__}: {error}")
            _write(out, metric, [*cells, *others])
        yield cells[i]


def read(out: str | Path) -> list[Cell]:
    """The cells of a sweep's folder as they stand; none for a new folder.

    Raises: ValueError if the sweep's file is damaged.
    """
    file = Path(out) / "sweep.json"
    if not file.exists():
        return []
    try:
        return [Cell(**cell) for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not a sweep's file ({error}); remove it and repeat the command") from None


def _write(out: Path, metric: str, cells: list[Cell]) -> None:
    facts = {"metric": metric, "cells": [asdict(c) for c in cells]}
    artifact.write(out / "sweep.json", json.dumps(facts, indent=1, ensure_ascii=False))
