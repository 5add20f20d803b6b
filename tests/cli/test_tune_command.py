"""lmx tune on a tiny trained run: ways side by side, gone on with, and mistakes in one line."""

import csv
import json

import pytest

from lmx.cli.tune import way
from lmx.evals import score
from lmx.run import load, trained
from lmx.tasks import Choices, Records, Task, Template

CHOICES = ("--template", "{text}\\nभाव:", "--labels", "0=ना,1=हाँ")


@pytest.fixture(scope="module")
def reviews(folder):
    words = (("बुरी", 0), ("कमाल", 1), ("old", 0), ("near", 1))
    for name, n in (("dev", 8), ("train", 48)):
        rows = [(f"{words[i % 4][0]} {i // 4 % 5}", words[i % 4][1]) for i in range(n)]
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return "--test", "dev.csv", "--train", "train.csv"


def test_ways_are_trained_judged_and_told(run, lmx, refused, folder, reviews):
    how = "--ways 3e-2@full head --epochs 8 --seq-len 64 --valid-share 0.3".split()
    words = ("tune", run[0], *reviews, *CHOICES, *how)
    with pytest.warns(UserWarning, match="test questions"):
        told = lmx(*words, "--shots", "2", "--text", "english.txt", "--out", "tuned")
    assert "0 shots" in told and "2 shots" in told and "3e-2@full" in told and "head" in told
    kept = json.loads((folder / "tuned" / "3e-2@full" / "score.json").read_text())
    task = Task(
        "dev",
        test=Records(folder / "dev.csv"),
        template=Template("{text}\nभाव:", " {label}"),
        answer=Choices({"0": "ना", "1": "हाँ"}),
    )
    found = score(trained(folder / "tuned" / "3e-2@full", step="best"), task).metrics["accuracy"]
    assert kept["metrics"]["accuracy"]["value"] == found.value
    assert "held out" in (folder / "tuned" / "report.html").read_text()
    with pytest.warns(UserWarning, match="test questions"):
        assert lmx(*words, "--shots", "2", "--text", "english.txt", "--out", "tuned") == told
    assert "2 classes in place of words: ना, हाँ" in lmx("info", "tuned/head")
    asked = ("prompt", "score", "tuned/head", *reviews, *CHOICES)
    assert "accuracy" in lmx(*asked)
    with pytest.warns(UserWarning, match="test questions"):
        assert "leave the examples before them out" in refused(*asked, "--shots", "2")
    before = (folder / "train.csv").read_text(encoding="utf-8")
    more = "".join(f"अच्छी {i},1\n" for i in range(40))
    (folder / "train.csv").write_text(before + more, encoding="utf-8")
    with pytest.warns(UserWarning, match="test questions"):
        assert "its data has changed" in refused(*words, "--text", "english.txt", "--out", "tuned")
    (folder / "train.csv").write_text(before, encoding="utf-8")


def test_the_best_by_accuracy_with_noise_and_smoothing(run, lmx, refused, folder, reviews):
    how = "--ways 3e-2@full --epochs 8 --seq-len 64 --valid-share 0.3 --out by-score".split()
    more = "--best accuracy --patience 2 --noise 5 --smoothing 0.1".split()
    with pytest.warns(UserWarning, match="test questions"):
        lmx("tune", run[0], *reviews, *CHOICES, *how, *more)
    lines = (folder / "by-score" / "3e-2@full" / "metrics.jsonl").read_text().splitlines()
    told = [line["valid/accuracy"] for line in map(json.loads, lines) if "valid/accuracy" in line]
    assert told and all(0 <= x <= 1 for x in told)
    saved = load(folder / "by-score" / "3e-2@full" / "run.txt")
    assert (saved.best, saved.patience, saved.model.embed_noise) == ("-valid/accuracy", 2, 5.0)
    assert "is judged by accuracy" in refused("tune", run[0], *reviews, *CHOICES, *how, "--best", "bleu")


@pytest.mark.parametrize("text", ["lora:x", "head:4", "most", "fast@full", "full:8", "1e-4@", ":4"])
def test_ways_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=f"--ways {text}: write full, lora, qlora, head, with a rank"):
        way(text)


def test_mistakes_cost_one_line(run, refused, reviews):
    assert "it reads data" in refused("tune", run[0], "sst2") or "--data FOLDER" in refused(
        "tune", run[0], "sst2"
    )
    free = ("tune", run[0], *reviews, "--template", "{text}:", "--ways", "head", "--valid-share", "0.3")
    assert "head=True needs classes" in refused(*free)
    alone = ("tune", run[0], "--test", "dev.csv", *CHOICES)
    assert "it has no training records" in refused(*alone)
    assert "is less than one step" in refused(
        "tune", run[0], *reviews, *CHOICES, "--epochs", "0.001", "--valid-share", "0.3"
    )
