"""Learning from a teacher's kept labels beside learning from the teacher online."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tutors import LR, MODEL, TUTOR, release

from lmx import losses
from lmx.data import Data, Documents, File, TeacherTopK, prepare
from lmx.distill import label
from lmx.losses import ForwardKL, Jsd, ReverseKL, Term
from lmx.mesh import MeshConfig
from lmx.optim import Constant, Sgd
from lmx.run import Run, trained
from lmx.train import Teacher, batch_shapes, session

LINES = ("नदी {} नावों को ले जाती है", "the river carries {} boats", "{} पुरानी चक्कियाँ", "{}")
TEXTS = tuple(LINES[i % 4].format(i * i) for i in range(60))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(a run without a teacher, the teacher's path, the folder of all that is made)"""
    folder = tmp_path_factory.mktemp("taught")
    teacher = release(folder / "teacher", TUTOR, 1)
    data = Data((Documents(TEXTS),), valid_share=0.0, tokenizer=File(teacher), seq_len=32, batch_size=8)
    optim = Sgd(lr=LR, schedule=Constant(warmup=0), momentum=0.0, clip=None)
    return Run(model=MODEL, data=data, optim=optim, steps=3), teacher, folder


@pytest.fixture(scope="module")
def labels(setting):
    """{k: where k labels of each token are kept}"""
    run, teacher, folder = setting
    made = prepare(run.data, folder / "cache" / "data")
    of = {k: folder / f"labels-{k}" for k in (1, 8, made.tokenizer.vocab_size)}
    for k, out in of.items():
        label(trained(teacher), made, out, k=k, origin=[teacher])
    return of


def learned(run, folder, devices=1):
    """(losses of the steps, the parameters after them)"""
    made = session(run, cache=folder / "cache", devices=jax.devices()[:devices])
    told, state = [], None
    for state, metrics in made.steps(made.init()):
        told.append(float(metrics["loss"]))
    return np.array(told), jax.device_get(state.params)


def with_labels(run, path, loss, **more):
    data = replace(run.data, teacher=TeacherTopK(str(path)))
    return replace(run, data=data, objective={"kd": Term(loss)}, **more)


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), Jsd(0.3), ForwardKL(2.0)])
def test_all_labels_teach_what_the_teacher_does_online(setting, labels, loss):
    """Codes are off by 1/4096 of a nat at most, so a divergence by a few thousandths of itself."""
    run, teacher, folder = setting
    online = learned(replace(run, objective={"kd": Term(loss)}, enrich=Teacher(teacher)), folder)
    stored = learned(with_labels(run, labels[max(labels)], loss), folder)
    np.testing.assert_allclose(stored[0], online[0], rtol=2e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), stored[1], online[1])


def test_fewer_labels_teach_a_lower_bound_that_grows_with_them(setting, labels):
    run, _, folder = setting
    first = [
        learned(with_labels(run, path, ForwardKL(), steps=1), folder)[0][0]
        for _, path in sorted(labels.items())
    ]
    assert 0 < first[0] < first[1] < first[2] + 1e-6


@pytest.mark.parametrize(
    "devices, mesh, n_micro", [(8, MeshConfig(), 1), (4, MeshConfig(1, 2, 2), 2), (1, MeshConfig(), 4)]
)
def test_a_mesh_and_micro_batches_learn_the_same(setting, labels, devices, mesh, n_micro):
    run, _, folder = setting
    run = with_labels(run, labels[8], losses.Chunked(ForwardKL(), 8))
    alone = learned(run, folder)
    spread = learned(replace(run, mesh=mesh, n_micro=n_micro), folder, devices)
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread[1], alone[1])


def test_the_abstract_batch_is_the_real_one(setting, labels):
    run, _, folder = setting
    made = session(with_labels(run, labels[8], ForwardKL()), cache=folder / "cache")
    batch, shapes = made.prepared.train.batch(0), batch_shapes(made.run, made.program.mesh)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
        k: (x.shape, x.dtype) for k, x in shapes.items()
    }
    with pytest.raises(FileNotFoundError, match="no labels here"):
        batch_shapes(with_labels(run, folder / "nowhere", ForwardKL()), made.program.mesh)
