"""Models of fewer bits, and adapters on them, as their user meets them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import tree
from lmx.adapt import Int8
from lmx.adapt.matrices import found
from lmx.cli.quantize import METHODS, UNSEEING
from lmx.data import Word
from lmx.formats import safetensors
from lmx.run import trained
from lmx.train import stored
from lmx.weights import LowRank, Quantized, Weight, dense

SMALL = ("--length", "16", "--samples", "4", "--windows", "3")


def logits(model):
    return model.model.apply(model.params, {"tokens": jnp.arange(12)[None]}).logits


@pytest.fixture(scope="module")
def four(run, folder, tmp_path_factory):
    """The run in 4 bits, calibrated on Hindi."""
    from lmx import cli

    out = tmp_path_factory.mktemp("quantized") / "चार"
    with pytest.MonkeyPatch.context() as at:
        at.chdir(folder)
        cli.main(
            ["quantize", str(run[0]), str(out), "--method", "gptq", "--group-size", "16", "--report",
             "--calibration", "hindi.txt", *SMALL]
        )  # fmt: skip
    return out


def test_a_quantized_run_is_a_run(run, four, lmx):
    params = trained(four).params
    q = params["blocks"]["attn"]["q"]["w"]
    assert isinstance(q, Quantized) and (q.bits, q.group_size, q.order.shape) == (4, 16, (1, 32))
    near = np.abs(np.asarray(dense(q)) - np.asarray(trained(run[0]).params["blocks"]["attn"]["q"]["w"]))
    assert 0 < near.max() < 0.2
    assert lmx("generate", four, "नदी", "--max-tokens", "3").startswith("नदी")
    assert "7 Quantized of 4 bits" in lmx("info", four)
    facts = json.loads((four / "quantization.json").read_text("utf-8"))
    assert facts["calibration tokens"] == 64 and len(facts["calibration hash"]) == 16
    assert set(facts["lost"]) == {
        f"blocks/0/{m}/w" for m in [*(f"attn/{x}" for x in "qkvo"), "mlp/up", "mlp/gate", "mlp/down"]
    }
    page = (four / "report.html").read_text("utf-8")
    assert "KL, nats per token" in page and "act_order=True" in page
    assert "hindi.txt" in lmx("explain", four / "checkpoints" / "0")


def test_methods_without_data_say_how_near_they_stay(run, lmx, tmp_path):
    said = lmx("quantize", run[0], tmp_path / "q8", "--report", "--text", "english.txt", *SMALL)
    assert "top1" in said and "times less than before" in said
    a, b = logits(trained(run[0])), logits(trained(tmp_path / "q8"))
    assert 0 < np.abs(a - b).max() < 0.1
    loaded_then = Int8()(trained(run[0]).params, jax.random.key(0))
    assert jax.tree.structure(loaded_then) == jax.tree.structure(trained(tmp_path / "q8").params)
    jax.tree.map(np.testing.assert_array_equal, loaded_then, trained(tmp_path / "q8").params)
    lmx("quantize", run[0], tmp_path / "four", "--method", "int4")
    w = trained(tmp_path / "four").params["blocks"]["mlp"]["up"]["w"]
    assert (w.bits, w.group_size) == (4, 32)  # of 32 inputs
    lmx("quantize", run[0], tmp_path / "all", "--method", "w8a8", "--embed")
    params = trained(tmp_path / "all").params
    assert isinstance(params["embed"].base, Quantized)
    assert lmx("generate", tmp_path / "all", "The", "--max-tokens", "2")


def test_a_folder_for_others_holds_what_no_layout_does_as_plain_numbers(run, lmx, refused, tmp_path):
    """The embedding by itself; all else when it is asked for. Both folders are the quantized model, read back."""
    base, eight, awq = run[0], tmp_path / "eight", tmp_path / "awq"
    lmx("quantize", base, eight, "--embed")
    assert "the embedding is written as plain numbers" in lmx("convert", eight, tmp_path / "codes")
    kept = safetensors.read(tmp_path / "codes")
    assert kept["model.embed_tokens.weight"].stored == "F32"
    assert kept["model.layers.0.mlp.up_proj.weight_scale"].stored and len(kept) > 10
    assert "embedding" not in lmx("convert", eight, tmp_path / "dense", "--layout", "dense")
    assert {x.stored for x in safetensors.read(tmp_path / "dense").values()} == {"F32"}
    lmx("quantize", base, awq, "--method", "awq", "--calibration", "hindi.txt", *SMALL)
    assert "it is Scaled, which no layout holds; merge it" in (
        told := refused("convert", awq, tmp_path / "no")
    )
    assert "--layout dense of `lmx convert`" in told
    lmx("convert", awq, tmp_path / "scaled", "--layout", "dense")
    for made, folder in ((eight, "codes"), (eight, "dense"), (awq, "scaled")):
        np.testing.assert_allclose(logits(trained(tmp_path / folder)), logits(trained(made)), atol=1e-4)
    said = "--layout dense: no matrix of this model is quantized"
    assert said in refused("convert", base, tmp_path / "no", "--layout", "dense")


def test_mixed_precision_keeps_layers_apart(run, lmx, tmp_path):
    lmx("quantize", run[0], tmp_path / "mixed", "--method", "mixed", "--bits", "3.5", "--group-size", "16",
        "--calibration", "english.txt", *SMALL)  # fmt: skip
    facts = json.loads((tmp_path / "mixed" / "quantization.json").read_text("utf-8"))
    assert facts["bits of each layer"] == "3"  # of one layer, whole bits
    assert lmx("generate", tmp_path / "mixed", "The", "--max-tokens", "2")


def test_the_frontier_goes_on_where_it_was(run, lmx, refused, tmp_path, monkeypatch):
    from lmx.cli import frontier

    every = frontier.FRONTIER
    some = {name: every[name] for name in ("float32", "int8", "GGUF Q4_0")}
    monkeypatch.setattr(frontier, "FRONTIER", some)  # all of them take minutes
    words = ("quantize", run[0], tmp_path / "f", "--frontier", "--calibration", "english.txt", *SMALL)
    assert lmx(*words).count("perplexity") == 3
    rows = json.loads((tmp_path / "f" / "frontier.json").read_text("utf-8"))["rows"]
    assert rows["float32"]["kl"]["value"] < 1e-6 < rows["GGUF Q4_0"]["kl"]["value"]
    assert rows["float32"]["bits"] == 32 and rows["int8"]["speed"] > 0
    monkeypatch.setattr(frontier, "FRONTIER", some | {"nf4": every["nf4"]})
    assert lmx(*words).count("perplexity") == 1
    assert "other settings" in refused(*words, "--affine")
    model = tmp_path / "model"
    shutil.copytree(run[0], model)
    words = ("quantize", model, tmp_path / "g", *words[3:])
    monkeypatch.setattr(frontier, "FRONTIER", {"bf16": every["bf16"]})
    assert lmx(*words).count("perplexity") == 1
    shutil.rmtree(model / "checkpoints" / "10")  # its latest is another one now
    assert "other settings or texts" in refused(*words)


def test_a_method_that_failed_is_tried_again(run, lmx, tmp_path, monkeypatch):
    from lmx.cli import frontier

    monkeypatch.setattr(frontier, "FRONTIER", {"w4a8": frontier.FRONTIER["w4a8"]})
    words = ("quantize", run[0], tmp_path / "f", "--frontier", "--calibration", "english.txt", *SMALL)
    assert "left out: W4A8: group_size=24" in lmx(*words, "--group-size", "24")
    assert "left out" in lmx(*words, "--group-size", "24")
    assert "Left out" in (tmp_path / "f" / "report.html").read_text("utf-8")


def test_the_frontier_of_a_text_that_has_changed_is_refused(run, lmx, refused, tmp_path, monkeypatch):
    from lmx.cli import frontier

    monkeypatch.setattr(frontier, "FRONTIER", {"bf16": frontier.FRONTIER["bf16"]})
    texts = {name: tmp_path / f"{name}.txt" for name in ("seen", "judged")}
    for path in texts.values():
        shutil.copy("hindi.txt", path)
    words = (
        "quantize",
        run[0],
        tmp_path / "f",
        "--frontier",
        "--calibration",
        texts["seen"],
        "--text",
        texts["judged"],
    )
    assert lmx(*words, *SMALL).count("perplexity") == 1
    assert lmx(*words, *SMALL).count("perplexity") == 0
    for path in texts.values():
        kept = path.read_text("utf-8")
        shutil.copy("english.txt", path)
        assert "other settings or texts" in refused(*words, *SMALL)
        path.write_text(kept, "utf-8")
    assert lmx(*words, *SMALL).count("perplexity") == 0


def test_a_damaged_frontier_is_told_in_one_line_and_a_lost_page_is_written_again(
    run, lmx, refused, tmp_path, monkeypatch
):
    from lmx.cli import frontier

    every = frontier.FRONTIER
    monkeypatch.setattr(frontier, "FRONTIER", {"bf16": every["bf16"]})
    words = ("quantize", run[0], tmp_path / "f", "--frontier", "--calibration", "english.txt", *SMALL)
    lmx(*words)
    page, file = (tmp_path / "f" / name for name in ("report.html", "frontier.json"))
    page.unlink()  # as by a kill between the two files
    assert "report.html" in lmx(*words) and "bf16" in page.read_text("utf-8")
    monkeypatch.setattr(frontier, "FRONTIER", {"bf16": every["bf16"], "int8": every["int8"]})
    whole = json.loads(file.read_text("utf-8"))
    row = whole["rows"]["bf16"]
    for name, value in (("kl", "x"), ("kl", {}), ("bits", "8"), ("bytes", None)):
        file.write_text(json.dumps(whole | {"rows": {"bf16": row | {name: value}}}), "utf-8")
        assert "is damaged; delete it" in refused(*words), name
    file.write_text("[" * 100_000, "utf-8")
    assert "is damaged; delete it" in refused(*words)


FAMILIES = Path(__file__).parents[1] / "models" / "families"


def of_family(name, folder, lmx):
    """A tiny random model as others release it, as a run."""
    shutil.copytree(FAMILIES / name, folder / name, ignore=shutil.ignore_patterns("expected.*"))
    Word(40).train([Path("english.txt").read_text("utf-8")]).save(folder / name)
    lmx("convert", folder / name, folder / "run")
    return folder / "run"


def quantized_as(method, base, out, lmx):
    """Relative error of logits against the model it came from; the result also decodes."""
    text = () if method in UNSEEING else ("--calibration", "english.txt")
    said = ("--bits", "3.5") if method == "mixed" else ()
    lmx("quantize", base, out, "--method", method, "--embed", *text, *said, *SMALL[:4])
    made, was = (trained(folder) for folder in (out, base))
    matrices = {path: w for path, w in found(made.params).items() if "router" not in path}
    assert all(isinstance(w, Weight) for w in matrices.values()) or method == "bf16"
    assert "The" in lmx("generate", out, "The", "--max-tokens", "2")
    a, b = (np.asarray(logits(x), np.float64) for x in (made, was))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("gpt2", method) for method in METHODS),
        *(("gemma3", method) for method in ("w8a8", "smooth", "rotate-gptq", "mixed")),
        *(("qwen3-moe", method) for method in ("w4a8", "nf4", "gptq", "awq-gptq")),
    ],
)
def test_every_method_on_every_shape_of_model(family, method, lmx, tmp_path):
    """Biases and learned positions; a tied embedding that is scaled, and windows; experts."""
    base = of_family(family, tmp_path, lmx)
    limit = 0.1 if method in ("bf16", "fp8", "int8", "w8a8", "smooth") else 0.6
    assert 0 < quantized_as(method, base, tmp_path / "out", lmx) < limit


def test_gptq_on_experts_and_w8a8_on_biases(lmx, tmp_path):
    for family, method in (("qwen3-moe", "gptq"), ("gpt2", "w8a8")):
        folder = tmp_path / family
        folder.mkdir()
        assert 0 < quantized_as(method, of_family(family, folder, lmx), folder / "out", lmx) < 0.6
    w = trained(tmp_path / "qwen3-moe" / "out").params["blocks"]["mlp"]["experts"]["down"]["w"]
    assert isinstance(w, Quantized) and w.bits == 4 and w.order.shape == w.shape[:-1]


def test_layers_of_different_bits_are_written_as_plain_numbers(run, lmx, refused, tmp_path):
    base = of_family("gpt2", tmp_path, lmx)
    mixed, out = tmp_path / "mixed", tmp_path / "folder"
    model = trained(base)
    with pytest.MonkeyPatch.context() as at:  # whatever is measured: the first layer 3 bits, the second 4
        at.setattr("lmx.adapt.spend", lambda losses, bits: (3, 4))
        lmx("quantize", base, mixed, "--method", "mixed", "--calibration", "english.txt", *SMALL[:4])
    assert isinstance(trained(mixed).params["blocks"], tuple)
    assert "blocks: its layers are quantized in several ways; make them all dense" in refused(
        "convert", mixed, out
    )
    lmx("convert", mixed, out, "--layout", "dense")
    np.testing.assert_allclose(logits(trained(out)), logits(trained(mixed)), atol=1e-4)
    assert np.abs(logits(trained(out)) - logits(model)).max() > 1e-2


def test_adapters_on_a_quantized_base_are_all_that_is_saved(four, folder, lmx, refused, tmp_path):
    """QLoRA by values: trained, stopped and gone on with, used, and merged into a folder for others."""
    base = tmp_path / "base"
    shutil.copytree(four, base)
    (tmp_path / "qlora.py").write_text(
        f'''"""Does an adapter on 4 bits learn?"""
from dataclasses import replace
from lmx import Run
from lmx.adapt import Lora
from lmx.data import Data, File, Text
from lmx.optim import AdamW, Constant
from lmx.run import trained
from lmx.train import Load

def base():
    there = trained({str(base)!r})
    data = Data(train=(Text({str(folder / "hindi.txt")!r}, unit="line"),), valid_share=0.2, seq_len=32, batch_size=8,
                tokenizer=File({str(base)!r}))
    return Run(model=there.run.model, data=data, start=(Load({str(base)!r}), Lora(4)), trainable="*/w/[ab]",
               optim=AdamW(lr=1e-2, schedule=Constant()), steps=6, eval_every=3, save_every=3)
''',
        encoding="utf-8",
    )
    out = tmp_path / "run"
    lmx("train", tmp_path / "qlora.py", "--out", out)
    saved = stored.about(out / "checkpoints" / "6")["tree"]
    assert not any(path.startswith("frozen/") for path in saved)
    assert {path.split("/")[-1] for path in saved if path.startswith("trainable/")} == {"a", "b"}
    model = trained(out)
    w = model.params["blocks"]["attn"]["q"]["w"]
    assert isinstance(w, LowRank) and isinstance(w.base, Quantized) and np.abs(w.b).max() > 0
    assert np.abs(logits(model) - logits(trained(base))).max() > 1e-3
    lmx(
        "train", tmp_path / "qlora.py", "--out", out, "--set", "steps=8", "--set", "optim.schedule=Constant()"
    )
    assert lmx("generate", out, "नदी", "--max-tokens", "3")
    assert tree.paths(trained(out).params) == tree.paths(model.params)
    shutil.rmtree(base)
    assert str(base) in refused("generate", out, "नदी")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "gptq"), "looks at inputs; give it a text: --calibration FILE"),
        (("--report",), "give one: --text FILE"),
        (("--bits", "3.5", "--method", "int4"), "only --method mixed spends parts of bits"),
        (("--bits", "7", "--method", "int4"), "--bits 7: no format has them"),
        (("--method", "gptq", "--calibration", "none.txt"), "none.txt"),
        (
            ("--method", "gptq", "--calibration", "hindi.txt", "--length", "99999"),
            "give a longer text or a shorter --length",
        ),
        (("--where", "layers/*"), "fits no matrix"),
        (("--method", "w4a8", "--group-size", "20"), "does not divide 32 inputs"),
        (("--text", "hindi.txt"), "--text says what to judge by, which --report or --frontier asks for"),
        (("--report", "--text", "none.txt"), "none.txt"),
        (("--frontier", "--calibration", "hindi.txt", "--embed"), "--embed says nothing to --frontier"),
        (("--frontier", "--calibration", "hindi.txt", "--no-act-order"), "--no-act-order says nothing to"),
        (("--bits", "3"), "--bits says nothing to --method int8; it is for int4, gptq"),
        (("--method", "w4a8", "--affine"), "--affine says nothing to --method w4a8"),
        (("--method", "nf4", "--group-size", "0"), "use 2 or more"),
        (("--method", "nf4", "--group-size", "1"), "--group-size 1; use 2 or more"),
        (("--method", "w4a8", "--group-size", "0"), "w4a8 has groups"),
        (("--where", ""), "fits no path"),
        (("--method", "gptq", "--calibration", ""), '--calibration "" names no text'),
        (("--report", "--text", ""), '--text "" names no text'),
        (("--method", "mixed", "--bits", "inf", "--calibration", "hindi.txt"), "--bits inf; use 2"),
        (("--method", "mixed", "--bits", "nan", "--calibration", "hindi.txt"), "--bits nan; use 2"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(run, refused, tmp_path, words, said):
    assert said in refused("quantize", run[0], tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_not_quantized_again(four, refused, tmp_path):
    said = refused("quantize", four, tmp_path / "out")
    assert "blocks/attn/k/w is quantized already; give the model it was made from" in said
    assert f"`lmx convert {four} OUT --layout dense`" in said


def test_a_folder_that_is_there_is_kept(run, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    assert "is already there" in refused("quantize", run[0], tmp_path / "out")
    assert (tmp_path / "out" / "notes").read_text() == "mine"


def test_what_an_adapter_was_trained_on_may_not_change(run, lmx, refused, tmp_path):
    """The base was at step 10; without that step its latest is 5, which has the same shapes."""
    base, out, file = tmp_path / "base", tmp_path / "run", tmp_path / "lora.py"
    shutil.copytree(run[0], base)
    file.write_text(
        f'''"""An adapter."""
from dataclasses import replace
from lmx import run
from lmx.adapt import Lora
from lmx.train import Load

def base():
    there = run.load({str(base / "run.txt")!r})
    return replace(there, start=(Load({str(base)!r}), Lora(4)), trainable="*/w/[ab]", steps=2, save_every=1)
''',
        encoding="utf-8",
    )
    lmx("train", file, "--out", out)
    lmx("train", file, "--out", out)
    shutil.rmtree(base / "checkpoints" / "10")
    said = "is not what"
    assert said in refused("generate", out, "नदी")
    shutil.rmtree(out / "checkpoints" / "2")
    assert said in refused("train", file, "--out", out)


@pytest.mark.parametrize("text", ['{"asked": ', "[]", '{"rows": {}}'])
def test_a_damaged_frontier_is_told(run, refused, tmp_path, text):
    (tmp_path / "frontier.json").write_text(text)
    words = ("quantize", run[0], tmp_path, "--frontier", "--calibration", "english.txt", *SMALL)
    assert "frontier.json is damaged" in refused(*words)


def test_a_start_edited_after_training_is_refused(run, folder, lmx, refused, tmp_path):
    """Adapters alone are saved: another alpha is another model of the same shapes."""
    out = tmp_path / "lora"
    start = f"start=(Load('{folder / run[0]}'), Int8(), Lora(rank=2, alpha=16.0))"
    lmx("train", "experiment.py", "--out", out, "--set", start, "--set", "trainable='*/w/[ab]'")
    trained(out)
    file = out / "run.txt"
    text = file.read_text("utf-8")
    for old, new in (("alpha=16.0", "alpha=99.0"), ("bits=8", "bits=4")):
        assert old in text
        file.write_text(text.replace(old, new), "utf-8")
        assert "the start in run.txt makes other weights" in refused("generate", out, "The")


def test_a_checkpoint_described_too_deep_or_at_step_infinity_is_damaged(tmp_path):
    for text in ('{"a":' * 10_000 + "1" + "}" * 10_000, '{"step":Infinity,"meta":{},"metrics":{},"tree":{}}'):
        (tmp_path / stored.META).write_text(text)
        with pytest.raises(ValueError, match="not the description of a checkpoint"):
            stored.about(tmp_path)


def test_numbers_that_are_not_finite_are_refused_by_name(run, refused, tmp_path, monkeypatch):
    from lmx import run as runs

    model = trained(run[0])
    params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), model.params)
    monkeypatch.setattr(runs, "trained", lambda *_: model._replace(params=params))
    said = refused("quantize", run[0], tmp_path / "out", "--method", "int8")
    assert "blocks/attn/k/w holds numbers that are not finite" in said and not (tmp_path / "out").exists()


def test_bf16_of_some_matrices_leaves_the_others(run, lmx, tmp_path):
    lmx("quantize", run[0], tmp_path / "out", "--method", "bf16", "--where", "blocks/*attn*")
    kinds = {path: w.dtype for path, w in found(trained(tmp_path / "out").params).items()}
    assert {str(kinds[path]) for path in kinds if "attn" in path} == {"bfloat16"}
    assert {str(kinds[path]) for path in kinds if "attn" not in path} == {"float32"}
