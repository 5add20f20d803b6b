"""Keys and values kept as int8 codes: against the float64 model of the rounded ones, and rows that come and go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import tree
from lmx.data import Byte
from lmx.generate import Draft, Memory, Sampling, generate, speculate, stream
from lmx.models import build, unstacked
from lmx.models.presets import llama
from lmx.nn import AttentionConfig, Local, MlpConfig
from lmx.nn.attention import rounded
from lmx.ops.position import T5, RoPE

BYTES = Byte().train(["the byte tokenizer learns nothing"])
PROMPTS = ["a", "नमस्", "", "The quick fox", "The quick brown fox"]
GREEDY = Sampling(temperature=0.0, max_tokens=10)
T = 12
LOCAL = AttentionConfig(n_heads=4, n_kv_heads=2, local=Local(4, "LG"))


@functools.cache
def make(**more):
    config = llama(
        32, 2, 4, n_kv_heads=2, vocab_size=BYTES.vocab_size, init_std=0.3, mlp=MlpConfig(d_ff=24), unroll=1
    )
    config = dataclasses.replace(config, **more)
    return build(config, cache="int8"), build(config), jax.jit(build(config).init)(jax.random.key(3))


def walk(model, params, tokens, cut):
    cache, pieces, start = model.new_cache(tokens.shape[0], 16, params), [], 0
    for n in cut:
        out, cache = jax.jit(model.step)(params, cache, tokens[:, start : start + n])
        pieces.append(np.asarray(out.logits))
        start += n
    return np.concatenate(pieces, 1), cache


def draw(shape, seed=0):
    return np.random.default_rng(seed).integers(0, BYTES.vocab_size, shape).astype(np.int32)


def nearest(x):
    """float64 [T, K, H] on the grid of 256 steps that each token's and head's largest needs, which lies past an end."""
    step = 2 * (1 - 2**-20) * np.abs(x).max(-1, keepdims=True) / 255
    return step * np.clip(np.round(x / step), -128, 127)


def apart(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("form", [lambda x: x, unstacked], ids=["stacked", "unstacked"])
@pytest.mark.parametrize("position", [RoPE(), T5(8, 8)], ids=repr)
@pytest.mark.parametrize("cut", [[1] * T, [5, 3, 1, 3], [T]], ids=str)
def test_step_is_the_float64_model_whose_keys_and_values_are_rounded(form, position, cut):
    """However the tokens are cut: what is kept of one does not depend on those that come later."""
    model, _, params = make(position=position)
    tokens = draw((2, T))
    got, cache = walk(model, form(params), tokens, cut)
    want = numpy_model.logits(params, model.config, tokens, kept=nearest)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    exact = numpy_model.logits(params, model.config, tokens)
    assert 1e-3 < apart(want, exact) < 0.03  # rounding shows, and is small
    assert {x.dtype.name for x in jax.tree.leaves((cache.k, cache.v))} == {"int8"}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-30, 30), spread=st.floats(0, 8))
def test_what_is_kept_lies_within_half_a_step(seed, size, spread):
    rng = np.random.default_rng(seed)
    x = (
        10.0**size * rng.standard_normal((1, 3, 2, 8)) * 10.0 ** rng.uniform(-spread, 0, (1, 3, 2, 8))
    ).astype("f4")
    x[0, 1, 1] = 0
    q, scale = (np.asarray(y, np.float64) for y in rounded(jnp.asarray(x)))
    assert np.abs(q).max() <= 128 and (q[0, 1, 1] == 0).all()
    step = np.maximum(2 * np.abs(np.float64(x)).max(-1, keepdims=True) / 255, np.finfo("f4").tiny)
    assert (np.abs(q * scale - x) <= 0.501 * step).all()


@pytest.mark.parametrize(
    "more", [{}, {"dtype": "bfloat16"}, {"attention": LOCAL}], ids=["float32", "bfloat16", "local"]
)
def test_step_is_near_apply(more):
    """Rounding moves a key by 1/255 of its largest number at most, and logits by a few hundredths of their size."""
    model, _, params = make(**more)
    tokens = draw((2, T))
    want = np.asarray(model.apply(params, {"tokens": jnp.asarray(tokens)}).logits)
    got, _ = walk(model, params, tokens, [4, *[1] * 8])
    assert apart(got, want) < 0.03


def test_a_cache_takes_a_quarter_and_the_scales():
    config = llama(256, 2, 4, n_kv_heads=2, vocab_size=64)  # heads of 64
    for params in (None, {"blocks": ()}):
        small, large = (build(config, cache=kind).new_cache(3, 100, params) for kind in ("int8", "float"))
        kept = [tree.nbytes((c.k, c.v, c.scales)) for c in (small, large)]
        assert kept[0] / kept[1] == (64 + 4) / (4 * 64)


@pytest.mark.parametrize("form", [lambda x: x, unstacked], ids=["stacked", "unstacked"])
def test_rows_that_join_and_share_a_beginning_are_the_prompts_alone(form):
    model, _, params = make()
    prompts = [f"The quick brown fox jumps over {text}" for text in ("", "a", "the lazy dog", "नदी")]
    got = generate(model, form(params), BYTES, prompts, GREEDY, batch_size=2)
    for prompt, completion in zip(prompts, got):
        (alone,) = generate(model, params, BYTES, [prompt], GREEDY)
        assert completion.tokens == alone.tokens
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=5e-3)


def test_a_draft_with_a_small_cache_changes_no_token():
    model, _, params = make()
    want = generate(model, params, BYTES, PROMPTS, GREEDY)
    got, acceptance = speculate(model, params, BYTES, PROMPTS, GREEDY, draft=Draft(model, params, 3))
    assert [c.tokens for c in got] == [c.tokens for c in want] and acceptance.rate > 0.9


def test_parameters_over_a_mesh_give_the_same_tokens():
    model, _, params = make()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))

    def place(x):
        axes = [None] * (x.ndim - 1) + ["fsdp" if x.shape[-1] % 2 == 0 else None]
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    want = generate(model, params, BYTES, PROMPTS, GREEDY)
    got = generate(model, jax.tree.map(place, params), BYTES, PROMPTS, GREEDY)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    on_mesh = build(
        model.config,
        mesh=Mesh(np.array(jax.devices()).reshape(1, 4, 2), ("data", "fsdp", "tensor")),
        cache="int8",
    )
    tokens = draw((4, T))
    got, _ = walk(on_mesh, params, tokens, [5, 1, 6])
    np.testing.assert_allclose(got, walk(model, params, tokens, [5, 1, 6])[0], rtol=1e-3, atol=1e-3)


def test_a_conversation_keeps_its_memory_as_codes():
    model, _, params = make()
    memory, said = Memory(), [BYTES.bos_id]
    for text in ("नमस्ते, hello", " how are you?", "क्ष"):
        said += BYTES.encode(text)
        (want,) = generate(model, params, BYTES, [said], GREEDY)
        pieces = stream(model, params, BYTES, said, GREEDY, memory=memory)
        assert "".join(pieces) == want.text and memory.cache.dtype == "int8"
        said = [*memory.ids, want.tokens[-1]]


def test_a_cache_of_another_kind_is_refused():
    model, plain, params = make()
    tokens = draw((1, 3))
    for one, other, said in ((model, plain, "as float32, and int8"), (plain, model, "as int8, and float32")):
        with pytest.raises(ValueError, match=said):
            one.step(params, other.new_cache(1, 8), tokens)
        with pytest.raises(ValueError, match=said):
            one.new_cache(2, 8).place(other.new_cache(1, 8), jnp.array([1]))
    memory = Memory()
    list(stream(plain, params, BYTES, "one two", GREEDY, memory=memory))
    with pytest.raises(
        ValueError, match=r"keeps keys and values as float32, and int8.*`new_cache` of the model"
    ):
        list(stream(model, params, BYTES, "one two three", GREEDY, memory=memory))
    with pytest.raises(ValueError, match='cache=\'int4\'; use "float" or "int8"'):
        build(model.config, cache="int4")


def test_a_trained_model_writes_mostly_the_same():
    """It is sure of most tokens, which rounding then leaves as they are."""
    text = "नदी 3 नावों को ले जाती है। The quick brown fox jumps over the lazy dog. " * 3
    ids = jnp.asarray([BYTES.encode(text)])
    model, plain, params = make()
    tx = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry

            def loss(params):
                logits = plain.apply(params, {"tokens": ids[:, :-1]}).logits
                return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), None, length=150)
        return params, losses

    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        params, losses = train(params)
    assert losses[-1] < 0.1
    ids = BYTES.encode(text)
    sampling = Sampling(0.0, max_tokens=60)
    each = [generate(m, params, BYTES, [ids[:n] for n in (20, 90)], sampling) for m in (model, plain)]
    a, b = (np.array([c.tokens for c in found]) for found in each)
    assert (a == b).mean() > 0.9
