"""Quantization that looks at inputs, against float64 written from the papers, and what it may never do."""

from dataclasses import replace
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import CONFIG, KEY, TOKENS, fresh, logits, moved

from lmx.adapt import (
    W8A8,
    Awq,
    Dense,
    Gptq,
    Int4,
    Int8,
    Lora,
    Merge,
    Nf4,
    Prune,
    Quantize,
    Rotate,
    Rounded,
    Smooth,
    Unstack,
    calibrate,
    importance,
)
from lmx.adapt.gptq import gptq, lost
from lmx.adapt.matrices import found
from lmx.models import build, layers, unstacked
from lmx.nn import Inputs, MoeConfig
from lmx.weights import LowRank, Masked, Quantized, Rotated, Scaled, dense

LAYERS = layers(CONFIG)
MIXTURE = build(replace(CONFIG, mlp=MoeConfig(d_ff=24, n_experts=4)))
MANY = jax.random.randint(jax.random.key(3), (16, 24), 0, 40)


def correlated(seed, n, d):
    """Inputs of which a few directions carry most, as those of a trained model."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * np.exp(-np.arange(d) / 6)[:, None])


def by_paper(w, gram, bits, size, symmetric, act_order, damp, clip):
    """GPTQ in float64, a row at a time, without blocks. w [d_in, d_out]; returns the rounded matrix."""
    w, H, n = w.astype(np.float64).copy(), gram.astype(np.float64).copy(), len(w)
    dead = np.diag(H) <= 0
    H[dead, dead] += 1
    w[dead] = 0
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(n)
    w, H = w[order], H[order][:, order]
    H += damp * np.diag(H).mean() * np.eye(n)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    out = np.zeros_like(w)
    for i in range(n):
        if i % size == 0:
            group = w[i : i + size]
            grids = [grid(group * (1 - share / 50), bits, symmetric) for share in range(20 if clip else 1)]
            off = np.stack([((nearest(group, *g, bits) - group) ** 2).sum(0) for g in grids])
            best = off.argmin(0), np.arange(w.shape[1])
            scale, zero = (
                np.stack([np.broadcast_to(g[k], best[1].shape) for g in grids])[best] for k in (0, 1)
            )
        out[i] = nearest(w[i], scale, zero, bits)
        w[i + 1 :] -= np.outer(U[i, i + 1 :], (w[i] - out[i]) / U[i, i])
    return out[np.argsort(order)]


def grid(group, bits, symmetric):
    """(scale, zero) of each column in float64."""
    lo, hi, top = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0), 2**bits - 1
    if symmetric:
        return 2 * (1 - 2.0**-20) * np.maximum(-lo, hi) / top, 2.0 ** (bits - 1)
    return (hi - lo) / top, np.round(-lo / ((hi - lo) / top))


def nearest(w, scale, zero, bits):
    return (np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize(
    ("d_in", "size", "bits", "symmetric", "act_order", "clip"),
    [
        (48, 16, 4, True, False, False),
        (48, 16, 3, False, True, True),
        (72, 32, 2, True, True, True),
        (72, 32, 2, False, True, False),
        (300, 300, 4, True, False, True),
    ],
)
def test_gptq_is_the_papers(d_in, size, bits, symmetric, act_order, clip):
    """Where float32 rounds a tie the other way the rows after it differ too, hence the share and not every number."""
    x = correlated(1, 400, d_in)
    w = np.random.default_rng(2).normal(size=(d_in, 24))
    gram = x.T @ x / 400
    found = Gptq(bits, size, act_order, 0.01, symmetric, "float32", clip).of(
        jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32)
    )
    want = by_paper(w, gram, bits, size, symmetric, act_order, 0.01, clip)
    same = np.isclose(dense(found), want, atol=1e-3).mean(0)
    assert np.median(same) == 1.0 and same.mean() > 0.8
    mine, theirs = (float(np.linalg.norm(x @ (w - np.asarray(q)))) for q in (dense(found), want))
    assert abs(mine / theirs - 1) < 0.05


@given(
    seed=st.integers(0, 99), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans(), act_order=st.booleans()
)
def test_gptq_loses_a_third_of_what_rounding_loses_on_correlated_inputs(seed, bits, symmetric, act_order):
    x = correlated(seed, 200, 64)
    w = jnp.asarray(np.random.default_rng(seed + 1).normal(size=(64, 24)), jnp.float32)
    gram = jnp.asarray(x.T @ x, jnp.float32)
    plain = Quantize(bits, 32, symmetric).of(w)
    found = Gptq(bits, 32, act_order, symmetric=symmetric).of(w, gram)
    limit = 1.0 if bits == 2 else 1 / 3
    assert float(lost(w, dense(found), gram)) < limit * float(lost(w, dense(plain), gram))


def test_clipped_ranges_lose_less_than_whole_ones_at_few_bits():
    w = jax.random.normal(KEY, (64, 256))
    x = jnp.asarray(correlated(1, 200, 64), jnp.float32)
    whole, clipped = (
        float(lost(w, dense(Gptq(3, 32, clip=clip).of(w, x.T @ x)), x.T @ x)) for clip in (False, True)
    )
    assert clipped < 0.95 * whole


def test_uncorrelated_inputs_leave_plain_rounding():
    w = jax.random.normal(KEY, (64, 24))
    found = Gptq(4, 32, act_order=False, clip=False).of(w, jnp.eye(64) * 7)
    np.testing.assert_array_equal(dense(found), dense(Quantize(4, 32).of(w)))


def test_inputs_that_are_always_zero_and_grams_without_a_factor():
    w = jax.random.normal(KEY, (64, 24))
    x = jax.random.normal(jax.random.key(1), (5, 64)).at[:, 7].set(0.0)
    found = gptq(
        w, x.T @ x, bits=4, group_size=32, symmetric=True, act_order=True, damp=1e-9, scale_dtype="float32"
    )
    assert float(found.damp) > 1e-9  # rank 5 of 64
    made = dense(Gptq(4, 32, damp=1e-6).of(w, x.T @ x))
    assert np.isfinite(made).all() and (np.asarray(made[7]) == 0).all()


METHODS = {
    "gptq": Gptq(4, 16),
    "gptq 3 bits affine": Gptq(3, 16, False, symmetric=False),
    "rounded": Rounded(Int4(group_size=16)),
    "w8a8": Rounded(W8A8()),
    "w8a8 calibrated": Rounded(W8A8(), calibrated=True),
    "smooth w8a8": Smooth(then=Rounded(W8A8())),
    "awq": Awq(Int4(group_size=16), Rounded(Int4(group_size=16)), steps=5),
    "awq gptq": Awq(Int4(group_size=16), Gptq(4, 16), steps=5),
    "nf4": Rounded(Nf4(16)),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_gives_a_model_near_to_what_it_was(name):
    done = []
    found = calibrate(LAYERS, fresh(), MANY, METHODS[name], seen=lambda *at: done.append(at))
    assert done == [(1, 2), (2, 2)] and len(found.lost) == 14
    assert not isinstance(found.params["blocks"], tuple)
    kl = divergence(found.params)
    assert 0 < kl < (0.05 if "8" in name else 0.7)
    if "w8a8" not in name:
        np.testing.assert_allclose(logits(found.params), logits(Dense()(found.params, KEY)), atol=1e-3)


def divergence(params):
    p, q = (jax.nn.log_softmax(logits(x, MANY)) for x in (fresh(), params))
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


def test_the_order_of_methods_is_as_published():
    kl = {
        name: divergence(calibrate(LAYERS, fresh(), MANY, METHODS[name]).params)
        for name in ("rounded", "gptq")
    }
    assert kl["gptq"] < kl["rounded"]
    shares = [calibrate(LAYERS, fresh(), MANY, METHODS[name]).lost for name in ("rounded", "gptq", "awq")]
    total = [sum(x.values()) for x in shares]
    assert total[1] < total[0] and total[2] < total[0]


def test_matrices_see_what_those_before_them_have_become():
    """The second stage's inputs are those of a model whose first stage is quantized already."""
    seen: list[tuple[str, Inputs]] = []

    def spy(matrices, inputs):
        seen.append((min(matrices), inputs))
        return Rounded(Quantize(2, 16))(matrices, inputs)

    found = calibrate(LAYERS, fresh(), MANY, spy)
    assert [name for name, _ in seen[:4]] == ["attn/k/w", "attn/o/w", "mlp/gate/w", "mlp/down/w"]
    apart = unstacked_layers(found.params)
    x = LAYERS.enter(fresh(), MANY)
    stats = LAYERS.layer(fresh(), apart[0], jnp.int32(0), x)[1]
    np.testing.assert_allclose(seen[3][1].gram, stats["mlp"]["down"]["w"].gram, rtol=1e-3, atol=1e-2)
    x, _ = LAYERS.layer(fresh(), apart[0], jnp.int32(0), x)
    stats = LAYERS.layer(fresh(), apart[1], jnp.int32(1), x)[1]
    np.testing.assert_allclose(seen[4][1].gram, stats["attn"]["q"]["w"].gram, rtol=1e-3, atol=1e-2)
    assert float(seen[0][1].n) == MANY.size


