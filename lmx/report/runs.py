"""What a run left behind, read back and told on one page.

A run's folder holds, each if there was something to say:
  metrics.jsonl     one object a line: {"step": 7, "loss": 3.1, "lr": ..., "tokens_per_sec": ..., "mfu": ...};
                    evaluations are lines of their own, {"step": 100, "valid/loss": 3.3}
  run.txt           the resolved run as `values.show` writes it
  overrides.json    {"optim.lr": ["0.001", "0.0003"], ...}: base and value of every field that was changed
  samples.jsonl     {"step": 100, "prompt": ..., "text": ..., "note": ...}
  results.json      evaluation results, nested; {"value", "low", "high"} is an interval
  environment.json, data.json, source.py, uncommitted.diff   where it ran, on what, and with which code
  artifact files    of run.txt and of the checkpoints: its ancestry
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmx import artifact
from lmx.report import plots
from lmx.report.page import Block, Code, Figure, Fold, KeyValues, Page, Row, Sample, Samples, Section, Text
from lmx.report.stats import Interval
from lmx.report.table import Cell, Table

LOSS = "loss (nats per token)"
SMALL = (4.2, 2.4)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut short by a kill is left out.

    Raises: FileNotFoundError; ValueError naming the line if any line before the last is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip(b" \r\t\0"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: {error}: {line[:60]!r}; mend or remove that line"
            ) from None
        found.append(row)
    return found


def read_json(path: Path) -> Any:
    """The file's content, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_metrics(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a run by name, as (step, value) pairs in the order they were written.

    The words "NaN", "Infinity" and "-Infinity", which stand for what JSON cannot write, become floats again.
    Raises: FileNotFoundError if the run has no metrics.jsonl; ValueError if a line is broken or has no step.
    """
    path = Path(run_dir) / "metrics.jsonl"
    series: dict[str, list[tuple[int, float]]] = {}
    for number, row in enumerate(read_jsonl(path), 1):
        if "step" not in row:
            raise ValueError(f'{path}, line {number}: no "step" among {sorted(row)}')
        for name, value in row.items():
            if name != "step" and (number_of := _number(value)) is not None:
                series.setdefault(name, []).append((int(row["step"]), number_of))
    return series


def smoothing(curves: Iterable[Sequence]) -> int:
    """A window that leaves a long curve its shape: a fiftieth of its points, or 0 where that is few."""
    window = max(map(len, curves)) // 50
    return window if window >= 5 else 0


def run_report(run_dir: str | Path) -> str:
    """The HTML page of one run, from whatever its folder holds so far; a run in progress can be looked at.

    Raises: FileNotFoundError if `run_dir` holds neither metrics.jsonl nor results.json.
    """
    run_dir = Path(run_dir)
    has_metrics = (run_dir / "metrics.jsonl").exists()
    if not has_metrics and not (run_dir / "results.json").exists():
        raise FileNotFoundError(
            f"{run_dir}: neither metrics.jsonl nor results.json here; is this a run's folder?"
        )
    metrics = read_metrics(run_dir) if has_metrics else {}
    sections = (
        Section("Learning", _learning(metrics)),
        Section("Results", _results(read_json(run_dir / "results.json"))),
        Section("Samples", _samples(run_dir / "samples.jsonl")),
        Section("What was run", _choices(run_dir)),
        Section("Other measurements", _others(metrics)),
        Section("Environment", _environment(run_dir)),
        Section("Ancestry", _ancestry(run_dir)),
    )
    shown = tuple(s for s in sections if s.blocks)
    return Page(run_dir.resolve().name, shown, "Run report", head=_headline(metrics)).html()


def _headline(metrics: dict[str, list[tuple[int, float]]]) -> tuple[Block, ...]:
    tiles: dict[str, Cell] = {}
    if metrics:
        tiles["steps"] = max(points[-1][0] for points in metrics.values())
    if "loss" in metrics:
        tiles["train loss"] = _mean([y for _, y in metrics["loss"][-20:]])
    for name in sorted(n for n in metrics if _is_valid_loss(n)):
        step, best = min(metrics[name], key=lambda p: (math.isnan(p[1]), p[1]))
        tiles[f"best {_valid_label(name)} loss, step {step:,}"] = best
    if "tokens" in metrics:
        tiles["tokens seen"] = int(sum(y for _, y in metrics["tokens"]))
    if rates := [y for _, y in metrics.get("tokens_per_sec", [])]:
        tiles["tokens per second"] = float(sorted(rates)[len(rates) // 2])
    if mfu := [y for _, y in metrics.get("mfu", []) if math.isfinite(y)]:
        tiles["model FLOP use"] = f"{100 * sorted(mfu)[len(mfu) // 2]:.1f} %"
    return (KeyValues(tiles, tiles=True),) if tiles else ()


def _learning(metrics: dict[str, list[tuple[int, float]]]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    losses = {"train": metrics["loss"]} if "loss" in metrics else {}
    losses |= {_valid_label(name): points for name, points in metrics.items() if _is_valid_loss(name)}
    if _plottable(losses):
        smooth = smoothing(losses.values())
        svg = plots.curves(losses, y_label=LOSS, smooth=smooth)
        caption = f"Thick: mean of the {smooth} steps around. Thin: each step." if smooth > 1 else ""
        blocks.append(Figure(svg, caption, "Training and validation loss by step"))
    broken = [step for points in losses.values() for step, y in points if not math.isfinite(y)]
    if broken:
        text = f"Steps whose loss was not finite: {len(broken)}, the first at {min(broken)}."
        blocks.append(Text(text, "warning"))
    if skipped := max((y for _, y in metrics.get("skipped", [])), default=0):
        text = f"Updates left out because the loss or the gradient was not finite: {skipped:.0f}."
        blocks.append(Text(text, "warning"))
    small = []
    late = {k: points[len(points) // 2 :] for k, points in losses.items() if len(points) > 1}
    for series, label in (
        (late, "loss, second half"),
        ({"lr": metrics.get("lr", [])}, "learning rate"),
        ({"grad_norm": metrics.get("grad_norm", [])}, "gradient norm"),
        ({"tokens_per_sec": metrics.get("tokens_per_sec", [])}, "tokens per second"),
    ):
        if _plottable(series):
            smooth = 0 if label == "learning rate" else smoothing(series.values())
            small.append(
                Figure(plots.curves(series, y_label=label, smooth=smooth, size=SMALL), "", f"{label} by step")
            )
    return (*blocks, *((Row(tuple(small)),) if small else ()))


def _others(metrics: dict[str, list[tuple[int, float]]]) -> tuple[Block, ...]:
    told = {"loss", "lr", "grad_norm", "tokens_per_sec"}
    rest = {k: v for k, v in sorted(metrics.items()) if k not in told and not _is_valid_loss(k)}
    same = {k: v[0][1] for k, v in rest.items() if len({y for _, y in v}) == 1}
    drawn = {k: v for k, v in rest.items() if k not in same and _plottable({k: v})}
    figures = tuple(
        Figure(plots.curves({k: v}, y_label=k, size=SMALL), "", f"{k} by step") for k, v in drawn.items()
    )
    plotted = (Fold(", ".join(drawn), (Row(figures),)),) if figures else ()
    return (*((KeyValues(same),) if same else ()), *plotted)


def _results(results: Any) -> tuple[Block | Table, ...]:
    if not isinstance(results, dict) or not results:
        return ()
    groups = {k: _flat(v) for k, v in results.items() if isinstance(v, dict) and not _is_interval(v)}
    if groups and len(groups) == len(results):
        columns = list(dict.fromkeys(name for group in groups.values() for name in group))
        if len(columns) <= 6:
            rows = tuple((name, *(group.get(c) for c in columns)) for name, group in groups.items())
            return (Table(("", *columns), rows),)
    return (Table(("result", "value"), tuple(_flat(results).items())),)


def _samples(path: Path) -> tuple[Block, ...]:
    rows = read_jsonl(path) if path.exists() else []
    by_step: dict[int, list[Sample]] = {}
    for row in rows:
        note = str(row.get("note", ""))
        sample = Sample(str(row.get("prompt", "")), str(row.get("text", "")), note)
        by_step.setdefault(int(row.get("step", 0)), []).append(sample)
    if not by_step:
        return ()
    *earlier, last = sorted(by_step)
    folds = [
        Fold(f"Step {step:,}", (Samples(tuple(by_step[step])),))
        for step in earlier[:: -(-len(earlier) // 8) or 1]
    ]
    return (Text(f"At step {last:,}; prompts are grey.", "quiet"), Samples(tuple(by_step[last])), *folds)


def _choices(run_dir: Path) -> tuple[Block | Table, ...]:
    blocks: list[Block | Table] = []
    overrides = read_json(run_dir / "overrides.json")
    if overrides:
        rows = tuple((path, str(base), str(value)) for path, (base, value) in overrides.items())
        blocks.append(Table(("changed from the base", "base", "this run"), rows))
    for name, title in (("run.txt", "The whole run"), ("source.py", "The experiment's file")):
        if (run_dir / name).exists():
            blocks.append(Fold(title, (Code((run_dir / name).read_text(encoding="utf-8")),)))
    return tuple(blocks)


def _environment(run_dir: Path) -> tuple[Block, ...]:
    facts = _flat(read_json(run_dir / "environment.json") or {})
    facts |= _flat(read_json(run_dir / "data.json") or {}, "data/")
    short = {k: v for k, v in facts.items() if v not in ("", None)}
    blocks: list[Block] = [KeyValues(short)] if short else []
    diff = run_dir / "uncommitted.diff"
    if diff.exists():
        blocks.append(Fold("Changes that were not committed", (Code(diff.read_text(encoding="utf-8")),)))
    return tuple(blocks)


def _ancestry(run_dir: Path) -> tuple[Block, ...]:
    checkpoints = [p for p in run_dir.glob("checkpoints/*") if p.name.isdigit()]
    newest = sorted(checkpoints, key=lambda p: int(p.name))[-1:]
    known = [p for p in (run_dir / "run.txt", *newest) if artifact.read(p) is not None]
    return tuple(Code(artifact.explain(p)) for p in known)


def _flat(tree: dict, prefix: str = "") -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for name, value in tree.items():
        if _is_interval(value):
            low, high = float(value["low"]), float(value["high"])
            found[prefix + name] = Interval(float(value["value"]), low, high, int(value.get("n", 1)))
        elif isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found[prefix + name] = ", ".join(v if isinstance(v, str) else json.dumps(v) for v in value)
        else:
            found[prefix + name] = value
    return found


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and {"value", "low", "high"} <= value.keys()


def _is_valid_loss(name: str) -> bool:
    return name.startswith("valid/") and name.endswith("loss")


def _valid_label(name: str) -> str:
    return name.removesuffix("loss").rstrip("/").replace("/", " ")


def _plottable(series: dict[str, list[tuple[int, float]]]) -> bool:
    return any(math.isfinite(y) for points in series.values() for _, y in points)


def _mean(values: list[float]) -> float:
    good = [v for v in values if math.isfinite(v)]
    return sum(good) / len(good) if good else math.nan


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float):
        return float(value)
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return None
