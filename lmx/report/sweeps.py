"""A sweep on one page: variants against seeds, with intervals, and what failed.

A sweep's folder holds sweep.json, {"metric": "valid/loss", "cells": [{"variant", "seed", "path", "status",
"error"}, ...]}, or else plain folders <variant>/<seed>/; each cell is a run's folder.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lmx.report import plots
from lmx.report.page import Block, Figure, Page, Section, Text
from lmx.report.runs import LOSS, Series, read_json, read_metrics, smoothing
from lmx.report.stats import Interval, mean_interval, paired_difference
from lmx.report.table import Cell, Table

STATUSES = ("done", "running", "failed", "planned")


@dataclass(frozen=True)
class Trial:
    """One cell of a sweep: its run folder `path` below the sweep's, and how it ended.

    status is "done", "running", "failed" or "planned"; `error` says why it failed.
    Raises: ValueError for another status, or a field of another type.
    """

    variant: str
    seed: int
    path: str
    status: str = "done"
    error: str = ""

    def __post_init__(self):
        for name in ("variant", "path", "error"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r:.60} is no text")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r:.60} is no whole number")
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r:.60} is none of {', '.join(STATUSES)}")


def read_sweep(sweep_dir: str | Path) -> tuple[str, list[Trial]]:
    """The metric a sweep is judged by, and its cells in the order they were planned.

    Raises: FileNotFoundError if the folder holds neither sweep.json nor <variant>/<seed>/ folders; ValueError
      naming the file, and the cell where it is one, if sweep.json is damaged.
    """
    sweep_dir = Path(sweep_dir)
    file = sweep_dir / "sweep.json"
    plan = read_json(file)
    if plan is not None:
        try:
            return _planned(plan)
        except ValueError as error:
            hint = "remove it and repeat the command"
            raise ValueError(f"{file}: not a sweep's file ({error}); {hint}") from None
    trials = []
    for folder in sorted(p for p in sweep_dir.glob("*/*") if p.is_dir()):
        digits = "".join(c for c in folder.name if c.isdecimal())
        if digits:
            trials.append(Trial(folder.parent.name, int(digits), str(folder.relative_to(sweep_dir))))
    if not trials:
        raise FileNotFoundError(f"{sweep_dir}: neither sweep.json nor <variant>/<seed>/ folders here")
    return "valid/loss", trials


def _planned(plan: dict[str, Any]) -> tuple[str, list[Trial]]:
    metric, cells = plan.get("metric", "valid/loss"), plan.get("cells")
    if not isinstance(metric, str):
        raise ValueError(f"metric={metric!r:.60} is no text")
    if not isinstance(cells, list) or not cells:
        raise ValueError(f"cells={cells!r:.60} is no list of cells")
    trials = []
    for number, cell in enumerate(cells, 1):
        try:
            trials.append(_trial(cell))
        except ValueError as error:
            raise ValueError(f"cell {number}: {error}") from None
    return metric, trials


def _trial(cell: Any) -> Trial:
    if not isinstance(cell, dict) or not {"variant", "seed", "path"} <= cell.keys():
        raise ValueError(f"{cell!r:.60} has no variant, seed and path")
    known = (field.name for field in fields(Trial))
    return Trial(**{name: cell[name] for name in known if name in cell})


def read_trial(sweep_dir: str | Path, trial: Trial, metric: str) -> tuple[Series, float | str]:
    """The metrics of a cell, and its last `metric`, or in a word or two why there is none to count.

    A cell counts only when it is done: a run that was stopped half way has not the loss of a whole one.
    """
    try:
        series = read_metrics(Path(sweep_dir) / trial.path)
    except FileNotFoundError:
        return {}, "missing" if trial.status == "done" else trial.status
    except (ValueError, OSError) as error:
        return {}, f"unreadable: {error}"
    if trial.status != "done":
        return series, trial.status
    if metric not in series:
        return series, f"no {metric}"
    last = series[metric][-1][1]
    return series, last if math.isfinite(last) else "diverged"


def sweep_table(metric: str, ends: dict[tuple[str, int], float | str]) -> Table:
    """Variants down, seeds across, then the mean and the difference from the first variant, paired by seed.

    Args:
      ends: (variant, seed) -> last value, or where there is none a word, after which a colon may explain.
    """
    variants, seeds = list(dict.fromkeys(v for v, _ in ends)), sorted({s for _, s in ends})
    base = {s: x for (v, s), x in ends.items() if v == variants[0] and isinstance(x, float)}
    rows: list[tuple[Cell, ...]] = []
    for v in variants:
        own = {s: x for (w, s), x in ends.items() if w == v and isinstance(x, float)}
        shared = sorted(own.keys() & base.keys()) if v != variants[0] else []
        difference = (
            paired_difference([own[s] for s in shared], [base[s] for s in shared]) if shared else None
        )
        mean = mean_interval(list(own.values())) if own else None
        cells = [ends.get((v, s)) for s in seeds]
        rows.append((v, *(c.partition(":")[0] if isinstance(c, str) else c for c in cells), mean, difference))
    columns = ("variant", *(f"seed {s}" for s in seeds), "mean", f"less {variants[0]}")
    caption = f"Last {metric}; ± is the 95 % t-interval over seeds, and differences are paired by seed."
    return Table(columns, tuple(rows), caption)


def sweep_text(sweep_dir: str | Path) -> str:
    """The table of a sweep for a terminal. Raises: as `read_sweep`."""
    metric, trials = read_sweep(sweep_dir)
    ends = {(t.variant, t.seed): read_trial(sweep_dir, t, metric)[1] for t in trials}
    return sweep_table(metric, ends).text()


def sweep_report(sweep_dir: str | Path) -> str:
    """The HTML page of a sweep: each variant over its seeds with intervals, and its difference from the base.

    The base is the first variant. A cell that failed, is missing, still runs or went to NaN is shown as such
    and left out of the means.
    Raises: as `read_sweep`.
    """
    sweep_dir = Path(sweep_dir)
    metric, trials = read_sweep(sweep_dir)
    found = {(t.variant, t.seed): read_trial(sweep_dir, t, metric) for t in trials}
    ends = {at: end for at, (_, end) in found.items()}
    variants = list(dict.fromkeys(t.variant for t in trials))
    blocks: list[Block | Table] = [sweep_table(metric, ends)]
    numbers = {v: [x for (w, _), x in ends.items() if w == v and isinstance(x, float)] for v in variants}
    means = {v: mean_interval(x) for v, x in numbers.items() if x}
    if means:
        caption = (
            f"Last {metric}: each seed, their mean, and its 95 % t-interval where there are two or more."
        )
        blocks.append(Figure(plots.bars_with_intervals(means, x_label=metric, points=numbers), caption))
    for t in trials:
        end = ends[t.variant, t.seed]
        if isinstance(end, str) and end not in ("running", "planned"):
            why = f" {t.error}" if t.error else ""
            blocks.append(Text(f"{t.variant}, seed {t.seed}: {end}.{why} ({t.path})", "warning"))
    series = {at: own for at, (own, _) in found.items()}
    sections = (
        Section("Results", tuple(blocks)),
        Section("By length", _by_length(metric, variants, series)),
        Section("Learning curves", _learning(metric, variants, series)),
    )
    subtitle = f"Sweep report: {len(variants)} variants, {len(trials)} runs"
    return Page(sweep_dir.resolve().name, tuple(s for s in sections if s.blocks), subtitle).html()


def _by_length(
    metric: str, variants: list[str], found: dict[tuple[str, int], Series]
) -> tuple[Block | Table, ...]:
    """The last `metric`@N of each variant against N, where a run was judged on rows of several lengths."""
    judged = re.compile(re.escape(metric) + r"@([1-9][0-9]{0,14})")
    names = {name for series in found.values() for name in series}
    lengths = sorted(int(match[1]) for match in map(judged.fullmatch, names) if match)
    means: dict[str, dict[int, Interval]] = {v: {} for v in variants}
    for v in variants:
        for n in lengths:
            ends = [
                s[f"{metric}@{n}"][-1][1] for (w, _), s in found.items() if w == v and f"{metric}@{n}" in s
            ]
            if ends and all(map(math.isfinite, ends)):
                means[v][n] = mean_interval(ends)
    lines = {v: list(points.items()) for v, points in means.items() if points}
    if not lines:
        return ()
    rows = tuple((v, *(points.get(n) for n in lengths)) for v, points in means.items())
    return (
        Figure(
            plots.lines_with_points(lines, x_label="tokens in a row", y_label=metric, log_x=True),
            "The same text in rows of other lengths than those trained on; mean over seeds with 95 % interval.",
        ),
        Table(("variant", *map(str, lengths)), rows),
    )


def _learning(metric: str, variants: list[str], found: dict[tuple[str, int], Series]) -> tuple[Figure, ...]:
    figures = []
    for name, label in {metric: metric, "loss": f"train {LOSS}"}.items():
        by_variant = {v: [s[name] for (w, _), s in found.items() if w == v and name in s] for v in variants}
        curves = [curve for seeds in by_variant.values() for curve in seeds]
        if any(math.isfinite(y) for curve in curves for _, y in curve):
            svg = plots.seed_curves(by_variant, y_label=label, smooth=smoothing(curves))
            figures.append(Figure(svg, "Thick: mean over seeds. Thin: each seed.", f"{label} by step"))
    return tuple(figures)
