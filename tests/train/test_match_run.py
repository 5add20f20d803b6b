"""What layers keep is what they make, and a student that learns from it has its projection while it trains alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tutors import MODEL, RUN, TUTOR, B, T, V, learning, made_on, release, rows

from lmx import train, tree
from lmx.adapt import Project
from lmx.losses import MatchHidden, MatchRelations, NextToken, Term
from lmx.mesh import MeshConfig
from lmx.models import build, layers, unstacked
from lmx.nn import KEPT
from lmx.run import trained
from lmx.train import Load, Teacher, standard
from lmx.train.checkpoint import load_params

OBJECTIVE = {
    "hidden": Term(MatchHidden("uniform", "cosine"), 0.5),
    "relations": Term(MatchRelations(heads=4), 0.5),
    "ce": Term(NextToken()),
}


@pytest.fixture(scope="module")
def tutor(tmp_path_factory):
    return release(tmp_path_factory.mktemp("tutor") / "a", TUTOR, 1)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_layer_keeps_its_output_and_its_heads_and_the_answer_is_the_same(remat):
    config = replace(TUTOR, remat=remat)
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = {"tokens": jnp.asarray(rows()["tokens"])}
    plain = model.apply(params, batch)
    out = jax.jit(lambda p: model.apply(p, batch, keep=KEPT))(params)
    assert plain.kept is None and set(out.kept) == set(KEPT)
    np.testing.assert_allclose(out.hidden, plain.hidden, rtol=1e-5, atol=1e-5)
    shapes = {name: x.shape for name, x in out.kept.items()}
    H = TUTOR.d_model // 4
    assert shapes == {
        "hidden": (2, B, T, 32),
        "queries": (2, B, T, 4, H),
        "keys": (2, B, T, 2, H),
        "values": (2, B, T, 2, H),
    }
    parts = layers(config)
    x = parts.enter(params, batch["tokens"])
    for i in range(2):
        block = tree.layer(params["blocks"], i)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm.eps)
        normed = normed * block["attn_norm"]["scale"][None, None]
        for name, at in (("queries", "q"), ("values", "v")):
            wanted = (normed @ block["attn"][at]["w"]).reshape(B, T, -1, H)
            np.testing.assert_allclose(out.kept[name][i], wanted, rtol=1e-4, atol=1e-4)
        x, _ = parts.layer(params, block, jnp.int32(i), x)
        np.testing.assert_allclose(out.kept["hidden"][i], x, rtol=1e-4, atol=1e-4)
    if remat == "none":
        one_by_one = model.apply(unstacked(params), batch, keep=KEPT)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), out.kept, one_by_one.kept
        )


def test_a_step_is_the_same_on_every_mesh(tutor):
    found = []
    for mesh, n, n_micro in (
        (MeshConfig(1, 1, 1), 1, 4),
        (MeshConfig(2, 2, 2), 8, 2),
        (MeshConfig(8, 1, 1, pmap=True), 8, 1),
    ):
        run = replace(
            RUN, enrich=Teacher(tutor), start=(Project(TUTOR.d_model),), objective=OBJECTIVE, n_micro=n_micro
        )
        made = made_on(run, mesh, n)
        state, told = made.step(made.init(0), made.place(rows()))
        found.append(jax.device_get((told, state.params)))
    assert found[0][1]["project"].shape == (MODEL.d_model, TUTOR.d_model) and found[0][0]["hidden"] > 0.1
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found[0], other)


def test_the_projection_learns_and_whoever_uses_the_student_does_not_get_it(tutor, tmp_path):
    run = learning(
        Teacher(tutor), objective=OBJECTIVE, start=(Project(TUTOR.d_model),), steps=6, save_every=3
    )
    session = train.session(
        replace(run, optim=replace(run.optim, ema=0.5)), cache=tmp_path, devices=jax.devices()[:1]
    )
    assert session.program.model.config.vocab_size == V
    result = standard.run(session, tmp_path / "run")
    start = session.init()
    assert np.any(np.asarray(result.state.params["project"]) != np.asarray(start.params["project"]))
    plain = set(tree.paths(start.params)) - {"project"}
    for ema in (False, True):
        assert set(tree.paths(trained(tmp_path / "run", ema=ema).params)) == plain
        assert set(tree.paths(load_params(tmp_path / "run", ema=ema))) == plain
    again = learning(Teacher(str(tmp_path / "run")), start=(Load(str(tmp_path / "run")),), steps=2)
    session = train.session(again, cache=tmp_path, devices=jax.devices()[:1])
    assert set(tree.paths(session.init().params)) == plain
    resumed = train.session(replace(run, steps=6), cache=tmp_path, devices=jax.devices()[:1])
    assert "project" in resumed.program.shapes.params
