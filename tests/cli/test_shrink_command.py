"""Smaller models made by a command, in both scripts, as those who go on with them meet them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import train
from lmx.run import trained
from lmx.train import Load, stored

SMALL = ("--length", "16", "--samples", "8", "--windows", "4")


@pytest.fixture(scope="module")
def half(run, folder, tmp_path_factory):
    """The run's heads and units halved and its stream narrowed, by what they do on Hindi."""
    from lmx import cli

    out = tmp_path_factory.mktemp("shrunk") / "आधा"
    with pytest.MonkeyPatch.context() as at:
        at.chdir(folder)
        at.setenv("LMX_CACHE", str(folder / "cache"))
        cli.main(
            ["shrink", str(run[0]), str(out), "--heads", "1", "--ff", "40", "--d-model", "24", "--report",
             "--calibration", "hindi.txt", *SMALL]
        )  # fmt: skip
    return out


def test_a_shrunk_run_is_a_run(run, half, lmx):
    model = trained(half)
    c = model.run.model
    assert (c.d_model, c.attention.n_heads, c.attention.head_dim, c.mlp.d_ff) == (24, 1, 16, 40)
    assert model.params["blocks"]["attn"]["o"]["w"].shape == (1, 16, 24)
    assert lmx("generate", half, "नदी", "--max-tokens", "3").startswith("नदी")
    assert "bits per byte" in lmx("eval", half, "english.txt").lower()
    assert "hindi.txt" in lmx("explain", half / "checkpoints" / "0")
    about = stored.about(half / "checkpoints" / "0")["meta"]["pruned"]
    assert about["shape"] == {"n_heads": "1", "d_ff": "40", "d_model": "24"}
    assert about["calibration tokens"] == 8 * 16 and len(about["influence of each layer"]) == 1


def test_its_page_sets_it_beside_the_original_and_beside_chance(half):
    page = (half / "report.html").read_text("utf-8")
    for words in ("all of it", "worth most", "at random, 2", "same likeliest token", "hindi.txt"):
        assert words in page


def test_it_is_converted_and_answers_the_same(half, lmx, tmp_path):
    lmx("convert", half, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["head_dim"]) == (24, 1, 16)
    tokens = {"tokens": jnp.arange(12)[None]}
    ours, theirs = (
        model.model.apply(model.params, tokens).logits for model in map(trained, (half, tmp_path / "hf"))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_it_heals(half):
    known = trained(half).run
    run = replace(known, start=(Load(str(half)),), steps=10, seed=1)
    losses = [float(told["loss"]) for _, told in train.steps(run, devices=jax.devices()[:1])]
    assert losses[-1] < losses[0] - 0.2


def test_what_cannot_be_is_said_in_a_line(run, refused, tmp_path):
    out = tmp_path / "out"
    more = ("--calibration", "hindi.txt", *SMALL)
    assert "nothing is to shrink" in refused("shrink", run[0], out, *more)
    assert "say how many: --layers N" in refused("shrink", run[0], out, "--ff", "8", "--evenly", *more)
    assert "n_heads=3; the model has 2" in refused("shrink", run[0], out, "--heads", "3", *more)
    assert "n_layers=5; the model has 1" in refused("shrink", run[0], out, "--layers", "5", "--evenly", *more)
    assert "make no window of 512" in refused(
        "shrink", run[0], out, "--ff", "8", "--calibration", "widths_beside_it.py"
    )
    assert not out.exists()
