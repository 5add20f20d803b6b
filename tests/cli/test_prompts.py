"""lmx prompt on a tiny trained run: what is printed is what the library says, and mistakes cost one line."""

import csv
import json
import re
from pathlib import Path

import pytest

from lmx.evals import score, search, sensitivity
from lmx.run import trained
from lmx.tasks import Choices, Free, Number, Records, Shots, Task, Template, fruit, prompt_text

TEMPLATE = Template("{text}\nभाव:", " {label}")
CHOICES = ("--template", "{text}\\nभाव:", "--labels", "0=ना,1=हाँ")


@pytest.fixture
def reviews(tmp_path):
    """dev.csv and train.csv, in English and Hindi."""
    rows = ["नदी शांत है", "the old mills", 'पुरानी, "टूटी" नाव', "boats pass", "कमाल", "near town 3"]
    for name, texts in {"dev": rows[:4], "train": [f"{x} {i}" for i in range(2) for x in rows]}.items():
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((x, i % 2) for i, x in enumerate(texts))])
    return tmp_path


def own(reviews):
    return ("--test", reviews / "dev.csv", "--train", reviews / "train.csv", "--bootstrap", "20")


def task_of(reviews, answer=Choices({"0": "ना", "1": "हाँ"})):
    test, train = (Records(reviews / f"{name}.csv") for name in ("dev", "train"))
    return Task("dev", test=test, train=train, template=TEMPLATE, answer=answer)


def test_try_shows_the_exact_tokens_and_the_answer(run, lmx, reviews):
    told = lmx("prompt", "try", run[0], *own(reviews), *CHOICES, "--shots", "2", "--example", "3")
    model, task = trained(run[0]), task_of(reviews)
    example = list(task.examples())[2]
    text = prompt_text(task, example.question, Shots(2)(task.examples("train")))
    assert told.startswith(text + "\n\n")
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    lines = [line.split() for line in told.split("─\n")[1].split("\n\n")[0].splitlines()]
    assert [int(line[1].replace(",", "")) for line in lines] == ids
    assert [int(line[0]) for line in lines] == list(range(len(ids)))
    assert lines[0][2] == "<|bos|>" and lines[-1][-1] == "question" and "shot 2 answer" in told
    (outcome,) = [x for x in score(model, task, Shots(2)).outcomes if x.where == example.where]
    assert f"answer: {outcome.prediction}   right: {example.references[0]}" in told
    assert all(f"{p:.2g}"[:3] in told for p in outcome.probabilities.values())


def test_try_of_free_text_and_of_numbers(run, lmx, reviews):
    for more in ((), ("--number", "0", "1")):
        told = lmx(
            "prompt", "try", run[0], *own(reviews), "--template", "{text}:", "--max-tokens", "3", *more
        )
        assert "written greedily: " in told and "right: 0" in told


def test_score_prints_metrics_and_writes_outcomes(run, lmx, reviews, tmp_path):
    out = tmp_path / "deep" / "answers.jsonl"
    settings = ("--shots", "3", "--pick", "nearest", "--calibrate", "--limit", "3", "--out", out)
    told = lmx("prompt", "score", run[0], *own(reviews), *CHOICES, *settings)
    from lmx.evals import Nearest

    want = score(trained(run[0]), task_of(reviews), Nearest(3), calibrate=True, limit=3, resamples=20)
    assert re.search(rf"^accuracy +{re.escape(str(want.metrics['accuracy']))}$", told, re.MULTILINE)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(x["where"], x["prediction"]) for x in rows] == [(x.where, x.prediction) for x in want.outcomes]
    voted = lmx(
        "prompt",
        "score",
        run[0],
        *own(reviews),
        "--template",
        "{text}:",
        "--number",
        "0",
        "1",
        "--votes",
        "2",
    )
    assert "mean_error" in voted


def test_score_of_a_named_task_with_another_template(run, lmx):
    told = lmx(
        "prompt",
        "score",
        run[0],
        "fruit",
        "--shot-tokens",
        "40",
        "--template",
        "{fruit} =",
        "--limit",
        "5",
        "--instruction",
        "फल\\nक्या है",
    )
    assert "fruit: 5 examples" in told and "read once" in told


def test_sweep_writes_a_report_and_goes_on(run, lmx, reviews, tmp_path):
    out = tmp_path / "sweep"
    command = ("prompt", "sweep", run[0], *own(reviews), *CHOICES, "--templates", "{text} =>", "--out", out)
    told = lmx(*command, "--shots", "0", "1", "--seeds", "2", "--orders", "1")
    kept = (out / "prompts.jsonl").read_text("utf-8")
    assert len(kept.splitlines()) == 2 * (1 + 2)
    want = sensitivity(
        trained(run[0]),
        task_of(reviews),
        (0, 1),
        [Template("{text} =>", " {label}")],
        seeds=2,
        orders=1,
        resamples=20,
    )
    mean = next(iter(want.groups().values()))[0]
    assert str(mean) in told and "sd of prompts" in told
    page = (out / "report.html").read_text("utf-8")
    assert "<svg" in page and "भाव" in page and (out / "prompts.svg").read_text("utf-8").startswith("<svg")
    again = lmx(*command, "--shots", "0", "1", "--seeds", "2", "--orders", "1")
    assert again == told and (out / "prompts.jsonl").read_text("utf-8") == kept


