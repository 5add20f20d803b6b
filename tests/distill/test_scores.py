"""Scores as what is learned and answered: their way into batches, training on them, rank metrics against scipy and
scikit-learn, and bulk scoring that is killed."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import run as runs
from lmx.adapt import Classes
from lmx.data import Bpe, Data, TokenStore, prepare
from lmx.data.store import Writer
from lmx.data.tally import Report
from lmx.distill import score_records, scores
from lmx.evals import score
from lmx.losses import SoftLabels, Term
from lmx.models import build
from lmx.models.presets import gpt2, llama
from lmx.optim import AdamW
from lmx.report.runs import read_metrics
from lmx.run import Run, Trained
from lmx.tasks import (
    Answers,
    Choices,
    Outcome,
    Ranking,
    Records,
    Score,
    ScoreError,
    Task,
    Template,
    average_difference,
    measure,
)
from lmx.train import batch_shapes, session, standard

ROWS = [{"text": f"{'बुरी अच्छी'.split()[i % 2]} {i}", "share": (i % 2) * 0.5 + 0.2} for i in range(40)]
TASK = Task("राय", Records(ROWS), Template("{text}", "{share}"), Score(), Records(ROWS))


def data(task=TASK, **more):
    return Data(
        (Answers(task, head=True),),
        tokenizer=Bpe(270),
        seq_len=64,
        batch_size=4,
        **{"valid_share": 0.0} | more,
    )


def test_scores_lie_where_the_labels_are(tmp_path):
    made = prepare(data(), tmp_path)
    found = {}
    for batch in made.train.once():
        on = batch["loss_mask"] > 0
        assert batch["scores"].dtype == np.float32 and not batch["scores"][~on].any()
        for row, at in zip(*np.nonzero(on)):
            segment = batch["segment_ids"][row] == batch["segment_ids"][row, at]
            text = made.tokenizer.decode(batch["tokens"][row][segment].tolist())
            found[text] = batch["scores"][row, at], batch["labels"][row, at]
    assert set(found) == {row["text"] for row in ROWS}
    for row in ROWS:
        score, label = found[row["text"]]
        assert score == np.float32(row["share"]) and label == (row["share"] > 0.5)


def test_what_is_no_score_is_counted_and_left_out():
    bad = [{"text": "क", "share": x} for x in (1.5, -0.1, float("nan"), "no", True)]
    task = replace(TASK, train=Records([*ROWS[:3], *bad, {"text": "ख", "share": "0.25"}]))
    report = Report()
    kept = list(task.examples("train", report))
    assert [x.references for x in kept][-1] == ("0.25",) and len(kept) == 4
    assert report.skipped == {"score_outside": 5}
    assert any("holds 1.5; scores are numbers from 0 to 1" in x for x in report.examples["score_outside"])
    with pytest.raises(ValueError, match="no usable example"):
        list(replace(TASK, train=Records(bad)).examples("train"))


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"threshold=1; use 0 up to"):
        Score(1)
    with pytest.raises(ValueError, match="has scores, which a head of two classes learns; set head=True"):
        Answers(TASK)
    other = replace(TASK, answer=Choices(("0.2", "0.7")))
    with pytest.raises(ValueError, match="some sources have scores and some have none"):
        Data((Answers(TASK, head=True), Answers(other, head=True)))


def test_a_store_has_scores_for_all_or_none(tmp_path):
    with Writer(tmp_path / "a", 10, scored=True) as writer:
        writer.add([1, 2], score=0.5)
        writer.add([3], score=1.0)
        with pytest.raises(ValueError, match="for all documents or for none"):
            writer.add([4])
    store = TokenStore(str(tmp_path / "a"))
    with Writer(tmp_path / "b", 10, scored=True) as writer:
        writer.append(store)
    assert TokenStore(str(tmp_path / "b")).scores.tolist() == [0.5, 1.0]
    with Writer(tmp_path / "c", 10, scored=True) as writer:
        writer.add([1, 2], score=0.25)
        writer.add([3], score=1.0)
    assert TokenStore(str(tmp_path / "c")).hash != store.hash == TokenStore(str(tmp_path / "b")).hash
    (tmp_path / "a" / "scores.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"scores.bin: 4 bytes where meta.json says 8"):
        TokenStore(str(tmp_path / "a"))


def test_a_student_learns_scores_in_between_and_is_judged(tmp_path):
    run = Run(
        model=llama(32, 1, 2),
        data=data(valid_share=0.2),
        start=(Classes(2),),
        objective={"bce": Term(SoftLabels())},
        optim=AdamW(lr=1e-2),
        steps=80,
        n_micro=2,
    )
    made = session(run, cache=tmp_path / "cache", devices=jax.devices()[:1])
    batch = made.prepared.train.batch(0)
    shapes = batch_shapes(run, made.program.mesh)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
        k: (x.shape, x.dtype) for k, x in shapes.items()
    }
    standard.run(made, tmp_path / "out")
    held_out = read_metrics(tmp_path / "out")["valid/loss"][-1][1]
    entropies = [-sum(p * np.log(p) for p in (s, 1 - s)) for s in (0.2, 0.7)]
    assert min(entropies) < held_out < max(entropies) + 0.1  # of classes it would be -log 0.8 or -log 0.7
    model = runs.trained(tmp_path / "out")
    said = scores(model, [row["text"] for row in ROWS], batch_tokens=64)
    assert np.abs(said - [row["share"] for row in ROWS]).max() < 0.1
    found = score(model, TASK)
    assert found.metrics["auroc"].value == 1.0 and found.metrics["spearman"].value > 0.8
    assert found.metrics["brier"].value < 0.01
    assert [float(x.prediction) for x in found.outcomes] == pytest.approx(said.tolist(), abs=1e-4)
    bare = model._replace(params={k: x for k, x in model.params.items() if k != "classes"})
    with pytest.raises(ValueError, match="scores are answered by a head of two classes"):
        score(bare, TASK)


def outcomes(n=400, seed=0, noise=0.3, ties=True):
    rng = np.random.default_rng(seed)
    right = rng.integers(0, 4, n) / 3
    said = np.clip(right + noise * rng.normal(size=n), 0, 1)
    said = np.round(said, 1) if ties else said
    return [Outcome(str(i), (repr(float(r)),), repr(float(p))) for i, (r, p) in enumerate(zip(right, said))]


def columns(found):
    return np.array([[float(x.references[0]), float(x.prediction)] for x in found]).T


@pytest.mark.parametrize("ties", [False, True])
def test_rank_metrics_by_their_definitions(ties):
    stats = pytest.importorskip("scipy.stats")
    found = outcomes(ties=ties)
    right, said = columns(found)
    got = {name: x.value for name, x in measure((Ranking(),), found, 50).items()}
    yes, no = said[right > 0.5], said[right <= 0.5]
    assert got["auroc"] == pytest.approx(((yes[:, None] > no) + 0.5 * (yes[:, None] == no)).mean())
    assert got["spearman"] == pytest.approx(stats.spearmanr(right, said).statistic)
    cuts = np.unique(said)[::-1]
    hits = np.array([(yes >= c).sum() for c in cuts])
    precision = hits / [(said >= c).sum() for c in cuts]
    assert got["average_precision"] == pytest.approx((np.diff(hits / len(yes), prepend=0) * precision).sum())


@pytest.mark.peers
def test_rank_metrics_as_scikit_learn_has_them():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        found = outcomes(seed=seed, ties=seed % 2 == 0)
        right, said = columns(found)
        got = {name: x.value for name, x in measure((Ranking(), ScoreError()), found, 10).items()}
        assert got["auroc"] == pytest.approx(metrics.roc_auc_score(right > 0.5, said))
        assert got["average_precision"] == pytest.approx(metrics.average_precision_score(right > 0.5, said))
        assert got["brier"] == pytest.approx(metrics.mean_squared_error(right, said))


def test_counting_an_example_twice_is_having_it_twice():
    found = outcomes(60)
    counts = np.random.default_rng(1).integers(0, 3, 60)
    twice = [x for x, n in zip(found, counts) for _ in range(n)]
    metric = Ranking()
    a = metric.values(np.column_stack([counts, metric.rows(found)]))
    b = metric.values(np.column_stack([np.ones(len(twice)), metric.rows(twice)]))
    assert a == pytest.approx(b)


def test_calibration_of_scores_in_closed_form():
    def of(pairs):
        found = [Outcome(str(i), (repr(r),), repr(p)) for i, (r, p) in enumerate(pairs)]
        return {name: x.value for name, x in measure((ScoreError(),), found, 10).items()}

    assert of([(0.5, 0.5), (1.0, 1.0)]) == {"brier": 0.0, "score_calibration_error": 0.0}
    assert of([(0.0, 0.5), (1.0, 0.5)]) == {"brier": 0.25, "score_calibration_error": 0.0}
    assert of([(0.0, 1.0), (1.0, 1.0)]) == {"brier": 0.5, "score_calibration_error": 0.5}


def test_a_paired_difference_of_several_seeds_and_one_sided_data():
    good, bad = ([outcomes(seed=0, noise=s + 0.01 * i) for i in range(3)] for s in (0.1, 0.6))
    found = average_difference((Ranking(),), good, bad, 200)["auroc"]
    assert found.excludes(0) and found.value > 0
    swapped = average_difference((Ranking(),), bad, good, 200)["auroc"]
    assert (swapped.value, swapped.low) == pytest.approx((-found.value, -found.high))
    one = [Outcome(str(i), ("0.0",), repr(i / 10)) for i in range(5)]
    values = {name: x.value for name, x in measure((Ranking(),), one, 10).items()}
    assert np.isnan([values[name] for name in ("auroc", "average_precision", "spearman")]).all()


def scorer(vocabulary, config=None):
    model = build(replace(config or llama(16, 1, 2), vocab_size=vocabulary.vocab_size))
    params = Classes(2, init_std=1.0)(model.init(jax.random.key(0)), jax.random.key(1))
    return Trained(Run(), model, params, vocabulary, None, 128)


def test_bulk_scores_are_those_of_each_text_alone():
    vocabulary = lmx.data.Byte().train([])
    model = scorer(vocabulary)
    texts = [("नमस्ते दुनिया " * 3)[: 1 + i * 3 % 40] for i in range(23)]
    for batch_tokens in (8, 256):
        found = scores(model, texts, batch_tokens=batch_tokens)
        for text, p in zip(texts, found):
            ids = lmx.tasks.ids_of(vocabulary, text)
            row = jnp.array([ids + [0] * (128 - len(ids))])  # what follows changes nothing
            z = np.asarray(
                model.model.apply(model.params, {"tokens": row}).logits[0, len(ids) - 1], np.float64
            )
            assert p == pytest.approx(1 / (1 + np.exp(z[0] - z[1])), abs=1e-5)
    assert scores(model, []).shape == (0,)
    with pytest.raises(ValueError, match="text 0 has 41 tokens; use 1 to 16"):
        scores(scorer(vocabulary, gpt2(16, 1, 2, max_len=16)), ["x" * 40 + "y" * (vocabulary.bos_id is None)])
    with pytest.raises(ValueError, match="the model has no head of classes"):
        scores(model._replace(params={k: x for k, x in model.params.items() if k != "classes"}), ["क"])


def work(folder, seconds=0.0):
    """The body of a process that scores, slowed down so that it can be hit."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    import lmx.distill.score

    lmx.distill.score.BLOCK = 8
    model = scorer(lmx.data.Byte().train([]))
    score_records(
        model,
        Records(str(folder / "rows.jsonl")),
        ("text", "share"),
        lambda row: row["text"],
        folder / "scored.jsonl",
        how="{text}",
        origin=[folder / "teacher"],
        seen=lambda *_: time.sleep(seconds),
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "teacher").write_text("शिक्षक")
    rows = [*ROWS, {"text": "no share"}, *ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in rows))
    return tmp_path


def test_scoring_that_is_killed_goes_on_and_two_do_not_mix(folder):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work, args=(folder, 0.2))
    process.start()
    part = folder / "scored.jsonl.part"
    end = time.monotonic() + 300
    while not (part.exists() and part.read_bytes().count(b"\n") >= 16):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)  # so that it is still at it
    with pytest.raises(ValueError, match="is in use by process"):
        work(folder)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with part.open("ab") as file:
        file.write('{"text": "आधी'.encode()[:-1])  # a line that was cut short
    work(folder)
    found = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert [{k: x[k] for k in ("text", "share")} for x in found] == [*ROWS, *ROWS]
    alone = scores(scorer(lmx.data.Byte().train([])), [row["text"] for row in ROWS])
    assert [x["score"] for x in found] == pytest.approx([*alone, *alone], abs=1e-5)
    assert "content unchanged" in lmx.artifact.explain(folder / "scored.jsonl")
    assert not part.exists()
    work(folder)  # whole: nothing to do
    (folder / "teacher").write_text("another")
    with pytest.raises(ValueError, match="made with another teacher; name another file"):
        work(folder)
