"""lmx eval and generate on a trained run, lmx tokenizer on text, lmx explain on all of them."""

import io
import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from lmx import artifact, cli
from lmx.data import Byte, Tokenizer
from lmx.generate import Sampling, generate
from lmx.run import trained
from lmx.text.graphemes import clusters


def test_eval_measures_each_text_with_intervals_and_keeps_the_results(run, lmx):
    out, _ = run
    told = lmx("eval", out, "hindi.txt", "english.txt", "--unit", "line", "--json", "--bootstrap", "100")
    found = json.loads(told)["results"]
    assert [(x["text"], x["documents"]) for x in found] == [("hindi.txt", 120), ("english.txt", 120)]
    for x in found:
        lines = Path(x["text"]).read_text(encoding="utf-8").split("\n")
        assert x["bytes"] == sum(len(line.encode("utf-8")) for line in lines)
        nats = x["tokens"] * math.log(x["perplexity"]["value"])
        assert nats == pytest.approx(x["bits_per_byte"]["value"] * x["bytes"] * math.log(2), rel=1e-9)
        words = sum(len(line.split()) for line in lines)
        assert nats == pytest.approx(words * math.log(x["word_perplexity"]["value"]), rel=1e-9)
        assert x["perplexity"]["low"] < x["perplexity"]["value"] < x["perplexity"]["high"]
    kept = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert kept["hindi.txt: step 10, 32 tokens, by line"]["bits_per_byte"] == found[0]["bits_per_byte"]
    parents = artifact.read(out / "results.json").made_from
    assert {p.kind for p in parents} == {"checkpoint", "file"} and len(parents) == 3


def test_eval_compares_runs_pair_by_pair(run, lmx, tmp_path):
    out, _ = run
    settings = ("--bootstrap", "50", "--unit", "line")
    earlier, same = tmp_path / "earlier", tmp_path / "same"
    shutil.copytree(out, same)
    shutil.copytree(out, earlier)
    shutil.rmtree(earlier / "checkpoints" / "10")
    told = json.loads(lmx("eval", out, earlier, same, "hindi.txt", "--json", *settings))
    of_earlier, of_same = told["differences"]
    assert of_earlier["bits_per_byte"]["low"] > 0
    assert {of_same["bits_per_byte"][k] for k in ("value", "low", "high")} == {0.0}
    table = lmx("eval", out, earlier, "hindi.txt", *settings)
    assert "paired by document" in table and "worse" in table and "bits per byte" in table


def test_eval_without_text_takes_what_the_run_held_out(run, lmx):
    out, _ = run
    told = json.loads(lmx("eval", out, "--json", "--bootstrap", "10", "--stride", "16", "--step", "5"))
    (found,) = told["results"]
    held_out = list(trained(out).run.data.documents("valid"))
    assert found["documents"] == len(held_out) > 20
    assert found["bytes"] == sum(len(d["text"].encode("utf-8")) for d in held_out)
    assert "held out: step 5, 32 tokens, stride 16" in json.loads((out / "results.json").read_text())


def test_eval_refuses_what_was_held_out_of_a_text_that_has_changed(run, lmx, refused):
    text = Path("hindi.txt")
    before = text.read_text(encoding="utf-8")
    try:
        text.write_text(before + "\nएक और पंक्ति", encoding="utf-8")
        assert "hindi.txt: its content changed since" in refused("eval", run[0])
    finally:
        text.write_text(before, encoding="utf-8")


def test_eval_compares_on_held_out_text_only_where_it_is_the_same(run, refused, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run[0], other)
    text = (other / "run.txt").read_text(encoding="utf-8")
    (other / "run.txt").write_text(text.replace("valid_share=0.2", "valid_share=0.3"), encoding="utf-8")
    assert "held out other text than" in refused("eval", run[0], other)


