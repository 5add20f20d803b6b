"""Scores against float64 likelihoods of a numpy Transformer; what is shared, merged or batched changes nothing."""

import dataclasses
import functools
import json

import jax
import numpy as np
import numpy_model
import pytest

from lmx.data import Bpe, Byte, ChatTemplate, Report
from lmx.evals import log_likelihoods, score
from lmx.evals.likelihood import _rows
from lmx.evals.tasks import EMPTY
from lmx.models import build
from lmx.models.presets import llama
from lmx.nn import MlpConfig
from lmx.ops.mask import Full, PrefixLM
from lmx.ops.position import Learned
from lmx.run import Run, Trained
from lmx.tasks import (
    Accuracy,
    Choices,
    Encoded,
    ExactMatch,
    Free,
    Number,
    Records,
    Shots,
    Task,
    Template,
    alternatives,
    difference,
    fruit,
    prompt_messages,
    prompt_text,
)

CHATML = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HINDI = [("सुंदर है", 1), ("बुरी", 0), ("लंबी थी", 0), ("कमाल", 1)]
TASK = Task(
    "समीक्षा",
    test=Records([{"text": text, "label": label} for text, label in HINDI]),
    train=Records([{"text": f"फ़िल्म {i}", "label": i % 2} for i in range(6)]),
    template=Template("{text}\nभाव:", " {label}"),
    answer=Choices({"0": "ना", "1": "हाँ", "2": "हाँ-ना"}),
    instruction="एक शब्द।",
)


@functools.cache
def trained(kind="byte", **more) -> Trained:
    """A model of random weights, large enough to have opinions."""
    kinds = {"byte": Byte(), "bpe": Bpe(vocab_size=300)}
    tokenizer = kinds[kind].train([text for text, _ in HINDI] * 9 + ["भाव: हाँ-ना"] * 9)
    config = llama(
        16,
        1,
        2,
        n_kv_heads=1,
        vocab_size=tokenizer.vocab_size,
        init_std=0.3,
        mlp=MlpConfig(d_ff=24),
        unroll=1,
    )
    config = dataclasses.replace(config, **more)
    model = build(config)
    return Trained(Run(model=config), model, jax.jit(model.init)(jax.random.key(1)), tokenizer, CHATML, 4096)


KNOWN = {}


def by_definition(model, ids, start):
    """float64 log p of ids[start:]; each model here is told by its configuration."""
    key = model.model.config, tuple(ids)
    if key not in KNOWN:
        KNOWN[key] = -numpy_model.sequence_nats(model.params, model.model.config, ids)
    return KNOWN[key][start - 1 :]


def of_choices(model, task, question, shots=(), chat=False):
    """(float64 log p of the choices, their numbers of tokens), by the definition."""
    prompt = (prompt_messages if chat else prompt_text)(task, question, shots)
    words = [task.template.answer_of(w) for w in task.answer.labels.values()]
    found = alternatives(model.tokenizer, prompt, words, model.chat)
    each = [by_definition(model, *x) for x in found]
    return np.array([x.sum() for x in each]), np.array([len(x) for x in each])


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def of(result):
    return np.array([list(x.probabilities.values()) for x in result.outcomes])


@pytest.mark.parametrize("shared, batch_tokens, fast", [(0, 4096, False), (40, 64, True)])
def test_log_likelihoods_equal_a_float64_forward_pass(shared, batch_tokens, fast):
    model = trained()
    rng = np.random.default_rng(0)
    head = [int(i) for i in rng.integers(3, 250, shared)]
    asked = []
    for n, start in ((5, 1), (5, 4), (30, 29), (30, 20), (17, 3)):
        ids = [1, *head, *map(int, rng.integers(3, 250, n))]
        asked.append(Encoded(ids, start + len(head)))
        asked.append(Encoded([*ids[:-1], 7], start + len(head)))
        asked.append(Encoded([*ids, 8, 9], start + len(head)))
    used = model.for_decoding() if fast else model
    found = log_likelihoods(used.model, used.params, used.tokenizer, asked, batch_tokens=batch_tokens)
    assert found.shared == shared
    for got, top, x in zip(found.nats, found.likeliest, asked):
        best = np.asarray(model.model.apply(model.params, {"tokens": jax.numpy.asarray([x.ids])}).logits)[
            0
        ].argmax(-1)
        np.testing.assert_array_equal(top, best[x.start - 1 : -1] == x.ids[x.start :])
        np.testing.assert_allclose(got, by_definition(model, *x), rtol=1e-4, atol=1e-4)