def test_search_writes_a_winner_that_can_be_rebuilt(run, lmx, reviews, tmp_path):
    out = tmp_path / "search"
    settings = (
        "--budget",
        "24",
        "--shots",
        "0",
        "2",
        "--seeds",
        "2",
        "--instructions",
        "एक शब्द",
        "--out",
        out,
    )
    told = lmx("prompt", "search", run[0], *own(reviews), *CHOICES, *settings)
    assert "winner, held out" in told and "the best of 6 prompts" in told
    import lmx.tasks as tasks
    from lmx.evals import Nearest

    names = {**vars(tasks), "Nearest": Nearest}
    exec((out / "winner.txt").read_text("utf-8"), names)
    want = search(
        trained(run[0]), task_of(reviews), budget=24, instructions=["एक शब्द"],
        shots=[Shots(), Shots(2, seed=0), Shots(2, seed=1)], resamples=20,
    )  # fmt: skip
    assert (names["task"], names["shots"]) == (want.task, want.shots)
    assert str(want.held_out.metrics["accuracy"]) in told
    page = (out / "report.html").read_text("utf-8")
    assert "held out" in page and "Candidates" in page


@pytest.mark.parametrize(
    "words, why",
    [
        (("fruits",), "no task 'fruits'; by name there are fruit"),
        (("sst2",), "sst2 reads data; give the folder"),
        (("fruit", "--test", "x.csv"), "fruit is a task by name, and --test"),
        ((), "--test is missing"),
        (("--test", "x.csv"), "--template is missing"),
        (("--test", "none.csv", "--template", "{text}"), "none.csv"),
        (("fruit", "--template", "{text}"), "lacks 'text'"),
        (("fruit", "--template", "{text"), "single {"),
        (("fruit", "--max-tokens", "3"), "--max-tokens 3"),
        (("fruit", "--shots", "99"), "k=99"),
        (("fruit", "--votes", "2"), "votes=2"),
        (("fruit", "--pick", "nearest", "--shots", "2", "--order", "1"), "--pick nearest"),
        (
            ("--test", "x.csv", "--template", "{a}", "--labels", "a,b", "--number", "0", "1"),
            "give one of them",
        ),
        (("--test", "x.csv", "--template", "{a}", "--labels", "a"), "leave no choice"),
        (("translation-hi-en", "--data", "nowhere"), "no file devtest.hi"),
        (("fruit", "--chat"), "chat template"),
    ],
)
def test_mistakes_are_told_in_one_line(run, refused, words, why):
    assert why in refused("prompt", "score", run[0], *words)


def test_mistakes_of_the_other_verbs(run, refused, tmp_path):
    assert "--example 0" in refused("prompt", "try", run[0], "fruit", "--example", "0")
    n = len(list(fruit().examples()))
    assert f"fruit has {n}" in refused("prompt", "try", run[0], "fruit", "--example", "999")
    assert "--pick nearest" in refused("prompt", "sweep", run[0], "fruit", "--pick", "nearest")
    out = ("--out", tmp_path)
    assert "metric='bleu'" in refused("prompt", "sweep", run[0], "fruit", "--metric", "bleu", *out)
    assert "budget=1" in refused("prompt", "search", run[0], "fruit", "--budget", "1", *out)
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    assert "prompts.jsonl:1 is no line" in refused("prompt", "sweep", run[0], "fruit", *out)
    assert "nowhere: no checkpoint" in refused("prompt", "score", Path("nowhere"), "fruit")


def test_answers_by_their_options():
    from lmx.cli.prompt import Score
    from lmx.cli.task import _answer, task_of

    asked = {"model": Path("m"), "test": "x.csv", "template": "{a}"}
    assert task_of(Score(**asked)).answer == Free(64)
    assert _answer(Score(**asked, number=(1, 5))) == Number(1, 5)
    assert _answer(Score(**asked, labels="bad, good")).labels == {"bad": "bad", "good": "good"}
    assert task_of(Score(**asked, answer="\\n{b}")).template == Template("{a}", "\n{b}")


def test_what_is_stopped_says_how_to_go_on_and_works_alone(tmp_path):
    from lmx.cli.prompt import _kept

    with pytest.raises(KeyboardInterrupt, match=r"prompts\.jsonl has what is done; repeat"), _kept(tmp_path):
        with pytest.raises(ValueError, match="is in use by process"), _kept(tmp_path):
            pass
        raise KeyboardInterrupt
