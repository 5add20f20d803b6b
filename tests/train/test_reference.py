"""Preference tuning through the one step: against plain gradient descent of the paper's equation, however it is laid
out on devices, and resumed; the reference is the start and stays it."""

import json
import shutil
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_same_bits, metrics, state

from lmx import train, tree
from lmx.adapt import Lora
from lmx.data import Data, Preferences
from lmx.losses import Dpo, Margin, NextToken, Preferred, Term
from lmx.mesh import MeshConfig
from lmx.models import TransformerConfig, build
from lmx.nn import AttentionConfig
from lmx.ops.mask import PrefixLM
from lmx.optim import AdamW, Constant, Sgd
from lmx.run import Run
from lmx.train import standard
from lmx.train.program import batch_shapes, program

pytestmark = pytest.mark.filterwarnings("ignore:the tokenizer comes without a chat template")
B, T, V, BETA, LR = 8, 24, 40, 0.5, 0.3
MODEL = TransformerConfig(
    vocab_size=V,
    d_model=16,
    n_layers=1,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2),
    init_std=0.2,
    unroll=1,
)
OBJECTIVE = {
    "dpo": Term(Dpo(BETA), mask="pair_mask"),
    "margin": Term(Margin(BETA), 0.0, "pair_mask"),
    "accuracy": Term(Preferred(BETA), 0.0, "pair_mask"),
}
RUN = Run(
    model=MODEL,
    data=Data(seq_len=T, batch_size=B),
    objective=OBJECTIVE,
    enrich=train.Reference(),
    optim=Sgd(lr=LR, schedule=Constant(warmup=0), momentum=0.0, clip=None),
    steps=3,
)
MESHES = {
    "one": (MeshConfig(1, 1, 1), 1),
    "micro": (MeshConfig(1, 1, 1), 4),
    "all": (MeshConfig(2, 2, 2), 2),
    "pmap": (MeshConfig(8, 1, 1, pmap=True), 1),
}


@cache
def pairs():
    """Rows of 0, 1 or 2 pairs, as `Batches` lays them, of 1 to 4 prompt and 1 to 4 reply tokens."""
    rng = np.random.default_rng(0)
    found = {name: np.zeros((B, T), np.int32) for name in ("segment_ids", "positions")}
    found |= {name: np.zeros((B, T), np.float32) for name in ("loss_mask", "rejected_mask", "pair_mask")}
    found |= {name: rng.integers(0, V, (B, T)).astype(np.int32) for name in ("tokens", "labels")}
    for row, n_pairs in enumerate([2, 1, 0, 2, 2, 1, 0, 2]):
        at = 0
        for s in range(1, 2 * n_pairs + 1):
            prompt, reply = rng.integers(1, 4, 2)
            here = slice(at, at + prompt + reply)
            found["segment_ids"][row, here], found["positions"][row, here] = s, np.arange(prompt + reply)
            found["rejected_mask" if s % 2 == 0 else "loss_mask"][row, at + prompt : here.stop] = 1
            at = here.stop
            found["pair_mask"][row, at - 1] = s % 2 == 0
    return found


def plain(params, start):
    """The mean of equation 7 over pairs: each reply alone in a row, so no packing, no scatter and no mask of pairs."""
    batch, model = pairs(), build(MODEL)
    each = [(r, s) for r in range(B) for s in range(1, batch["segment_ids"][r].max() + 1)]
    rows = {name: np.zeros((len(each), T), batch[name].dtype) for name in ("tokens", "labels", "loss_mask")}
    for i, (r, s) in enumerate(each):
        here = batch["segment_ids"][r] == s
        both = batch | {"loss_mask": batch["loss_mask"] + batch["rejected_mask"]}
        for name, value in rows.items():
            value[i, : here.sum()] = both[name][r, here]

    def replied(params):
        logp = jax.nn.log_softmax(model.apply(params, {"tokens": jnp.asarray(rows["tokens"])}).logits)
        told = jnp.take_along_axis(logp, jnp.asarray(rows["labels"])[..., None], -1)[..., 0]
        return (told * rows["loss_mask"]).sum(1)

    gain = BETA * (replied(params) - replied(start)).reshape(-1, 2)
    return jnp.log1p(jnp.exp(gain[:, 1] - gain[:, 0])).mean()


@cache
def descended():
    """The parameters before and after three steps of plain gradient descent, and the loss at each step and after."""
    params = start = jax.device_get(program(RUN, MESHES["one"][0].build(jax.devices()[:1])).init(0).params)
    found, step = [], jax.jit(jax.value_and_grad(plain))
    for _ in range(3):
        loss, grads = step(params, start)
        params = jax.tree.map(lambda x, g: x - LR * g, params, grads)
        found.append(float(loss))
    return jax.device_get((start, params, [*found, float(step(params, start)[0])]))