def test_contexts_that_begin_another_share_its_row():
    contexts = [(1, 2), (1, 2, 3), (1, 3), (1, 2), (2,), (1, 2, 3, 4), (1, 2, 4)]
    rows, row_of = _rows(contexts)
    assert sorted(rows) == [(1, 2, 3, 4), (1, 2, 4), (1, 3), (2,)]
    assert all(rows[row][: len(x)] == x for x, row in zip(contexts, row_of))


@pytest.mark.parametrize("kind, k, chat", [("byte", 0, False), ("bpe", 2, False), ("bpe", 1, True)])
def test_choices_are_weighed_by_their_likelihood(kind, k, chat):
    model, shots = trained(kind), Shots(k, "balanced", seed=4)
    shown = shots(TASK.examples("train"))
    result = score(model, TASK, shots, chat=chat)
    right = 0
    for got, example in zip(result.outcomes, TASK.examples()):
        log_p, _ = of_choices(model, TASK, example.question, shown, chat)
        np.testing.assert_allclose(list(got.probabilities.values()), softmax(log_p), atol=1e-3)
        assert got.prediction == str(log_p.argmax()) and got.where == example.where
        right += got.prediction == example.references[0]
    assert result.metrics["accuracy"].value == pytest.approx(right / len(HINDI))
    assert len(result.outcomes) == len(HINDI) and result.seconds > 0
    assert result.shared_tokens > 16 if k else True


def test_likelihoods_per_token_and_per_byte():
    model = trained("bpe")
    plain, token, byte = (score(model, TASK, per=per) for per in ("answer", "token", "byte"))
    n_bytes = np.array([len(f" {word}".encode()) for word in TASK.answer.labels.values()])
    for i, example in enumerate(TASK.examples()):
        log_p, n_tokens = of_choices(model, TASK, example.question)
        assert len(set(n_tokens)) > 1
        for result, by in ((plain, 1), (token, n_tokens), (byte, n_bytes)):
            np.testing.assert_allclose(of(result)[i], softmax(log_p / by), atol=1e-3)


def test_calibration_takes_off_what_is_thought_without_a_question():
    model = trained()
    empty = np.mean([softmax(of_choices(model, TASK, TASK.empty(x))[0]) for x in EMPTY], axis=0)
    result = score(model, TASK, calibrate=True)
    for got, example in zip(of(result), TASK.examples()):
        p = softmax(of_choices(model, TASK, example.question)[0]) / empty
        np.testing.assert_allclose(got, p / p.sum(), atol=1e-3)
    blank = dataclasses.replace(TASK, test=Records([{"text": "N/A", "label": 1}]))
    (even,) = of(score(model, blank, calibrate=True))
    log_p = of_choices(model, TASK, TASK.empty("N/A"))[0]
    np.testing.assert_allclose(even, softmax(log_p - np.log(empty)), atol=1e-3)


def greedy(model, ids, n, stop):
    """The text of the likeliest tokens, one forward pass each, up to the stop string."""
    text = model.tokenizer.decode(ids)
    for _ in range(n):
        best = int(numpy_model.logits(model.params, model.model.config, [ids])[0, -1].argmax())
        if best in model.tokenizer.end_ids:
            break
        ids = [*ids, best]
        text = model.tokenizer.decode(ids)
    return text.split(stop[0])[0]


def test_free_text_is_written_greedily_and_judged():
    model = trained()
    answer = Free(max_tokens=4, stop=("\x00",))
    rows = [{"text": text, "label": "x"} for text, _ in HINDI[:3]]
    task = dataclasses.replace(TASK, test=Records(rows), answer=answer, metrics=())
    first = [score(model, task).outcomes, score(model, task, batch_tokens=1).outcomes]
    assert first[0] == first[1]
    for outcome, example in zip(first[0], task.examples()):
        prompt = prompt_text(task, example.question)
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]
        assert outcome.prediction == greedy(model, ids, 4, answer.stop)[len(prompt) :].strip()
    rows[1]["label"] = [first[0][1].prediction or "x", "कुछ और"]
    result = score(model, dataclasses.replace(task, test=Records(rows)))
    assert result.metrics["exact_match"].value == pytest.approx(1 / 3)
    assert result.drawn_tokens <= 3 * 4 and result.prompt_tokens == sum(
        1 + len(prompt_text(task, x.question).encode()) for x in task.examples()
    )


