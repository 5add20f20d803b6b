"""The whole model: against float64 numpy, and the properties every setting keeps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import tree, values
from lmx.models import PRESETS, TransformerConfig, build, flops_per_token, n_params, preset
from lmx.models.presets import gpt2, llama
from lmx.models.transformer import Transformer
from lmx.nn import AttentionConfig, MlpConfig, MoeConfig, NormConfig
from lmx.ops.mask import Causal, Full, PrefixLM, SlidingWindow, Where
from lmx.ops.position import T5, ALiBi, Learned, NoPE, RoPE, Sinusoidal

V = 23
LLAMA = llama(16, 2, 4, n_kv_heads=2, vocab_size=V, init_std=0.2)
SMALL = {
    "llama": LLAMA,
    "gpt2": gpt2(16, 2, 4, max_len=32, vocab_size=V, init_std=0.2),
    "gemma": dataclasses.replace(
        LLAMA,
        placement="sandwich",
        mlp=MlpConfig("geglu", d_ff=24),
        attention=AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=6, softcap=2.0, qk_norm=True),
        logit_softcap=3.0,
        scale_embed=True,
    ),
    "post": dataclasses.replace(
        LLAMA,
        placement="post",
        position=Sinusoidal(),
        tie_head=False,
        mlp=MlpConfig("relu_squared", bias=True),
    ),
    "scaled": dataclasses.replace(LLAMA, position=Sinusoidal(), scale_embed=True),
    "alibi": dataclasses.replace(LLAMA, position=ALiBi(), mlp=MlpConfig("silu")),
    "t5": dataclasses.replace(
        LLAMA, position=T5(n_buckets=8, max_distance=10), attention=AttentionConfig(n_heads=4, scale=1.0)
    ),
    "nope": dataclasses.replace(
        LLAMA, position=NoPE(), norm=NormConfig("layer"), mlp=MlpConfig("gelu_exact")
    ),
    "window": dataclasses.replace(LLAMA, attention=AttentionConfig(n_heads=4, mask=SlidingWindow(3))),
    "full": dataclasses.replace(LLAMA, attention=AttentionConfig(n_heads=2, mask=Full())),
    "moe": dataclasses.replace(LLAMA, mlp=MoeConfig(d_ff=12, n_experts=4, top_k=2)),
    "moe, plain": dataclasses.replace(
        LLAMA, mlp=MoeConfig("gelu", d_ff=12, n_experts=3, top_k=1, renormalise=False), placement="sandwich"
    ),
    "prefix": dataclasses.replace(LLAMA, attention=AttentionConfig(n_heads=2, mask=PrefixLM(4), bias=True)),
}
CAUSAL = [name for name in SMALL if name not in ("full", "prefix")]


def make(config, seed=0):
    """A model and its parameters, every one of which is away from its starting value."""
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def draw(shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def some(shape, seed=0):
    return {"tokens": jnp.asarray(draw(shape, seed))}


def forward(model, params, **batch):
    return np.asarray(jax.jit(lambda p, b: model.apply(p, b).logits)(params, batch))


@pytest.mark.parametrize("name", SMALL)
def test_logits_equal_a_float64_forward_pass(name):
    model, params = make(SMALL[name])
    tokens = draw((2, 11))
    got = forward(model, params, tokens=tokens)
    want = numpy_model.logits(params, SMALL[name], tokens)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def packed():
    """Segments of 5, 3 and 4 tokens in one row of 16, padded; another row cut differently."""
    positions = [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 0, 0, 0], [*range(9), *range(7)]]
    segments = [[1] * 5 + [2] * 3 + [3] * 4 + [0] * 4, [1] * 9 + [2] * 7]
    return draw((2, 16)), np.array(positions, np.int32), np.array(segments, np.int32)


@pytest.mark.parametrize("name", SMALL)
def test_packing_and_padding_change_nothing(name):
    model, params = make(SMALL[name])
    tokens, positions, segments = packed()
    got = forward(model, params, tokens=tokens, positions=positions, segment_ids=segments)
    for b in range(2):
        for segment in range(1, segments[b].max() + 1):
            here = segments[b] == segment
            alone = numpy_model.logits(params, SMALL[name], tokens[b : b + 1, here])[0]
            np.testing.assert_allclose(got[b, here], alone, rtol=2e-5, atol=2e-5 * np.abs(alone).max())
    other = np.where(segments == 0, (tokens + 1) % V, tokens)
    again = forward(model, params, tokens=other, positions=positions, segment_ids=segments)
    np.testing.assert_array_equal(got[segments > 0], again[segments > 0])
    assert np.isfinite(got).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_no_logit_depends_on_a_later_token(name):
    model, params = make(SMALL[name])
    tokens = draw((1, 12))
    before = forward(model, params, tokens=tokens)
    for t in (1, 6, 11):
        changed = tokens.copy()
        changed[0, t:] = (changed[0, t:] + 1 + draw(12 - t, seed=t) % (V - 1)) % V
        after = forward(model, params, tokens=changed)
        np.testing.assert_array_equal(before[0, :t], after[0, :t])
        assert np.abs(before[0, t] - after[0, t]).max() > 1e-3


def test_a_prefix_sees_itself_and_nothing_after():
    model, params = make(SMALL["prefix"])
    tokens = draw((1, 10))
    before = forward(model, params, tokens=tokens)
    inside, outside = tokens.copy(), tokens.copy()
    inside[0, 3] = (inside[0, 3] + 1) % V
    outside[0, 4] = (outside[0, 4] + 1) % V
    assert np.abs(forward(model, params, tokens=inside)[0, 0] - before[0, 0]).max() > 1e-3
    np.testing.assert_array_equal(forward(model, params, tokens=outside)[0, :4], before[0, :4])


def test_zero_weights_cost_log_v_per_token():
    model, params = make(SMALL["post"])
    zero = jax.tree.map(jnp.zeros_like, params)
    log_p = jax.nn.log_softmax(forward(model, zero, tokens=draw((1, 8))))
    np.testing.assert_allclose(log_p, -math.log(V), rtol=1e-6)


@functools.cache
def value_and_grad(config):
    model, params = make(config)

    def loss(p):
        return jax.nn.log_softmax(model.apply(p, some((2, 8))).logits)[:, :, 0].sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("name", ["llama", "moe"])
@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 1}, {"unroll": 2}], ids=str
)
def test_remat_and_unroll_change_neither_values_nor_gradients(change, name):
    config = SMALL[name]
    (a, grads_a), (b, grads_b) = value_and_grad(config), value_and_grad(dataclasses.replace(config, **change))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), grads_a, grads_b)


def test_remat_holds_less_of_a_deep_model():
    """Temporary bytes of the gradients, by the compiler, on a CPU, which would take all layers together without it."""

    def temporary_bytes(remat):
        model = build(llama(64, 8, 4, vocab_size=V, remat=remat))
        params = jax.eval_shape(model.init, jax.random.key(0))
        grads = jax.jit(jax.grad(lambda p, tokens: model.apply(p, {"tokens": tokens}).logits.sum()))
        compiled = grads.lower(params, jax.ShapeDtypeStruct((4, 128), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = map(temporary_bytes, ("none", "dots", "full"))
    assert full < dots < none and full < none / 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gemma", "post", "moe"])
def test_gradients_equal_differences(name):
    """d loss / d step along the gradient itself, by central differences."""
    model, params = make(SMALL[name])
    batch = some((2, 8))
    loss = jax.jit(lambda p: jnp.mean(jax.nn.log_softmax(model.apply(p, batch).logits)[:, :, 1]))
    grads = jax.jit(jax.grad(loss))(params)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))

    def move(h):
        return jax.tree.map(lambda x, g: x + h * g / norm, params, grads)

    h = 1e-2
    slope = (float(loss(move(h))) - float(loss(move(-h)))) / (2 * h)
    assert slope == pytest.approx(norm, rel=2e-2)


def test_dropout_needs_a_key_and_depends_on_it():
    config = dataclasses.replace(LLAMA, dropout=0.5)
    model, params = make(config)
    plain, _ = make(LLAMA)
    batch = some((2, 8))

    def run(m, *key):
        return np.asarray(jax.jit(m.apply)(params, batch, *key).hidden)

    np.testing.assert_array_equal(run(model), run(plain))
    np.testing.assert_array_equal(run(model, jax.random.key(1)), run(model, jax.random.key(1)))
    assert np.abs(run(model, jax.random.key(1)) - run(model, jax.random.key(2))).max() > 1e-2
    np.testing.assert_array_equal(run(plain, jax.random.key(1)), run(plain))


def test_embeddings_are_dropped_too():
    """With blocks that add nothing, entries of the hidden states are zero where the embedding was dropped."""
    model = build(dataclasses.replace(LLAMA, dropout=0.5))
    params = jax.jit(model.init)(jax.random.key(0))
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    hidden = model.apply(params, some((4, 32)), jax.random.key(1)).hidden
    assert 0.4 < float((hidden == 0).mean()) < 0.6


def test_noise_on_embeddings_is_as_wide_as_the_length_of_each_segment_says():
    """Jain et al. 2023, algorithm 1: uniform in +-a / sqrt(L d), here with L of the segment; only with a key."""
    D, a = LLAMA.d_model, 5.0
    lengths = (40, 8, 16)
    ids = np.repeat([1, 2, 3], lengths)[None].repeat(64, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(64, 0).astype(np.int32)
    batch = some(ids.shape) | {"positions": jnp.array(positions), "segment_ids": jnp.array(ids)}
    _, params = make(LLAMA)

    def entered(config, **rngs):
        module = Transformer(config, None, lambda x, *axes: x, 1, deterministic=not rngs)
        where = Where(batch["positions"], batch["segment_ids"])
        return module.apply({"params": params}, batch["tokens"], where, only="enter", rngs=rngs)

    noisy = dataclasses.replace(LLAMA, embed_noise=a)
    plain = entered(LLAMA)
    np.testing.assert_array_equal(entered(noisy), plain)
    noise = np.asarray(entered(noisy, dropout=jax.random.key(1)) - plain)
    for segment, length in enumerate(lengths, 1):
        here, bound = noise[ids == segment], a / (length * D) ** 0.5
        assert 0.99 * bound < np.abs(here).max() <= bound * 1.0001
        assert here.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert abs(here.mean()) < 5 * here.std() / here.size**0.5
    model = build(noisy)
    with_key = [np.asarray(model.apply(params, batch, jax.random.key(i)).hidden) for i in (1, 2)]
    assert np.abs(with_key[0] - with_key[1]).max() > 1e-2
    np.testing.assert_array_equal(model.apply(params, batch).hidden, build(LLAMA).apply(params, batch).hidden)


def test_dropout_differs_between_layers():
    """Each of two layers adds a constant that dropout doubles or removes: twice, once and never all occur."""
    model, params = make(dataclasses.replace(LLAMA, dropout=0.5, mlp=MlpConfig("silu", bias=True)))
    params = jax.tree.map(jnp.zeros_like, params)
    params["blocks"]["mlp"]["down"]["b"] += 1.0
    params["norm"]["scale"] += 1.0
    hidden = np.asarray(jax.jit(model.apply)(params, some((1, 2)), jax.random.key(0)).hidden)[0]
    levels = np.unique(np.round(hidden / hidden.max(-1, keepdims=True), 4))
    np.testing.assert_array_equal(levels, [0, 0.5, 1])


def test_initial_spread_follows_init_std():
    config = llama(128, 2, 4, vocab_size=512, tie_head=False)
    params = build(config).init(jax.random.key(0))
    spread = {path: float(x.std()) for path, x in zip(tree.paths(params), jax.tree.leaves(params))}
    for path, std in spread.items():
        if path.endswith("scale"):
            assert std == 0
        elif path in ("blocks/attn/o/w", "blocks/mlp/down/w"):
            assert std == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.02)
        else:
            assert std == pytest.approx(0.02, rel=0.02)
    q = np.asarray(params["blocks"]["attn"]["q"]["w"])
    assert abs(np.corrcoef(q[0].ravel(), q[1].ravel())[0, 1]) < 0.05


def test_published_parameter_counts():
    """GPT-2 small has 124,439,808 parameters (HF gpt2), Llama 2 7B 6,738,415,616."""

    def count(config):
        return tree.count(jax.eval_shape(build(config).init, jax.random.key(0)))

    assert count(preset("gpt2-124m")) == 124_439_808
    assert count(dataclasses.replace(preset("7b"), mlp=MlpConfig(d_ff=11008))) == 6_738_415_616


def test_published_counts_of_mixtures_of_experts():
    """Mixtral 8x7B has 46,702,792,704 parameters, 12.9B active; Qwen3-30B-A3B 30,532,122,624, 3.3B active."""
    mixtral = llama(
        4096, 32, 32, n_kv_heads=8, vocab_size=32000, tie_head=False, mlp=MoeConfig(d_ff=14336, n_experts=8)
    )
    qwen = dataclasses.replace(
        llama(2048, 48, 32, vocab_size=151936, tie_head=False),
        attention=AttentionConfig(32, 4, head_dim=128, qk_norm=True),
        mlp=MoeConfig(d_ff=768, n_experts=128, top_k=8),
    )
    (everything, active), (everything_too, active_too) = n_params(mixtral), n_params(qwen)
    assert everything == 46_702_792_704 and active == pytest.approx(12.9e9, rel=0.02)
    assert everything_too == 30_532_122_624 and active_too == pytest.approx(3.3e9, rel=0.02)
    assert n_params(LLAMA)[0] == n_params(LLAMA)[1]


def test_routing_leaves_the_scan_by_layer_and_is_none_without_experts():
    """The first layer's logits are those of its input; every layer has its own."""
    _, params = make(SMALL["moe"])
    params["blocks"]["attn"]["o"]["w"] *= 0
    x, block = params["embed"][draw((2, 8))], jax.tree.map(lambda p: p[0], params["blocks"])
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * block["mlp_norm"]["scale"][None, None]
    want = x @ block["mlp"]["router"]["w"]
    for unroll in (1, 2):
        model = build(dataclasses.replace(SMALL["moe"], unroll=unroll))
        routing = jax.jit(model.apply)(params, some((2, 8))).routing
        assert routing.logits.shape == (2, 2, 8, 4) and routing.top_k == 2
        np.testing.assert_allclose(routing.logits[0], want, rtol=1e-4, atol=1e-5)
        assert np.abs(routing.logits[1] - want).max() > 0.1
    model, params = make(LLAMA)
    assert model.apply(params, some((1, 2))).routing is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_values(name):
    config = preset(name)
    assert values.parse(values.show(config), TransformerConfig) == config


