"""What a task shows of its records: words, labels, what is passed over, and what leaks from training into test."""

import doctest
import importlib
from pathlib import Path

import pytest

import lmx
from lmx.data import Report
from lmx.tasks import (
    Choices,
    Free,
    Number,
    Records,
    Task,
    Template,
    fruit,
    overlap,
    sst2,
    summarization,
    translation,
)

DATA = Path(lmx.__file__).parents[2] / "shared" / "data"
SENTIMENT = Template("Review: {text}\nSentiment:", " {label}")
WORDS = Choices({"0": "negative", "1": "positive"})


def task(rows, template=SENTIMENT, answer=WORDS, **more):
    return Task("reviews", Records(rows), template, answer, **more)


@pytest.mark.parametrize("module", ["", ".task", ".prompt"])
def test_examples_in_docstrings(module):
    found = doctest.testmod(importlib.import_module(f"lmx.tasks{module}"))
    assert found.attempted and not found.failed


def test_a_template_puts_in_fields_and_nothing_else():
    nasty = {
        "a": "{b} {0} {a.__class__} %s \\1 \\g<0>",
        "b.__class__": "x",
        "b": "क्षि",
        "c[0]": "y",
        "d:>9": "z",
        "e!r": "w",
    }
    shown = Template("{{{a}}} {b.__class__} {c[0]} {d:>9} {e!r} {b}", "{b}").question_of(nasty)
    assert shown == "{" + nasty["a"] + "} x y z w क्षि"
    with pytest.raises(ValueError, match=r"lacks 'a\.__class__'"):
        list(task([{"a": "x", "label": 1}], Template("{a.__class__}", "{label}")).examples())


@pytest.mark.parametrize(
    "question, answer, why",
    [
        ("{a", "{b}", r"'\{a' has a single \{ at character 0"),
        ("{a} }", "{b}", r"a single \} at character 4"),
        ("{a}{}", "{b}", "a field without a name"),
        ("none {{x}}", "{b}", "names no field"),
        ("{a}", "x", "names 0 fields; it needs one"),
        ("{a}", "{b}{c}", "names 2 fields"),
    ],
)
def test_a_template_that_means_nothing_is_refused(question, answer, why):
    with pytest.raises(ValueError, match=why):
        Template(question, answer)


def test_examples_in_words_and_what_is_passed_over():
    rows = [
        {"text": "अच्छी", "label": 1},
        {"text": "bad", "label": "0"},
        {"text": "odd", "label": 7},
        {"text": " ", "label": 1},
        {"text": "both", "label": ["0", "1"]},
        {"text": "none"},
    ]
    report = Report()
    first, second = task(rows).examples(report=report)
    assert first == ("row 0", "Review: अच्छी\nSentiment:", " positive", ("1",))
    assert second[1:] == ("Review: bad\nSentiment:", " negative", ("0",))
    assert report.documents == 2
    assert report.skipped == {"field_missing": 1, "label_outside": 2, "empty_text": 1}
    assert report.examples["label_outside"][0] == "row 2 holds 7; the labels are 0, 1"
    with pytest.raises(
        ValueError, match=r"(?s)no usable example.*label outside: row 0 holds 7; the labels are 0, 1"
    ):
        list(task(rows[2:3]).examples())
    with pytest.raises(ValueError, match="has no training records"):
        list(task(rows).examples("train"))


def test_truth_values_several_references_and_numbers():
    labels = Choices({True: "yes", False: "no"})
    assert next(task([{"text": "a", "label": True}], answer=labels).examples()).answer == " yes"
    found = next(task([{"text": "a", "label": ["नदी", " ", "river"]}], answer=Free()).examples())
    assert (found.answer, found.references) == (" नदी", ("नदी", "river"))
    report = Report()
    rows = [{"text": "a", "label": x} for x in (2.5, "1", 6, "many", -1)]
    assert [x.references for x in task(rows, answer=Number(0, 5)).examples(report=report)] == [
        ("2.5",),
        ("1",),
    ]
    assert report.skipped == {"label_outside": 3}


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: Choices(["one"]), "leave no choice"),
        (lambda: Choices({"0": "a", "1": "a"}), "must differ"),
        (lambda: Choices({"0": "a", "1": " "}), "must differ and have text"),
        (lambda: Free(stop="\n"), "is one string"),
        (lambda: Free(0), "max_tokens=0; use 1"),
        (lambda: Number(1, 1), "the lower one first"),
        (lambda: Number(0, float("inf")), "two finite numbers"),
    ],
)
def test_an_answer_that_means_nothing_is_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_a_number_is_read_from_words():
    read = Number(-10, 10).read
    assert [read(x) for x in ("5", "about 3.5.", "−2 या 3", "३.५ अंक", "11", "x", "", "-.5")] == [
        "5", "3.5", "-2", "3.5", None, None, None, "-.5",
    ]  # fmt: skip


