"""Real processes joined by jax.distributed on this machine, against one process with the same devices."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_resume import assert_as_if_undisturbed, assert_close, cut_back, lines, wait_for
from tiny import assert_same_bits, free_port, metrics, rows, state, tail

from lmx.train.checkpoint import steps


def test_two_processes_train_as_one_does(references):
    one, two = references["eight"], references["two"]
    halves = [Path(f"{two.out}.rows.{process}.jsonl").read_text().splitlines() for process in (0, 1)]
    for first, second in zip(*(map(json.loads, half) for half in halves), strict=True):
        assert (
            len(first["rows"]) == len(second["rows"]) == 8
            and not first["rows"].keys() & second["rows"].keys()
        )
    assert rows(two.out) == rows(one.out)
    assert_close(two, one, since=0)


def test_processes_that_share_matrices_see_the_same_rows(runner, references, tmp_path):
    """One device in each of two processes, and the tensor axis across them: both hold the whole batch."""
    job = replace(references["two"], out=str(tmp_path / "run"), mesh=(1, 1, 2), devices=1, port=free_port())
    runner.run(job)
    for process in (0, 1):
        notes = [json.loads(x) for x in Path(f"{job.out}.rows.{process}.jsonl").read_text().splitlines()]
        assert [len(note["rows"]) for note in notes] == [16] * job.steps
    assert rows(job.out) == rows(references["alone"].out)
    assert_close(job, references["alone"], since=0)


@pytest.mark.parametrize("begun, ended", [("two", "two"), ("two", "eight"), ("eight", "two")])
def test_begun_by_some_and_ended_by_other_processes(runner, references, tmp_path, begun, ended):
    begun, ended = references[begun], references[ended]
    placed = {"devices": ended.devices, "processes": ended.processes, "port": free_port()}
    job = cut_back(begun, 6, tmp_path / "run", **placed)
    runner.run(job)
    assert_same_bits(state(job.out, 6), state(begun.out, 6))
    if begun is ended:
        assert_as_if_undisturbed(job, begun)
    else:
        assert rows(job.out) == rows(begun.out)
        assert_close(job, begun, since=6)


def test_a_signal_to_one_process_stops_both_at_the_same_step(runner, references, tmp_path):
    job = replace(references["two"], out=str(tmp_path / "run"), seconds=0.3, port=free_port())
    jobs = [replace(job, process=i) for i in range(2)]
    processes = [runner.start(each) for each in jobs]
    wait_for(lambda: lines(job) >= 3, processes[0], jobs[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    for process, each in zip(processes, jobs, strict=True):
        process.join(60)
        assert process.exitcode == 0, tail(each)
    stopped = max(steps(Path(job.out) / "checkpoints"))
    assert 3 <= stopped < job.steps and metrics(job.out)[-1][0] == stopped
    assert all(f"interrupted at step {stopped}\n" in tail(each) for each in jobs)


@pytest.mark.slow
def test_one_process_killed_leaves_whole_checkpoints_and_ends_the_other(runner, references, tmp_path):
    """The survivor cannot go on alone; what was saved is enough to go on with one process."""
    job = replace(references["two"], out=str(tmp_path / "run"), seconds=0.05, port=free_port())
    jobs = [replace(job, process=i) for i in range(2)]
    processes = [runner.start(one) for one in jobs]
    wait_for(lambda: steps(Path(job.out) / "checkpoints"), processes[0], jobs[0])
    os.kill(processes[1].pid, signal.SIGKILL)
    time.sleep(0.2)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    reached = steps(Path(job.out) / "checkpoints")[-1]
    alone = replace(job, processes=1, devices=8, seconds=0)
    runner.run(alone)
    assert_close(alone, references["two"], since=reached)
