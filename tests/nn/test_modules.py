"""The modules' own promises: shapes, initial values, dtypes, and what they refuse.

Their formulas are tested in tests/models, against a float64 forward pass of the whole model.
"""

import dataclasses
from math import inf, nan

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import values
from lmx.nn import (
    AttentionConfig,
    Block,
    BlockConfig,
    Context,
    Linear,
    Mlp,
    MlpConfig,
    Norm,
    NormConfig,
    weight,
)
from lmx.ops.attention import attention
from lmx.ops.mask import SlidingWindow, Where
from lmx.ops.position import NoPE
from lmx.tree import paths
from lmx.weights import Transposed, Weight, leaf


@leaf
class Scaled(Weight):
    """scale * base: a matrix whose first field has another shape than the matrix."""

    scale: jax.Array
    base: jax.Array

    @property
    def shape(self):
        return tuple(self.base.shape)

    def dense(self):
        return jnp.broadcast_to(self.scale, self.base.shape) * self.base


def test_linear_is_x_w_plus_b():
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 4), (4, 5), (5,)))
    got = Linear(5, 0.1, bias=True).apply({"params": {"w": w, "b": b}}, x)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_linear_starts_with_the_spread_asked_for_and_no_bias():
    params = Linear(300, 0.05, bias=True).init(jax.random.key(0), jnp.zeros((1, 200)))["params"]
    assert params["w"].shape == (200, 300) and params["w"].dtype == jnp.float32
    assert float(params["w"].std()) == pytest.approx(0.05, rel=0.02)
    assert not params["b"].any()
    assert set(Linear(3, 0.1).init(jax.random.key(0), jnp.zeros((1, 2)))["params"]) == {"w"}


