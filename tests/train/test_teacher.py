"""A teacher in the step: its logits are those of numpy, the student's updates those of plain gradient descent however
they are laid out on devices, and a resumed run goes on with the same teacher or is refused."""

import json
import shutil
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from tiny import assert_same_bits, metrics, state
from tutors import LR, MODEL, RUN, TUTOR, V, learning, made_on, release, rows

from lmx import artifact, train, tree, values
from lmx.adapt import Int8, Lora
from lmx.data import Bpe, File
from lmx.losses import Chunked, Jsd, ReverseKL, Term
from lmx.mesh import MeshConfig
from lmx.models import RULES, build, pretrained
from lmx.run import Run, trained
from lmx.train import Enrich, Load, Teacher, Teachers, past, standard
from lmx.train.program import batch_shapes, program
from lmx.weights import Quantized

MESHES = {
    "one": (MeshConfig(1, 1, 1), 1),
    "micro": (MeshConfig(1, 1, 1), 4),
    "all": (MeshConfig(2, 2, 2), 2),
    "pmap": (MeshConfig(8, 1, 1, pmap=True), 1),
}


@pytest.fixture(scope="module")
def tutors(tmp_path_factory):
    """Two teachers, the second of which pads its vocabulary."""
    folder = tmp_path_factory.mktemp("tutors")
    wide = replace(TUTOR, vocab_size=V + 5)
    return release(folder / "a", TUTOR, 1), release(folder / "b", wide, 2)


@cache
def teaching(path):
    """log p of the teacher at temperature 1, by numpy."""
    found = pretrained.find(path)
    params = jax.device_get(pretrained.load(found))
    batch = rows()
    return numpy_model.log_softmax(
        numpy_model.logits(params, found.config, batch["tokens"], batch["positions"], batch["segment_ids"])
    )


@cache
def descended(path):
    """The student before and after three steps of plain gradient descent, and the loss at each."""
    model, batch = build(MODEL), jax.tree.map(jnp.asarray, rows())
    x = teaching(path) / 2
    p = jnp.asarray(np.exp(x) / np.exp(x).sum(-1, keepdims=True), jnp.float32)

    def plain(params):
        logits = model.apply(params, batch).logits
        kd = 4 * (p * (jnp.log(p) - jax.nn.log_softmax(logits / 2))).sum(-1)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)[..., 0]
        return ((0.7 * kd + 0.3 * ce) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    start = params = jax.device_get(program(RUN, MESHES["one"][0].build(jax.devices()[:1])).init(0).params)
    found, step = [], jax.jit(jax.value_and_grad(plain))
    for _ in range(3):
        loss, grads = step(params)
        params = jax.tree.map(lambda x, g: x - LR * g, params, grads)
        found.append(float(loss))
    return jax.device_get((start, params, found))


@pytest.mark.parametrize("name", MESHES)
def test_three_steps_are_those_of_plain_gradient_descent_on_every_mesh(name, tutors):
    mesh, n_micro = MESHES[name]
    run = replace(RUN, enrich=Teacher(tutors[0]), n_micro=n_micro)
    made = made_on(run, mesh, 1 if name in ("one", "micro") else 8)
    state = made.init(0)
    _, params, losses = descended(tutors[0])
    before = jax.device_get(state.constants)
    assert jax.tree.structure(state) == jax.tree.structure(made.shapes)
    for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(made.shapes)):
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype)
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    found = []
    for _ in range(3):
        state, told = made.step(state, made.place(rows()))
        found.append(float(told["loss"]))
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    assert found[2] < found[0]
    for path, a, b in zip(tree.paths(params), *map(jax.tree.leaves, (params, state.params))):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5, err_msg=path)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.constants))


def test_the_teacher_lies_on_the_mesh_by_the_rules_of_every_model_and_holds_no_logits(tutors):
    run = replace(RUN, enrich=Teacher(tutors[0], start=(Int8(),)))
    made = made_on(run, MeshConfig(2, 2, 2), 8)
    constants = made.init(0).constants
    up = constants.params["blocks"]["mlp"]["up"]["w"]
    assert isinstance(up, Quantized) and up.q.sharding.shard_shape(up.q.shape) == (2, 48, 16)  # of 96 x 32
    assert RULES and constants.params["head"].sharding.spec == jax.sharding.PartitionSpec("fsdp", None)
    made.step.lower(made.shapes, batch_shapes(run, made.mesh))


