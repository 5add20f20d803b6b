"""Mistakes at the command line: one line, status 2, the way out; bugs keep their traceback."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lmx import Run, cli, optim, values


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_teaches_by_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.count(f"lmx {verb}") >= 3


def examples():
    """Every line of the READMEs, the helps and the experiments that is a command."""
    root = Path(__file__).parents[2]
    verbs = [importlib.import_module(f"lmx.cli.{verb}") for verb in cli.VERBS]
    documents = [cli.__doc__, *(verb.__doc__ for verb in verbs)]
    files = [*root.glob("README*.md"), *root.glob("experiments/*.py"), *root.glob("lmx/**/*.py")]
    documents += [path.read_text(encoding="utf-8") for path in files]
    found = {
        line for text in documents for line in re.findall(r"^(?:Run:)? *(lmx [a-z]+ .+)$", text, re.MULTILINE)
    }
    return sorted(line for line in found if not line.startswith("lmx is one "))


@pytest.mark.parametrize("line", examples())
def test_every_example_is_a_command(line):
    quoted = r"""'[^']*'|"[^"]*"|\S+"""
    words = re.match(rf"((?:{quoted})(?: (?:{quoted}))*)", line.split("  #")[0])[1]
    _, verb, *argv = shlex.split(words)
    assert verb in cli.VERBS
    assert all(
        (Path(__file__).parents[2] / word).exists() for word in argv if word.startswith("experiments/")
    )
    asked = cli.options(importlib.import_module(f"lmx.cli.{verb}").Options, argv, "", verb)
    if changes := cli.changes(getattr(asked, "set", [])):
        Run().override(changes)


