"""How near a model stays to another, against float64 written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.evals import agreement
from lmx.models import TransformerConfig, build
from lmx.nn import AttentionConfig, MlpConfig

MODEL = build(
    TransformerConfig(
        vocab_size=30, d_model=16, n_layers=1, attention=AttentionConfig(2), mlp=MlpConfig(d_ff=16)
    )
)


def models():
    params = jax.tree.map(lambda x: x * 8, MODEL.init(jax.random.key(0)))
    other = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return params, other


@pytest.mark.parametrize("length", [2, 70, 300])
def test_figures_are_those_of_float64(length):
    tokens = np.random.default_rng(0).integers(0, 30, (5, length)).astype(np.int32)
    params, other = models()
    found = agreement(MODEL, params, other, tokens)
    p, q = (
        np.asarray(
            jax.nn.log_softmax(MODEL.apply(x, {"tokens": jnp.asarray(tokens[:, :-1])}).logits), np.float64
        )
        for x in (params, other)
    )
    label = tokens[:, 1:, None]
    nats = [-np.take_along_axis(x, label, -1).mean() for x in (p, q)]
    assert found.n_tokens == 5 * (length - 1)
    np.testing.assert_allclose(found.perplexity.value, np.exp(nats[1]), rtol=1e-4)
    np.testing.assert_allclose(found.ratio.value, np.exp(nats[1] - nats[0]), rtol=1e-4)
    np.testing.assert_allclose(found.kl.value, (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-3)
    np.testing.assert_allclose(found.top1.value, (p.argmax(-1) == q.argmax(-1)).mean(), atol=1e-6)
    assert found.kl.low < found.kl.value < found.kl.high


def test_a_model_agrees_with_itself_and_one_window_has_no_interval():
    params, _ = models()
    found = agreement(MODEL, params, params, np.arange(20, dtype=np.int32)[None])
    assert (found.kl.value, found.top1.value, found.ratio.value) == (0.0, 1.0, 1.0)
    assert np.isnan(found.kl.low)


def test_numbers_that_are_not_finite_are_refused():
    params, other = models()
    other["norm"]["scale"] = other["norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="window 0 gives numbers not finite"):
        agreement(MODEL, params, other, np.zeros((2, 9), np.int32))