def answered(enrich, tutors_run=RUN):
    """What a loss reads of the teacher: log p [B, T, V] float64."""
    mesh = MeshConfig(1, 1, 1)
    made = made_on(replace(tutors_run, enrich=enrich), mesh, 1)
    batch = made.place(rows())
    out = jax.jit(lambda c, batch: enrich(c, batch, None)["teacher"].logits)(made.init(0).constants, batch)
    return numpy_model.log_softmax(np.asarray(out, np.float64))


def test_teachers_answer_as_numpy_has_them_alone_quantized_and_together(tutors):
    a, b = teaching(tutors[0]), teaching(tutors[1])[..., :V]
    b = numpy_model.log_softmax(b)
    each = tuple(map(Teacher, tutors))
    np.testing.assert_allclose(answered(each[0]), a, atol=1e-4)
    rounded = answered(Teacher(tutors[0], start=(Int8(),)))
    assert abs(rounded - a).max() > 1e-4 and (np.exp(a) * (a - rounded)).sum(-1).mean() < 0.01
    coarse = answered(Teacher(tutors[0], dtype="bfloat16"))
    assert abs(coarse - a).max() > 1e-4 and (np.exp(a) * (a - coarse)).sum(-1).mean() < 0.01
    mean = np.log(0.25 * np.exp(a) + 0.75 * np.exp(b))
    np.testing.assert_allclose(answered(Teachers(each, (0.25, 0.75))), mean, atol=1e-4)
    together = numpy_model.log_softmax(0.5 * a + 0.5 * b)
    np.testing.assert_allclose(answered(Teachers(each, mean="log_p")), together, atol=1e-4)


def test_teachers_cut_along_t_teach_the_same(tutors):
    enrich = Teachers(tuple(map(Teacher, tutors)))
    losses = []
    for loss in (Jsd(), Chunked(Jsd(), 5)):
        run = replace(RUN, enrich=enrich, objective={"kd": Term(loss)})
        made = made_on(run, MeshConfig(2, 2, 2), 8)
        losses.append(float(made.step(made.init(0), made.place(rows()))[1]["loss"]))
    a, b = teaching(tutors[0]), numpy_model.log_softmax(teaching(tutors[1])[..., :V])
    p = (np.exp(a) + np.exp(b)) / 2
    start = descended(tutors[0])[0]
    batch = rows()
    student = numpy_model.logits(start, MODEL, batch["tokens"], batch["positions"], batch["segment_ids"])
    q = np.exp(numpy_model.log_softmax(student))
    m = (p + q) / 2
    jsd = 0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(-1)
    wanted = (jsd * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)


# --- whole runs


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tutors, cache_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    session = train.session(learning(Teacher(tutors[0])), cache=cache_folder, devices=jax.devices()[:1])
    return session, out, standard.run(session, out)


def test_a_student_learns_and_what_taught_it_is_written_down(whole, tutors):
    session, out, _ = whole
    kd = {step: line["kd"] for step, line in metrics(out) if "kd" in line}
    assert kd[8] < kd[1] and [step for step, line in metrics(out) if "valid/loss" in line] == [4, 8]
    saved = state(out)
    assert not [path for path in saved if path.startswith("constants")]
    known = artifact.read(out / "checkpoints" / "8")
    weights = [artifact.hash_path(path) for path in Teacher(tutors[0]).files()]
    assert weights and set(weights) <= {x.hash for x in known.made_from}
    assert values.parse((out / "run.txt").read_text(), Run) == session.run
    assert trained(out).params.keys() == session.init().params.keys()


def test_resumed_equals_uninterrupted(whole, tmp_path):
    session, out, _ = whole
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    again = standard.run(session, tmp_path / "run")
    assert again.step == 8 and metrics(tmp_path / "run") == metrics(out)
    assert_same_bits(state(tmp_path / "run"), state(out))


def test_a_resumed_run_with_another_teacher_is_refused(whole, tutors, cache_folder, tmp_path):
    session, out, _ = whole
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    other = train.session(learning(Teacher(tutors[1])), cache=cache_folder, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"is not what .* was trained on"):
        standard.run(other, tmp_path / "run")
    kept = pretrained.find(tutors[0])
    before = {path: path.read_bytes() for path in kept.files()}
    params = jax.tree.map(lambda x: x * 1.01, pretrained.load(kept))
    try:
        pretrained.save(tutors[0], kept.config, params, context=64)
        with pytest.raises(
            ValueError, match=r"is not what .* was trained on.*step=NUMBER of Load or Teacher"
        ):
            standard.run(session, tmp_path / "run")
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    assert standard.run(session, tmp_path / "run").step == 8


