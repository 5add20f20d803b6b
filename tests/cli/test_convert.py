"""Released models into runs and back, by command."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lmx import artifact, cli
from lmx.data import Word
from lmx.formats import gguf, safetensors

FAMILIES = Path(__file__).parents[1] / "models" / "families"
TEXT = "the river carries boats past old mills नदी नावों को ले जाती है"


@pytest.fixture
def released(tmp_path):
    """A Hugging Face folder: a tiny Qwen 3, a tokenizer, and what comes beside."""
    folder = tmp_path / "released"
    shutil.copytree(FAMILIES / "qwen3", folder, ignore=shutil.ignore_patterns("expected.*"))
    Word(17).train([TEXT]).save(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} नमस्ते")
    return folder


def test_there_and_back_changes_nothing(released, tmp_path, lmx):
    run, back = tmp_path / "run", tmp_path / "back"
    assert "lmx generate" in lmx("convert", released, run)
    assert "as qwen3; transformers reads it with Qwen3ForCausalLM" in lmx("convert", run, back)
    ours, theirs = (safetensors.read(folder) for folder in (back, released))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].read().tobytes() == x.read().tobytes() for name, x in theirs.items())
    for path in released.iterdir():
        if path.suffix == ".json":
            want, found = (json.loads((folder / path.name).read_text("utf-8")) for folder in (released, back))
            assert {name: found[name] for name in want} == want, path.name
        elif path.suffix == ".jinja":
            assert (back / path.name).read_bytes() == path.read_bytes()
    kinds = [line.split()[0] for line in lmx("explain", run).splitlines()]
    made = artifact.read(run / "checkpoints/0")
    assert kinds == ["checkpoint", "file"] and made.made_from
    assert made.path == str(run / "checkpoints/0")


def test_a_released_model_is_used_as_it_is_and_as_a_run(released, tmp_path, lmx, refused):
    run = tmp_path / "run"
    lmx("convert", released, run)
    options = ("the river", "--temperature", "0", "--max-tokens", "5")
    assert lmx("generate", released, *options) == lmx("generate", run, *options)
    told = lmx("info", released)
    for part in ("qwen3", "head", "128 tokens", "word", "F32"):
        assert part in told
    assert "parameters" in lmx("info", run)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = json.loads(
        lmx("eval", run, tmp_path / "text.txt", "--bootstrap", "0", "--json", "--seq-len", "32")
    )
    assert np.isfinite(found["results"][0]["bits_per_byte"])
    assert "convert it" in refused("eval", released, tmp_path / "text.txt")


def test_a_layout_is_of_quantized_matrices(released, tmp_path, lmx, refused):
    assert "--layout is of a folder written from a run" in refused(
        "convert", released, tmp_path / "run", "--layout", "gptq"
    )
    lmx("convert", released, tmp_path / "run")
    told = refused("convert", tmp_path / "run", tmp_path / "out", "--layout", "gptq")
    assert "layout='gptq': no matrix of this model is quantized; leave the layout out" in told


def test_a_quantized_folder_says_how_it_becomes_plain_numbers(released, tmp_path, lmx, refused):
    lmx("quantize", released, tmp_path / "q8")
    lmx("convert", tmp_path / "q8", tmp_path / "codes")
    told = refused("quantize", tmp_path / "codes", tmp_path / "out")
    codes = tmp_path / "codes"
    assert f"`lmx convert {codes} RUN`, then `lmx convert RUN OUT --layout dense`" in told
    lmx("convert", codes, tmp_path / "again")
    lmx("convert", tmp_path / "again", tmp_path / "plain", "--layout", "dense")
    lmx("quantize", tmp_path / "plain", tmp_path / "out")


def test_mistakes_are_told(released, tmp_path, refused):
    assert "no such model" in refused("convert", tmp_path / "none", tmp_path / "out")
    assert "is already there; name a new folder" in refused("convert", released, released)
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert "hidden_act='relu' has no counterpart" in refused("convert", released, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generate_shows_no_prompt_that_it_refuses(released, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", str(released), "\udcff"])
    shown = capsys.readouterr()
    assert not shown.out and "lone surrogate" in shown.err


def test_the_folder_one_is_in_is_not_replaced(released, tmp_path, monkeypatch, refused):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "the folder you are in" in refused("convert", released, ".")
    assert Path.cwd().samefile(".") and not any(Path.cwd().iterdir())


def test_code_in_a_model_is_never_run(released, tmp_path, lmx):
    config = json.loads((released / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    (released / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (released / "modeling_own.py").write_text("raise SystemExit('it ran')")
    lmx("convert", released, tmp_path / "out")
    assert "modeling_own" not in sys.modules and not list((tmp_path / "out").rglob("*.py"))


def test_what_fails_midway_leaves_nothing(released, tmp_path, lmx, refused):
    tensors = {name: x.read() for name, x in safetensors.read(released).items()}
    tensors["model.norm.weight"] *= 1e6
    safetensors.write(released, tensors.items())
    run, out = tmp_path / "run", tmp_path / "out"
    lmx("convert", released, run)
    out.mkdir()
    assert "too large for float16; use bfloat16" in refused("convert", run, out, "--dtype", "float16")
    assert {path.name for path in tmp_path.iterdir()} == {"released", "run", "out"} and not any(out.iterdir())
    lmx("convert", run, out)
    assert (out / "config.json").exists() and not list(tmp_path.glob("*partial*"))


def test_a_gguf_file_of_a_run_and_of_a_released_model(run, released, tmp_path, lmx, refused):
    (folder, _), out = run, tmp_path / "deep" / "small.gguf"
    with pytest.warns(UserWarning, match="join letters with their marks"):
        told = lmx("convert", folder, out, "--type", "Q8_0")
    assert f"wrote {out}" in told and "MiB" in told and "in its place" not in told
    assert "already there; name a new file" in refused("convert", folder, out)
    options = ("The river", "--temperature", "0", "--max-tokens", "5")
    exact = tmp_path / "exact.gguf"
    with pytest.warns(UserWarning):
        lmx("convert", folder, exact, "--type", "F32")
    assert lmx("generate", exact, *options) == lmx("generate", folder, *options)
    with pytest.warns(UserWarning):
        told = lmx("convert", exact, tmp_path / "k.gguf", "--type", "Q4_K")
    assert "rows that Q4_K does not divide into blocks, and are Q5_0 or Q8_0 in its place" in told
    assert "kind word has no counterpart in llama.cpp" in refused("convert", released, tmp_path / "w.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "exact.gguf", "k.gguf", "released"]


def test_a_gguf_file_loses_least_where_a_texts_inputs_are_large(run, tmp_path, lmx, refused):
    (folder, _), plain, seen = run, tmp_path / "plain.gguf", tmp_path / "seen.gguf"
    text = ("--calibration", "hindi.txt", "--samples", "4", "--length", "16")
    with pytest.warns(UserWarning, match="join letters"):
        lmx("convert", folder, plain, "--type", "Q4_0")
        lmx("convert", folder, seen, "--type", "Q4_0", *text)
    a, b = (gguf.read(path).tensors for path in (plain, seen))
    differ = {name for name in a if (a[name].read() != b[name].read()).any()}
    parts = [*(f"attn_{x}" for x in ("q", "k", "v", "output")), *(f"ffn_{x}" for x in ("up", "gate", "down"))]
    assert differ == {f"blk.0.{part}.weight" for part in parts}
    assert "The" in lmx("generate", seen, "The", "--max-tokens", "3")
    out = tmp_path / "out.gguf"
    assert "says nothing to --type F16" in refused("convert", folder, out, *text)
    assert "--calibration is of GGUF files" in refused("convert", folder, tmp_path / "out", *text)
    assert '--calibration "" names no text' in refused("convert", folder, out, "--calibration", "")
    assert "no-such.txt" in refused("convert", folder, out, "--type", "Q4_0", "--calibration", "no-such.txt")
    told = refused("convert", folder, out, "--type", "Q4_0", *text[:2], "--length", "99999")
    assert "give a longer text or a shorter --length" in told and not out.exists()


def test_mistakes_about_gguf_are_told(released, tmp_path, refused):
    out = tmp_path / "out.gguf"
    assert "no such model" in refused("convert", tmp_path / "none", out)
    assert "give a GGUF file's --type" in refused("convert", released, out, "--dtype", "float32")
    assert "of GGUF files; end" in refused("convert", released, tmp_path / "out", "--type", "F16")
    assert not out.exists()
