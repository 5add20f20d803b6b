"""Files that a kill, a full disk, a copy or an editor left damaged: what is told, and what it costs."""

import json

import pytest

from lmx import artifact, cli
from lmx.report import read_metrics, run_report, sweep_report
from lmx.report.page import Text
from lmx.report.runs import _told, read_json
from lmx.report.sweeps import read_sweep

GOOD = [{"step": step, "tokens": 8} for step in (1, 2, 3)]
DEEP = "[" * 100_000
NO_OBJECT = {"list": "[1]", "number": "5", "text": '"x"', "null": "null", "empty": "", "deep": DEEP}
NO_OBJECT |= {"half": '{"a": 1', "zeros": "\0" * 8, "latin": b'{"a": "caf\xe9"}'}


def damaged(contents):
    return pytest.mark.parametrize("content", contents.values(), ids=list(contents))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "metrics.jsonl", lines(GOOD))
    return tmp_path


def warnings(page):
    return [text for text, a in zip(page.text("p"), page.attributes("p")) if a.get("class") == "warning"]


@pytest.fixture
def told(elements):
    """html -> Elements of a page that can be written."""
    return lambda html: elements(html.encode("utf-8").decode("utf-8"))


@damaged(
    {
        "no step": '{"loss": 1.0}',
        "step null": '{"step": null}',
        "step list": '{"step": [1]}',
        "step text": '{"step": "abc"}',
        "step infinite": '{"step": 1e400}',
        "step true": '{"step": true}',
        "step huge": f'{{"step": {10**400}, "loss": 1.0}}',
        "digits": f'{{"step": 2, "loss": {"9" * 5000}}}',
        "nested": f'{{"step": 2, "a": {DEEP}',
        "no object": "12",
        "half": '{"st',
    }
)
class TestADamagedLineOfMetrics:
    def test_is_counted_on_the_page(self, run, told, content):
        write(run / "metrics.jsonl", lines(GOOD[:1]) + content + "\n" + lines(GOOD[1:]))
        page = told(run_report(run))
        (warning,) = warnings(page)
        assert warning.startswith("Damaged lines left out: 1, the first: ")
        assert f"{run / 'metrics.jsonl'}, line 2: " in warning
        assert dict(zip(page.text("dt"), page.text("dd")))["tokens seen"] == "24"

    def test_is_an_error_where_no_other_line_is_left(self, run, content):
        write(run / "metrics.jsonl", content + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: .*mend or remove the file"):
            run_report(run)

    def test_is_an_error_to_who_asks_for_the_numbers(self, run, content):
        write(run / "metrics.jsonl", content + "\n" + lines(GOOD))
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: .*mend or remove that line"):
            read_metrics(run)


@pytest.mark.parametrize("loss", ["1e400", "1e308", "1" + "0" * 400, "-1e308"])
def test_a_loss_too_large_to_draw_is_not_finite(run, told, loss):
    write(
        run / "metrics.jsonl", lines(GOOD) + f'{{"step": 4, "loss": {loss}}}\n{{"step": 5, "loss": -1e150}}\n'
    )
    assert warnings(told(run_report(run))) == ["Steps whose loss was not finite: 1, the first at 4."]


@pytest.mark.parametrize("tokens, shown", [("NaN", "–"), ('"NaN"', "–"), ("1e308", "inf")])
def test_a_token_count_that_is_no_number_is_shown_so(run, told, tokens, shown):
    write(run / "metrics.jsonl", lines(GOOD) + f'{{"step": 4, "tokens": {tokens}}}\n')
    page = told(run_report(run))
    assert dict(zip(page.text("dt"), page.text("dd")))["tokens seen"] == shown


@pytest.mark.parametrize("name", ["a\0b", "a\x1bb", "\ud800", "\uffff", "valid/loss@²", "valid/loss@"])
def test_a_metric_and_a_variant_may_have_any_name(run, told, name):
    rows = [{"step": step, "loss": step, "valid/loss": step, name: step} for step in (1, 2)]
    write(run / "metrics.jsonl", lines(rows))
    assert warnings(told(run_report(run))) == []
    write(run / "sweep.json", json.dumps({"cells": [{"variant": name, "seed": 0, "path": "."}]}))
    assert warnings(told(sweep_report(run))) == []


@pytest.mark.parametrize("name", ["overrides.json", "environment.json", "data.json", "results.json"])
class TestASideFile:
    @damaged(NO_OBJECT)
    def test_that_holds_no_object_costs_its_own_part(self, run, told, name, content):
        write(run / name, content)
        write(run / "run.txt", "Run()")
        page = told(run_report(run))
        (warning,) = warnings(page)
        assert str(run / name) in warning and "mend or remove it" in warning
        assert page.text("code") == ["Run()"] and "Other measurements" in page.text("h2")

    def test_that_cannot_be_opened_is_named(self, run, told, name):
        (run / name).mkdir()
        (warning,) = warnings(told(run_report(run)))
        assert str(run / name) in warning

    def test_may_hold_any_text(self, run, told, name):
        write(run / name, json.dumps({"\ud800\0": ["\ud800\0", "\x1b"]}))
        assert warnings(told(run_report(run))) == []

    def test_that_is_empty_of_facts_is_no_trouble(self, run, told, name):
        write(run / name, "{}")
        assert warnings(told(run_report(run))) == []


@pytest.mark.parametrize(
    "name, content",
    [
        ("overrides.json", '{"a": 1}'),
        ("overrides.json", '{"a": [1]}'),
        ("overrides.json", '{"a": "bc"}'),
        ("results.json", '{"a": {"value": null, "low": 1, "high": 2}}'),
        ("results.json", '{"a": {"b": {"value": 1, "low": [], "high": 2}}}'),
        ("results.json", '{"value": "x", "low": 1, "high": 2, "a": {"value": 1, "low": {}, "high": 2}}'),
        ("environment.json", '{"a": {"value": null, "low": 1, "high": 2}}'),
    ],
)
def test_a_value_of_the_wrong_form_is_named_with_its_file(run, told, name, content):
    write(run / name, content)
    (warning,) = warnings(told(run_report(run)))
    assert warning.startswith(f"{run / name}: '") and warning.endswith("mend or remove it")


def test_an_interval_of_huge_numbers_is_shown(run, told):
    interval = {"value": 10**400, "low": -1e308, "high": 1e308}
    write(run / "results.json", json.dumps({"a": interval, "b": 1e308, "c": 10**400}))
    assert warnings(told(run_report(run))) == []


@pytest.mark.parametrize("name", ["overrides.json", "environment.json", "results.json"])
@pytest.mark.parametrize("depth", [300, 3_000, 9_000])
def test_deep_nesting_is_told_or_named(run, told, name, depth):
    write(run / name, '{"a": [' + '{"b":' * depth + "1" + "}" * depth + ", 2]}")
    found = warnings(told(run_report(run)))
    assert len(found) == (depth > 300) and all(str(run / name) in warning for warning in found)


def test_a_file_that_is_read_but_too_deep_to_tell_is_named(tmp_path):
    """Since Python 3.12 json reads deeper than Python functions call."""

    def tell(path):
        return tell(path)

    warning = Text(f"{tmp_path}: nested too deeply; mend or remove it", "warning")
    assert _told(tmp_path, tell) == (warning,)


@pytest.mark.parametrize("content", ['{"step": null}', '{"text": "a"}', "[1]", DEEP, b"\xff"])
def test_a_damaged_sample_is_left_out_and_counted(run, told, content):
    write(run / "samples.jsonl", content)
    (warning,) = warnings(told(run_report(run)))
    assert f"{run / 'samples.jsonl'}, line 1: " in warning
    with (run / "samples.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 7, "prompt": "once", "text": " more"}) + "\n")
    page = told(run_report(run))
    assert warnings(page) == [warning] and "once more" in page.text("p")


@pytest.mark.parametrize("name", ["run.txt", "source.py", "uncommitted.diff"])
def test_a_text_that_is_not_utf_8_is_shown_as_far_as_it_goes(run, told, name):
    write(run / name, b"# caf\xe9\nlr = 3")
    page = told(run_report(run))
    assert page.text("code") == ["# caf\ufffd\nlr = 3"] and warnings(page) == []


@pytest.mark.parametrize("content", ["", "[1]", '{"made_from": 5}'])
def test_a_damaged_artifact_file_costs_its_own_ancestry(run, told, content):
    write(run / "run.txt", "Run()")
    write(run / "run.txt.artifact.json", content)
    (run / "checkpoints" / "²").mkdir(parents=True)
    (run / "checkpoints" / "3").mkdir()
    artifact.record(run / "checkpoints" / "3", "checkpoint")
    page = told(run_report(run))
    (warning,) = warnings(page)
    assert str(run / "run.txt.artifact.json") in warning and "content unchanged" in page.text("code")[1]


@damaged(NO_OBJECT)
def test_read_json_names_the_file(tmp_path, content):
    write(tmp_path / "results.json", content)
    with pytest.raises(ValueError, match=r"results\.json: not (JSON|a JSON object).*; mend or remove it"):
        read_json(tmp_path / "results.json")


CELL = {"variant": "a", "seed": 0, "path": "a"}
NO_SWEEP = NO_OBJECT | {
    "no cells": "{}",
    "cells 5": '{"cells": 5}',
    "cells none": '{"cells": []}',
    "metric": json.dumps({"metric": 5, "cells": [CELL]}),
}
NO_CELL = [{}, 5, [], CELL | {"seed": "1"}, CELL | {"seed": None}, CELL | {"seed": True}]
NO_CELL += [CELL | {"variant": 5}, CELL | {"path": None}, CELL | {"status": []}, CELL | {"status": "?"}]
NO_CELL += [CELL | {"error": 5}, {k: v for k, v in CELL.items() if k != "path"}]


@damaged(NO_SWEEP)
def test_a_damaged_sweep_is_an_error_that_names_its_file(tmp_path, content):
    write(tmp_path / "sweep.json", content)
    with pytest.raises(ValueError, match=r"sweep\.json: .*remove it"):
        sweep_report(tmp_path)


@pytest.mark.parametrize("cell", NO_CELL, ids=str)
def test_a_damaged_cell_of_a_sweep_is_named(tmp_path, cell):
    write(tmp_path / "sweep.json", json.dumps({"cells": [CELL, cell]}))
    with pytest.raises(ValueError, match=r"sweep\.json: not a sweep's file \(cell 2: .*\); remove it and"):
        read_sweep(tmp_path)


@damaged(
    {"lines": '{"step"\n' + lines(GOOD), "step": '{"step": null}\n', "huge": lines(GOOD), "folder": None}
)
def test_a_damaged_run_of_a_sweep_does_not_hide_the_others(tmp_path, told, content):
    for variant, loss in (("a", -1e150), ("b", 1e150), ("c", 1e308)):
        (tmp_path / variant).mkdir()
        write(tmp_path / variant / "metrics.jsonl", lines([{"step": 1, "valid/loss": loss}]))
    cells = [CELL | {"variant": variant, "path": variant} for variant in "abcd"]
    write(tmp_path / "sweep.json", json.dumps({"cells": cells}))
    broken = tmp_path / "d" / "metrics.jsonl"
    if content is None:
        broken.mkdir(parents=True)
    else:
        broken.parent.mkdir()
        write(broken, content)
    first, second = warnings(told(sweep_report(tmp_path)))
    assert first == "c, seed 0: diverged. (c)"
    assert second.startswith("d, seed 0: ") and ("no valid/loss" in second or str(broken) in second)


def test_lengths_that_are_no_numbers_are_not_compared(tmp_path, told):
    (tmp_path / "a").mkdir()
    names = ("", "@", "@²", "@x", "@0", "@" + "9" * 400, "@16")
    write(tmp_path / "a" / "metrics.jsonl", lines([{"step": 1} | {f"valid/loss{n}": 2.0 for n in names}]))
    write(tmp_path / "sweep.json", json.dumps({"cells": [CELL]}))
    assert told(sweep_report(tmp_path)).text("th")[-2:] == ["16", "a"]
    (tmp_path / "sweep.json").unlink()
    (tmp_path / "a" / "²").mkdir()
    with pytest.raises(FileNotFoundError, match=r"sweep\.json"):
        read_sweep(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "sweep.json"])
def test_the_command_ends_with_one_line_about_the_file(tmp_path, capsys, name):
    write(tmp_path / name, "[1]\n[2]\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"lmx report: {tmp_path / name}")
    assert not (tmp_path / "report.html").exists()