def test_linear_keeps_the_dtype_of_activations_over_float32_weights():
    x = jnp.ones((1, 4), jnp.bfloat16)
    params = Linear(3, 0.1, bias=True).init(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert Linear(3, 0.1, bias=True).apply(params, x).dtype == jnp.bfloat16


def test_a_weight_may_be_any_leaf_of_the_right_shape():
    x, w = jnp.ones((2, 4)), jnp.arange(12.0).reshape(4, 3)
    plain = Linear(3, 0.1).apply({"params": {"w": w}}, x)
    np.testing.assert_allclose(
        Linear(3, 0.1).apply({"params": {"w": Scaled(jnp.full((1, 1), 2.0), w)}}, x), 2 * plain
    )
    np.testing.assert_allclose(Linear(3, 0.1).apply({"params": {"w": Transposed(w.T)}}, x), plain)


def test_a_weight_of_another_shape_is_refused_by_its_path():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Linear(3, 0.1, name="q")(x)

    for wrong in (jnp.zeros((3, 4)), Scaled(jnp.zeros((1, 1)), jnp.zeros((3, 4)))):
        with pytest.raises(ValueError, match=r"q/w has shape \(3, 4\), this model wants \(4, 3\)"):
            Outer().apply({"params": {"q": {"w": wrong}}}, jnp.zeros((1, 4)))


def test_weight_outside_of_a_matrix_product():
    class Table(nn.Module):
        @nn.compact
        def __call__(self):
            return weight(self, "table", nn.initializers.ones, (2, 3))

    assert Table().init(jax.random.key(0))["params"]["table"].shape == (2, 3)
    np.testing.assert_array_equal(Table().apply({"params": {"table": jnp.eye(2, 3)}}), np.eye(2, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [NormConfig(), NormConfig("layer", bias=True), NormConfig("layer", 1e-3)], ids=repr
)
def test_norms_start_with_unit_scale_and_keep_the_dtype(config, dtype):
    x = (5 + 3 * jax.random.normal(jax.random.key(0), (2, 3, 64))).astype(dtype)
    params = Norm(config).init(jax.random.key(0), x)
    assert set(params["params"]) == ({"scale", "bias"} if config.bias else {"scale"})
    y = Norm(config).apply(params, x)
    assert y.dtype == x.dtype
    wide = np.asarray(y, np.float64)
    np.testing.assert_allclose((wide**2).mean(-1), 1, rtol=2e-2)
    if config.kind == "layer":
        np.testing.assert_allclose(wide.mean(-1), 0, atol=2e-2)


def test_feed_forward_widths():
    assert MlpConfig("gelu").width(48) == 192
    assert MlpConfig("swiglu").width(384) == 1024
    assert MlpConfig("geglu").width(100) == 288  # 8/3 of 100 is 266.7
    assert MlpConfig("swiglu", d_ff=50).width(48) == 50
    params = Mlp(MlpConfig("swiglu", bias=True), 0.1, 0.1).init(jax.random.key(0), jnp.zeros((1, 1, 48)))[
        "params"
    ]
    assert {name: p["w"].shape for name, p in params.items()} == {
        "up": (48, 128),
        "gate": (48, 128),
        "down": (128, 48),
    }
    assert set(Mlp(MlpConfig("gelu"), 0.1, 0.1).init(jax.random.key(0), jnp.zeros((1, 1, 8)))["params"]) == {
        "up",
        "down",
    }


def block(config, T=6, D=16, seed=0):
    module = Block(config, NoPE(), attention, 0.1, 0.05)
    places = jnp.arange(T, dtype=jnp.int32)[None]
    context = Context(Where(places, jnp.ones_like(places)), {})
    x = jax.random.normal(jax.random.key(seed), (1, T, D))
    params = module.init(jax.random.key(1), (x, None), jnp.int32(0), context)["params"]
    return params, lambda p: module.apply({"params": p}, (x, None), jnp.int32(0), context)[0][0], x


@pytest.mark.parametrize(
    ("n_kv_heads", "head_dim", "widths"), [(None, None, (16, 16)), (2, None, (16, 8)), (1, 6, (24, 6))]
)
def test_grouped_heads_shape_the_matrices(n_kv_heads, head_dim, widths):
    attn = AttentionConfig(
        n_heads=4, n_kv_heads=n_kv_heads, head_dim=head_dim, qk_norm=True, bias=True, out_bias=True
    )
    params, run, x = block(BlockConfig(attention=attn))
    q, kv = widths
    shapes = {name: p["w"].shape for name, p in params["attn"].items() if "w" in p}
    assert shapes == {"q": (16, q), "k": (16, kv), "v": (16, kv), "o": (q, 16)}
    assert params["attn"]["q_norm"]["scale"].shape == (head_dim or 4,)
    assert run(params).shape == x.shape


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_blocks_without_sublayers_are_the_residual_stream(placement):
    """With zero output matrices only the residual stream is left, and in the post arrangement its norm."""
    params, run, x = block(BlockConfig(placement=placement))
    names = {"attn_norm", "mlp_norm", *(("attn_norm_out", "mlp_norm_out") if placement == "sandwich" else ())}
    assert set(params) == {"attn", "mlp", *names}
    params["attn"]["o"]["w"] *= 0
    params["mlp"]["down"]["w"] *= 0
    want = np.asarray(x, np.float64)
    if placement == "post":
        want = want / np.sqrt((want**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(run(params), want, rtol=1e-4, atol=1e-5)


def test_module_names_make_the_documented_paths():
    params, _, _ = block(BlockConfig())
    assert (
        "attn/q/w" in paths(params) and "mlp/gate/w" in paths(params) and "attn_norm/scale" in paths(params)
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: AttentionConfig(n_heads=12, n_kv_heads=5),
            "not a multiple of n_kv_heads=5; use 1, 2, 3, 4, 6, 12",
        ),
        (lambda: AttentionConfig(n_heads=4, n_kv_heads=0), "n_kv_heads=0"),
        (lambda: AttentionConfig(n_heads=0), "n_heads=0"),
        (
            lambda: AttentionConfig(n_heads=3).width(16),
            "d_model=16 is not a multiple of n_heads=3; set head_dim",
        ),
        (lambda: NormConfig("batch"), "kind='batch'"),
        (lambda: NormConfig("rms", bias=True), "RMSNorm has no shift"),
        (lambda: MlpConfig("tanh"), "activation='tanh'; use gelu"),
        *(
            (lambda kind=kind, name=name, x=x: kind(**{name: x}), f"{kind.__name__}: {name}={x} is not in ")
            for kind, name, wrong in (
                (AttentionConfig, "head_dim", (0, -8)),
                (AttentionConfig, "softcap", (0.0, -1.0, inf, nan)),
                (AttentionConfig, "scale", (0.0, -1.0, inf, nan)),
                (MlpConfig, "d_ff", (0, -8)),
                (NormConfig, "eps", (-1e-6, inf, nan)),
            )
            for x in wrong
        ),
        (lambda: BlockConfig(placement="both"), "placement='both'"),
        (lambda: BlockConfig(dropout=1.0), r"dropout=1.0 must lie in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused_when_written(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_configs_rebuild_from_their_repr():
    config = BlockConfig(
        AttentionConfig(8, 2, mask=SlidingWindow(4)), MlpConfig("geglu", 7), NormConfig("layer"), "post", 0.1
    )
    assert values.parse(repr(config), BlockConfig) == config
    assert dataclasses.replace(config, dropout=0.0) != config