def test_eval_reads_results_before_it_computes_and_says_what_it_skips(run, lmx, refused, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    rows = ['{"hi": "नदी 3 नावों को"}', "{broken", '{"hi": "नदी 4 नावों को"}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    source = f"Jsonl({str(tmp_path / 'pairs.jsonl')!r}, field='hi')"
    with pytest.warns(UserWarning, match=r"skipped 1 broken line: .*pairs.jsonl:2"):
        found = json.loads(lmx("eval", copy, source, "--json", "--bootstrap", "0"))["results"]
    assert found[0]["documents"] == 2
    (copy / "results.json").write_text("[1]")
    assert "results.json" in refused("eval", copy, "hindi.txt")


def test_averaged_parameters_are_those_of_the_checkpoints(run, lmx, refused, tmp_path):
    """mean = (1 - d) / (1 - d**t) * sum of d**(t - i) p_i, Kingma & Ba 2015, section 7.2."""
    settings = ("optim.ema=0.8", "steps=4", "eval_every=4", "save_every=1", "keep=4")
    out = tmp_path / "run"
    lmx("train", "experiment.py", "--out", out, *(word for x in settings for word in ("--set", x)))
    each = [trained(out, step).params["embed"] for step in (1, 2, 3, 4)]
    mean = sum(0.8 ** (3 - i) * np.float64(w) for i, w in enumerate(each)) * 0.2 / (1 - 0.8**4)
    averaged = trained(out, ema=True).params["embed"]
    np.testing.assert_allclose(averaged, mean, rtol=1e-5, atol=1e-8)
    options = (out, "hindi.txt", "--json", "--bootstrap", "0")
    plain, average = (json.loads(lmx("eval", *options, *more))["results"][0] for more in ((), ("--ema",)))
    assert plain["perplexity"] != average["perplexity"]
    assert "hindi.txt: step 4, averaged, 32 tokens" in json.loads((out / "results.json").read_text())
    assert "train with optim.ema" in refused("generate", run[0], "नदी", "--ema")


def test_one_document_has_no_interval_and_says_so(run, lmx):
    assert "one document has no interval" in lmx("eval", run[0], "hindi.txt", "--unit", "file")


def test_generate_streams_what_generate_returns(run, lmx):
    out, _ = run
    model = trained(out)
    prompt, sampling = "नदी 3 ", Sampling(temperature=0.7, max_tokens=12, seed=3)
    (expected,) = generate(model.model, model.params, model.tokenizer, [prompt], sampling)
    options = ("--temperature", "0.7", "--max-tokens", "12", "--seed", "3")
    assert lmx("generate", out, prompt, *options) == prompt + expected.text + "\n"
    (line,) = lmx("generate", out, prompt, *options, "--json").splitlines()
    assert json.loads(line) == {
        "prompt": prompt,
        "text": expected.text,
        "reason": expected.reason,
        "tokens": list(expected.tokens),
    }


def test_generate_writes_what_a_pattern_or_a_schema_says(run, lmx, refused, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["हाँ", 7]}', encoding="utf-8")
    assert lmx("generate", run[0], "नदी ", "--schema", schema) in ('नदी "हाँ"\n', "नदी 7\n")
    assert "a ( without its )" in refused("generate", run[0], "--pattern", "(")
    assert "give one" in refused("generate", run[0], "--pattern", "a", "--schema", schema)
    schema.write_text('{"type": "object"}', encoding="utf-8")
    assert "schema.json: schema: at #: an object of anything" in refused(
        "generate", run[0], "--schema", schema
    )


def test_texts_are_cleaned_as_the_run_was(run, lmx, refused, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(run[0], raw)
    text = (raw / "run.txt").read_text(encoding="utf-8")
    (raw / "run.txt").write_text(text.replace("clean=True", "clean=False"), encoding="utf-8")
    letters = "\u0958लम\n" * 30  # whose first letter NFC takes apart, into twice its bytes
    (tmp_path / "nukta.txt").write_text(letters, encoding="utf-8")
    told = [lmx("eval", out, tmp_path / "nukta.txt", "--bootstrap", "0", "--json") for out in (run[0], raw)]
    cleaned, as_it_is = (json.loads(one)["results"][0]["bytes"] for one in told)
    assert cleaned - as_it_is == 30 * 3
    assert "differ in data.clean" in refused("eval", run[0], raw, tmp_path / "nukta.txt")
    options = ("--temperature", "0", "--max-tokens", "4")
    written = [lmx("generate", run[0], prompt, *options) for prompt in ("\u0958", "\u0915\u093c")]
    assert written[0] == written[1]


def test_results_that_cannot_be_kept_are_shown(run, lmx, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy, ignore=shutil.ignore_patterns(".results.lock"))
    (copy / ".results.lock").mkdir()
    with pytest.warns(UserWarning, match=r"not added to .*results\.json"):
        assert "hindi.txt" in lmx("eval", copy, "hindi.txt", "--bootstrap", "0")


def test_generate_takes_a_batch_from_a_file_and_keeps_it(run, lmx, tmp_path):
    out, _ = run
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    (tmp_path / "prompts.txt").write_text("The river\n\nनदी\n", encoding="utf-8")
    options = ("--file", tmp_path / "prompts.txt", "--samples", "2", "--max-tokens", "6", "--batch-size", "3")
    written = [json.loads(line) for line in lmx("generate", copy, *options, "--json", "--save").splitlines()]
    assert [x["prompt"] for x in written] == ["The river", "The river", "नदी", "नदी"]
    assert written[0]["tokens"] != written[1]["tokens"]
    kept = [json.loads(line) for line in (copy / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(x["step"], x["prompt"], x["text"]) for x in kept] == [
        (10, x["prompt"], x["text"]) for x in written
    ]
    lmx("report", copy)
    assert "The river" in (copy / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_saved_is_refused_before_it_is_written(refused, tmp_path):
    (tmp_path / "model.gguf").touch()
    assert "is a file; use --json" in refused("generate", tmp_path / "model.gguf", "a", "--save")


def test_generate_reads_a_prompt_from_standard_input(run, lmx, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("नदी\n"))
    assert lmx("generate", run[0], "-", "--max-tokens", "0") == "नदी\n"


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_stream_is_an_empty_one(name, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be"))
    monkeypatch.setattr(sys, name, None)
    cli.main(["generate", str(run[0]), "-", "--max-tokens", "2"])
    getattr(sys, name).close()


def test_tokenizers_are_compared_on_hindi(lmx, tmp_path):
    kinds = ("byte", "grapheme", "bpe")
    table = lmx(
        "tokenizer", "compare", "hindi.txt", "--kinds", *kinds, "--sizes", "300", "400", "--out", tmp_path
    )
    assert "Devanagari words" in table and "Latin words" not in table
    rows = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    words = {row["tokenizer"]: row for row in rows if row["script"] == "Devanagari"}
    assert words["byte"]["bytes_per_token"] == 1.0 and words["byte"]["whole"] == 0.0
    assert (
        words["bpe"]["tokens_per_word"]
        < words["grapheme"]["tokens_per_word"]
        < words["byte"]["tokens_per_word"]
    )
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse(tmp_path / "compare.svg").getroot().tag.endswith("svg")
    assert artifact.read(tmp_path / "compare.json").made_from[0].hash == artifact.hash_path("hindi.txt")


def test_a_tokenizer_is_trained_and_shown(lmx, tmp_path):
    path = tmp_path / "tokenizer.json"
    told = lmx("tokenizer", "train", "hindi.txt", "--spec", "Bpe(vocab_size=300)", "--out", path)
    assert str(path) in told and "vocab_size=300" in told
    text = "क्षत्रिय नमस्ते"
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode(text)) == text
    shown = lmx("tokenizer", "show", path, "--text", text)
    table = shown.split("\n\n")[1].splitlines()[2:]
    assert [int(line.split()[0]) for line in table] == tokenizer.encode(text)
    assert f"{len(table)} tokens for 2 words" in shown and "lossless" in shown


def test_tokens_of_whole_letters_are_shown_as_text(lmx, tmp_path):
    lmx("tokenizer", "train", "hindi.txt", "--spec", "Grapheme()", "--out", tmp_path / "tokenizer.json")
    shown = lmx("tokenizer", "show", tmp_path / "tokenizer.json", "--text", "नदी")
    assert all(f"  {cluster}  " in shown for cluster in clusters("नदी"))


def test_explain_leads_from_the_model_to_the_text_and_sees_a_changed_byte(run, lmx, folder):
    out, _ = run
    lines = lmx("explain", out).splitlines()
    depth = {line.strip().split("  ")[0]: (len(line) - len(line.lstrip())) // 3 for line in lines}
    assert depth["checkpoint"] == 0 and depth["corpus"] == 1 and depth["file"] == 2
    tokenizer = next(line for line in lines if line.strip().startswith("tokenizer"))
    assert "kind=bpe" in tokenizer and all("CONTENT CHANGED" not in line for line in lines)
    for kind in ("corpus", "tokenizer"):
        path = next(line.split("  ") for line in map(str.strip, lines) if line.startswith(kind))[2]
        assert lmx("explain", path).splitlines()[0].startswith(kind)
    text = (folder / "hindi.txt").read_bytes()
    try:
        (folder / "hindi.txt").write_bytes(text[:-1] + b"!")
        changed = [line for line in lmx("explain", out).splitlines() if "CONTENT CHANGED" in line]
    finally:
        (folder / "hindi.txt").write_bytes(text)
    assert len(changed) == 1 and str(folder / "hindi.txt") in changed[0]


def test_explain_finds_what_was_named_from_another_folder(run, lmx, tmp_path, monkeypatch):
    out = run[0].absolute()
    lmx("tokenizer", "train", "hindi.txt", "--spec", "Bpe(vocab_size=300)", "--out", tmp_path / "t.json")
    monkeypatch.chdir(tmp_path)
    for path, n in ((out, 6), ("t.json", 2)):
        lines = lmx("explain", path).splitlines()
        assert len(lines) >= n and all(re.search(r"content unchanged$|  \(above\)$", line) for line in lines)


@pytest.mark.parametrize("verb", ["info", "generate"])
def test_a_run_with_a_class_of_its_own_names_the_way_to_it(run, lmx, refused, tmp_path, verb):
    own, copy = f"Own{verb.title()}", tmp_path / "run"
    shutil.copytree(run[0], copy)
    source = copy / "source.py"
    source.write_text(f"import lmx\nclass {own}(lmx.optim.Cosine): pass\nbase = lmx.Run\n")
    text = (copy / "run.txt").read_text(encoding="utf-8")
    assert "Cosine(" in text
    (copy / "run.txt").write_text(text.replace("Cosine(", f"{own}("), encoding="utf-8")
    words = (verb, copy, *(("नदी", "--max-tokens", "3") if verb == "generate" else ()))
    told = refused(*words)
    assert f"{own}(" in told and "is not one of" in told and f"give --source {source}" in told
    assert lmx(*words, "--source", source)


@pytest.mark.slow
def test_plan_compiles_for_a_machine_that_is_not_here(lmx):
    pytest.importorskip("libtpu")
    told = lmx("plan", "experiment.py", "--topology", "v5e:2x2")
    assert "4 devices" in told and "fits" in told


def test_generate_with_a_draft_writes_the_same_and_tells_what_was_accepted(run, lmx, capsys):
    """The run drafts for itself, so that all is accepted; another tokenizer is refused."""
    options = ("--temperature", "0", "--max-tokens", "13")
    plain = lmx("generate", run[0], "नदी 3 ", *options)
    capsys.readouterr()
    cli.main(["generate", str(run[0]), "नदी 3 ", *options, "--draft", str(run[0]), "--draft-tokens", "3"])
    told = capsys.readouterr()
    assert told.out == plain
    assert "draft: 9 of 9 tokens accepted (100%), 4.00 tokens per step of the target" in told.err
    both = lmx("generate", run[0], "नदी", "boat", *options, "--draft", run[0])
    assert "── 2 of 2\nboat" in both
    (line,) = lmx("generate", run[0], "नदी 3 ", *options, "--draft", run[0], "--json").splitlines()
    assert plain == json.loads(line)["prompt"] + json.loads(line)["text"] + "\n"


def test_generate_refuses_a_draft_of_another_tokenizer(run, refused, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run[0], other)
    Byte().train([]).save(other / "tokenizer.json")
    told = refused("generate", run[0], "नदी", "--draft", other)
    assert f"--draft {other}: its tokenizer is not that of {run[0]}" in told and "same tokenizer" in told
