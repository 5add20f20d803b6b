"""What a student writes within the step: it is its own, it alone counts, and a resumed run writes the same."""

import shutil
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from tiny import assert_same_bits, metrics, state

from lmx import train
from lmx.data import Byte, Data, Documents
from lmx.losses import Chunked, Jsd, NextToken, Term
from lmx.mesh import MeshConfig
from lmx.models import TransformerConfig, build, pretrained
from lmx.nn import AttentionConfig
from lmx.optim import AdamW
from lmx.run import Run
from lmx.train import Enrich, OnPolicy, Teacher, standard
from lmx.train.program import program

V, B, T = Byte.vocab_size, 8, 16
MODEL = TransformerConfig(
    vocab_size=V,
    d_model=16,
    n_layers=2,
    attention=AttentionConfig(4, 2),
    init_std=0.4,
    tie_head=False,
    unroll=1,
)
RUN = Run(
    model=MODEL,
    data=Data(seq_len=T, batch_size=B),
    objective={"kd": Term(Chunked(Jsd(0.5), 8))},
    optim=AdamW(lr=1e-2),
    steps=8,
    save_every=4,
    mesh=MeshConfig(1, 1, 1),
)
TEXTS = tuple(f"नदी {i} नावों को ले जाती है, the river carries {i} boats" for i in range(60))


def rows(n=B):
    """Two packed texts a row, padding after them in every other row; of row 0 the reply alone counts, from token 7."""
    rng = np.random.default_rng(0)
    found = {name: rng.integers(3, V, (n, T)).astype(np.int32) for name in ("tokens", "labels")}
    at = np.broadcast_to(np.arange(T)[None], (n, T))
    found["segment_ids"] = np.where(at < 4, 1, 2).astype(np.int32)
    found["segment_ids"][1::2, 12:] = 0
    found["positions"] = np.where(at < 4, at, at - 4).astype(np.int32)
    found["loss_mask"] = (found["segment_ids"] > 0).astype(np.float32)
    found["loss_mask"][0, :7] = 0
    return jax.tree.map(jnp.asarray, found)


@cache
def student():
    return build(MODEL), jax.jit(build(MODEL).init)(jax.random.key(1))


def written(asked, batch, key=0):
    model, params = student()
    batch = batch | {"data_mask": batch["loss_mask"]}
    return jax.device_get(jax.jit(lambda key: asked.written(model, params, batch, key))(jax.random.key(key)))


@pytest.mark.parametrize("new", [None, 3])
def test_what_follows_is_what_the_student_finds_likeliest(new):
    """Drawn so coldly that it is greedy, each token is the likeliest by numpy after all before it in the row."""
    batch = rows()
    found = written(OnPolicy(Enrich(), prompt=5, new=new, temperature=1e-5), batch)
    start = np.array([8, 5, 5, 5, 5, 5, 5, 5])
    _, params = student()
    logits = numpy_model.logits(jax.device_get(params), MODEL, found["tokens"])
    for b in range(B):
        end = T if new is None else min(start[b] + new - 1, T)
        np.testing.assert_array_equal(found["tokens"][b, : start[b]], batch["tokens"][b, : start[b]])
        counts = np.flatnonzero(found["loss_mask"][b])
        np.testing.assert_array_equal(counts, np.arange(start[b] - 1, end))
        np.testing.assert_array_equal(found["labels"][b, counts], logits[b, counts].argmax(-1))
        np.testing.assert_array_equal(found["tokens"][b, counts[:-1] + 1], found["labels"][b, counts[:-1]])
        wanted = T if new is None else min(start[b] + new, T)
        np.testing.assert_array_equal(found["segment_ids"][b], np.arange(T) < wanted)
        np.testing.assert_array_equal(found["positions"][b], np.arange(T))
    assert not found["data_mask"].any()


def test_tokens_are_drawn_as_the_student_holds_them_likely():
    n = 4096
    batch = {name: jnp.broadcast_to(x[2:3], (n, T)) for name, x in rows().items()}
    found = written(OnPolicy(Enrich(), prompt=4, new=1, words=9), batch)
    _, params = student()
    log_p = numpy_model.log_softmax(
        numpy_model.logits(jax.device_get(params), MODEL, batch["tokens"][:1, :4])[0, 3, :9]
    )
    seen = np.bincount(found["labels"][:, 3], minlength=9)
    chi2 = ((seen - n * np.exp(log_p)) ** 2 / (n * np.exp(log_p))).sum()
    assert seen.sum() == n and chi2 < 26.1  # 8 degrees of freedom, p = 0.001


