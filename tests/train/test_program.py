"""One step on eight virtual devices, however they are arranged, has the loss and gradients of one device.

Plain gradient descent with a learning rate of 1 is used, so that the change of a parameter is its gradient. What it is
compared with is `jax.grad` of the masked mean, written here, of a model that knows of no mesh.
"""

import re
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import tree
from lmx.data import Data
from lmx.losses import NextToken, Term, ZLoss
from lmx.mesh import MeshConfig
from lmx.models import TransformerConfig, build
from lmx.nn import AttentionConfig
from lmx.ops.mask import Full, PrefixLM
from lmx.ops.position import T5, ALiBi, Learned, RoPE
from lmx.optim import AdamW, Constant, Sgd
from lmx.run import Run
from lmx.train.program import batch_shapes, program
from lmx.weights.surgery import Surgery

B, T, V = 8, 16, 40
DESCENT = Sgd(lr=1.0, schedule=Constant(warmup=0), momentum=0.0, clip=None)
MODEL = TransformerConfig(
    vocab_size=V,
    d_model=32,
    n_layers=2,
    attention=AttentionConfig(n_heads=8, n_kv_heads=2),
    init_std=0.2,
    unroll=1,
)
RUN = Run(model=MODEL, data=Data(seq_len=T, batch_size=B), optim=DESCENT, steps=3)
POSITIONS = {"rope": RoPE(), "t5": T5(n_buckets=8, max_distance=10), "alibi": ALiBi()}
MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 8),
    "all": MeshConfig(2, 2, 2),
    "pmap": MeshConfig(8, 1, 1, pmap=True),
}


@cache
def packed():
    """Rows of several segments with padding; masks are as uneven as they get: 1 token in one row, all in another."""
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((2, B, T), np.int32)
    for b in range(B):
        start = 0
        for segment, length in enumerate(rng.integers(2, 8, 3), 1):
            here = slice(start, min(start + length, T))
            segments[b, here] = segment
            positions[b, here] = np.arange(here.stop - here.start)
            start = here.stop
    mask = (segments > 0) & (rng.random((B, T)) < 0.6)
    mask[0], mask[1] = False, segments[1] > 0
    mask[0, 1] = True
    tokens, labels = rng.integers(0, V, (2, B, T)).astype(np.int32)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": mask.astype(np.float32),
        "positions": positions,
        "segment_ids": segments,
    }


def trained_once(run):
    """(metrics, parameters before minus parameters after) of one step from the run's seed."""
    made = program(run, run.mesh.build())
    state = made.init(run.seed)
    before = jax.device_get(state.params)
    state, metrics = made.step(state, made.place(packed()))
    after = jax.device_get(state.params)
    return jax.device_get(metrics), jax.tree.map(lambda a, b: a - b, before, after), before


def plain(model, params):
    """(loss, gradients): the mean over counted tokens of -log softmax at the label."""
    apply, batch = build(model).apply, jax.tree.map(jnp.asarray, packed())

    def loss(params):
        logp = jax.nn.log_softmax(apply(params, batch).logits)
        nats = -jnp.take_along_axis(logp, batch["labels"][..., None], -1)[..., 0]
        return (nats * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


CASES = [
    *(("rope", mesh, 1) for mesh in MESHES),
    ("t5", "all", 1),
    ("t5", "tensor", 1),
    ("t5", "pmap", 1),
    ("alibi", "all", 1),
    ("rope", "all", 2),
]


@pytest.mark.parametrize("position, mesh, n_micro", CASES)
def test_eight_devices_give_the_loss_and_gradients_of_one(position, mesh, n_micro):
    model = replace(MODEL, position=POSITIONS[position])
    metrics, change, params = trained_once(replace(RUN, model=model, mesh=MESHES[mesh], n_micro=n_micro))
    loss, grads = plain(model, params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["tokens"] == packed()["loss_mask"].sum()
    for path, got, want in zip(tree.paths(grads), jax.tree.leaves(change), jax.tree.leaves(grads)):
        largest = np.abs(want).max()
        assert largest > 1e-3, path
        np.testing.assert_allclose(got, want, atol=1e-5 * max(largest, 1), err_msg=path)


def test_pmap_goes_on_from_its_own_state_and_evaluates():
    """Three steps under pmap, then three on one device: the same parameters."""
    runs = [
        replace(RUN, optim=replace(DESCENT, lr=0.1, momentum=0.9), mesh=m)
        for m in (MESHES["pmap"], MeshConfig(1, 1, 1))
    ]
    found = []
    for run, devices in zip(runs, (jax.devices(), jax.devices()[:1])):
        made = program(run, run.mesh.build(devices))
        state, batch = made.init(0), made.place(packed())
        for _ in range(3):
            state, metrics = made.step(state, batch)
        found.append(
            jax.device_get((state.params, metrics["loss"], made.evaluate(state.params, None, batch)))
        )
    for path, a, b in zip(tree.paths(found[0]), *map(jax.tree.leaves, found)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=path)


def test_evaluation_is_the_sum_of_nats_over_counted_tokens():
    made = program(RUN, MESHES["all"].build())
    state, batch = made.init(0), packed()
    nats, tokens = (x["loss"] for x in jax.device_get(made.evaluate(state.params, None, made.place(batch))))
    loss, _ = plain(MODEL, jax.device_get(state.params))
    assert tokens == batch["loss_mask"].sum()
    np.testing.assert_allclose(nats / tokens, loss, rtol=1e-5)


def test_evaluation_never_holds_the_logits_of_a_batch():
    run = replace(RUN, model=replace(MODEL, vocab_size=2**15), data=Data(seq_len=256, batch_size=16))
    made = program(run, MeshConfig(1, 1, 1).build(jax.devices()[:1]))
    compiled = made.evaluate.lower(made.shapes.params, None, batch_shapes(run, made.mesh)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 256 * 2**15 * 4 / 2


def test_a_token_of_the_prefix_is_not_asked_for_what_it_sees():
    """With PrefixLM(3) tokens 0 and 1 of each segment see their labels: neither the loss nor `valid` counts them."""
    run = replace(RUN, model=replace(MODEL, attention=AttentionConfig(8, mask=PrefixLM(3))))
    made = program(replace(run, mesh=MeshConfig(1, 1, 1)), MeshConfig(1, 1, 1).build(jax.devices()[:1]))
    batch = packed()
    counted = batch["loss_mask"] * (batch["positions"] >= 2)
    state = made.init(0)
    nats, tokens = (x["loss"] for x in made.evaluate(state.params, None, made.place(batch)))
    left = made.evaluate(state.params, None, made.place(batch | {"loss_mask": counted}))
    plain_nats, plain_tokens = (x["loss"] for x in left)
    assert tokens == plain_tokens == counted.sum() < batch["loss_mask"].sum() and nats == plain_nats
    assert made.step(state, made.place(batch))[1]["tokens"] == counted.sum()


def test_a_step_takes_over_the_memory_of_its_state():
    made = program(RUN, MeshConfig(8, 1, 1).build())
    state = made.init(0)
    made.step(state, made.place(packed()))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.trainable, state.opt_state)))