def test_help_needs_no_jax():
    program = (
        "import sys, lmx.cli; lmx.cli.main(['--help']); print('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.endswith("False\n") and all(f"lmx {verb}" in told for verb in cli.VERBS)


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m lmx --help"
    told = subprocess.run(["bash", "-c", f"{command} 2>&1 >&- | cat"], capture_output=True, text=True)
    assert told.returncode == 0
    pipe = subprocess.run(
        ["bash", "-c", f"set -o pipefail; ({command}) 2>err.txt | true; cat err.txt"],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in pipe.stdout


def test_an_unknown_verb_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2 and "did you mean train?" in capsys.readouterr().err


def test_settings_and_names_that_do_not_exist(refused):
    assert "did you mean optim.lr?" in refused("train", "experiment.py", "--set", "optm.lr=1")
    assert "path.to.field=value" in refused("train", "experiment.py", "--set", "optim.lr")
    assert "it has base, slow, broken" in refused("train", "experiment.py", "--variant", "fast")
    assert "experiment.py" in refused("train", "experimnt.py")
    assert "steps" in refused("train", "experiment.py", "--set", "steps=0")
    assert "defines base() -> Run" in refused("train", "widths_beside_it.py")


def test_a_sweep_that_cannot_be_compared_trains_nothing(refused, tmp_path):
    out = tmp_path / "sweep"
    told = refused("sweep", "experiment.py", "--metric", "valid/los", "--out", out)
    assert "--metric valid/los: slow measures loss" in told and "valid/loss" in told
    assert "--seeds N gives 0 to N - 1" in refused("sweep", "experiment.py", "--set", "seed=3", "--out", out)
    no_valid = ("--set", "data.valid_share=0.0")
    assert "--metric valid/loss: slow measures" in refused("sweep", "experiment.py", *no_valid, "--out", out)
    assert not out.exists()


def test_files_that_are_not_text(refused, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 8)

    def trained_on(name):
        data = f'data.train=("{tmp_path / name}",)'
        return refused("train", "experiment.py", "--out", tmp_path / "out", "--set", data)

    assert "no usable document" in trained_on("empty.txt")
    assert "binary.txt: a binary file, not text" in trained_on("binary.txt")
    assert "nothing.txt: no such file; " in trained_on("nothing.txt")
    assert not (tmp_path / "out").exists()
    assert "no usable document" in refused(
        "tokenizer", "train", tmp_path / "empty.txt", "--out", tmp_path / "t.json"
    )
    assert "binary" in refused("tokenizer", "compare", tmp_path / "binary.txt", "--out", tmp_path / "compare")


def test_a_batch_that_does_not_split_over_the_mesh(refused, tmp_path):
    told = refused("train", "experiment.py", "--out", tmp_path / "out", "--set", "data.batch_size=12")
    assert "batch_size=12 does not split" in told and "use 16" in told


def test_places_that_cannot_be_written(refused, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("not a folder")
    way_out = "choose a folder that you may write to"
    assert way_out in refused("train", "experiment.py", "--out", file)
    assert way_out in refused("sweep", "experiment.py", "--out", file / "sweep")
    assert way_out in refused("quickstart", "--out", file / "quickstart")
    assert way_out in refused("tokenizer", "train", "hindi.txt", "--out", file / "tokenizer.json")
    monkeypatch.setenv("LMX_CACHE", str(file))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    told = refused("train", "experiment.py", "--out", tmp_path / "out")
    jax.config.update("jax_compilation_cache_dir", before)
    assert f"cannot write {file / 'xla'} (LMX_CACHE): Not a directory; {way_out}" in told


def test_a_folder_with_another_run(refused, run):
    told = refused("train", "experiment.py", "--out", run[0], "--set", "optim.lr=0.5")
    assert "optim.lr: 0.01 there, 0.5 asked" in told


def test_checkpoints_that_do_not_fit(refused, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    text = (copy / "run.txt").read_text()
    (copy / "run.txt").write_text(text.replace("d_model=32", "d_model=64"))
    assert "they do not belong together" in refused("eval", copy, "hindi.txt")
    assert "they do not belong together" in refused("generate", copy, "नदी")
    assert "no checkpoint for --step 7; there are [5, 10]" in refused("generate", run[0], "--step", "7")
    assert "latest, best or a number" in refused("eval", run[0], "--step", "first")


def test_paths_that_are_no_runs(refused, tmp_path):
    assert "not a run's folder" in refused("eval", "hindi.txt")
    assert "a folder without run.txt" in refused("eval", "runs/experiment/base-b2=0.99", tmp_path)
    assert "neither metrics.jsonl nor results.json" in refused("report", tmp_path)
    assert "no saved run" in refused("info", tmp_path)
    assert "no such file or folder" in refused("explain", tmp_path / "nothing")
    assert "no artifact here" in refused("explain", "hindi.txt")


def test_tokenizers_that_cannot_be(refused, tmp_path):
    assert "Bpee" in refused("tokenizer", "train", "hindi.txt", "--spec", "Bpee()")
    assert "unknown tokenizer 'bp'" in refused("tokenizer", "compare", "hindi.txt", "--kinds", "bp")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "no tokenizer.json" in refused("tokenizer", "show", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed(refused, tmp_path):
    assert "pip install" in refused("train", "experiment.py", "--out", tmp_path / "out", "--wandb", "project")


def test_kilobytes_in_a_setting_do_not_flood_the_message(refused, run):
    long = f'data.train=(Documents(texts=("{"नदी " * 5000}",)),)'
    assert len(refused("train", "experiment.py", "--out", run[0], "--set", long)) < 1500


def test_a_bug_keeps_its_traceback(tmp_path):
    (tmp_path / "buggy.py").write_text("def base():\n    return {}['run']\n")
    with pytest.raises(KeyError):
        cli.main(["train", str(tmp_path / "buggy.py")])


@pytest.mark.parametrize("too_much", ["bytearray(1 << 60)", "jax.numpy.zeros(1 << 60, 'int8')"])
def test_no_memory_left_is_told_in_a_line(refused, tmp_path, too_much):
    (tmp_path / "large.py").write_text(f"import jax\ndef base():\n    return {too_much}\n")
    told = refused("train", tmp_path / "large.py")
    assert re.search(r"no memory left \(.+\); make data.seq_len, .* smaller", told)


def test_a_mistake_can_be_traced(monkeypatch):
    monkeypatch.setenv("LMX_TRACE", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["train", str(Path("nothing.py"))])


def test_folders_are_named_after_what_was_changed():
    assert cli.folder_name("base", False, {}) == "base"
    names = [
        cli.folder_name("alibi", True, {"data.train": text})
        for text in ('("a/b.txt",)', '("a_b.txt",)', "x" * 999)
    ]
    assert len(set(names)) == 3 and all(n.startswith("alibi-tiny-train=") and len(n) < 80 for n in names)
    assert not any(set(n) & set("/\"'()* ") for n in names)


def test_folders_of_different_settings_differ():
    run = Run().override({"optim": "Muon()"})
    paths = [path for path, value in values.leaves(run).items() if not isinstance(value, str)]
    names = [cli.folder_name("base", False, {path: "1"}, [run]) for path in paths]
    assert len(set(names)) == len(names) > 50
    assert {"base-steps=1", "base-ns_steps=1", "base-partner.lr=1", "base-mlp.bias=1"} <= set(names)


@pytest.mark.parametrize(
    "settings, want",
    [
        ("optim.lr=1 optim=Lion() optim.lr=3", optim.Lion(lr=3.0)),
        ("optim.lr=1 optim=Lion()", optim.Lion()),
        ("optim=Muon() optim.ns_steps=3 optim=Lion(b1=0.5)", optim.Lion(b1=0.5)),
        ("optim.lr=1 optim.clip=2 optim.lr=3", optim.AdamW(lr=3.0, clip=2.0)),
    ],
)
def test_the_last_setting_wins(settings, want):
    assert Run().override(cli.changes(settings.split())).optim == want
