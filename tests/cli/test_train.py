"""lmx train, sweep, report and info: what they leave behind, and what a repeated or stopped command does."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lmx import cli, values
from lmx import run as runs
from lmx.report.runs import read_metrics
from lmx.train import standard
from lmx.train.checkpoint import steps


def test_a_run_leaves_what_is_needed_to_judge_and_repeat_it(run):
    out, printed = run
    assert {step for step, _ in read_metrics(out)["loss"]} == set(range(1, 11))
    assert [step for step, _ in read_metrics(out)["valid/loss"]] == [5, 10]
    assert steps(out / "checkpoints") == [5, 10]
    assert json.loads((out / "overrides.json").read_text()) == {"optim.b2": [0.95, 0.99]}
    assert (out / "source.py").read_text() == Path("experiment.py").read_text()
    assert list((out / "tensorboard").glob("events*")) and (out / "report.html").stat().st_size > 10_000
    assert str(out) in printed and "10 steps" in printed


def test_what_was_left_out_of_the_text_is_told_and_kept(tmp_path, lmx):
    text = Path("hindi.txt").read_bytes().replace(b"\n", b"\n\xff\n", 1)
    (tmp_path / "hindi.txt").write_bytes(text)
    settings = (f'data.train=(Text("{tmp_path / "hindi.txt"}", unit="line"),)', "steps=1", "model.d_model=16")
    with pytest.warns(UserWarning, match=r"the run's text: skipped 1 invalid utf8: .*hindi.txt:2"):
        lmx("train", "experiment.py", "--out", tmp_path / "out", *(w for s in settings for w in ("--set", s)))
    kept = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    assert kept["text"]["skipped"] == {"invalid_utf8": 1} and 0 <= kept["padding_share"] < 1


def test_what_is_shown_rebuilds_the_run(lmx):
    shown = lmx("train", "experiment.py", "--show", "--set", 'data.train=("a.txt", "b/*.jsonl.zst")')
    run = values.parse(shown, runs.Run)
    asked = runs.experiment("experiment.py").variant("base")
    assert values.diff(asked, run).keys() >= {"data.train.0", "data.train.1"}
    assert run.data.train == ("a.txt", "b/*.jsonl.zst") and run.optim == asked.optim


def test_a_complete_run_is_left_alone(run, lmx):
    out, _ = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert "is complete at step 10" in lmx("train", "experiment.py", "--set", "optim.b2=0.99")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_report_that_fails_loses_nothing(tmp_path, capsys):
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    cli.main(["train", "experiment.py", "--out", str(tmp_path / "out"), "--set", "optim.b2=0.99"])
    printed = capsys.readouterr()
    assert "the run is whole, but its report failed: IsADirectoryError" in printed.err
    assert "10 steps" in printed.out and steps(tmp_path / "out" / "checkpoints") == [5, 10]


def test_rows_longer_than_any_document_are_filled_with_several(tmp_path, lmx):
    settings = ("--set", "data.seq_len=512", "--set", "steps=1")
    assert "1 steps" in lmx("train", "experiment.py", "--out", tmp_path / "out", *settings)


@pytest.fixture
def listening():
    """Ctrl-C reaches this process, which a shell's background job is born to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_step_at_hand(listening, tmp_path, capsys):
    out = tmp_path / "out"

    def press():
        while not (out / "metrics.jsonl").exists() or b"\n" not in (out / "metrics.jsonl").read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        cli.main(
            [
                "train",
                "experiment.py",
                "--out",
                str(out),
                "--set",
                "steps=100000",
                "--set",
                "eval_every=100000",
            ]
        )
    thread.join()
    (saved,) = steps(out / "checkpoints")[-1:]
    assert stop.value.code == 130 and 1 <= saved < 100_000
    assert f"saved step {saved} of 100000 in {out}; repeat the command to go on" in capsys.readouterr().err
    assert read_metrics(out)["loss"][-1][0] == saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def no_collection():
    """Hypothesis times collections in a callback; an interrupt that lands in there is swallowed."""
    gc.disable()
    yield
    gc.enable()


def test_a_second_ctrl_c_does_not_wait(listening, no_collection):
    with standard._stop_signal() as asked:
        assert not asked(1)
        signal.raise_signal(signal.SIGINT)
        assert asked(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_sweep_goes_past_a_run_that_fails_and_keeps_those_that_are_done(tmp_path, capsys):
    command = ["sweep", "experiment.py", "--seeds", "1", "--out", str(tmp_path / "sweep")]
    times = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and "1 of 2 runs failed: broken/seed0" in printed.err
        assert "[1/2] slow/seed0: done" in printed.out
        assert "[2/2] broken/seed0: failed mesh: data=3" in printed.out
        times.append((tmp_path / "sweep" / "slow" / "seed0" / "metrics.jsonl").stat().st_mtime_ns)
    assert times[0] == times[1]
    changed = json.loads((tmp_path / "sweep" / "slow" / "seed0" / "overrides.json").read_text())
    assert changed == {"optim.lr": [0.01, 0.001]}
    assert "slow" in (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")


def test_report_and_info_read_what_a_run_left(run, lmx, tmp_path):
    out, _ = run
    page = tmp_path / "new" / "page.html"
    assert lmx("report", out, "--out", page).strip() == str(page)
    html = page.read_text(encoding="utf-8")
    assert "optim.b2" in html
    about = lmx("info", out)
    assert "1 layers, d_model 32, 2 heads of 16" in about and f"of them embedding {320 * 32:,}" in about
    assert "10 of 10 steps of 8 x 32 tokens" in about


def test_a_process_of_its_own_trains_and_says_how_it_ended(tmp_path):
    def command(*argv):
        command = [sys.executable, "-m", "lmx", "train", *argv]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)

    done = command("experiment.py", "--out", str(tmp_path / "out"), "--set", "optim.b2=0.99")
    assert done.returncode == 0, done.stderr
    assert "step 10/10" in done.stderr and "10 steps, loss" in done.stdout
    assert "Traceback" not in done.stderr
