"""Nearest shots, votes, spreads over prompts and the search for one, against numpy and by hand."""

import dataclasses
import functools
import json
import math
from collections import Counter

import jax
import numpy as np
import numpy_model
import pytest

from lmx.data import Byte, ChatTemplate
from lmx.evals import Nearest, embed, score, search, sensitivity
from lmx.evals.prompting import fingerprint
from lmx.evals.tasks import EMPTY
from lmx.generate import Sampling, generate
from lmx.models import build
from lmx.models.presets import llama
from lmx.nn import MlpConfig
from lmx.ops.position import Learned
from lmx.run import Run, Trained
from lmx.tasks import (
    Choices,
    ExactMatch,
    Free,
    Number,
    Records,
    Shots,
    Task,
    Template,
    alternatives,
    prompt_text,
)

TRAIN = ["अच्छी", "बुरी बात", "good film", "bad", "ठीक-ठाक थी", "कमाल", "लंबी", "a", "सुंदर", "dull and long"]
TASK = Task(
    "समीक्षा",
    test=Records(
        [{"text": text, "label": i % 2} for i, text in enumerate(["सुंदर है", "बुरी", "bad film", "थी"])]
    ),
    train=Records([{"text": text, "label": i % 2} for i, text in enumerate(TRAIN)]),
    template=Template("{text}\nभाव:", " {label}"),
    answer=Choices({"0": "ना", "1": "हाँ"}),
)
OTHER = Template("{text} =>", " {label}", between="\n")
CHAT = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}")


@functools.cache
def trained(**more) -> Trained:
    tokenizer = Byte().train(TRAIN)
    config = llama(
        16,
        2,
        2,
        n_kv_heads=1,
        vocab_size=tokenizer.vocab_size,
        init_std=0.3,
        mlp=MlpConfig(d_ff=24),
        unroll=1,
    )
    config = dataclasses.replace(config, **more)
    model = build(config)
    return Trained(Run(model=config), model, jax.jit(model.init)(jax.random.key(1)), tokenizer, CHAT, 4096)


def hidden(model, ids):
    """float64 [T, D] after the last norm: the head of the oracle is made the unit matrix, and softcap is off."""
    config = dataclasses.replace(model.model.config, tie_head=False)
    params = {**model.params, "head": np.eye(config.d_model)}
    return numpy_model.logits(params, config, [ids])[0]


def vector(model, text):
    bos = model.tokenizer.bos_id
    mean = hidden(model, [bos, *model.tokenizer.encode(text)])[1:].mean(0)
    return mean / np.sqrt((mean**2).sum())


@pytest.mark.parametrize("fast, batch_tokens", [(False, 2048), (True, 16)])
def test_embeddings_are_means_of_a_float64_forward_pass(fast, batch_tokens):
    model = trained()
    texts = ["ठीक", "a", "a much longer text than all the others are", "कमाल की फ़िल्म", "b"]
    found = embed(model.for_decoding() if fast else model, texts, batch_tokens=batch_tokens)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [vector(model, text) for text in texts], atol=2e-5)
    with pytest.raises(ValueError, match="embed: '' has no tokens"):
        embed(model, ["a", ""])


def test_a_text_longer_than_the_positions_is_embedded_by_its_beginning():
    model = trained(position=Learned(20))
    long, short = embed(model, ["x" * 30, "x" * 19])
    np.testing.assert_allclose(long, short, atol=1e-6)


def by_cosine(model, question, k):
    """The k nearest training examples by float64 vectors, the nearest last."""
    examples = list(TASK.examples("train"))
    cosine = [vector(model, x.question) @ vector(model, question) for x in examples]
    return tuple(examples[i] for i in np.argsort(np.negative(cosine))[:k][::-1])


def test_nearest_shots_are_those_of_largest_cosine_and_stand_before_their_question():
    model = trained()
    for k in (1, 3):
        asked = list(TASK.examples())
        found = Nearest(k)(model, list(TASK.examples("train")), [x.question for x in asked])
        assert found == [by_cosine(model, x.question, k) for x in asked]
    assert len(set(found)) > 1
    result = score(model, TASK, Nearest(3))
    for got, x, some in zip(result.outcomes, asked, found):
        one = dataclasses.replace(TASK, test=Records([{"text": x.question.split("\n")[0], "label": 0}]))
        alone = score(model, one, lambda train, _, some=some: some).outcomes[0]
        assert got.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    again = dataclasses.replace(TASK, test=TASK.train)
    with pytest.warns(UserWarning, match="10 of 10 test questions"):
        assert score(model, again, Nearest(1)).outcomes
    with pytest.raises(ValueError, match="k=11, and there are 10 training"):
        score(model, TASK, Nearest(11))
    with pytest.raises(ValueError, match="k=0; use 1"):
        Nearest(0)


