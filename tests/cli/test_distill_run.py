"""lmx train with a teacher, a run of before: a student learns from it, goes on with it, and names it."""

import json
import shutil

import pytest

STUDENT = '''"""Does half a model learn from a whole one?"""

from dataclasses import replace

import experiment

from lmx.losses import Chunked, ForwardKL, NextToken, Term
from lmx.train import Teacher


def base():
    run = experiment.base()
    return replace(
        run,
        model=replace(run.model, d_model=16),
        objective={"kd": Term(Chunked(ForwardKL(2.0), 16), 0.7), "ce": Term(NextToken(), 0.3)},
        enrich=Teacher("runs/experiment/base-b2=0.99"),
    )
'''


@pytest.fixture(scope="module")
def student(folder, run):
    (folder / "student.py").write_text(STUDENT)
    return folder, run[0]


def test_a_student_learns_from_a_run_and_a_resumed_one_is_the_same(student, lmx, refused):
    folder, teacher = student
    assert "runs/student/base: 10 steps, loss" in lmx("train", "student.py")
    lines = [
        json.loads(line) for line in (folder / "runs/student/base/metrics.jsonl").read_text().splitlines()
    ]
    kd = [line["kd"] for line in lines if "kd" in line]
    assert len(kd) == 10 and kd[-1] < kd[0] and any("valid/loss" in line for line in lines)
    told = lmx("explain", "runs/student/base/checkpoints/10")
    assert str(teacher / "checkpoints") in told and "CHANGED" not in told

    shutil.copytree(folder / "runs/student/base", folder / "cut")
    shutil.rmtree(folder / "cut/checkpoints/10")
    other = folder / "another"
    shutil.copytree(folder / teacher, other)
    shutil.rmtree(other / "checkpoints/10")
    wrong = refused("train", "student.py", "--out", "cut", "--set", "enrich.path=another")
    assert "another/checkpoints/5 is not what" in wrong and "step=NUMBER" in wrong
    assert "cut: 10 steps" in lmx("train", "student.py", "--out", "cut")
    timed = ("first_step_seconds", "step_seconds", "tokens_per_sec", "mfu")
    again = [json.loads(line) for line in (folder / "cut/metrics.jsonl").read_text().splitlines()]
    for line in (*lines, *again):
        for name in timed:
            line.pop(name, None)
    assert again == lines


def test_a_teacher_that_does_not_fit_is_refused_in_a_line(student, refused):
    assert "has another tokenizer than the run" in refused(
        "train", "student.py", "--out", "x", "--set", "data.tokenizer=Byte()"
    )
    assert "was made to read 32 tokens at once" in refused(
        "train", "student.py", "--out", "x", "--set", "data.seq_len=48"
    )
    assert "is no model" in refused("train", "student.py", "--out", "x", "--set", "enrich.path=nowhere")