def test_flops_are_six_per_matrix_weight_and_token():
    config = llama(32, 3, 4, n_kv_heads=2, vocab_size=64, tie_head=False)
    params = jax.eval_shape(build(config).init, jax.random.key(0))
    matrices = sum(
        x.size
        for path, x in zip(tree.paths(params), jax.tree.leaves(params))
        if path.endswith("/w") or path == "head"
    )
    attention = 12 * config.n_layers * 32 * 100  # n_heads * head_dim = 32
    assert flops_per_token(config, 100) == 6 * matrices + attention


def test_flops_count_the_experts_that_a_token_goes_to():
    experts = llama(32, 3, 4, vocab_size=64, mlp=MoeConfig(d_ff=24, n_experts=16, top_k=2))
    wide = dataclasses.replace(experts, mlp=MlpConfig(d_ff=48))
    assert flops_per_token(experts, 100) == flops_per_token(wide, 100) + 6 * 3 * 32 * 16


def test_activations_have_the_dtype_asked_for_and_logits_are_float32():
    model, params = make(dataclasses.replace(LLAMA, dtype="bfloat16"))
    exact, _ = make(LLAMA)
    out = model.apply(params, some((2, 8)))
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    want = np.asarray(exact.apply(params, some((2, 8))).logits)
    assert np.abs(out.logits - want).max() < 0.05 * np.abs(want).max()