def test_nearest_shots_are_calibrated_each_after_its_own():
    model = trained()
    result = score(model, TASK, Nearest(2), calibrate=True)
    words = [TASK.template.answer_of(w) for w in TASK.answer.labels.values()]

    def p(question, some):
        found = alternatives(model.tokenizer, prompt_text(TASK, question, some), words)
        log_p = [
            -numpy_model.sequence_nats(model.params, model.model.config, x.ids)[x.start - 1 :].sum()
            for x in found
        ]
        return np.exp(log_p) / np.exp(log_p).sum()

    for got, x in list(zip(result.outcomes, TASK.examples()))[:2]:
        some = by_cosine(model, x.question, 2)
        want = p(x.question, some) / np.mean([p(TASK.empty(word), some) for word in EMPTY], 0)
        np.testing.assert_allclose(list(got.probabilities.values()), want / want.sum(), atol=1e-3)


def written(model, task, votes, temperature, seed):
    """What each example's draws say, one prompt at a time."""
    rule = Sampling(temperature, max_tokens=task.answer.max_tokens, stop=task.answer.stop, seed=seed)
    for i, x in enumerate(task.examples()):
        prompts = [prompt_text(task, x.question)] * votes
        rows = range(i * votes, (i + 1) * votes)
        parts = model.model, model.params, model.tokenizer
        yield [c.text.strip() for c in generate(*parts, prompts, rule, rows=rows)]


def test_the_most_frequent_answer_of_several_draws_wins():
    model, votes = trained(), 12
    task = dataclasses.replace(
        TASK,
        answer=Free(max_tokens=1, stop=("\x00",)),
        metrics=(ExactMatch(),),
        test=Records([{"text": "क", "label": "x"}]),
    )
    result = score(model, task, votes=votes, temperature=0.6, seed=5)
    ((texts),) = written(model.for_decoding(), task, votes, 0.6, 5)
    counts = Counter(text for text in texts if text)
    assert len(counts) > 1
    (got,) = result.outcomes
    assert got.prediction == next(t for t in texts if t and counts[t] == max(counts.values()))
    assert got.probabilities == {text: n / votes for text, n in counts.items()}
    assert result.drawn_tokens == votes and result.prompt_tokens % votes == 0
    assert score(model, task, votes=votes, temperature=0.6, seed=5).outcomes == result.outcomes


def test_numbers_are_voted_on_by_their_value():
    from lmx.evals.tasks import _most

    assert _most(["4.50", None, "3", "4.5", "3.0", "3"], float) == ("3", {"4.50": 2 / 6, "3": 3 / 6})
    assert _most(["2", "1", "1.0", "2.0"], float)[0] == "2"
    assert _most([None, None], float) == (None, {})
    assert _most(["", "क  ख", "क ख"], str.split and (lambda t: " ".join(t.split())))[0] == "क  ख"
    task = dataclasses.replace(TASK, answer=Number(0, 9, max_tokens=2), metrics=())
    assert len(score(trained(), task, votes=3).outcomes) == 4


@pytest.mark.parametrize(
    "task, more, why",
    [
        (TASK, {"votes": 3}, "votes=3 are counted of written answers"),
        (
            dataclasses.replace(TASK, answer=Free(), metrics=()),
            {"votes": 3, "temperature": 0.0},
            "temperature=0.0",
        ),
        (dataclasses.replace(TASK, answer=Free(), metrics=()), {"votes": -1}, "votes=-1"),
    ],
)
def test_votes_that_mean_nothing_are_refused(task, more, why):
    with pytest.raises(ValueError, match=why):
        score(trained(), task, **more)


def test_tokens_saved_are_those_of_all_rows_but_one():
    result = score(trained(), TASK, Shots(6))
    n = result.shared_tokens
    contexts = {
        tuple(x.ids[:-1])
        for example in TASK.examples()
        for x in alternatives(
            trained().tokenizer,
            prompt_text(TASK, example.question, Shots(6)(TASK.examples("train"))),
            [" ना", " हाँ"],
        )
    }
    rows = [c for c in contexts if not any(o != c and o[: len(c)] == c for o in contexts)]
    assert n > 100 and result.saved_tokens == (len(rows) - 1) * n and result.saved_seconds > 0
    assert f"{result.saved_tokens:,} tokens, about" in result.table().text()
    assert score(trained(), TASK).saved_tokens == 0


KS = (0, 1, 2)


