"""Early stopping: when, with which message, and at the same step if a run was interrupted on the way."""

import json
import shutil
import signal
from dataclasses import replace

import jax
import pytest
from tiny import assert_same_bits, metrics, state

from lmx import artifact, train
from lmx.data import Data, Documents
from lmx.models import TransformerConfig
from lmx.nn import AttentionConfig
from lmx.optim import AdamW, Constant
from lmx.run import Run
from lmx.train import standard
from lmx.train.checkpoint import best_step, steps
from lmx.train.metrics import Sink

LINES = tuple(f"पंक्ति {i * 37 % 101} line {i * 53 % 97}" for i in range(40))
RUN = Run(
    model=TransformerConfig(d_model=32, n_layers=1, attention=AttentionConfig(2), dtype="float32"),
    data=Data((Documents(LINES),), valid_share=0.2, seq_len=32, batch_size=8),
    optim=AdamW(lr=5e-2, schedule=Constant(warmup=0)),
    steps=400,
    eval_every=3,
    save_every=7,
    keep=2,
    patience=3,
)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return train.session(RUN, cache=tmp_path_factory.mktemp("cache"), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(session, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, standard.run(session, out)


def test_a_run_that_overfits_stops_after_its_patience_and_keeps_the_best(session, whole):
    out, result = whole
    losses = {step: line["valid/loss"] for step, line in metrics(out) if "valid/loss" in line}
    lowest = min(losses, key=losses.get)
    assert lowest > 0 and result.step == lowest + 3 * 3 == max(losses) < RUN.steps
    assert best_step(out / "checkpoints") == lowest and max(steps(out / "checkpoints")) == result.step
    told = f"3 evaluations without a valid/loss lower than {losses[lowest]:.4f} of step {lowest}"
    assert result.early == told and not result.interrupted
    assert artifact.read(out / "run.txt").facts == {"step": result.step, "early": told}
    assert standard.finished(session, out)
    again = standard.run(session, out)
    assert again.step == result.step and again.early == told, "asked again, it makes no further step"


class Stop(Sink):
    """Asks the run to stop, as Ctrl-C does, at a step."""

    def __init__(self, at):
        self.at = at

    def write(self, step, line):
        if step == self.at and "loss" in line:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("before", [2, 4, 8], ids=lambda n: f"{n} steps before the end")
def test_interrupted_on_the_way_it_stops_at_the_same_step(session, whole, tmp_path, before):
    out, result = whole
    first = standard.run(session, tmp_path / "run", sinks=[Stop(result.step - before)])
    assert first.interrupted == signal.SIGTERM and not first.early and first.step < result.step
    second = standard.run(session, tmp_path / "run")
    assert (second.step, second.early) == (result.step, result.early)
    assert_same_bits(state(tmp_path / "run"), state(out))
    assert best_step(tmp_path / "run" / "checkpoints") == best_step(out / "checkpoints")


def test_more_patience_goes_on_and_none_goes_to_the_end(session, whole, tmp_path):
    out, result = whole
    shutil.copytree(out, tmp_path / "run")
    more = replace(session, run=replace(session.run, patience=4))
    assert not standard.finished(more, tmp_path / "run")
    step = standard.run(more, tmp_path / "run").step
    assert step >= result.step + 3 and step == best_step(tmp_path / "run" / "checkpoints") + 4 * 3
    changed = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert changed == sorted(changed)


def test_what_cannot_be_waited_for_is_refused():
    with pytest.raises(ValueError, match="patience=0 must be at least 1, or None"):
        replace(RUN, patience=0)
    with pytest.raises(ValueError, match=r"nothing is held out; set data\.valid or data\.valid_share"):
        replace(RUN, data=replace(RUN.data, valid_share=0.0))
    assert RUN.override({"patience": "none"}).patience is None


def test_it_waits_for_the_most_of_a_metric_that_is_given(session, tmp_path):
    """A score that rises to step 6, and falls: the best is there, though the loss still falls."""
    score = {3: 0.5, 6: 0.75, 9: 0.7, 12: 0.75, 15: 0.1}
    by_score = replace(session, run=replace(session.run, best="-valid/accuracy"))
    out = tmp_path / "run"
    found = standard.run(by_score, out, judge=lambda state: {"accuracy": score[int(state.step)]})
    assert found.step == 15 and best_step(out / "checkpoints") == 6
    assert found.early == "3 evaluations without a valid/accuracy higher than 0.7500 of step 6"
    told = {step: line["valid/accuracy"] for step, line in metrics(out) if "valid/accuracy" in line}
    assert told == score
    assert train.standard.finished(by_score, out)


def test_a_best_of_nothing_is_told(session, tmp_path):
    unknown = replace(session, run=replace(session.run, best="-valid/accuracy"))
    with pytest.raises(ValueError, match=r"best='-valid/accuracy' is none of valid/loss; name one"):
        standard.run(unknown, tmp_path / "run")
    with pytest.raises(ValueError, match=r"is none of valid/loss, valid/f1; name one"):
        standard.run(unknown, tmp_path / "run", judge=lambda state: {"f1": 0.5})
    with pytest.raises(ValueError, match=r"best='accuracy' is not of held-out data; use valid/loss"):
        replace(RUN, best="accuracy")