def unstacked_layers(params):
    return [jax.tree.map(itemgetter(i), params["blocks"]) for i in range(CONFIG.n_layers)]


def test_layers_taken_apart_make_the_whole_model():
    params = fresh()
    x = LAYERS.enter(params, TOKENS)
    for i, of_layer in enumerate(unstacked_layers(params)):
        x, stats = LAYERS.layer(params, of_layer, jnp.int32(i), x)
    np.testing.assert_allclose(LAYERS.leave(params, x).logits, logits(params), atol=1e-4)
    assert stats["mlp"]["down"]["w"].gram.shape == (64, 64)


def test_gptq_over_a_merged_adapter_and_below_one_and_below_a_mask():
    adapted = moved(Lora(4)(fresh(), KEY))
    merged = calibrate(LAYERS, Merge()(adapted, KEY), MANY, Gptq(4, 16)).params
    assert isinstance(merged["blocks"]["attn"]["q"]["w"], Quantized)
    below = calibrate(LAYERS, adapted, MANY, Gptq(4, 16)).params["blocks"]["attn"]["q"]["w"]
    assert isinstance(below, LowRank) and isinstance(below.base, Quantized)
    masked = calibrate(LAYERS, Prune(0.3)(fresh(), KEY), MANY, Gptq(4, 16)).params
    w = masked["blocks"]["attn"]["q"]["w"]
    assert isinstance(w, Masked) and (np.asarray(dense(w))[~np.asarray(w.mask)] == 0).all()
    turned = calibrate(LAYERS, Rotate()(fresh(), KEY), MANY, Gptq(4, 16))
    w = turned.params["blocks"]["attn"]["q"]["w"]
    assert isinstance(w, Rotated) and isinstance(w.base, Quantized) and max(turned.lost.values()) < 0.1
    on_top = Lora(4)(merged, KEY)
    np.testing.assert_allclose(logits(on_top), logits(merged), atol=1e-4)


