"""`step` with a cache equals `apply` over the whole sequence: every position scheme, mask and cut."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmx.models import build
from lmx.models.presets import llama
from lmx.nn import AttentionConfig, MlpConfig, MoeConfig
from lmx.ops.mask import Causal, Full, PrefixLM, SlidingWindow
from lmx.ops.position import NTK, T5, ALiBi, Learned, Linear, Llama3, NoPE, RoPE, Sinusoidal, YaRN

V, T = 23, 12
POSITIONS = [
    NoPE(),
    Learned(16),
    Sinusoidal(),
    RoPE(),
    RoPE(fraction=0.5),
    RoPE(scaling=Linear(2.0)),
    RoPE(scaling=NTK(4.0)),
    RoPE(scaling=YaRN(4.0, 8)),
    RoPE(scaling=Llama3(original_len=8)),
    ALiBi(),
    T5(n_buckets=8, max_distance=8),
]
MASKS = [Causal(), SlidingWindow(3), Causal() & SlidingWindow(5), PrefixLM(4), Full()]
CUTS = {
    "one by one": [1] * T,
    "prompt, then one by one": [5] + [1] * (T - 5),
    "uneven": [4, 3, 1, 4],
    "at once": [T],
}


def first_cut(mask):
    """How many tokens must enter together, because they see each other."""
    return {"PrefixLM": 4, "Full": T}.get(type(mask).__name__, 1)


@functools.cache
def compiled(model):
    return jax.jit(lambda p, t: model.apply(p, {"tokens": t}).logits), jax.jit(model.step)


@functools.cache
def make(position=None, mask=None, **more):
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, mask=mask or Causal())
    more = {"unroll": 1, "mlp": MlpConfig(d_ff=24)} | more
    config = llama(16, 2, 4, vocab_size=V, init_std=0.3, **more)
    config = dataclasses.replace(config, position=position or RoPE(), attention=attention)
    model = build(config)
    return model, jax.jit(model.init)(jax.random.key(1))


def draw(shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def walk(model, params, tokens, cut, length=16):
    step = compiled(model)[1]
    cache, pieces, start = model.new_cache(tokens.shape[0], length), [], 0
    for n in cut:
        out, cache = step(params, cache, tokens[:, start : start + n])
        pieces.append(np.asarray(out.logits))
        start += n
    return np.concatenate(pieces, 1), cache


GRID = [(p, m) for p in POSITIONS for m in MASKS]
QUICK = [(p, m) for p, m in GRID if m == Causal() or p == ALiBi()]
REST = [pytest.param(*pair, marks=pytest.mark.slow) for pair in GRID if pair not in QUICK]


@pytest.mark.parametrize(("position", "mask"), [*QUICK, *REST], ids=repr)
def test_step_equals_apply_at_every_position(position, mask):
    model, params = make(position, mask)
    tokens = draw((2, T))
    want = np.asarray(compiled(model)[0](params, tokens))
    first = first_cut(mask)
    got, cache = walk(model, params, tokens, [first] + [1] * (T - first))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert (np.asarray(cache.length) == T).all()


@pytest.mark.parametrize("name", CUTS)
def test_how_the_tokens_are_cut_changes_nothing(name):
    model, params = make()
    tokens = draw((2, T))
    want = np.asarray(compiled(model)[0](params, tokens))
    np.testing.assert_allclose(walk(model, params, tokens, CUTS[name])[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"placement": "post"},
        {"placement": "sandwich", "scale_embed": True, "logit_softcap": 5.0},
        {"unroll": 2, "remat": "full"},
        {"tie_head": False, "dropout": 0.1},
        {"mlp": MoeConfig(d_ff=24, n_experts=4)},
    ],
    ids=str,
)
def test_every_other_setting_steps_too(more):
    model, params = make(**more)
    tokens = draw((2, T))
    want = np.asarray(compiled(model)[0](params, tokens))
    np.testing.assert_allclose(walk(model, params, tokens, [3] + [1] * 9)[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("position", [RoPE(), Learned(16), ALiBi(), T5(8, 8)], ids=repr)
def test_right_padding_leaves_no_trace(position):
    """Rows of 3, 5 and 1 tokens enter together, padded with junk, then go on together."""
    model, params = make(position)
    tokens, lengths = draw((3, T)), np.array([3, 5, 1])
    apply, step = compiled(model)
    valid = np.arange(5)[None] < lengths[:, None]
    prompt = np.where(valid, tokens[:, :5], 7).astype(np.int32)
    out, cache = step(params, model.new_cache(3, 16), prompt, valid)
    np.testing.assert_array_equal(cache.length, lengths)
    want = np.asarray(apply(params, tokens))
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(out.logits)[b, :n], want[b, :n], rtol=2e-5, atol=2e-5)
    for i in range(6):
        following = tokens[np.arange(3), lengths + i][:, None]
        out, cache = step(params, cache, following)
        np.testing.assert_allclose(
            np.asarray(out.logits)[:, 0], want[np.arange(3), lengths + i], rtol=2e-5, atol=2e-5
        )


def test_a_row_that_pauses_goes_on_as_if_nothing_happened():
    model, params = make()
    tokens = draw((2, T))
    step, want = compiled(model)[1], np.asarray(compiled(model)[0](params, tokens))
    _, cache = step(params, model.new_cache(2, 16), tokens[:, :4])
    for _ in range(3):
        _, cache = step(params, cache, draw((2, 1), 9), np.array([[False], [False]]))
    out, cache = step(params, cache, tokens[:, 4:5], np.array([[True], [False]]))
    np.testing.assert_allclose(np.asarray(out.logits)[0, 0], want[0, 4], rtol=2e-5, atol=2e-5)
    out, _ = step(params, cache, tokens[:, 4:5], np.array([[False], [True]]))
    np.testing.assert_allclose(np.asarray(out.logits)[1, 0], want[1, 4], rtol=2e-5, atol=2e-5)


def test_the_length_of_the_cache_changes_nothing():
    model, params = make()
    tokens = draw((1, T))
    a, _ = walk(model, params, tokens, [4, *[1] * 8], length=12)
    b, _ = walk(model, params, tokens, [4, *[1] * 8], length=64)
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_bfloat16_model_keeps_a_bfloat16_cache_and_steps_alike():
    model, params = make(dtype="bfloat16")
    assert model.new_cache(1, 4).k.dtype == "bfloat16"
    tokens = draw((2, T))
    want = np.asarray(compiled(model)[0](params, tokens))
    got, _ = walk(model, params, tokens, [4, *[1] * 8])
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3)], ids=repr)
def test_as_many_new_tokens_as_slots(mask):
    """Queries and keys are equally many but at different places: paths for whole rows do not apply."""
    model, params = make(mask=mask)
    tokens = draw((2, 8))
    step, want = compiled(model)[1], np.asarray(compiled(model)[0](params, tokens))
    _, cache = step(params, model.new_cache(2, 8), tokens[:, :3])
    padded = np.concatenate([tokens[:, 3:], draw((2, 3), 9)], 1)
    out, cache = step(params, cache, padded, np.broadcast_to(np.arange(8) < 5, (2, 8)))
    np.testing.assert_allclose(np.asarray(out.logits)[:, :5], want[:, 3:], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(cache.length, 8)


@pytest.mark.parametrize("position", [RoPE(), Learned(16), T5(8, 8)], ids=repr)
def test_a_row_that_goes_back_forgets_what_came_after(position):
    """Rows of 7 tokens, of which 2, 7 and 5 stay; the others were junk, and the window reaches over them."""
    model, params = make(position, SlidingWindow(4))
    tokens, lengths = draw((3, T)), np.array([2, 7, 5], np.int32)
    apply, step = compiled(model)
    entered = np.where(np.arange(7) < lengths[:, None], tokens[:, :7], 11).astype(np.int32)
    cache = step(params, model.new_cache(3, 16), entered)[1].rewind(jax.numpy.asarray(lengths))
    np.testing.assert_array_equal(cache.length, lengths)
    want, rows = np.asarray(apply(params, tokens)), np.arange(3)[:, None]
    at = lengths[:, None] + np.arange(3)
    out, cache = step(params, cache, tokens[rows, at])
    np.testing.assert_allclose(np.asarray(out.logits), want[rows, at], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(cache.rewind(jax.numpy.asarray(lengths + 9)).length, lengths + 3)