def test_the_spread_over_prompts_is_that_of_single_scores(tmp_path):
    model, out = trained(), tmp_path / "prompts.jsonl"
    found = sensitivity(model, TASK, KS, [OTHER], seeds=3, orders=3, out=out, resamples=200)
    by_group = {}
    for number, template in enumerate((TASK.template, OTHER)):
        task = dataclasses.replace(TASK, template=template)
        train = list(task.examples("train"))
        for k in KS:
            prompts = {Shots(k, "random", s, o)(train) for s in range(3) for o in range(3)}
            values = [score(model, task, lambda *_, p=p: p).metrics["accuracy"].value for p in prompts]
            by_group[number, k] = values
    assert {len(v) for (_, k), v in by_group.items() if k == 0} == {1}
    rows = {row[:2]: row for row in found.table().rows}
    assert len(rows) == len(by_group)
    for (number, k), values in by_group.items():
        _, _, n, mean, spread, _, low, high = rows[found.label(number), k]
        assert (n, low, high) == (len(values), min(values), max(values))
        assert mean.value == pytest.approx(np.mean(values)) and mean.low <= mean.value <= mean.high
        assert spread == (pytest.approx(np.std(values, ddof=1)) if n > 1 else None)
    assert {len(x.outcomes) for x in found.prompts} == {4}
    assert "समीक्षा" in found.table().text() and "<svg" in found.plot()
    found.save(tmp_path / "copy.jsonl")
    assert len((tmp_path / "copy.jsonl").read_text("utf-8").splitlines()) == len(found.prompts)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    from lmx.evals import prompting

    model, out, real, calls = trained(), tmp_path / "deep" / "prompts.jsonl", prompting.judge, []
    monkeypatch.setattr(prompting, "judge", lambda *a, **k: calls.append(1) or real(*a, **k))
    settings = {"seeds": 2, "orders": 1, "out": out, "resamples": 20}
    first = sensitivity(model, TASK, (0, 2), **settings)
    assert len(calls) == 3
    with out.open("a", encoding="utf-8") as file:
        file.write('{"key": "अधू')  # the process ended while it wrote
    again = sensitivity(model, TASK, (0, 2), **settings)
    assert len(calls) == 3 and again == first
    sensitivity(model, TASK, (0, 2), **settings | {"seeds": 3})
    assert len(calls) == 4
    sensitivity(model, TASK, (0,), calibrate=True, **settings)
    changed = {**model.params, "embed": model.params["embed"] * 2}
    sensitivity(model._replace(params=changed), TASK, (0,), **settings)
    rows = [dict(row, text=row["text"] + "!") for _, row in TASK.test.rows()]
    sensitivity(model, dataclasses.replace(TASK, test=Records(rows)), (0,), **settings)
    assert len(calls) == 7 == len(out.read_text("utf-8").splitlines())
    out.write_text('{"key": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts.jsonl:1 is no line of this command"):
        sensitivity(model, TASK, (0,), **settings)


def test_examples_that_one_prompt_has_no_room_for_are_left_out_of_all():
    model = trained(position=Learned(144))
    with pytest.warns(UserWarning, match="longer than positions"):
        found = sensitivity(model, TASK, (0, 3), seeds=2, orders=1, resamples=20)
    n = min(len(x.outcomes) for x in found.prompts)
    assert 0 < n < 4 and f"the same {n} examples ({4 - n} that" in found.table().caption
    assert {mean.n for mean, _ in found.groups().values()} == {n}


@pytest.mark.parametrize(
    "more, why",
    [
        ({"ks": ()}, r"ks=\(\)"),
        ({"ks": (1, 1)}, r"ks=\(1, 1\)"),
        ({"seeds": 0}, "seeds=0"),
        ({"metric": "bleu"}, "metric='bleu': समीक्षा is judged by accuracy, macro_f1"),
        ({"ks": (11,)}, "k=11, and there are 10"),
    ],
)
def test_sweeps_that_mean_nothing_are_refused(more, why):
    with pytest.raises(ValueError, match=why):
        sensitivity(trained(), TASK, **more)


def test_a_fingerprint_tells_models_apart():
    model = trained()
    assert fingerprint(model) == fingerprint(model._replace(run=Run()))
    others = [
        model._replace(params={**model.params, "embed": model.params["embed"] + 1}),
        model._replace(chat=None),
    ]
    assert len({fingerprint(x) for x in (model, *others)}) == 3


SHOTS = (Shots(), Shots(2, seed=0), Shots(2, seed=1), Nearest(1))
ROWS = [{"text": f"{text} {i}", "label": (i + len(text)) % 2} for i in range(3) for text in TRAIN]
LARGE = dataclasses.replace(TASK, train=Records([*ROWS, {"text": "bad film!", "label": 0}, *ROWS[:1]]))


def test_the_search_spends_its_budget_by_halves_and_judges_once(tmp_path, monkeypatch):
    from lmx.evals import prompting

    model, real, calls = trained(), prompting.judge, []
    monkeypatch.setattr(
        prompting,
        "judge",
        lambda m, t, examples, some, *a, **k: (
            calls.append((t, tuple(examples), some)) or real(m, t, examples, some, *a, **k)
        ),
    )
    settings = {"budget": 60, "instructions": ["एक शब्द।"], "shots": SHOTS, "seed": 3, "resamples": 50}
    with pytest.warns(UserWarning, match=r"skipped 1 in the test: row 30"):
        found = search(model, LARGE, out=tmp_path / "trials.jsonl", **settings)
    # 8 candidates, 3 rounds of 20: 8 x 2, then 4 x 5, but 2 x 10 meets the end of the 15 that there are.
    assert [len(x[1]) for x in calls] == [2] * 8 + [5] * 4 + [8] * 2 + [4] * 2
    assert found.spent == 16 + 20 + 16 <= 60
    assert sorted(len(x.outcomes) for x in found.trials) == [2] * 4 + [7] * 2 + [15] * 2
    scored = {x.question for _, examples, _ in calls[:-2] for x in examples}
    shown = {x.question for *_, some in calls for shots in some for x in shots}
    tested = {x.question for x in LARGE.examples()}
    assert len(scored) == 15 and not scored & shown and not tested & (scored | shown)
    assert not any("bad film!" in q for q in scored | shown)
    for alive in (8, 4):  # every winner of a round is at least as good as its losers
        n = {8: 2, 4: 7}[alive]
        value = [
            np.mean([o.prediction in o.references for o in x.outcomes[:n]]) for x in found.trials[:alive]
        ]
        assert min(value[: alive // 2]) >= max(value[alive // 2 :])
    again = score(model, found.task, found.shots, resamples=50)
    assert again.outcomes == found.held_out.outcomes
    assert (
        found.baseline.outcomes == tuple(real(model.for_decoding(), *calls[-1][:3]).outcomes)
        and calls[-1][0] == LARGE
    )
    right = [
        np.array([o.prediction in o.references for o in x.outcomes], float)
        for x in (found.held_out, found.baseline)
    ]
    assert found.difference["accuracy"].value == pytest.approx(np.mean(right[0] - right[1]))
    assert "held out" in found.table().text() and "एक शब्द।" in found.candidates().text()
    n = len(calls)
    with pytest.warns(UserWarning):
        assert search(model, LARGE, out=tmp_path / "trials.jsonl", **settings).trials == found.trials
    assert len(calls) == n + 2  # the test alone


@pytest.mark.parametrize(
    "more, why",
    [
        ({"budget": 100}, "one candidate leaves nothing"),
        (
            {"budget": 3, "shots": (Shots(), Shots(1), Shots(2))},
            "budget=3 for 3 candidates in 2 rounds; give 6",
        ),
        ({"budget": 100, "shots": (Shots(), Shots(6))}, "k=6, and there are 5 training"),
        ({"budget": 100, "shots": (Shots(), Nearest(6))}, "k=6, and there are 5 training"),
    ],
)
def test_searches_that_mean_nothing_are_refused(more, why):
    with pytest.raises(ValueError, match=why):
        search(trained(), TASK, **more)


def test_less_error_is_better():
    rows = [{"text": text, "label": i % 5} for i, text in enumerate(TRAIN)]
    task = dataclasses.replace(TASK, answer=Number(0, 9, max_tokens=2), metrics=(), train=Records(rows))
    found = search(trained(), task, budget=20, instructions=["अंक:"], shots=(Shots(), Shots(2)), resamples=20)
    values = [math.inf if math.isnan(x.value) else x.value for x in found.trials[:2]]
    assert values == sorted(values) and found.metric == "mean_error"
    assert json.dumps(found.task.train.label)


def test_rows_that_one_template_cannot_use_are_scored_by_none():
    rows = [
        {"text": text, "label": i % 2, **({"more": "b"} if i != 4 else {})} for i, text in enumerate(TRAIN)
    ]
    task = dataclasses.replace(
        TASK, train=Records(rows), test=Records([{"text": "x", "more": "y", "label": 0}])
    )
    found = search(
        trained(), task, budget=90, templates=[Template("{text} {more}:", " {label}")], seed=2, resamples=9
    )
    places = [[x.where for x in trial.outcomes] for trial in found.trials]
    assert places[0] == places[1] and len(places[0]) == 4  # of the five in this half, row 4 lacks a field
