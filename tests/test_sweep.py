"""Sweeps go on from any point: after a failed cell, an interruption, a kill."""

import itertools
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass, replace

import pytest

from lmx.sweep import read, sweep


@dataclass(frozen=True)
class Small:
    lr: float = 0.1
    seed: int = 0


RUNS = {"base": Small(), "high": Small(lr=1.0)}
ORDER = [("base", 0), ("high", 0), ("base", 1), ("high", 1)]


class Train:
    """Counts up to 3 in a file of the cell's folder, and goes on from what it finds there."""

    def __init__(self, disturb=lambda run, count: None):
        self.disturb = disturb
        self.called = []

    def __call__(self, run, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.called.append((run, folder))
        file = folder / "count"
        count = int(file.read_text()) if file.exists() else 0
        while count < 3:
            self.disturb(run, count)
            count += 1
            file.write_text(str(count))


def cells(found):
    return [(cell.variant, cell.seed, cell.status) for cell in found]


def test_every_run_is_trained_with_every_seed_once(tmp_path):
    train = Train()
    found = list(sweep(RUNS, range(2), tmp_path, train, metric="valid/loss"))
    assert cells(found) == [(*cell, "done") for cell in ORDER] == cells(read(tmp_path))
    want = [(replace(RUNS[v], seed=s), tmp_path / v / f"seed{s}") for v, s in ORDER]
    assert train.called == want
    again = Train()
    assert list(sweep(RUNS, range(2), tmp_path, again)) == found and again.called == []


def test_cells_of_other_text_are_not_joined(tmp_path):
    train = Train()
    list(sweep(RUNS, [0], tmp_path, train, texts=lambda run: "as it was"))
    assert len(list(sweep(RUNS, range(2), tmp_path, train, texts=lambda run: "as it was"))) == 4
    with pytest.raises(ValueError, match=r"base/seed0 was done with other settings or other text"):
        next(sweep(RUNS, range(2), tmp_path, train, texts=lambda run: "longer now"))


def test_the_file_says_at_each_moment_what_is_done_and_what_runs(tmp_path):
    seen = []

    def look(run, count):
        if count == 0:
            seen.append([cell.status for cell in read(tmp_path)])

    walk = sweep(RUNS, range(2), tmp_path, Train(look), metric="bits")
    for _ in itertools.islice(walk, 3):
        seen.append([cell.status for cell in read(tmp_path)])
    P, R, D = "planned", "running", "done"
    assert seen == [[R, P, P, P], [D, P, P, P], [D, R, P, P], [D, D, P, P], [D, D, R, P], [D, D, D, P]]
    assert json.loads((tmp_path / "sweep.json").read_text())["metric"] == "bits"


@pytest.mark.parametrize(
    "error, told",
    [
        (ValueError("n_heads=5"), "n_heads=5"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("loss not finite"), "loss not finite"),
        (TypeError("no such thing"), "TypeError: no such thing"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (MemoryError(), "MemoryError: "),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path, error, told):
    def fail(run, count):
        if run == Small(lr=1.0, seed=0) and count == 2:
            raise error

    found = list(sweep(RUNS, range(2), tmp_path, Train(fail)))
    assert [cell.status for cell in found] == ["done", "failed", "done", "done"]
    assert found[1].error == told == read(tmp_path)[1].error
    train = Train()
    again = list(sweep(RUNS, range(2), tmp_path, train))
    assert [cell.status for cell in again] == ["done"] * 4 and not again[1].error
    assert train.called == [(Small(1.0, 0), tmp_path / "high" / "seed0")]


def test_an_interruption_ends_the_sweep_and_the_next_goes_on_there(tmp_path):
    def stop(run, count):
        if run == Small(seed=1) and count == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(sweep(RUNS, range(2), tmp_path, Train(stop)))
    assert [cell.status for cell in read(tmp_path)] == ["done", "done", "running", "planned"]
    counts = []
    train = Train(lambda run, count: counts.append((run.seed, run.lr, count)))
    assert all(cell.status == "done" for cell in sweep(RUNS, range(2), tmp_path, train))
    assert counts == [(1, 0.1, 1), (1, 0.1, 2), (1, 1.0, 0), (1, 1.0, 1), (1, 1.0, 2)]


def _sweep_and_die(out, at):
    """A process that kills itself when it has trained `at` counts in all."""
    left = iter(range(at))

    def die(run, count):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    list(sweep(RUNS, range(2), out, Train(die)))


@pytest.mark.parametrize("at", [0, 1, 4, 11])
def test_a_killed_sweep_loses_nothing_that_was_done(tmp_path, at):
    process = multiprocessing.get_context("spawn").Process(target=_sweep_and_die, args=(tmp_path, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    done = at // 3
    assert [cell.status for cell in read(tmp_path)] == ["done"] * done + ["running"] + ["planned"] * (
        3 - done
    )
    counted = []
    train = Train(lambda run, count: counted.append(count))
    assert cells(sweep(RUNS, range(2), tmp_path, train)) == [(*cell, "done") for cell in ORDER]
    assert len(counted) == 12 - at and len(train.called) == 4 - done


def test_more_seeds_and_variants_join_what_is_done(tmp_path):
    list(sweep(RUNS, range(2), tmp_path, Train()))
    train = Train()
    found = list(sweep({"low": Small(lr=0.01), **RUNS}, range(3), tmp_path, train))
    assert len(found) == 9 and len(train.called) == 5
    few = Train()
    assert cells(sweep({"high": RUNS["high"]}, [1], tmp_path, few)) == [("high", 1, "done")]
    assert few.called == [] and len(read(tmp_path)) == 9


def test_a_cell_done_with_other_settings_is_refused_and_nothing_is_touched(tmp_path):
    list(sweep(RUNS, range(1), tmp_path, Train()))
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(
        ValueError, match=r"high/seed0 was done with other settings or other text; give another"
    ):
        list(sweep(RUNS | {"high": Small(lr=2.0)}, range(1), tmp_path, Train()))
    assert (tmp_path / "sweep.json").read_text() == before


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    first = sweep(RUNS, range(1), tmp_path, Train())
    next(first)
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()}; wait"):
        next(sweep(RUNS, range(1), tmp_path, Train()))
    first.close()
    assert len(list(sweep(RUNS, range(1), tmp_path, Train()))) == len(RUNS)


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"cells": [3]}', '{"cells": [{"name": 1}]}', "{}"]
)
def test_a_damaged_file_is_told_with_the_way_out(tmp_path, damage):
    (tmp_path / "sweep.json").write_text(damage)
    for function in (read, lambda out: list(sweep(RUNS, range(1), out, Train()))):
        with pytest.raises(ValueError, match=r"sweep\.json: not a sweep's file .*remove it and repeat"):
            function(tmp_path)


def test_a_new_folder_has_no_cells(tmp_path):
    assert read(tmp_path / "new") == []
