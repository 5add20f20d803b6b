"""The count of FLOPs against XLA's own, of the loss and its gradients in a program without loops.

XLA also counts what is elementwise, of which there is about one part in D; scores above the diagonal are computed and
counted by both.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lmx.losses import NextToken
from lmx.models import TransformerConfig, build, flops_per_token
from lmx.nn import AttentionConfig, MlpConfig

B, T = 2, 256
BASE = TransformerConfig(
    vocab_size=2048,
    d_model=512,
    n_layers=2,
    attention=AttentionConfig(n_heads=4, impl="reference"),
    tie_head=False,
    unroll=2,
)


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(BASE, tie_head=True, mlp=MlpConfig("gelu", d_ff=1024)),
        replace(BASE, attention=AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=96, impl="reference")),
    ],
    ids=["gated", "tied, plain", "grouped, wide heads"],
)
def test_flops_agree_with_the_compiler(config):
    apply = build(config, platform="cpu").apply
    batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in ("tokens", "labels")}

    def loss(params, batch):
        return NextToken()(apply(params, batch), batch).mean()

    params = jax.eval_shape(build(config).init, jax.random.key(0))
    counted = jax.jit(jax.grad(loss)).lower(params, batch).cost_analysis()["flops"]
    assert counted == pytest.approx(B * T * flops_per_token(config, T), rel=0.03)
