"""Runs that are killed, told to stop, moved to other devices, or out of disk, against an undisturbed one."""

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import Job, assert_same_bits, metrics, plan, rows, state, tail

from lmx import train
from lmx.optim import WSD
from lmx.train import standard
from lmx.train.checkpoint import steps

LOSS_TOLERANCE = 1e-5  # relative; float32 has 6e-8, and sums over other shards run in another order each step
PARAMS_TOLERANCE = 1e-4  # absolute, after six updates of Adam with a rate of 1e-2


@pytest.fixture(scope="module")
def undisturbed(references):
    return references["alone"]


@pytest.fixture(scope="module")
def on_eight(references):
    return references["eight"]


def assert_as_if_undisturbed(job, reference):
    assert [step for step, line in metrics(job.out) if "loss" in line] == list(range(1, job.steps + 1))
    assert metrics(job.out) == metrics(reference.out)
    assert rows(job.out) == rows(reference.out)
    assert_same_bits(state(job.out), state(reference.out))


def cut_back(job, step, out, **changes):
    """A copy of a run whose newest checkpoint is that of `step`, while its metrics go on to the end."""
    shutil.copytree(job.out, out)
    for later in steps(out / "checkpoints"):
        if later != step:
            shutil.rmtree(out / "checkpoints" / str(later))
    for i in range(job.processes):
        noted = Path(f"{job.out}.rows.{i}.jsonl").read_text().splitlines(keepends=True)
        Path(f"{out}.rows.{i}.jsonl").write_text("".join(x for x in noted if json.loads(x)["step"] < step))
    return replace(job, out=str(out), **changes)