def test_logits_are_not_rounded_to_bfloat16():
    model, params = make(dataclasses.replace(LLAMA, dtype="bfloat16"))
    logits = model.apply(params, some((2, 8))).logits
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(logits != rounded)) > 0.5


def test_a_mesh_changes_no_value():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    model, params = make(LLAMA)
    tokens = draw((8, 8))
    on_mesh = build(LLAMA, mesh=mesh)
    spread = jax.device_put(params, NamedSharding(mesh, P()))
    got = jax.jit(lambda p, t: on_mesh.apply(p, {"tokens": t}).logits)(spread, tokens)
    np.testing.assert_allclose(got, forward(model, params, tokens=tokens), rtol=1e-5, atol=1e-5)


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match="vocab_size=None"):
        build(llama(16, 1, 2))
    with pytest.raises(ValueError, match="d_model=15"):
        llama(15, 1, 2, vocab_size=4)
    with pytest.raises(ValueError, match="remat='half'"):
        dataclasses.replace(LLAMA, remat="half")
    for name, wrong in {
        "d_model": (0,),
        "n_layers": (0,),
        "vocab_size": (0,),
        "unroll": (0, -1),
        "logit_softcap": (0.0, -1.0, math.inf, math.nan),
        "init_std": (-0.02, math.inf, math.nan),
    }.items():
        for value in wrong:
            with pytest.raises(ValueError, match=f"TransformerConfig: {name}={value} is not in "):
                dataclasses.replace(LLAMA, **{name: value})
    with pytest.raises(ValueError, match="no preset 'gpt5'"):
        preset("gpt5")
    model, params = make(dataclasses.replace(LLAMA, position=Learned(8)))
    with pytest.raises(ValueError, match="9"):
        model.apply(params, some((1, 9)))
    with pytest.raises(ValueError, match="9"):
        model.new_cache(1, 9)


def test_configs_rebuild_from_their_repr():
    for config in SMALL.values():
        assert values.parse(repr(config), TransformerConfig) == config
    assert RoPE() == LLAMA.position and Causal() == LLAMA.attention.mask