@pytest.mark.parametrize("name", MESHES)
def test_three_steps_are_those_of_the_papers_loss_on_every_mesh(name):
    mesh, n_micro = MESHES[name]
    run = replace(RUN, n_micro=n_micro, mesh=mesh)
    made = program(run, mesh.build(jax.devices()[: 1 if name in ("one", "micro") else 8]))
    state = made.init(0)
    start, params, losses = descended()
    found = []
    for _ in range(3):
        state, told = made.step(state, made.place(pairs()))
        found.append(float(told["dpo"]))
    np.testing.assert_allclose(found, losses[:3], rtol=1e-5)
    assert found[0] == pytest.approx(np.log(2), rel=1e-6) and found[2] < found[0]
    for path, a, b in zip(tree.paths(params), *map(jax.tree.leaves, (params, state.params))):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5, err_msg=path)
    for path, a, b in zip(tree.paths(start), *map(jax.tree.leaves, (start, state.constants))):
        np.testing.assert_array_equal(a, b, err_msg=path)
    sums, counts = jax.device_get(made.evaluate(state.params, state.constants, made.place(pairs())))
    assert set(map(float, counts.values())) == {10.0} and "tokens" not in told
    assert sums["dpo"] / 10 == pytest.approx(losses[3], rel=1e-5)
    assert sums["margin"] > 0 and sums["accuracy"] / 10 > 0.5


def test_beside_an_adapter_the_reference_is_the_adapter_alone():
    run = replace(
        RUN, start=(Lora(rank=2),), trainable="*/w/[ab]", objective=OBJECTIVE | {"ce": Term(NextToken(), 0.0)}
    )
    made = program(run, MESHES["one"][0].build(jax.devices()[:1]))
    state = made.init(0)
    paths = tree.paths(state.constants)
    assert paths == tree.paths(state.trainable) and all(path.endswith(("/a", "/b")) for path in paths)
    before = jax.device_get(state.constants)
    for _ in range(3):
        state, told = made.step(state, made.place(pairs()))
    assert told["dpo"] < np.log(2) and told["tokens"] == pairs()["loss_mask"].sum()
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.constants))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, state.trainable))))
    made.step.lower(made.shapes, batch_shapes(run, made.mesh))


def test_labels_that_a_prefix_shows_count_in_neither_reply():
    run = replace(RUN, model=replace(MODEL, attention=AttentionConfig(4, mask=PrefixLM(3))))
    made = program(run, MESHES["one"][0].build(jax.devices()[:1]))
    state, batch = made.init(0), pairs()
    state, _ = made.step(state, made.place(batch))
    seen = batch["positions"] < 2
    changed = batch | {"labels": np.where(seen, (batch["labels"] + 1) % V, batch["labels"])}
    both = (made.evaluate(state.params, state.constants, made.place(x)) for x in (batch, changed))
    a, b = (float(sums["margin"]) for sums, _ in both)
    assert a == b != 0


# --- whole runs


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": f"फल {i}?", "chosen": f"आम {i % 7}", "rejected": f"पत्थर {i % 5}"} for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = replace(
        RUN,
        model=replace(MODEL, vocab_size=None),
        data=Data((Preferences(str(folder / "a.jsonl")),), valid_share=0.2, seq_len=160, batch_size=4),
        optim=AdamW(lr=3e-3, ema=0.9),
        steps=8,
        eval_every=2,
        save_every=4,
        keep=9,
    )
    return train.session(run, cache=folder / "cache", devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(session, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, standard.run(session, out)


def test_preferences_are_learned_and_judged_by_their_own_objective(session, whole):
    out, result = whole
    lines = {step: line for step, line in metrics(out) if "valid/loss" in line}
    assert sorted(lines) == [2, 4, 6, 8]
    for line in lines.values():
        assert line["valid/loss"] == line["valid/dpo"] > 0
    assert lines[8]["valid/loss"] < lines[2]["valid/loss"] < np.log(2)
    assert lines[8]["valid/margin"] > lines[2]["valid/margin"] > 0 and lines[8]["valid/accuracy"] == 1
    measured = set(train.metric_names(session.run))
    assert set(lines[8]) == {name for name in measured if name.startswith("valid/")}
    assert {"valid/ema_loss", "valid/accuracy", "margin"} <= measured
    assert session.evaluate(result.state)["valid/loss"] == lines[8]["valid/loss"]


def test_resumed_equals_uninterrupted_and_the_reference_is_the_start_still(session, whole, tmp_path):
    out, result = whole
    saved = state(out)
    assert saved and not [path for path in saved if path.startswith("constants")]
    shutil.copytree(out, tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step), ignore_errors=True)
    again = standard.run(session, tmp_path / "run")
    assert again.step == 8 and metrics(tmp_path / "run") == metrics(out)
    assert_same_bits(state(tmp_path / "run"), saved)
    start = session.init()
    for kept in (result.state.constants, again.state.constants):
        jax.tree.map(np.testing.assert_array_equal, kept, start.trainable)


def test_an_objective_of_pairs_is_refused_without_pairs(session):
    data = session.run.data
    for part, changed in (("train", Data(("a.txt",))), ("valid", replace(data, valid=("a.txt",)))):
        with pytest.raises(
            ValueError, match=rf"'dpo' is of pairs of replies, and data.{part} has none; add a Pref"
        ):
            replace(session.run, data=changed)
    without = replace(session, run=replace(session.run, enrich=train.Enrich()))
    with pytest.raises(
        ValueError, match=r"Dpo: the batch has no 'reference'; train with enrich=Reference\(\)"
    ):
        next(without.steps(without.init()))
