import json

import pytest

from lmx.report import sweep_report
from lmx.report.sweeps import Trial, read_sweep, read_trial, sweep_table


def write_cell(folder, loss):
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": loss + 1 / s} for s in range(1, 6)] + [{"step": 5, "valid/loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def sweep(tmp_path):
    """base ends at 3, 4, 5 and रोप 0.5 lower; the others never get to a number, each for its own reason."""
    cells = []
    for seed in range(3):
        for variant, loss in (("base", 3.0 + seed), ("रोप", 2.5 + seed)):
            write_cell(tmp_path / f"{variant}-{seed}", loss)
            cells.append({"variant": variant, "seed": seed, "path": f"{variant}-{seed}"})
    for variant, status, loss in (("nan", "done", "NaN"), ("late", "running", 9.0), ("gone", "failed", 8.0)):
        folder = tmp_path / variant
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "valid/loss": loss}) + "\n")
        cells.append(
            {"variant": variant, "seed": 0, "path": variant, "status": status, "error": f"<{status}>"}
        )
    cells.append({"variant": "next", "seed": 0, "path": "next", "status": "planned"})
    cells.append({"variant": "lost", "seed": 0, "path": "lost"})
    (tmp_path / "sweep.json").write_text(
        json.dumps({"metric": "valid/loss", "cells": cells}), encoding="utf-8"
    )
    return tmp_path


def test_only_finished_finite_cells_count_and_the_rest_say_why(sweep):
    metric, trials = read_sweep(sweep)
    ends = {(t.variant, t.seed): read_trial(sweep, t, metric)[1] for t in trials}
    table = sweep_table(metric, ends)
    assert table.columns == ("variant", "seed 0", "seed 1", "seed 2", "mean", "less base")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["base"][:3] == (3.0, 4.0, 5.0) and rows["base"][4] is None
    mean, difference = rows["रोप"][3:]
    assert mean.value == 3.5 and mean.high - mean.value == pytest.approx(4.302652729911275 / 3**0.5)
    assert (difference.value, difference.low, difference.high) == (-0.5, -0.5, -0.5)
    words = {name: rows[name][0] for name in ("nan", "late", "gone", "next", "lost")}
    assert words == {
        "nan": "diverged",
        "late": "running",
        "gone": "failed",
        "next": "planned",
        "lost": "missing",
    }
    assert all(rows[name][3] is None for name in words)


def test_the_page_shows_the_table_the_plots_and_the_failures(sweep, elements):
    page = elements(sweep_report(sweep))
    assert page.text("h2") == ["Results", "Learning curves"]
    assert len(page.text("figure")) == 3
    assert {"base", "रोप", "valid/loss"} <= set(page.text("text"))
    warnings = [w for w, a in zip(page.text("p"), page.attributes("p")) if a["class"] == "warning"]
    assert warnings == [
        "nan, seed 0: diverged. <done> (nan)",
        "gone, seed 0: failed. <failed> (gone)",
        "lost, seed 0: missing. (lost)",
    ]


def test_plain_folders_are_a_sweep_too(tmp_path):
    for variant in ("a", "b"):
        for seed in (0, 11):
            write_cell(tmp_path / variant / f"seed_{seed}", 2.0)
    metric, trials = read_sweep(tmp_path)
    assert metric == "valid/loss"
    assert trials[1] == Trial("a", 11, "a/seed_11") and len(trials) == 4
    assert "<svg" in sweep_report(tmp_path)


def test_a_damaged_cell_does_not_hide_the_others(sweep, elements):
    (sweep / "base-0" / "metrics.jsonl").write_text('{"step"\n{"step": 1, "valid/loss": 1.0}\n')
    shown = elements(sweep_report(sweep))
    assert any("line 1" in w for w in shown.text("p")) and shown.text("td")[0] == "unreadable"


def test_a_folder_without_cells_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sweep\.json"):
        read_sweep(tmp_path)