def test_a_run_teaches_too_with_its_adapter_and_itself(whole, tutors, cache_folder, tmp_path):
    _, out, result = whole
    again = learning(Teacher(str(out)), start=(Load(str(out)), Lora(rank=2)), trainable="*/w/[ab]", steps=2)
    again = replace(again, objective={"kd": Term(ReverseKL())})
    session = train.session(again, cache=cache_folder, devices=jax.devices()[:1])
    _, told = next(iter(session.steps(session.init())))
    assert abs(float(told["loss"])) < 1e-5  # of itself there is nothing to learn yet
    adapted = standard.run(session, tmp_path / "adapted")
    folder = tmp_path / "adapted"
    known = past.past(folder)
    shapes = past.shapes(folder, known)
    assert tree.paths(shapes) == tree.paths(adapted.state.params)
    enrich = Teacher(str(folder))
    made = made_on(replace(session.run, enrich=enrich, start=(), trainable="*"), MeshConfig(2, 2, 2), 8)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(made.init(0).constants.params),
        jax.device_get(adapted.state.params),
    )
    assert result.state is not None


def test_what_does_not_fit_is_refused_before_anything_is_trained(tutors, cache_folder, tmp_path):
    def session(enrich, **data):
        run = learning(enrich)
        return train.session(replace(run, data=replace(run.data, **data)), cache=cache_folder)

    with pytest.raises(
        ValueError, match=r"made to read 64 tokens at once, and data\.seq_len=65; use data\.seq_len=64"
    ):
        session(Teacher(tutors[0]), seq_len=65)
    with pytest.raises(ValueError, match=r"another tokenizer than the run: .* is \[.*File\("):
        session(Teacher(tutors[0]), tokenizer=Bpe(300))
    large = release(tmp_path / "large", replace(MODEL, vocab_size=V + 2000), 0)
    with pytest.raises(
        ValueError, match="the teacher has 2259 words and the student 259, more apart than padding"
    ):
        session(Teacher(large))
    with pytest.raises(FileNotFoundError, match="is no model; give the folder of a run"):
        session(Teacher(str(tmp_path / "nothing")))
    for wrong in ({"weights": (0.5,)}, {"weights": (0.5, 0.6)}, {"mean": "q"}, {"each": ()}):
        with pytest.raises(ValueError, match="Teachers: "):
            replace(Teachers(tuple(map(Teacher, tutors))), **wrong)
    both = Teachers((Teacher("a", start=(Int8(),)), Teacher("b", step=3)), (0.5, 0.5))
    assert values.parse(values.show(both), Enrich) == both


def test_tokenizers_of_one_name_that_differ_are_told_apart(tmp_path, cache_folder):
    """Two of 300 tokens each, which merge other bytes."""
    texts = (["the river carries old boats " * 9] * 40, ["नदी पुरानी नावों को ले जाती है " * 9] * 40)
    (one, other) = (Bpe(300).train(x) for x in texts)
    path = release(tmp_path / "a", replace(MODEL, vocab_size=one.vocab_size), 0, one)
    other.save(tmp_path / "other")
    run = learning(Teacher(path))
    with pytest.raises(ValueError, match="has another tokenizer than the run"):
        train.session(
            replace(run, data=replace(run.data, tokenizer=File(str(tmp_path / "other")))), cache=cache_folder
        )
    train.session(replace(run, data=replace(run.data, tokenizer=File(path))), cache=cache_folder)
    layout = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    vocab = layout["model"]["vocab"]
    last = sorted(vocab, key=vocab.get)[-2:]
    vocab[last[0]], vocab[last[1]] = vocab[last[1]], vocab[last[0]]
    shutil.copytree(tmp_path / "a", tmp_path / "swapped")
    (tmp_path / "swapped" / "tokenizer.json").write_text(json.dumps(layout))
    with pytest.raises(ValueError, match="has another tokenizer than the run"):
        train.session(
            replace(run, data=replace(run.data, tokenizer=File(str(tmp_path / "swapped")))),
            cache=cache_folder,
        )
