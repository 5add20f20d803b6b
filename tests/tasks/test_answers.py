"""What is learned of a task: its answers, or the numbers of its classes, and nothing else."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import run as runs
from lmx.adapt import Classes, Lora
from lmx.data import Bpe, Byte, Data, prepare
from lmx.evals import score
from lmx.losses import NextToken
from lmx.models import build
from lmx.models.presets import llama
from lmx.optim import AdamW
from lmx.run import Run, Trained
from lmx.tasks import Answers, Choices, Free, Records, Task, Template, prompt_text
from lmx.train import session, standard

LABELS = {"0": "ना", "1": "हाँ"}
ROWS = [{"text": f"{word} {i}", "label": i % 2} for i, word in enumerate(("बुरी", "अच्छी") * 20)]
TASK = Task(
    "समीक्षा",
    test=Records(ROWS[:6]),
    train=Records(ROWS[6:]),
    template=Template("{text}\nभाव:", " {label}"),
    answer=Choices(LABELS),
    instruction="एक शब्द।",
)


def learned(prepared):
    """(what is read, what is learned of it) of each document, from a batch as it is trained on."""
    found = []
    for batch in prepared.train.once():
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                here = batch["segment_ids"][row] == segment
                on = here & (batch["loss_mask"][row] > 0)
                found.append((batch["tokens"][row][here].tolist(), batch["labels"][row][on].tolist()))
    return found


@pytest.mark.parametrize("tokenizer", [Byte(), Bpe(vocab_size=300)])
def test_answers_alone_are_learned_token_by_token(tmp_path, tokenizer):
    data = Data(train=(Answers(TASK),), valid_share=0.0, tokenizer=tokenizer, seq_len=128, batch_size=4)
    made = prepare(data, tmp_path)
    words = made.tokenizer
    found = sorted((words.decode(ids), words.decode(labels), labels[-1]) for ids, labels in learned(made))
    asked = [(prompt_text(TASK, f"{row['text']}\nभाव:"), f" {LABELS[str(row['label'])]}") for row in ROWS[6:]]
    assert [(text, answer) for text, answer, _ in found] == sorted((q + a, a) for q, a in asked)
    assert {end for *_, end in found} == {words.eos_id}


def test_the_number_of_a_class_is_the_label_of_the_last_token(tmp_path):
    data = Data(train=(Answers(TASK, head=True),), valid_share=0.0, seq_len=128, batch_size=4)
    made = prepare(data, tmp_path)
    found = {made.tokenizer.decode(ids): labels for ids, labels in learned(made)}
    assert found == {prompt_text(TASK, f"{row['text']}\nभाव:"): [row["label"]] for row in ROWS[6:]}
    bos = [] if made.tokenizer.bos_id is None else [made.tokenizer.bos_id]
    assert all(ids[: len(bos)] == bos for ids, _ in learned(made))


def test_of_a_long_question_the_end_is_kept_with_its_answer(tmp_path):
    long = Task("t", Records(ROWS), TASK.template, TASK.answer, Records([{"text": "क" * 90, "label": 1}]))
    data = Data(train=(Answers(long),), valid_share=0.0, seq_len=48, batch_size=1)
    made = prepare(data, tmp_path)
    ((ids, labels),) = learned(made)
    assert made.tokenizer.decode(ids).endswith("क\nभाव: हाँ")
    assert made.tokenizer.decode(labels) == " हाँ" and len(ids) <= 48
    assert made.report.to_json()["noted"]["conversations_cut"] == 1


def test_a_limit_draws_by_its_seed_and_content_decides_the_store(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    task = replace(TASK, train=Records(str(path)))

    def texts(**more):
        return [x["text"] for x in Answers(task, **more)]

    assert len(texts(limit=7)) == 7 and texts(limit=7) == texts(limit=7)
    assert texts(limit=7) != texts(limit=7, seed=1) and set(texts(limit=7)) <= set(texts())
    there = tmp_path / "elsewhere.jsonl"
    there.write_text(path.read_text())
    moved = replace(task, train=Records(str(there)))
    assert Answers(task).fingerprint() == Answers(moved).fingerprint()
    there.write_text(path.read_text() + "\n" + json.dumps({"text": "नई", "label": 0}))
    others = [
        Answers(moved),
        Answers(task, limit=3),
        Answers(task, head=True),
        Answers(task, part="test"),
        Answers(replace(task, instruction="")),
        Answers(replace(task, template=Template("{text}:", " {label}"))),
    ]
    assert len({x.fingerprint() for x in (Answers(task), *others)}) == 7


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"limit=0; use 1 or more"):
        Answers(TASK, limit=0)
    free = replace(TASK, answer=Free())
    with pytest.raises(ValueError, match=r"head=True needs classes, and समीक्षा has Free"):
        Answers(free, head=True)
    with pytest.raises(ValueError, match="reads plain text; leave chat off"):
        Answers(TASK, head=True, chat=True)
    with pytest.raises(ValueError, match=r"'best_fit' with Answers"):
        Data(train=(Answers(TASK),), packing="concat")


@pytest.mark.parametrize("head", [True, False])
def test_both_ways_to_answer_learn_a_task_and_are_scored(tmp_path, head):
    start = (Lora(rank=2), Classes(2)) if head else (Lora(rank=2),)
    rows = Records([{"text": w, "label": i % 2} for i, w in enumerate(("बुरी", "अच्छी") * 20)])
    task = replace(TASK, train=rows, test=rows)
    run = Run(
        model=llama(32, 1, 2),
        data=Data(
            train=(Answers(task, head=head),),
            valid=(Answers(task, "test", head=head),),
            tokenizer=Bpe(290),
            seq_len=64,
            batch_size=8,
        ),
        start=start,
        trainable="*",
        optim=AdamW(lr=1e-2),
        steps=100,
        eval_every=100,
    )
    standard.run(session(run, cache=tmp_path / "cache"), tmp_path / "out")
    model = runs.trained(tmp_path / "out")
    assert ("classes" in model.params) == head
    found = score(model, task)
    assert found.metrics["accuracy"].value == 1.0, found.metrics
    if head:
        out = model.model.apply(model.params, {"tokens": jnp.array([model.tokenizer.encode("अ")])})
        assert out.logits.shape[-1] == 2
        for labels in ({"0": "ना", "1": "हाँ", "2": "शायद"}, {"1": "हाँ", "0": "ना"}):
            with pytest.raises(
                ValueError, match=r"a head of the classes 0, 1, and the task has .*same order"
            ):
                score(model, replace(TASK, answer=Choices(labels)))
        with pytest.raises(ValueError, match="a head of classes reads plain text"):
            score(model, TASK, chat=True)


def test_a_head_weighs_the_last_hidden_state():
    tokenizer = Byte().train([])
    config = replace(llama(32, 2, 2), vocab_size=tokenizer.vocab_size, logit_softcap=1.0)
    model = build(config)
    bare = model.init(jax.random.key(0))
    params = Classes(2, init_std=1.0)(bare, jax.random.key(1))
    found = score(Trained(Run(), model, params, tokenizer, None, 128), TASK)
    for x, row in zip(found.outcomes, ROWS):
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = bos + tokenizer.encode(prompt_text(TASK, f"{row['text']}\nभाव:"))
        hidden = np.asarray(model.apply(bare, {"tokens": jnp.array([ids])}).hidden[0, -1], np.float64)
        logits = hidden @ np.asarray(params["classes"], np.float64)
        p = np.exp(logits) / np.exp(logits).sum()
        assert [x.probabilities["0"], x.probabilities["1"]] == pytest.approx(p, rel=1e-5)
        assert x.prediction == str(p.argmax())


def test_classes_start_alike_and_only_once():
    params = Classes(3)({"embed": jnp.ones((5, 4))}, jax.random.key(0))
    assert params["classes"].shape == (4, 3) and not params["classes"].any()
    with pytest.raises(ValueError, match="there are classes already"):
        Classes(3)(params, jax.random.key(0))
    with pytest.raises(ValueError, match="use 2 or more"):
        Classes(1)
    assert NextToken()(
        build(replace(llama(32, 1, 2), vocab_size=5)).apply(
            Classes(3)(
                build(replace(llama(32, 1, 2), vocab_size=5)).init(jax.random.key(0)), jax.random.key(0)
            ),
            {"tokens": jnp.zeros((1, 2), jnp.int32)},
        ),
        {"labels": jnp.array([[0, 2]])},
    ) == pytest.approx(np.log([[3, 3]]))