def wait_for(condition, process, job, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, f"exit code {process.exitcode}\n{tail(job)}"
        time.sleep(0.001)


def lines(job):
    path = Path(job.out) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_while_saving(runner, job) -> bool:
    """Kills the run when it starts to write a checkpoint; whether the kill came before the commit."""
    folder = Path(job.out) / "checkpoints"
    process = runner.start(job)
    left = set(begun(folder))
    wait_for(lambda: set(begun(folder)) - left, process, job)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return any(folder.glob("*.partial"))


def begun(folder):
    """What is being written; a folder that is renamed while it is listed counts for the next look."""
    try:
        return list(folder.glob("*.partial/state*"))
    except FileNotFoundError:
        return []


def kill_between_saves(runner, job, after: float):
    before = lines(job)
    process = runner.start(job)
    wait_for(lambda: lines(job) != before, process, job)
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def torture(runner, job, kills, seed):
    rng = random.Random(seed)
    in_flight = 0
    for i in range(kills):
        if i % 2 == 0 or in_flight == 0:
            in_flight += kill_while_saving(runner, job)
        else:
            kill_between_saves(runner, job, rng.uniform(0, 4 * job.seconds))
    assert in_flight, "no kill hit a save under way"
    runner.run(job)


def test_killed_also_during_a_save_and_resumed_equals_undisturbed(runner, undisturbed, tmp_path):
    job = replace(undisturbed, out=str(tmp_path / "run"), seconds=0.03)
    torture(runner, job, kills=2, seed=0)
    assert_as_if_undisturbed(job, undisturbed)
    assert not list(Path(job.out).glob("checkpoints/*.partial"))


@pytest.mark.slow
def test_killed_many_times_and_resumed_equals_undisturbed(runner, tmp_path):
    reference = Job(out=str(tmp_path / "reference"), cache=runner.cache, steps=60)
    runner.run(reference)
    job = replace(reference, out=str(tmp_path / "run"), seconds=0.15)
    torture(runner, job, kills=10, seed=1)
    assert_as_if_undisturbed(job, reference)


def test_told_to_stop_it_saves_that_step_exits_cleanly_and_resumes_equal(runner, undisturbed, tmp_path):
    job = replace(undisturbed, out=str(tmp_path / "run"), seconds=0.1)
    process = runner.start(job)
    wait_for(lambda: lines(job) >= 4, process, job)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0, tail(job)
    stopped = max(steps(Path(job.out) / "checkpoints"))
    assert f"interrupted at step {stopped}\n" in tail(job)
    assert 4 <= stopped < job.steps and metrics(job.out)[-1][0] == stopped
    assert int(state(job.out)["step"]) == stopped
    runner.run(replace(job, seconds=0))
    done, expected = metrics(job.out), metrics(undisturbed.out)
    assert done == expected
    assert_same_bits(state(job.out), state(undisturbed.out))


@pytest.mark.slow
def test_resumed_on_the_same_mesh_equals_undisturbed(runner, on_eight, tmp_path):
    job = cut_back(on_eight, 6, tmp_path / "run")
    runner.run(job)
    assert_as_if_undisturbed(job, on_eight)


@pytest.mark.parametrize("mesh, devices", [((2, 2, 2), 8), ((1, 1, 1), 1)])
def test_resumed_on_another_mesh_sees_the_same_batches(runner, on_eight, tmp_path, mesh, devices):
    job = cut_back(on_eight, 6, tmp_path / "run", mesh=mesh, devices=devices)
    runner.run(job)
    assert rows(job.out) == rows(on_eight.out) and rows(job.out).keys() == set(range(12))
    assert all(sorted(batch) == list(range(16)) for batch in rows(job.out).values())
    assert_close(job, on_eight, since=6)


def assert_close(job, reference, since):
    """The same steps, bitwise up to `since`; then losses and parameters differ by float32 rounding alone."""
    (found, expected) = (
        [(step, line) for step, line in metrics(one.out) if "loss" in line] for one in (job, reference)
    )
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert found[:since] == expected[:since]
    losses = [[line["loss"] for _, line in lines] for lines in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=LOSS_TOLERANCE)
    reached, aim = state(job.out), state(reference.out)
    assert list(reached) == list(aim) and int(reached["step"]) == int(aim["step"])
    for path, x in reached.items():
        if path.startswith("trainable/"):
            np.testing.assert_allclose(x, aim[path], rtol=0, atol=PARAMS_TOLERANCE, err_msg=path)


def test_full_disk_loses_no_checkpoint_and_says_so(runner, undisturbed, tmp_path):
    # The limit holds for the log too, and each failed save writes much to it: two saves fail, none for an evaluation.
    starved = cut_back(undisturbed, 6, tmp_path / "run", file_bytes=40_000, eval_every=12)
    process = runner.start(starved)
    process.join(120)
    assert process.exitcode == 1, tail(starved)
    said = starved.log.read_text()
    assert re.search(r"UserWarning: the checkpoint of step 9 in \S+ was not saved: .*File too large", said)
    assert re.search(r"OSError: stopped at step 12, but the checkpoint of step 12 in \S+ was not saved", said)
    assert steps(Path(starved.out) / "checkpoints") == [6]
    fed = replace(starved, file_bytes=None, eval_every=undisturbed.eval_every)
    runner.run(fed)
    assert_as_if_undisturbed(fed, undisturbed)


def test_a_run_with_other_settings_is_refused_in_the_same_folder(runner, undisturbed, tmp_path):
    job = cut_back(undisturbed, 6, tmp_path / "run")
    other = replace(plan(job), steps=13)
    with pytest.raises(
        ValueError, match=r"holds another run \(steps: 12 there, 13 asked\); choose another folder"
    ):
        standard.run(train.session(other, cache=job.cache, devices=jax.devices()[:1]), job.out)
    wider = plan(replace(job, d_model=16))
    with pytest.raises(
        ValueError, match=r"attn/q/w is float32\[2, 32, 32\] there, float32\[2, 16, 16\] here"
    ):
        standard.run(train.session(wider, cache=job.cache, devices=jax.devices()[:1]), job.out)
    assert steps(Path(job.out) / "checkpoints") == [6]
    assert metrics(job.out) == metrics(undisturbed.out)


def test_a_run_is_prolonged_from_where_its_schedule_is_flat(tmp_path):
    """From the checkpoint at step 4 of 6, before the fall, 8 steps are those of a run that was to have 8."""
    schedule = WSD(warmup=1, decay=2)
    base = plan(Job(str(tmp_path), str(tmp_path / "cache"), steps=6, save_every=2, eval_every=6))
    short = replace(base, optim=replace(base.optim, schedule=schedule))
    long = replace(short, steps=8)

    def run(wanted, out):
        session = train.session(wanted, cache=tmp_path / "cache", devices=jax.devices()[:1])
        return standard.run(session, tmp_path / out)

    run(long, "long")
    run(short, "short")
    with pytest.raises(ValueError, match=r"steps: 6 there, 8 asked"):
        run(long, "short")
    shutil.copytree(tmp_path / "short", tmp_path / "prolonged")
    shutil.rmtree(tmp_path / "prolonged" / "checkpoints" / "6")
    run(long, "prolonged")
    assert_same_bits(state(tmp_path / "prolonged"), state(tmp_path / "long"))
    assert metrics(tmp_path / "prolonged") == metrics(tmp_path / "long")