def test_another_seed_compiles_nothing(caplog):
    made = program(RUN, MeshConfig(8, 1, 1).build())
    with jax.log_compiles():
        first = made.init(0)
        assert "jit(init)" in caplog.text
        caplog.clear()
        last = made.init(2**32 - 1)
    assert "jit(init)" not in caplog.text and not np.array_equal(first.key, last.key)


def test_terms_that_read_the_logits_share_them():
    """FLOPs of a step, by the compiler: cross-entropy and z-loss together cost no second head."""

    def flops(objective):
        run = replace(RUN, objective=objective, model=replace(MODEL, vocab_size=2**12))
        made = program(run, MeshConfig(1, 1, 1).build(jax.devices()[:1]))
        return made.step.lower(made.shapes, batch_shapes(run, made.mesh)).compile().cost_analysis()["flops"]

    one = flops({"ce": Term(NextToken())})
    assert flops({"ce": Term(NextToken()), "z": Term(ZLoss(), 1e-4)}) < 1.2 * one


def test_the_key_of_the_steps_is_not_that_of_the_parameters():
    key = program(RUN, MeshConfig(8, 1, 1).build()).init(5).key
    for used in (
        jax.random.key(5),
        jax.random.fold_in(jax.random.key(5), 0),
        jax.random.fold_in(jax.random.key(5), 1),
    ):
        assert not np.array_equal(key, jax.random.key_data(used))


@pytest.mark.parametrize("tied", [True, False])
def test_devices_exchange_matrices_and_no_activations(tied):
    """Matrices are gathered over fsdp, one layer at a time, and stay split over tensor, the embedding too."""
    run = replace(RUN, model=replace(MODEL, tie_head=tied), mesh=MESHES["all"])
    made = program(run, run.mesh.build())
    text = made.step.lower(made.shapes, batch_shapes(run, made.mesh)).compile().as_text()
    moved = re.findall(
        r"= f32\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text
    )
    shapes = [tuple(map(int, shape.split(","))) for shape in moved]
    assert len(shapes) > 5
    assert all(len(shape) == 2 and V not in shape for shape in shapes), shapes


def test_numbers_keep_their_types_in_bfloat16():
    """Parameters, optimizer state, sums of gradients, losses: float32. Activations: bfloat16."""
    run = replace(RUN, model=replace(MODEL, dtype="bfloat16"), optim=AdamW(), n_micro=2, mesh=MESHES["all"])
    made = program(run, run.mesh.build())
    batch = batch_shapes(run, made.mesh)
    state, metrics = jax.eval_shape(made.step, made.shapes, batch)
    for found in (made.shapes, state):
        arrays = jax.tree.leaves((found.params, found.opt_state))
        assert {x.dtype for x in arrays if x.ndim} == {jnp.dtype("float32")}
    assert {name: x.dtype for name, x in metrics.items()} == {
        **dict.fromkeys(("loss", "grad_norm", "tokens"), jnp.float32),
        **dict.fromkeys(("skipped", "streak"), jnp.int32),
    }

    def forward(params, batch):
        out = made.model.apply(params, batch)
        return out.hidden, out.logits

    hidden, logits = jax.eval_shape(forward, made.shapes.params, batch)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    state, exact = made.init(0), program(replace(run, model=MODEL), made.mesh)
    loss, want = (float(m.evaluate(state.params, None, m.place(packed()))[0]["loss"]) for m in (made, exact))
    assert loss == pytest.approx(want, rel=0.02) and loss != want


@dataclass(frozen=True)
class Extra(Surgery):
    def __call__(self, params, key):
        return params | {"extra": jnp.zeros(3)}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"start": (Extra(),)}, "no sharding rule covers extra"),
        ({"trainable": "blocks/*/lora"}, "'blocks/\\*/lora' fits no parameter; paths near it: blocks"),
        (
            {"model": replace(MODEL, attention=AttentionConfig(8, mask=Full()))},
            "Full.* its own label; use Causal",
        ),
        (
            {"model": replace(MODEL, position=Learned(16)), "eval_lengths": (32,)},
            "eval_lengths: 32 is more than",
        ),
        ({"n_micro": 3}, r"batch_size=8 does not split into n_micro=3 x 4 devices \(data x fsdp\); use 12"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(change, told):
    with pytest.raises(ValueError, match=told):
        program(replace(RUN, mesh=MESHES["all"], **change), MESHES["all"].build())