def test_scaled_matrices_see_inputs_as_they_read_them():
    found = calibrate(LAYERS, fresh(), MANY, Smooth(then=Rounded(Int8()))).params
    assert isinstance(found["blocks"]["attn"]["q"]["w"], Scaled)
    q, k = (found["blocks"]["attn"][x]["w"].scale for x in "qk")
    np.testing.assert_array_equal(q, k)  # one input, one scale


def test_unstacked_layers_and_layers_that_differ_stay_a_tuple():
    found = calibrate(LAYERS, unstacked_plain(fresh()), MANY, Gptq(4, 16)).params
    assert isinstance(found["blocks"], tuple)
    both = calibrate(LAYERS, fresh(), MANY, Gptq(4, 16)).params
    np.testing.assert_allclose(logits(found), logits(both), atol=1e-3)
    np.testing.assert_allclose(logits(unstacked(both)), logits(both), atol=1e-3)


def test_layers_of_different_bits_decode_one_by_one():
    """As mixed precision leaves them: a tuple of layers, which `unstacked` takes as it takes a stack."""
    mixed = calibrate(LAYERS, fresh(), MANY, (Gptq(4, 16), Gptq(8, None))).params
    assert isinstance(mixed["blocks"], tuple)
    apart = unstacked(mixed)
    assert [layer["attn"]["q"]["w"].bits for layer in apart["blocks"]] == [4, 8]
    np.testing.assert_allclose(logits(apart), logits(mixed), atol=2e-3)  # by inputs of 16 bits


def with_experts():
    """Two layers of four experts; of the first, the last expert's logit is never above that of the one before it."""
    params = MIXTURE.init(jax.random.key(5))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    router = params["blocks"]["mlp"]["router"]["w"]
    v = router[0, :, 0]
    routed = router.at[0].set(jnp.stack([v, -v, 0 * v, 0 * v], 1))
    params["blocks"]["mlp"]["router"]["w"] = routed
    return params


def experts(params, matrix):
    return params["blocks"]["mlp"]["experts"][matrix]["w"]


@pytest.mark.parametrize("name", ["awq gptq", "smooth w8a8", "w8a8 calibrated"])
def test_each_expert_is_quantized_for_the_tokens_that_it_gets(name):
    before = with_experts()
    found = calibrate(layers(MIXTURE.config), before, MANY, METHODS[name])
    assert len(found.lost) == 14 and all(0 < x < 0.2 for x in found.lost.values()), found.lost
    for matrix in ("up", "gate", "down"):
        made, w = experts(found.params, matrix), experts(before, matrix)
        assert isinstance(made, Scaled | Quantized) and made.shape == w.shape
        apart = np.asarray(dense(made) - w)
        assert (np.square(apart).sum((-1, -2)) < 0.1 * np.square(w).sum((-1, -2))).all()  # of each expert


