"""Meshes, and where parameters, optimizer state and batches lie on them. Eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import models, optim, tree
from lmx.losses import LoadBalance, NextToken, Term, counts, total
from lmx.mesh import BATCH, MeshConfig, check_batch, fit, follow, shardings
from lmx.models import TransformerConfig, build
from lmx.nn import AttentionConfig, MlpConfig, MoeConfig, NormConfig
from lmx.ops.position import T5, Learned
from lmx.weights import LowRank, Quantized, Transposed, quantize

RULES = (
    ("*/q/w|head", ("fsdp", "tensor")),
    ("embed", ("tensor", "fsdp")),
    ("*/b|*scale", ()),
    ("*/q/*", ("data",)),
)
SHAPES = {
    "blocks": {"q": {"w": (3, 8, 16), "b": (3, 16), "other": (4,)}, "norm": {"scale": (3, 8)}},
    "embed": (10, 8),
    "head": (8, 7),
}


def shapes(found=SHAPES):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), found, is_leaf=is_shape)


def specs(found):
    return {path: s.spec for path, s in zip(tree.paths(found), jax.tree.leaves(found))}


def test_the_first_rule_that_fits_places_the_last_dimensions():
    placed = specs(shardings(shapes(), RULES, MeshConfig(2, 2, 2).build()))
    assert placed == {
        "blocks/q/w": P(None, "fsdp", "tensor"),
        "blocks/q/b": P(None, None),
        "blocks/q/other": P("data"),
        "blocks/norm/scale": P(None, None),
        "embed": P("tensor", "fsdp"),
        "head": P("fsdp", None),  # 7 columns do not split in two
    }


def test_a_dimension_that_an_axis_does_not_divide_is_not_split():
    with pytest.warns(UserWarning, match=r"not split: embed \(10 over tensor=4\), head \(7 over tensor=4\)$"):
        placed = specs(shardings(shapes(), RULES, MeshConfig(1, 2, 4).build()))
    assert placed["embed"] == P(None, "fsdp") and placed["blocks/q/w"] == P(None, "fsdp", "tensor")
    mesh = MeshConfig(2, 2, 2).build()
    assert fit((8, 3), (("data", "fsdp"), None), mesh).spec == P(("data", "fsdp"), None)
    assert fit((6, 3), (("data", "fsdp"), "tensor"), mesh).spec == P(None, None)


def test_a_parameter_that_no_rule_covers_is_an_error():
    with pytest.raises(
        ValueError, match=r"no sharding rule covers blocks/q/other; add a \(pattern, axes\) rule"
    ):
        shardings(shapes(), RULES[:3], MeshConfig(8, 1, 1).build())
    with pytest.raises(ValueError, match="covers embed, head"):
        shardings({"embed": shapes()["embed"], "head": shapes()["head"]}, RULES[3:], MeshConfig().build())


EVERY_PARAMETER = [
    TransformerConfig(vocab_size=16, d_model=16, n_layers=2),
    TransformerConfig(
        vocab_size=16,
        d_model=16,
        n_layers=2,
        tie_head=False,
        placement="sandwich",
        position=Learned(32),
        attention=AttentionConfig(n_heads=8, qk_norm=True, bias=True, out_bias=True),
        mlp=MlpConfig("geglu", bias=True),
        norm=NormConfig("layer", bias=False),
    ),
    TransformerConfig(
        vocab_size=16, d_model=16, n_layers=2, position=T5(), norm=NormConfig("layer", bias=True)
    ),
]


@pytest.mark.parametrize("config", EVERY_PARAMETER, ids=["plain", "all", "t5"])
def test_the_model_has_a_rule_for_every_parameter_and_splits_every_matrix(config):
    params = jax.eval_shape(build(config).init, jax.random.key(0))
    placed = specs(shardings(params, models.RULES, MeshConfig(2, 2, 2).build()))
    for path, spec in placed.items():
        if path.endswith("/w") or path in ("embed", "head"):
            assert {"fsdp", "tensor"} <= set(spec), path
        elif path.endswith(("/up/b", "/gate/b", "/q/b", "/k/b", "/v/b")):
            assert spec[-1] == "tensor", path
        else:
            assert set(spec) <= {None}, path


MOE = TransformerConfig(
    vocab_size=16,
    d_model=16,
    n_layers=2,
    unroll=1,
    init_std=0.3,
    attention=AttentionConfig(n_heads=8),
    mlp=MoeConfig(d_ff=8, n_experts=8),
)


def test_experts_are_divided_over_fsdp_and_their_width_over_tensor():
    params = jax.eval_shape(build(MOE).init, jax.random.key(0))
    placed = specs(shardings(params, models.RULES, MeshConfig(2, 2, 2).build()))
    assert {path.removeprefix("blocks/mlp/"): s for path, s in placed.items() if "/mlp/" in path} == {
        "experts/up/w": P(None, "fsdp", None, "tensor"),
        "experts/gate/w": P(None, "fsdp", None, "tensor"),
        "experts/down/w": P(None, "fsdp", "tensor", None),
        "router/w": P(None, "fsdp", None),
    }


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_experts_on_eight_devices_equal_one(sizes):
    """Loss and gradients; each token stays with its device, so only weights and gradients travel."""
    objective = {"ce": Term(NextToken()), "balance": Term(LoadBalance(), 0.1)}
    tokens = np.random.default_rng(0).integers(0, 16, (8, 9)).astype(np.int32)
    mask = np.ones((8, 8), np.float32)
    mask[3:, 5:] = 0
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}

    def loss_and_grads(model):
        def loss(params, batch):
            return total(objective, model.apply(params, batch), batch, counts(objective, batch))

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    params = jax.jit(build(MOE).init)(jax.random.key(0))
    want = loss_and_grads(build(MOE))(params, batch)
    mesh = MeshConfig(*sizes).build()
    spread = jax.device_put(params, shardings(params, models.RULES, mesh))
    rows = jax.device_put(batch, NamedSharding(mesh, BATCH))
    got = loss_and_grads(build(MOE, mesh=mesh))(spread, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


UPDATES = [optim.AdamW(), optim.Lion(), optim.Muon(), optim.Adafactor(), optim.AdamW(ema=0.9), optim.Sgd()]


@pytest.mark.parametrize("update", UPDATES, ids=lambda u: type(u).__name__ + ("+ema" if u.ema else ""))
def test_optimizer_state_lies_where_its_parameter_does(update):
    """Arrays of the state that are as large as a parameter are split like it; what remains is small."""
    mesh = MeshConfig(2, 2, 2).build()
    params = jax.eval_shape(build(EVERY_PARAMETER[1]).init, jax.random.key(0))
    placed = shardings(params, models.RULES, mesh)
    state = jax.eval_shape(update.build(10, params).init, params)
    found = follow(state, params, placed, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    of = {
        path: (x.shape, s) for path, x, s in zip(tree.paths(params), *map(jax.tree.leaves, (params, placed)))
    }
    followed = set()
    for path, x, sharding in zip(tree.paths(state), jax.tree.leaves(state), jax.tree.leaves(found)):
        owner = max((p for p in of if path.endswith("/" + p)), key=len, default=None)
        if owner and x.shape == of[owner][0]:
            assert sharding == of[owner][1], path
            followed.add(owner)
        else:
            assert sharding == NamedSharding(mesh, P()) and x.size <= 8 * 16 * 2, path
    if not isinstance(update, optim.Adafactor):
        assert followed == set(of)


def test_follow_takes_the_longest_path_and_its_shape():
    mesh = MeshConfig(2, 2, 2).build()
    params = shapes({"w": (4, 8), "a": {"w": (4, 8)}})
    placed = {"w": NamedSharding(mesh, P("fsdp")), "a": {"w": NamedSharding(mesh, P("tensor"))}}
    state = {"mu": params, "row": shapes({"a": {"w": (8,)}}), "count": shapes({"n": ()})}
    found = specs(follow(state, params, placed, mesh))
    assert found == {"count/n": P(), "mu/w": P("fsdp"), "mu/a/w": P("tensor"), "row/a/w": P()}


def test_one_size_may_be_what_is_left():
    assert dict(MeshConfig().build().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(MeshConfig(2, -1, 2).build().shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(MeshConfig(1, 1, -1).build(jax.devices()[:3]).shape) == {"data": 1, "fsdp": 1, "tensor": 3}
    assert list(MeshConfig(2, 2, 2).build().devices.flat) == jax.devices()


@pytest.mark.parametrize(
    "make, told",
    [
        (
            lambda: MeshConfig(3).build(),
            "data=3 x fsdp=1 x tensor=1 does not fill 8 devices; set one of them to -1",
        ),
        (lambda: MeshConfig(-1, 16).build(), "data=-1 x fsdp=16 x tensor=1 does not fill 8 devices"),
        (lambda: MeshConfig(-1, 3).build(), "does not fill 8 devices"),
        (lambda: MeshConfig(0), "sizes must be 1 or more"),
        (lambda: MeshConfig(-1, -1), "at most one of them -1"),
        (lambda: MeshConfig(4, 2, pmap=True), "pmap splits data only; use fsdp=1, tensor=1 or pmap=False"),
    ],
)
def test_a_mesh_that_cannot_be_is_told(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    "rows, n_micro, near", [(11, 1, 8), (8, 2, 16), (1, 1, 8), (0, 1, 8), (23, 1, 24), (100, 4, 96)]
)
def test_a_batch_that_does_not_split_names_one_that_does(rows, n_micro, near):
    mesh = MeshConfig(4, 2, 1).build()
    with pytest.raises(ValueError, match=f"batch_size={rows} .*n_micro={n_micro} x 8 devices .*use {near}$"):
        check_batch(rows, n_micro, mesh)
    check_batch(near, n_micro, mesh)
    check_batch(16, 2, MeshConfig(2, 1, 4).build())


def test_a_leaf_is_split_as_its_matrix():
    """The axes of inputs and outputs go with every field, through a transpose and a base."""
    w = quantize(jnp.ones((3, 16, 8)), group_size=4)
    params = {
        "q": LowRank(w, jnp.ones((3, 16, 2)), jnp.ones((3, 2, 8))),
        "embed": Transposed(quantize(jnp.ones((16, 8)))),
    }
    rules = (("q*", ("fsdp", "tensor")), ("embed*", ("tensor", "fsdp")))
    found = shardings(jax.eval_shape(lambda: params), rules, MeshConfig(2, 2, 2).build())
    assert isinstance(found["q"].base, Quantized)
    assert found["q"].base.q.spec == P(None, "tensor", "fsdp") == found["q"].base.scale.spec
    assert (found["q"].a.spec, found["q"].b.spec) == (P(None, "fsdp", None), P(None, None, "tensor"))
    assert found["embed"].base.q.spec == P("tensor", "fsdp")  # [V, D], as the embedding itself
    placed = jax.device_put(params, found)
    assert placed["q"].base.q.sharding.spec == P(None, "tensor", "fsdp")
