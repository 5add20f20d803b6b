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

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lmx import artifact
from lmx.report import plots
from lmx.report.page import Block, Code, Figure, Fold, KeyValues, Page, Row, Sample, Samples, Section, Text
from lmx.report.stats import Interval
from lmx.report.table import Cell, Table

Series = dict[str, list[tuple[int, float]]]
LOSS = "loss (nats per token)"
SMALL = (4.2, 2.4)
LARGEST = 1e150
"""About the largest number whose square is finite in float64, as intervals and axes need."""


def read_records(path: str | Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """The records of a JSON-lines file as (step, object), and of each damaged line where it is and why.

    A last line that was cut short by a kill is left out and is no damage.
    Raises: FileNotFoundError.
    """
    lines = Path(path).read_bytes().split(b"\n")
    while lines and not lines[-1].strip(b" \r\t\0"):
        lines.pop()
    if len(lines) > 1 and _is_cut(lines[-1]):
        lines.pop()
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = _object(line)
            records.append((_step(row), row))
        except ValueError as error:
            damaged.append(f"{path}, line {number}: {error}: {line[:60]!r}")
    return records, damaged


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None where there is no such file.

    Raises: ValueError naming the file if it holds no JSON object.
    """
    try:
        return _object(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend or remove it") from None


def read_metrics(run_dir: str | Path) -> Series:
    """Every metric of a run by name, as (step, value) pairs in the order they were written.

    The words "NaN", "Infinity" and "-Infinity", which stand for what JSON cannot write, become floats again.
    Numbers beyond ±1e150, whose squares overflow, count as infinite.
    Raises: FileNotFoundError if the run has no metrics.jsonl; ValueError naming its first damaged line.
    """
    records, damaged = read_records(Path(run_dir) / "metrics.jsonl")
    if damaged:
        raise ValueError(f"{damaged[0]}; mend or remove that line")
    return _series(records)


def smoothing(curves: Iterable[Sequence]) -> int:
    """A window that leaves a long curve its shape: a fiftieth of its points, or 0 where that is few."""
    window = max(map(len, curves)) // 50
    return window if window >= 5 else 0


def run_report(run_dir: str | Path) -> str:
    """The HTML page of one run, from whatever its folder holds so far; a run in progress can be looked at.

    Damaged lines of metrics.jsonl are counted on the page; any other damaged file is named where its content
    would stand.
    Raises: FileNotFoundError if `run_dir` holds neither metrics.jsonl nor results.json; ValueError if
      metrics.jsonl has damaged lines alone.
    """
    run_dir = Path(run_dir)
    has_metrics = (run_dir / "metrics.jsonl").exists()
    if not has_metrics and not (run_dir / "results.json").exists():
        raise FileNotFoundError(
            f"{run_dir}: neither metrics.jsonl nor results.json here; is this a run's folder?"
        )
    records, damaged = read_records(run_dir / "metrics.jsonl") if has_metrics else ([], [])
    if damaged and not records:
        raise ValueError(f"{damaged[0]}; no line can be read, so mend or remove the file")
    metrics = _series(records)
    sections = (
        Section("Learning", _learning(metrics)),
        Section("Results", _told(run_dir / "results.json", _results)),
        Section("Samples", _told(run_dir / "samples.jsonl", _samples)),
        Section("What was run", _choices(run_dir)),
        Section("Other measurements", _others(metrics)),
        Section("Environment", _environment(run_dir)),
        Section("Ancestry", _ancestry(run_dir)),
    )
    shown = tuple(s for s in sections if s.blocks)
    head = (*_headline(metrics), *_early(run_dir / "run.txt"), *_damage(damaged))
    return Page(run_dir.resolve().name, shown, "Run report", head=head).html()


def _told(path: Path, tell: Callable[[Path], tuple[Block | Table, ...]]) -> tuple[Block | Table, ...]:
    """What there is to tell of a side file: nothing where it is missing, a warning where it is damaged."""
    try:
        return tell(path)
    except FileNotFoundError:
        return ()
    except (ValueError, OSError) as error:
        return (Text(str(error), "warning"),)
    except RecursionError:
        return (Text(f"{path}: nested too deeply; mend or remove it", "warning"),)


def _damage(lines: list[str]) -> tuple[Text, ...]:
    """How many lines of a file were left out because they are damaged, and the first of them."""
    return (Text(f"Damaged lines left out: {len(lines)}, the first: {lines[0]}", "warning"),) if lines else ()


def _headline(metrics: Series) -> tuple[Block, ...]:
    tiles: dict[str, Cell] = {}
    if metrics:
        tiles["steps"] = max(points[-1][0] for points in metrics.values())
    if "loss" in metrics:
        tiles["train loss"] = _mean([y for _, y in metrics["loss"][-20:]])
    for name in sorted(n for n in metrics if _is_valid_loss(n)):
        step, best = min(metrics[name], key=lambda p: (math.isnan(p[1]), p[1]))
        tiles[f"best {_valid_label(name)} loss, step {step:,}"] = best
    if "tokens" in metrics:
        tiles["tokens seen"] = sum(y for _, y in metrics["tokens"])
    if rates := [y for _, y in metrics.get("tokens_per_sec", [])]:
        tiles["tokens per second"] = float(sorted(rates)[len(rates) // 2])
    if mfu := [y for _, y in metrics.get("mfu", []) if math.isfinite(y)]:
        tiles["model FLOP use"] = f"{100 * sorted(mfu)[len(mfu) // 2]:.1f} %"
    return (KeyValues(tiles, tiles=True),) if tiles else ()


def _early(path: Path) -> tuple[Block, ...]:
    with contextlib.suppress(ValueError, OSError):  # told with its ancestry
        made = artifact.read(path)
        if made and (why := made.facts.get("early")):
            return (Text(f"Stopped early: {why}."),)
    return ()


def _learning(metrics: Series) -> tuple[Block, ...]:
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


def _others(metrics: Series) -> tuple[Block, ...]:
    told = {"loss", "lr", "grad_norm", "tokens_per_sec"}
    rest = {k: v for k, v in sorted(metrics.items()) if k not in told and not _is_valid_loss(k)}
    same = {k: v[0][1] for k, v in rest.items() if len({y for _, y in v}) == 1}
    drawn = {k: v for k, v in rest.items() if k not in same and _plottable({k: v})}
    figures = tuple(
        Figure(plots.curves({k: v}, y_label=k, size=SMALL), "", f"{k} by step") for k, v in drawn.items()
    )
    plotted = (Fold(", ".join(drawn), (Row(figures),)),) if figures else ()
    return (*((KeyValues(same),) if same else ()), *plotted)


def _results(path: Path) -> tuple[Table, ...]:
    results = read_json(path)
    if not results:
        return ()
    groups = {k: _flat(path, v) for k, v in results.items() if isinstance(v, dict) and not _is_interval(v)}
    if groups and len(groups) == len(results):
        columns = list(dict.fromkeys(name for group in groups.values() for name in group))
        if len(columns) <= 6:
            rows = tuple((name, *(group.get(c) for c in columns)) for name, group in groups.items())
            return (Table(("", *columns), rows),)
    return (Table(("result", "value"), tuple(_flat(path, results).items())),)


def _samples(path: Path) -> tuple[Block, ...]:
    records, damaged = read_records(path)
    by_step: dict[int, list[Sample]] = {}
    for step, row in records:
        sample = Sample(*(str(row.get(part, "")) for part in ("prompt", "text", "note")))
        by_step.setdefault(step, []).append(sample)
    if not by_step:
        return _damage(damaged)
    *earlier, last = sorted(by_step)
    folds = [
        Fold(f"Step {step:,}", (Samples(tuple(by_step[step])),))
        for step in earlier[:: -(-len(earlier) // 8) or 1]
    ]
    told = Text(f"At step {last:,}; prompts are grey.", "quiet")
    return (*_damage(damaged), told, Samples(tuple(by_step[last])), *folds)


def _choices(run_dir: Path) -> tuple[Block | Table, ...]:
    return (
        *_told(run_dir / "overrides.json", _overrides),
        *_told(run_dir / "run.txt", lambda path: _folded(path, "The whole run")),
        *_told(run_dir / "source.py", lambda path: _folded(path, "The experiment's file")),
    )


def _overrides(path: Path) -> tuple[Table, ...]:
    rows = []
    for name, change in (read_json(path) or {}).items():
        if not isinstance(change, list) or len(change) != 2:
            raise ValueError(f"{path}: {name!r} has no [base, value] but {change!r:.60}; mend or remove it")
        rows.append((name, *map(str, change)))
    return (Table(("changed from the base", "base", "this run"), tuple(rows)),) if rows else ()


def _folded(path: Path, title: str) -> tuple[Block, ...]:
    return (Fold(title, (Code(path.read_text(encoding="utf-8", errors="replace")),)),)


def _environment(run_dir: Path) -> tuple[Block | Table, ...]:
    return (
        *_told(run_dir / "environment.json", _facts),
        *_told(run_dir / "data.json", lambda path: _facts(path, "data/")),
        *_told(run_dir / "uncommitted.diff", lambda path: _folded(path, "Changes that were not committed")),
    )


def _facts(path: Path, prefix: str = "") -> tuple[Block, ...]:
    facts = _flat(path, read_json(path) or {}, prefix)
    short = {k: v for k, v in facts.items() if v not in ("", None)}
    return (KeyValues(short),) if short else ()


def _ancestry(run_dir: Path) -> tuple[Block | Table, ...]:
    checkpoints = [p for p in run_dir.glob("checkpoints/*") if p.name.isdecimal()]
    newest = sorted(checkpoints, key=lambda p: int(p.name))[-1:]
    return tuple(block for p in (run_dir / "run.txt", *newest) for block in _told(p, _lineage))


def _lineage(path: Path) -> tuple[Block, ...]:
    return () if artifact.read(path) is None else (Code(artifact.explain(path)),)


def _flat(path: Path, tree: dict, prefix: str = "") -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for name, value in tree.items():
        if _is_interval(value):
            found[prefix + name] = _interval(path, prefix + name, value)
        elif isinstance(value, dict):
            found |= _flat(path, value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found[prefix + name] = ", ".join(v if isinstance(v, str) else json.dumps(v) for v in value)
        else:
            found[prefix + name] = value
    return found


def _interval(path: Path, name: str, found: dict) -> Interval:
    value, low, high = (_number(found[part]) for part in ("value", "low", "high"))
    if value is None or low is None or high is None:
        raise ValueError(f"{path}: {name!r} is no interval but {found!r:.80}; mend or remove it")
    return Interval(value, low, high)


def _is_interval(value: Any) -> bool:
    return isinstance(value, dict) and {"value", "low", "high"} <= value.keys()


def _is_valid_loss(name: str) -> bool:
    return name.startswith("valid/") and name.endswith("loss")


def _valid_label(name: str) -> str:
    return name.removesuffix("loss").rstrip("/").replace("/", " ")


def _plottable(series: Series) -> bool:
    return any(math.isfinite(y) for points in series.values() for _, y in points)


def _mean(values: list[float]) -> float:
    good = [v for v in values if math.isfinite(v)]
    return sum(good) / len(good) if good else math.nan


def _series(records: Iterable[tuple[int, dict[str, Any]]]) -> Series:
    series: Series = {}
    for step, row in records:
        for name, value in row.items():
            if name != "step" and (number := _number(value)) is not None:
                series.setdefault(name, []).append((step, number))
    return series


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _is_cut(line: bytes) -> bool:
    try:
        _object(line)
    except ValueError:
        return True
    return False


def _step(row: dict[str, Any]) -> int:
    if "step" not in row:
        raise ValueError(f'no "step" among {sorted(row)}')
    step = row["step"]
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) > 2**53:
        raise ValueError('"step" is not a whole number below 2**53')
    return step


def _number(value: Any) -> float | None:
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if not isinstance(value, int | float):
        return None
    if abs(value) > LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)
