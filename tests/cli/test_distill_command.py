"""`lmx distill` end to end: a run labels a text in Hindi and English, and a smaller one learns from the labels."""

import json

import pytest

from lmx import cli
from lmx.adapt import Classes
from lmx.data import Data, Documents, File, TeacherTopK
from lmx.models.presets import llama
from lmx.run import Run
from lmx.tasks import Answers, Records, Score, Task, Template
from lmx.train import session, standard

TEXTS = tuple(f"{'नदी river'.split()[i % 2]} {i * i} बहती है flows" for i in range(60))
EXPERIMENT = """
from lmx import Run
from lmx.data import Data, Documents, TeacherTopK
from lmx.models.presets import llama

def base():
    data = Data((Documents({texts}),), valid_share=0.0, seq_len=32, batch_size=8, teacher={teacher})
    return Run(model=llama(16, 1, 2), data=data, steps=4)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    data = Data((Documents(TEXTS),), valid_share=0.0, seq_len=32, batch_size=8)
    run = Run(model=llama(16, 1, 2), data=data, steps=2)
    standard.run(session(run, cache=folder / "cache"), folder / "run")
    return folder / "run"


def test_a_text_is_labelled_and_learned_from(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LMX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "student.py"
    file.write_text(EXPERIMENT.format(texts=TEXTS, teacher=f"TeacherTopK({str(tmp_path / 'labels')!r})"))
    asked = ["distill", "label", str(teacher), str(file), "--out", str(tmp_path / "labels"), "--k", "4"]
    cli.main(asked)
    assert "18 bytes each" in capsys.readouterr().out
    cli.main(asked)
    cli.main(["train", str(file), "--out", str(tmp_path / "student")])
    assert "TeacherTopK(" in (tmp_path / "student" / "run.txt").read_text()
    capsys.readouterr()
    cli.main(["explain", str(tmp_path / "student" / "run.txt")])
    assert "labels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*asked[:-1], "5"])
    assert "holds labels with another k (4 there, 5 asked)" in capsys.readouterr().err


def test_a_file_of_its_own_is_labelled_by_the_teachers_tokenizer(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("LMX_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(TEXTS))
    labels = tmp_path / "labels"
    cli.main(
        ["distill", "label", str(teacher), str(text), "--out", str(labels), "--k", "2", "--context", "32"]
    )
    data = Data(
        (str(text),),
        valid_share=0.0,
        tokenizer=File(str(teacher)),
        seq_len=32,
        teacher=TeacherTopK(str(labels)),
    )
    made = session(Run(model=llama(16, 1, 2), data=data), cache=tmp_path / "cache")
    assert made.prepared.train.batch(0)["teacher_ids"].shape == (32, 32, 2)


def test_rows_are_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LMX_CACHE", str(tmp_path / "cache"))
    rows = [{"text": text, "share": i % 2} for i, text in enumerate(TEXTS)]
    task = Task("t", Records(rows), Template("{text}", "{share}"), Score(), Records(rows))
    data = Data((Answers(task, head=True),), valid_share=0.0, seq_len=64, batch_size=8)
    run = Run(model=llama(16, 1, 2), data=data, start=(Classes(2),), steps=1)
    standard.run(session(run), tmp_path / "scorer")
    new = tmp_path / "new.jsonl"
    new.write_text(
        "\n".join(json.dumps({"text": x, "n": i}, ensure_ascii=False) for i, x in enumerate(TEXTS))
    )
    out = tmp_path / "scored.jsonl"
    cli.main(["distill", "score", str(tmp_path / "scorer"), str(new), "--out", str(out), "--keep", "n"])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [x["n"] for x in found] == list(range(60)) and all(0 <= x["score"] <= 1 for x in found)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(
            [
                "distill",
                "score",
                str(tmp_path / "scorer"),
                str(new),
                "--out",
                str(out)[:-1],
                "--template",
                "text",
            ]
        )
    assert "names no field" in capsys.readouterr().err