def test_numbers_are_read_from_what_is_written():
    model = trained()
    task = dataclasses.replace(TASK, answer=Number(0, 5), metrics=())
    result = score(model, task)
    assert set(result.metrics) == {"mean_error", "answered"}
    assert all(x.prediction is None or 0 <= float(x.prediction) <= 5 for x in result.outcomes)


def test_a_result_is_kept_as_lines_and_shown(tmp_path):
    result = score(trained(), TASK, limit=2, seed=1)
    result.save(tmp_path / "outcomes.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text("utf-8").splitlines()]
    assert [row["where"] for row in rows] == [x.where for x in result.outcomes] and len(rows) == 2
    assert rows[0]["probabilities"] == result.outcomes[0].probabilities
    assert "accuracy" in result.table().text() and "समीक्षा: 2 examples" in result.table().text()
    again = score(trained(), TASK, limit=2, seed=1)
    assert (again.outcomes, again.metrics) == (result.outcomes, result.metrics)
    assert [x.where for x in score(trained(), TASK, limit=2, seed=2).outcomes] != [
        row["where"] for row in rows
    ]
    assert difference((Accuracy(),), result.outcomes, again.outcomes)["accuracy"].value == 0


def test_training_questions_in_the_test_are_told():
    task = dataclasses.replace(TASK, train=TASK.test)
    with pytest.warns(
        UserWarning, match=r"समीक्षा: 4 of 4 test questions \(100.0%\) are in its training records"
    ):
        score(trained(), task, Shots(1))


ROOM = 68


def test_examples_that_do_not_fit_are_left_out_and_counted():
    model = trained(position=Learned(ROOM))
    with pytest.warns(
        UserWarning, match=r"skipped \d longer than positions: row 0: \d+ tokens for 68 positions"
    ):
        result = score(model, TASK)
    fit = {x.where for x in TASK.examples() if _length(x) <= ROOM}
    assert {x.where for x in result.outcomes} == fit and 0 < len(fit) < len(HINDI)
    for got, x in zip(result.outcomes, (x for x in TASK.examples() if x.where in fit)):
        log_p, _ = of_choices(model, TASK, x.question)
        np.testing.assert_allclose(list(got.probabilities.values()), softmax(log_p), atol=1e-3)
    with pytest.raises(ValueError, match="no example fits the model's 68 positions; show fewer"):
        score(model, TASK, Shots(6))
    short = trained()._replace(context=ROOM)
    assert score(short, TASK).report.noted["longer_than_context"] > 0


def _length(example):
    longest = max(
        (TASK.template.answer_of(w) for w in TASK.answer.labels.values()), key=lambda w: len(w.encode())
    )
    return 1 + len((prompt_text(TASK, example.question) + longest).encode())


@pytest.mark.parametrize(
    "more, why",
    [
        ({"per": "word"}, "per='word'; use 'answer'"),
        ({"limit": 0}, "limit=0; use 1 or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(more, why):
    with pytest.raises(ValueError, match=why):
        score(trained(), TASK, **more)


def test_what_does_not_suit_the_task_or_the_model_is_refused():
    with pytest.raises(ValueError, match="calibrate=True weighs choices"):
        score(trained(), dataclasses.replace(TASK, answer=Free(), metrics=(ExactMatch(),)), calibrate=True)
    with pytest.raises(ValueError, match="messages need a chat template"):
        score(trained()._replace(chat=None), TASK, chat=True)
    attention = dataclasses.replace(trained().model.config.attention, mask=Full())
    with pytest.raises(ValueError, match="lets tokens before the answer see it"):
        score(trained(attention=attention), TASK)
    attention = dataclasses.replace(attention, mask=PrefixLM(4))
    assert score(trained(attention=attention), TASK).outcomes  # its prefix ends before the answer
    with pytest.raises(ValueError, match="nothing comes before the answer"):
        model = trained()
        log_likelihoods(model.model, model.params, model.tokenizer, [Encoded([5, 6], 0)])


def test_fruits_are_judged_whole():
    report = Report()
    n = len(list(fruit().examples(report=report)))
    result = score(trained(), fruit(), Shots(8, "balanced"), resamples=50)
    assert len(result.outcomes) == n and not result.report.skipped
    assert result.shared_tokens > 80
    assert np.allclose(of(result).sum(1), 1)