def test_a_text_is_over_where_it_ends():
    batch = rows()
    free = written(OnPolicy(Enrich(), prompt=5, temperature=1e-5), batch)
    end = int(free["labels"][2, 6])  # what row 2 writes at place 7
    first = next(t for t in range(4, 7) if free["labels"][2, t] == end)
    found = written(OnPolicy(Enrich(), prompt=5, temperature=1e-5, ends=(end,)), batch)
    assert found["labels"][2, first] == end
    np.testing.assert_array_equal(np.flatnonzero(found["loss_mask"][2]), np.arange(4, first + 1))
    np.testing.assert_array_equal(found["segment_ids"][2], np.arange(T) <= first + 1)


def test_rows_of_padding_alone_count_nothing():
    batch = jax.tree.map(jnp.zeros_like, rows())
    assert not written(OnPolicy(Enrich(), prompt=5), batch)["loss_mask"].any()


@pytest.fixture(scope="module")
def tutor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutor")
    tokenizer, config = Byte().train(), replace(MODEL, d_model=32)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": 0}
    pretrained.save(folder, config, jax.jit(build(config).init)(jax.random.key(5)), like=ids, context=64)
    tokenizer.save(folder)
    return str(folder)


def three_steps(enrich, tutor, **changes):
    run = replace(RUN, enrich=enrich, **changes)
    made = program(run, run.mesh.build(jax.devices()[: 8 if run.mesh.data == 8 or run.mesh.fsdp == 2 else 1]))
    state, losses = made.init(0), []
    for _ in range(3):
        state, told = made.step(state, made.place(jax.device_get(rows())))
        losses.append((float(told["loss"]), float(told["tokens"])))
    return jax.device_get(state.params), losses


def test_no_share_is_the_teacher_alone_and_the_loss_is_its_divergence_on_what_was_written(tutor):
    plain, wanted = three_steps(Teacher(tutor), tutor)
    params, losses = three_steps(OnPolicy(Teacher(tutor), share=0.0, prompt=5), tutor)
    assert losses == wanted
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    _, ours = three_steps(OnPolicy(Teacher(tutor), share=1.0, prompt=5), tutor)
    assert ours[0][1] == 9 + 7 * 12 and ours[0][0] != wanted[0][0]


PARTS = {"mesh": MeshConfig(2, 2, 2), "n_micro": 2}


@pytest.mark.parametrize(
    "changes", [PARTS, pytest.param({"mesh": MeshConfig(8, 1, 1, pmap=True)}, marks=pytest.mark.slow)]
)
def test_meshes_and_parts_of_a_batch_learn_alike(changes, tutor):
    """Written greedily, since draws differ with the layout of random numbers under pmap alone."""
    cold = OnPolicy(Teacher(tutor), share=1.0, prompt=5, new=6, temperature=1e-5)
    params, losses = three_steps(cold, tutor)
    there, found = three_steps(cold, tutor, **changes)
    np.testing.assert_allclose(found, losses, rtol=2e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), there, params)


def test_terms_of_the_data_leave_out_what_was_written(tutor):
    terms = {"kd": Term(Jsd(0.5)), "ce": Term(NextToken(), 0.3, mask="data_mask")}
    run = replace(RUN, enrich=OnPolicy(Teacher(tutor), share=0.5, prompt=5), objective=terms)
    made = program(run, run.mesh.build(jax.devices()[:1]))
    state, ce = made.init(0), []
    for _ in range(12):
        state, told = made.step(state, made.place(jax.device_get(rows())))
        ce.append(float(told["ce"]))
    assert 2 <= sum(x == 0 for x in ce) <= 10  # of 12 fair draws all but 1 in 150


def test_resumed_equals_uninterrupted(tutor, tmp_path):
    data = Data((Documents(TEXTS),), valid_share=0.0, seq_len=T, batch_size=B)
    run = replace(RUN, data=data, enrich=OnPolicy(Teacher(tutor), share=0.5, prompt=5))
    session = train.session(run, cache=tmp_path / "cache", devices=jax.devices()[:1])
    out, again = tmp_path / "whole", tmp_path / "again"
    standard.run(session, out)
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "8")
    assert standard.run(session, again).step == 8 and metrics(again) == metrics(out)
    assert_same_bits(state(again), state(out))


@pytest.mark.parametrize(
    "asked, told",
    [
        ({"prompt": T}, "leaves no room in rows of data.seq_len=16"),
        ({"words": V + 1}, f"use words={V}"),
        ({"ends": (V,)}, "are not all ids of the tokenizer"),
    ],
)
def test_what_does_not_fit_is_said_before_training(asked, told):
    with pytest.raises(ValueError, match=told):
        OnPolicy(Enrich(), **({"prompt": 5} | asked)).check(RUN, Byte().train())


def test_stores_and_pairs_say_nothing_of_it(tutor):
    made = program(replace(RUN, enrich=OnPolicy(Teacher(tutor), prompt=5)), RUN.mesh.build(jax.devices()[:1]))
    batch = jax.device_get(rows()) | {"teacher_ids": np.zeros((B, T, 2), np.int32)}
    with pytest.raises(ValueError, match="the batch has teacher_ids, made for its text"):
        made.step(made.init(0), made.place(batch))
