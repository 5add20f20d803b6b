"""Adapters of PEFT, by command."""

import json
import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmx.data import Word
from lmx.formats import safetensors
from lmx.models import build, pretrained

MODELS = Path(__file__).parents[1] / "models"
TEXT = "the river carries boats past old mills नदी नावों को ले जाती है"


def released(folder, name):
    """A model of `families` with a tokenizer."""
    shutil.copytree(MODELS / "families" / name, folder, ignore=shutil.ignore_patterns("expected.*"))
    Word(17).train([TEXT]).save(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


def logits(folder, tokens):
    found = pretrained.find(folder)
    return (
        build(found.config).apply(pretrained.load(found), {"tokens": jnp.asarray(tokens, jnp.int32)}).logits
    )


@pytest.mark.parametrize(
    "name, adapter", [("llama", "lora"), ("llama-heads", "dora"), ("llama", "dora-layers")]
)
def test_a_merged_model_answers_as_peft(name, adapter, tmp_path, lmx):
    model, out = released(tmp_path / "नमूना", name), tmp_path / "मिला हुआ"
    told = lmx("adapt", "merge", model, MODELS / "adapters" / adapter, out)
    assert "as llama; transformers reads it with LlamaForCausalLM" in told
    want = {
        k: x.read()
        for k, x in safetensors.read(MODELS / "adapters" / adapter / "expected.safetensors").items()
    }
    np.testing.assert_allclose(logits(out, want["tokens"]), want["logits"], rtol=0, atol=3e-5)
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert (out / "tokenizer.json").exists() and json.loads((out / "config.json").read_text())[
        "dtype"
    ] == "float32"
    assert {path.name for path in tmp_path.iterdir()} == {"नमूना", "मिला हुआ"}


def test_of_a_run_and_in_another_dtype(tmp_path, lmx):
    model = released(tmp_path / "released", "llama")
    lmx("convert", model, tmp_path / "run")
    lmx("adapt", "merge", tmp_path / "run", MODELS / "adapters" / "lora", tmp_path / "a")
    lmx("adapt", "merge", model, MODELS / "adapters" / "lora", tmp_path / "b")
    lmx("adapt", "merge", model, MODELS / "adapters" / "lora", tmp_path / "c", "--dtype", "bfloat16")
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(np.array_equal(two[name], x) for name, x in one.items())
    kept = safetensors.read(tmp_path / "c")
    assert {x.stored for x in kept.values()} == {"BF16"}


def test_what_was_merged_is_extracted(tmp_path, lmx):
    model, adapter = released(tmp_path / "released", "llama"), MODELS / "adapters" / "lora"
    lmx("adapt", "merge", model, adapter, tmp_path / "tuned")
    told = lmx("adapt", "extract", tmp_path / "tuned", model, tmp_path / "again", "--rank", "3")
    assert "the adapter holds 100.0% of the whole difference\n" in told
    assert all(f"blocks/{x}/w" in told for x in ("attn/q", "attn/v", "mlp/down")) and "attn/k" not in told
    lmx("adapt", "merge", model, tmp_path / "again", tmp_path / "both")
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("tuned", "both"))
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=0, atol=1e-5)
    assert "for llama" in lmx("adapt", "info", tmp_path / "again") or str(model) in lmx(
        "adapt", "info", tmp_path / "again"
    )


def test_the_share_that_is_told_is_that_of_the_singular_values(tmp_path, lmx):
    base = released(tmp_path / "base", "llama")
    tuned = released(tmp_path / "tuned", "llama")
    tensors = {name: x.read() for name, x in safetensors.read(tuned).items()}
    rng = np.random.default_rng(0)
    key = "model.layers.0.self_attn.o_proj.weight"
    change = rng.normal(size=tensors[key].shape).astype("f4")
    tensors[key] = tensors[key] + change
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    safetensors.write(tuned, tensors.items())
    told = lmx("adapt", "extract", tuned, base, tmp_path / "out", "--rank", "4")
    s = np.linalg.svd(change.astype(np.float64), compute_uv=False) ** 2
    whole = s.sum() + 16
    assert f"{s[:4].sum() / s.sum():.1%}" in told and f"{s.sum() / whole:.1%}" in told
    assert (
        f"holds {s[:4].sum() / whole:.1%} of the whole difference; not in it: norm/scale ({16 / whole:.1%})"
        in told
    )


def test_info_says_what_it_is(lmx):
    told = lmx("adapt", "info", MODELS / "adapters" / "rslora")
    for words in ("rank-stabilised LoRA", "qwen3", "2 self_attn.q_proj", "alpha 3", "F32"):
        assert words in told


def test_for_llama_cpp(tmp_path, lmx, refused):
    model, out = released(tmp_path / "released", "llama"), tmp_path / "a.gguf"
    lmx("adapt", "gguf", model, MODELS / "adapters" / "lora", out)
    names = {x.name for x in gguf.GGUFReader(out).tensors}
    assert {"blk.1.attn_q.weight.lora_a", "blk.0.ffn_down.weight.lora_b"} <= names and len(names) == 12
    assert "already there; name a new file" in refused(
        "adapt", "gguf", model, MODELS / "adapters" / "lora", out
    )
    assert "ends in .gguf" in refused("adapt", "gguf", model, MODELS / "adapters" / "lora", tmp_path / "b")


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, refused):
    model, adapter, out = (
        released(tmp_path / "released", "llama"),
        MODELS / "adapters" / "lora",
        tmp_path / "out",
    )
    assert "holds no adapter_config.json" in refused("adapt", "merge", model, model, out)
    assert "names none of the modules" in refused(
        "adapt", "merge", model, MODELS / "adapters" / "gpt2-dora", out
    )
    assert "no saved run" in refused("adapt", "merge", tmp_path / "none", adapter, out)
    assert "are equal; there is nothing to extract" in refused("adapt", "extract", model, model, out)
    other = released(tmp_path / "other", "llama-heads")
    assert "not of one model" in refused("adapt", "extract", other, model, out)
    assert "--rank 0; use 1 or more" in refused("adapt", "extract", model, model, out, "--rank", "0")
    assert "is already there; name a new folder" in refused("adapt", "merge", model, adapter, model)
    assert {path.name for path in tmp_path.iterdir()} == {"released", "other"}


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, refused):
    """In an adapter, which would spoil all of a model, and in one of two models."""
    model, adapter = released(tmp_path / "released", "llama"), tmp_path / "adapter"
    for whole, part, name in (
        (MODELS / "adapters" / "lora", adapter, "adapter_model"),
        (model, tmp_path / "tuned", "model"),
    ):
        shutil.copytree(whole, part)
        tensors = load_file(part / f"{name}.safetensors")
        broken = next(x for x in tensors if "q_proj" in x)
        tensors[broken][0, 0] = np.nan
        save_file(tensors, part / f"{name}.safetensors")
    told = refused("adapt", "merge", model, adapter, tmp_path / "out")
    assert "q_proj.lora_A.weight holds numbers that are not finite" in told
    told = refused("adapt", "extract", tmp_path / "tuned", model, tmp_path / "out")
    assert f"{tmp_path / 'tuned'}: blocks/attn/q/w holds numbers that are not finite" in told
    assert '--where "" fits no path' in refused(
        "adapt", "extract", model, model, tmp_path / "out", "--where", ""
    )
    assert not (tmp_path / "out").exists()


def test_an_alpha_beyond_all_floats_is_refused_by_name():
    from lmx.models.families.fields import Fields

    with pytest.raises(ValueError, match="lora_alpha is 1000"):
        Fields({"lora_alpha": 10**400}, "adapter_config.json")("lora_alpha", float)
