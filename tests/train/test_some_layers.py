"""Which parameters learn is a pattern: the last layers (`Unstack`), biases and norms, adapters in some layers."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import train, tree
from lmx.adapt import Int8, Lora, Unstack
from lmx.data import Data, Documents
from lmx.models import TransformerConfig, build
from lmx.nn import AttentionConfig
from lmx.optim import AdamW, Constant, Sgd
from lmx.run import trained
from lmx.train import Load, standard
from lmx.train.program import program

TEXT = tuple(f"नदी {i} नावों को ले जाती है and {i * i % 97} boats pass" for i in range(80))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps: (its session, its folder, where to train others)."""
    folder = tmp_path_factory.mktemp("layers")
    run = lmx.Run(
        model=TransformerConfig(d_model=32, n_layers=3, attention=AttentionConfig(4, bias=True)),
        data=Data((Documents(TEXT),), valid_share=0.1, seq_len=32, batch_size=4),
        optim=Sgd(lr=0.1, schedule=Constant(), momentum=0.0, clip=None),
        steps=2,
        save_every=2,
    )
    session = train.session(run, cache=folder / "cache", devices=jax.devices()[:1])
    standard.run(session, folder / "base")
    return session, folder


def tuned(base, name, start, trainable):
    session, folder = base
    run = replace(session.run, start=(Load(str(folder / "base")), *start), trainable=trainable)
    made = train.session(run, cache=folder / "cache", devices=jax.devices()[:1])
    standard.run(made, folder / name)
    return trained(folder / name), trained(folder / "base")


@pytest.mark.parametrize(
    "start, trainable, learned",
    [
        ((Unstack(),), "blocks/[12]/*", r"blocks/[12]/.*"),
        ((Unstack(),), "blocks/2/*|norm/*", r"blocks/2/.*|norm/scale"),
        ((), "*/b|*bias|*scale", r".*/b|.*bias|.*scale"),
        ((Unstack(), Lora(2, where="blocks/2/*")), "*/w/[ab]", r"blocks/2/.*/w/[ab]"),
        ((Int8(), Unstack(), Lora(2, where="blocks/1/*attn*")), "*/w/[ab]", r"blocks/1/attn/.*/w/[ab]"),
    ],
    ids=["last two layers", "last layer and norm", "biases and norms", "adapters in one", "on int8"],
)
def test_only_what_the_pattern_names_learns_and_the_run_reads_back(base, start, trainable, learned):
    now, before = tuned(base, re.sub(r"\W", "", trainable + str(len(start))), start, trainable)
    untouched = {k: v for k, v in flat(now.params).items() if not re.fullmatch(learned, k)}
    moved = {k: v for k, v in flat(now.params).items() if re.fullmatch(learned, k)}
    assert moved and untouched
    first = program(now.run, now.run.mesh.build(jax.devices()[:1])).init(now.run.seed).params
    assert flat(first).keys() == flat(now.params).keys()
    for path, x in untouched.items():
        np.testing.assert_array_equal(x, flat(first)[path], err_msg=path)
    changed = {path for path, x in moved.items() if np.any(x != flat(first)[path])}
    assert changed, "nothing learned"
    tokens = {"tokens": jnp.arange(12, dtype=jnp.int32)[None]}
    assert np.isfinite(now.model.apply(now.params, tokens).logits).all()
    assert before.run.model == now.run.model


def test_the_last_layers_step_is_theirs_in_a_step_of_the_whole(base):
    """Without momentum or clipping an update is a gradient, which does not depend on what else learns."""
    session, folder = base
    batch = session.program.place(next(iter(session.prepared.train.once())))
    steps = {}
    for name, start, trainable in (("all", (), "*"), ("some", (Unstack(),), "blocks/2/*")):
        run = replace(session.run, start=(Load(str(folder / "base")), *start), trainable=trainable)
        made = program(run, run.mesh.build(jax.devices()[:1]))
        state, _ = made.step(made.init(0), batch)
        steps[name] = state.params
    whole = tree.layer(steps["all"]["blocks"], 2)
    for path, a, b in zip(tree.paths(whole), *map(jax.tree.leaves, (whole, steps["some"]["blocks"][2]))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=path)


def test_a_layer_that_is_not_there_is_named(base):
    with pytest.raises(ValueError, match=r"'blocks/7/\*' fits no parameter; paths near it: blocks/"):
        tuned(base, "none", (Unstack(),), "blocks/7/*")


def test_decay_of_nothing_that_learns_says_so(base):
    session, _ = base
    run = replace(session.run, trainable="*/b", optim=AdamW())
    with pytest.raises(
        ValueError,
        match=r"AdamW: weight_decay=0.1 decays nothing that learns.*blocks/.*/b.*set weight_decay=0",
    ):
        program(run, run.mesh.build(jax.devices()[:1]))


def test_unstacked_parameters_answer_the_same():
    model = build(TransformerConfig(vocab_size=30, d_model=32, n_layers=3, attention=AttentionConfig(4)))
    params = model.init(jax.random.key(0))
    apart = Unstack()(params, jax.random.key(1))
    tokens = {"tokens": jnp.arange(12, dtype=jnp.int32)[None]}
    np.testing.assert_allclose(
        model.apply(apart, tokens).logits, model.apply(params, tokens).logits, rtol=0, atol=1e-5
    )
    assert flat(Unstack()(apart, jax.random.key(1))).keys() == flat(apart).keys()


def flat(params):
    return dict(zip(tree.paths(params), map(np.asarray, jax.tree.leaves(params))))
