import json
import math
import shutil

import pytest

from lmx import artifact
from lmx.report import read_metrics, run_report


def write_run(folder, steps=40, offset=0.0, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "loss": 3 + offset + 4 / step, "lr": 1e-3, "tokens_per_sec": 1000.0 + step}
        )
        if step % 10 == 0:
            lines.append({"step": step, "valid/loss": 3.1 + offset + 4 / step, "valid/hindi/loss": 2.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


@pytest.fixture
def full_run(tmp_path):
    run = write_run(tmp_path / "hindi_small")
    (run / "run.txt").write_text("Run(\n    steps=40,\n)", encoding="utf-8")
    files = {
        "overrides.json": {"optim.lr": ["0.001", "0.0003"]},
        "results.json": {
            "wiki": {"nats_per_token": {"value": 2.5, "low": 2.4, "high": 2.6, "n": 9}, "words": 1200}
        },
        "environment.json": {"jax": "0.10.2", "devices": ["cpu:0", "cpu:1"], "xla_flags": ""},
        "data.json": {"train": "77aa", "seed": 3},
    }
    for name, content in files.items():
        (run / name).write_text(json.dumps(content), encoding="utf-8")
    (run / "uncommitted.diff").write_text("-a\n+b", encoding="utf-8")
    samples = [
        {"step": 20, "prompt": "एक समय ", "text": "की बात"},
        {"step": 40, "prompt": "एक समय ", "text": "गाँव <script>", "note": "end"},
    ]
    lines = [json.dumps(s, ensure_ascii=False) for s in samples]
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("कहानी", encoding="utf-8")
    checkpoint = run / "checkpoints" / "40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "w").write_bytes(b"1")
    artifact.record(checkpoint, "checkpoint", [corpus], {"step": 40})
    return run


def test_a_whole_run_is_told_on_one_page(full_run, elements):
    page = elements(run_report(full_run))
    assert page.text("h1") == ["hindi_small"]
    assert page.text("h2") == ["Learning", "Results", "Samples", "What was run", "Environment", "Ancestry"]
    tiles = dict(zip(page.text("dt"), page.text("dd")))
    assert tiles["steps"] == "40" and tiles["best valid loss, step 40"] == "3.2"
    assert tiles["devices"] == "cpu:0, cpu:1" and tiles["data/train"] == "77aa" and "xla_flags" not in tiles
    assert {"train", "valid", "valid hindi", "learning rate"} <= set(page.text("text"))
    assert [page.text("th")[3], *page.text("td")[:2]] == ["wiki", "2.50 ± 0.10", "1,200"]
    assert "एक समय गाँव <script>" in page.text("p") and "script" not in page.tags()
    assert page.text("summary") == ["Step 20", "The whole run", "Changes that were not committed"]
    code = page.text("code")
    assert code[0].startswith("Run(") and code[1] == "-a\n+b"
    assert "content unchanged" in code[2] and str(full_run.parent / "corpus.txt") in code[2]


def test_a_run_in_progress_has_only_what_it_has(tmp_path, elements):
    page = elements(run_report(write_run(tmp_path / "young", steps=3, tail='{"step": 4, "lo')))
    assert page.text("h2") == ["Learning"]
    assert page.text("dd")[0] == "3"


def test_a_folder_of_results_alone_is_reported(full_run, elements):
    (full_run / "metrics.jsonl").unlink()
    page = elements(run_report(full_run))
    assert "Learning" not in page.text("h2") and "Results" in page.text("h2")


def test_metrics_come_back_by_name_and_a_cut_last_line_is_dropped(tmp_path):
    metrics = read_metrics(write_run(tmp_path / "cut", steps=20, tail='{"step": 21, "loss": 2.'))
    assert metrics["loss"][-1] == (20, 3.2) and len(metrics["loss"]) == 20
    assert [step for step, _ in metrics["valid/loss"]] == [10, 20]


@pytest.mark.parametrize(
    "tail", ['{"step": 3, "lo', "\0\0\0\0\0\0", '{"step": 3, "loss": 1.0}\n\0\0\0', "12\n", ""]
)
def test_the_tail_that_a_power_cut_leaves_is_not_an_error(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n' + tail)
    loss = read_metrics(tmp_path)["loss"]
    assert loss[:2] == [(1, 2.0), (2, 1.5)] and len(loss) == 2 + ("1.0" in tail)


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n{"step": 3}\n')
    with pytest.raises(ValueError, match='line 1: no "step"'):
        read_metrics(tmp_path)


def test_a_loss_that_went_to_nan_is_said_in_words(tmp_path, elements):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "NaN"}\n')
    assert math.isnan(read_metrics(tmp_path)["loss"][1][1])
    page = elements(run_report(tmp_path))
    assert "Steps whose loss was not finite: 1, the first at 2." in page.text("p")


def test_skipped_updates_and_unnamed_metrics_are_told(tmp_path, elements):
    rows = [
        {"step": s, "loss": 2.0, "skipped": s // 3, "streak": 0, "z": s * 0.5, "tokens": 100}
        for s in range(1, 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = elements(run_report(tmp_path))
    assert "Updates left out because the loss or the gradient was not finite: 1." in page.text("p")
    facts = dict(zip(page.text("dt"), page.text("dd")))
    assert facts["tokens seen"] == "400" and facts["streak"] == "0"
    assert page.text("summary") == ["skipped, z"] and "z" in page.text("text")


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is this a run's folder"):
        run_report(tmp_path)


def test_a_changed_checkpoint_is_told(full_run, elements):
    (full_run / "checkpoints" / "40" / "w").write_bytes(b"2")
    assert "CONTENT CHANGED" in elements(run_report(full_run)).text("code")[2]
    shutil.rmtree(full_run / "checkpoints")
    assert "Ancestry" not in elements(run_report(full_run)).text("h2")