def test_overlap_is_found_but_for_case_punctuation_and_unicode_form():
    train = [{"text": x, "label": 1} for x in ("A good film!", "क़लम अच्छा है।", "left")]
    tests = [{"text": x, "label": 0} for x in ("a  good film", "\u0958लम अच्छा है", "right", "!", "?")]
    assert train[1]["text"][:2] != tests[1]["text"][:1]  # qa in two characters, and in one
    both = task(tests, train=Records(train))
    with pytest.warns(
        UserWarning, match=r"reviews: 2 of 5 test questions \(40.0%\) are in its training.*row 0, row 1"
    ):
        assert overlap(both.examples("train"), both.examples(), both.name) == ("row 0", "row 1")
    assert overlap(both.examples("train"), list(both.examples())[2:]) == ()


def test_fruits_are_known_once_and_every_kind_is_in_both_parts():
    train, test = (list(fruit().examples(part)) for part in ("train", "test"))
    assert overlap(train, test) == ()
    assert len({x.question for x in train + test}) == len(train + test) > 70
    kinds = {x.references for x in test}
    assert [x.references for x in train[: len(kinds)]] == list(dict.fromkeys(x.references for x in test))
    assert ("strawberry:", " aggregate") in {(x.question, x.answer) for x in train + test}


def files(folder, **texts):
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_built_in_tasks_read_their_folders(tmp_path):
    head = "label\tsentence\n"
    films = sst2(files(tmp_path, train__tsv=head + "1\tso `` good ''\n", dev__tsv=head + '0\ta "bad one\n'))
    assert next(films.examples()).question == 'Review: a "bad one\nSentiment:'
    assert next(films.examples("train")).answer == " positive"
    hi = {f"{part}__hi": "नदी बहती है।\n" for part in ("dev", "devtest")}
    en = {f"{part}__en__{i}": f"{i} river flows.\n" for part in ("dev", "devtest") for i in range(2)}
    files(tmp_path, **hi, **en)
    there, back = translation(tmp_path, "hi", "en"), translation(tmp_path, "en", "hi")
    assert next(there.examples()).references == ("0 river flows.", "1 river flows.")
    assert next(there.examples()).question == "Hindi: नदी बहती है।\nEnglish:"
    assert next(back.examples("train"))[1:3] == ("English: 0 river flows.\nHindi:", " नदी बहती है।")
    with pytest.raises(
        FileNotFoundError, match=r"no file devtest\.mr or devtest\.mr\.0; it holds dev\.en\.0"
    ):
        translation(tmp_path, "hi", "mr")
    line = '{"long": "क\\n\\nख", "short": "क"}\n'
    short = summarization(files(tmp_path, train__jsonl=line, valid__jsonl=line))
    assert next(short.examples()).question == "क\n\nख\n\nIn one line:"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not here")
def test_real_data_are_read_whole():
    for real, n in (
        (sst2(DATA / "sst2"), 872),
        (sst2(DATA / "sst2", train="train-phrases.tsv"), 872),
        (translation(DATA / "translation-hi-en", "hi", "en"), 993),
        (translation(DATA / "translation-hi-en", "en", "hi"), 993),
        (summarization(DATA / "debian-summaries"), 1709),
    ):
        report = Report()
        assert len(list(real.examples(report=report))) == n
        assert not report.skipped
        assert next(real.examples("train")).answer.startswith(" ")