def test_experts_lose_less_than_by_rounding_and_one_that_no_token_reached_is_rounded():
    before = with_experts()
    whole_ranges = Gptq(4, 16, clip=False)
    plain, found = (
        calibrate(layers(MIXTURE.config), before, MANY, method)
        for method in (METHODS["rounded"], whole_ranges)
    )
    for path in ("up/w", "gate/w", "down/w"):
        path = f"blocks/0/mlp/experts/{path}"
        assert found.lost[path] < 0.8 * plain.lost[path], path
    idle = [np.asarray(dense(experts(x.params, "up")))[0, 3] for x in (plain, found)]
    np.testing.assert_array_equal(*idle)
    assert np.abs(idle[0]).min(0).max() > 0
    with pytest.raises(ValueError, match="blocks/mlp/router/w: its inputs are not known here; leave it out"):
        calibrate(layers(MIXTURE.config), before, MANY, METHODS["gptq"], where="blocks/*")


def test_what_an_expert_stands_on_is_quantized_below_it():
    params = Rotate(where="*experts/*")(with_experts(), KEY)
    made = calibrate(layers(MIXTURE.config), params, MANY, METHODS["gptq"])
    up = experts(made.params, "up")
    assert isinstance(up, Rotated) and isinstance(up.base, Quantized) and max(made.lost.values()) < 0.05


def test_importance_is_the_mean_square_of_inputs(monkeypatch):
    """Against a model in numpy, by what its products read."""
    params, read = fresh(), {}
    paths = {
        np.asarray(w[i]).tobytes(): (path, i) for path, w in found(params["blocks"]).items() for i in (0, 1)
    }

    def linear(w, x):
        path, i = paths[w["w"].astype(np.float32).tobytes()]
        read.setdefault(path, [[], []])[i].append(x)
        return x @ w["w"]

    monkeypatch.setattr(numpy_model, "_linear", linear)
    numpy_model.logits(params, CONFIG, MANY[:6])
    got = importance(LAYERS, params, MANY[:6], batch_size=4)
    assert got.keys() == {f"blocks/{path}" for path in read} and len(got) == 7
    for path, layers_of in read.items():
        want = np.stack([np.square(np.concatenate(rows)).mean(0) for rows in layers_of])
        np.testing.assert_allclose(got[f"blocks/{path}"], want, rtol=1e-4)
    mixture = importance(layers(MIXTURE.config), with_experts(), MANY[:6])
    assert mixture["blocks/mlp/experts/down/w"].shape == (2, 4, 24)
    assert (mixture["blocks/mlp/experts/up/w"][0, 3] == 1).all() and (
        mixture["blocks/mlp/experts/up/w"] > 0
    ).all()


def unstacked_plain(params):
    return {**params, "blocks": tuple(unstacked_layers(params))}


def test_a_pattern_chooses_among_layers_that_stand_one_by_one():
    params = Unstack()(fresh(), KEY)
    made, shares = calibrate(LAYERS, params, MANY, Gptq(4, 16), where="blocks/1/*mlp/*")
    kinds = {path for path, w in found(made).items() if isinstance(w, Quantized)}
    assert kinds == set(shares) == {path for path in found(params) if path.startswith("blocks/1/mlp/")}
    first = calibrate(LAYERS, params, MANY, Gptq(4, 16), where="blocks/0/*mlp/*")
    assert all(path.startswith("blocks/0/mlp/") for path in first.lost) and len(first.lost) == len(shares)
    with pytest.raises(ValueError, match="fits no matrix; there are blocks/0/attn/k/w"):
        calibrate(LAYERS, params, MANY, Gptq(4, 16), where="blocks/9/*")


def test_what_is_not_finite_stops_it_with_the_matrix_name():
    broken = fresh()
    broken["blocks"]["mlp"]["up"]["w"] = broken["blocks"]["mlp"]["up"]["w"].at[1, 3, 5].set(jnp.nan)
    with pytest.raises(ValueError, match="blocks/1/mlp/up/w: not finite"):
        calibrate(LAYERS, broken, MANY, Gptq(4, 16))
    broken["blocks"]["attn"]["v"]["w"] = broken["blocks"]["attn"]["v"]["w"].at[0].set(jnp.inf)
    with pytest.raises(ValueError, match="blocks/0/attn/"):
        calibrate(LAYERS, broken, MANY, Gptq(4, 16))
    with pytest.raises(ValueError, match="fits no matrix; there are blocks/attn/k/w"):
        calibrate(LAYERS, fresh(), MANY, Gptq(4, 16), where="*/query/w")
    with pytest.raises(ValueError, match="quantized already, to 8 bits"):
        calibrate(LAYERS, Int8()(fresh(), KEY), MANY, Gptq(4, 16))
    for make, said in (
        (lambda: Gptq(9), "bits=9"),
        (lambda: Gptq(damp=0.0), "damp=0"),
        (lambda: Gptq(4, 0), "group"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
