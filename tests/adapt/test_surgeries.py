"""Surgeries on the weights of a model, alone and in every order that makes sense."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, KEY, MODEL, TOKENS, fresh, logits, moved

from lmx import adapt, tree
from lmx.adapt import (
    EVERY,
    W8A8,
    Cast,
    Dense,
    Dora,
    Fp8,
    Int4,
    Int8,
    LoftQ,
    Lora,
    Merge,
    Nf4,
    Pissa,
    Prune,
    Qat,
    Quantize,
    Rotate,
    Settle,
    Switch,
    Vera,
    chain,
)
from lmx.mesh import MeshConfig, shardings
from lmx.models import unstacked
from lmx.models.transformer import RULES
from lmx.train.checkpoint import Checkpoints
from lmx.weights import Bank, LowRank, Masked, Quantized, Rotated, dense

FORMATS = {
    "int8": Int8(),
    "int8 everywhere": Int8(where=EVERY),
    "int4": Int4(group_size=16),
    "int3 affine": Quantize(3, 8, symmetric=False),
    "nf4": Nf4(16),
    "fp8": Fp8(),
    "rotated int4": chain(Rotate(), Int4(group_size=16)),
    "pruned": Prune(0.3),
    "pruned int4": chain(Prune(of=(2, 4)), Int4(group_size=16)),
    "nothing": chain(),
}
ADAPTERS = {
    "lora": Lora(4, alpha=8.0),
    "rslora by pattern": Lora(4, stabilised=True, ranks={"*/q/*": 2, "*/down/*": 6}),
    "dora": Dora(4),
    "pissa": Pissa(4),
    "vera": Vera(8),
}
PAIRS = list(itertools.product(FORMATS, [name for name in ADAPTERS if name != "pissa"]))


def close(a, b, atol=2e-4):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_in_another_format_is_the_model_of_its_dense_matrices(name):
    params = FORMATS[name](fresh(), KEY)
    close(logits(params), logits(Dense()(params, KEY)))
    if name != "nothing":
        assert np.abs(logits(params) - logits(fresh())).max() > 1e-3
    assert tree.nbytes(params) <= tree.nbytes(fresh()) * 1.3


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_changes_nothing_at_its_start_and_merges(name):
    params = ADAPTERS[name](fresh(), KEY)
    close(logits(params), logits(fresh()))
    trained = moved(params)
    assert np.abs(logits(trained) - logits(fresh())).max() > 1e-2
    merged = Merge()(trained, KEY)
    assert tree.paths(merged) == tree.paths(fresh())
    close(logits(merged), logits(trained))
    alone = adapt.adapter(trained)
    assert "base" not in "".join(tree.paths(alone))
    base = jax.tree.map(lambda w: getattr(w, "base", w), params, is_leaf=lambda w: hasattr(w, "base"))
    np.testing.assert_array_equal(logits(adapt.attach(base, alone)), logits(trained))
    if name != "dora":
        again = adapt.unmerge(merged, trained)
        close(
            dense(again["blocks"]["attn"]["q"]["w"].base),
            dense(trained["blocks"]["attn"]["q"]["w"].base),
            1e-6,
        )


@pytest.mark.parametrize(("number_format", "kind"), PAIRS)
def test_quantize_then_adapt_then_merge_then_quantize(number_format, kind):
    """QLoRA and its kin: the adapter starts at the quantized base, and merging both gives what they compute."""
    base = FORMATS[number_format](fresh(), KEY)
    params = ADAPTERS[kind](base, KEY)
    close(logits(params), logits(base))
    trained = moved(params)
    close(logits(trained), logits(Dense()(trained, KEY)), 1e-3)
    again = Int8()(Merge()(trained, KEY), KEY)
    assert isinstance(again["blocks"]["attn"]["q"]["w"], Quantized | Rotated | Masked)


def test_an_adapter_stays_what_it_is_when_its_base_is_quantized_below_it():
    adapted = moved(Lora(4)(fresh(), KEY))
    params = Int4(group_size=16)(adapted, KEY)
    w = params["blocks"]["mlp"]["up"]["w"]
    assert isinstance(w, LowRank) and isinstance(w.base, Quantized)
    close(dense(w.base), dense(Int4(group_size=16)(fresh(), KEY)["blocks"]["mlp"]["up"]["w"]))
    with pytest.raises(ValueError, match=r"blocks/attn/k/w is quantized already, to 4 bits; make it dense"):
        Int8()(params, KEY)


@pytest.mark.parametrize("name", ["int4", "rotated int4", "pruned int4", "nf4", "int8 everywhere"])
def test_layer_by_layer_on_a_mesh_and_after_a_checkpoint(name, tmp_path):
    params = moved(Lora(4)(FORMATS[name](fresh(), KEY), KEY))
    want = logits(params)
    apart = unstacked(params)
    close(MODEL.apply(apart, {"tokens": TOKENS}).logits, want, 2e-3)  # codes by inputs of 16 bits
    mesh = MeshConfig(2, 2, 2).build()
    placed = jax.device_put(params, shardings(params, RULES, mesh))
    assert len(placed["blocks"]["mlp"]["up"]["w"].a.sharding.device_set) == 8
    close(logits(placed), want)
    with Saved(tmp_path, params) as restored:
        assert jax.tree.structure(restored) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params)):
            np.testing.assert_array_equal(a, b)


class Saved:
    """Parameters saved by orbax and read again, as a block."""

    def __init__(self, folder, params):
        checkpoints = Checkpoints(folder, strict=True, best=None)
        checkpoints.save(1, {"trainable": params}, {})
        checkpoints.close()
        self.state, _ = checkpoints.restore({"trainable": jax.eval_shape(lambda: params)})

    def __enter__(self):
        return self.state["trainable"]

    def __exit__(self, *_):
        pass


def test_a_donated_step_trains_the_adapter_alone():
    params = Lora(4)(Int4(group_size=16)(fresh(), KEY), KEY)
    trainable, frozen = tree.partition(params, "*/w/[ab]")
    before = jax.tree.map(np.asarray, frozen)

    def loss(trainable, frozen):
        out = MODEL.apply(tree.combine(trainable, frozen), {"tokens": TOKENS}).logits
        return -jax.nn.log_softmax(out)[:, :-1].mean()

    @jax.jit
    def step(trainable, frozen):
        value, grads = jax.value_and_grad(loss)(trainable, frozen)
        return value, jax.tree.map(lambda x, g: x - 0.5 * g, trainable, grads)

    first, trainable = jax.jit(step, donate_argnums=0)(trainable, frozen)
    second, _ = step(trainable, frozen)
    assert second < first
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(before)):
        np.testing.assert_array_equal(a, b)


def test_qat_multiplies_as_what_it_settles_to():
    params = Qat(4, 16)(fresh(), KEY)
    settled = Settle()(params, KEY)
    assert isinstance(settled["blocks"]["attn"]["q"]["w"], Quantized)
    close(logits(params), logits(settled))
    close(logits(settled), logits(Int4(group_size=16)(fresh(), KEY)))
    both = Qat(8, None, activations="int8")(fresh(), KEY)
    close(logits(both), logits(W8A8(scale_dtype="float16")(fresh(), KEY)), 5e-2)


def test_w8a8_is_near_and_uses_whole_numbers():
    params = W8A8()(fresh(), KEY)
    assert 1e-4 < np.abs(logits(params) - logits(fresh())).max() < 0.2
    text = jax.jit(lambda p, t: MODEL.apply(p, {"tokens": t}).logits).lower(params, TOKENS).as_text()
    assert "xi8>" in text
    four = adapt.W4A8(group_size=16)(fresh(), KEY)
    near = logits(Int4(group_size=16)(fresh(), KEY))
    assert 1e-4 < np.abs(logits(four) - near).max() < 0.2
    for some in (params, four):
        grads = jax.grad(lambda p: logits(p).var(), allow_int=True)(Lora(4)(some, KEY))
        assert all(np.abs(grads["blocks"]["attn"][x]["w"].b).max() > 1e-6 for x in "qkvo")


def test_loftq_leaves_less_than_rounding_alone():
    w = fresh()["blocks"]["mlp"]["up"]["w"]
    plain = np.linalg.norm(dense(Quantize(2, 16).of(w)) - w)
    after_svd = LoftQ(4, to=Quantize(2, 16), rounds=1)
    turns = LoftQ(4, to=Quantize(2, 16), rounds=5)
    lost = [np.linalg.norm(dense(s.on(w, 4, KEY)) - w) for s in (after_svd, turns)]
    assert lost[0] < plain and lost[1] < lost[0]


def test_pissa_takes_the_largest_directions_of_the_base():
    w = fresh()["blocks"]["mlp"]["up"]["w"][0]
    found = Pissa(4, alpha=2.0).on(w, 4, KEY)
    u, s, v = np.linalg.svd(np.asarray(w, np.float64))
    close(found.a @ found.b * found.scale, (u[:, :4] * s[:4]) @ v[:4], 1e-5)
    close(dense(found), w, 1e-5)


def test_extract_finds_the_adapter_that_was_merged():
    base = fresh()
    tuned = Merge()(moved(Lora(4)(base, KEY)), KEY)
    alone = adapt.extract(tuned, base, 4)
    close(logits(adapt.attach(base, alone)), logits(tuned))
    less = adapt.attach(base, adapt.extract(tuned, base, 1))
    w, goal = dense(less["blocks"]["attn"]["q"]["w"]), tuned["blocks"]["attn"]["q"]["w"]
    delta = np.asarray(goal - base["blocks"]["attn"]["q"]["w"], np.float64)
    s = np.linalg.svd(delta, compute_uv=False)
    close(np.linalg.norm(np.asarray(goal - w), axis=(1, 2)), np.sqrt((s[:, 1:] ** 2).sum(1)), 1e-4)


def test_adapters_are_switched_and_mixed_by_the_row_of_the_batch():
    base = Int4(group_size=16)(fresh(), KEY)
    each = [adapt.adapter(moved(s(base, KEY), i)) for i, s in enumerate((Lora(4), Lora(2, where="*/attn/*")))]
    rows = adapt.bank(base, each, jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    assert isinstance(rows["blocks"]["mlp"]["up"]["w"], Bank)
    alone = [logits(adapt.attach(base, x))[i] for i, x in enumerate(each)]
    close(logits(rows), jnp.stack(alone), 1e-3)
    close(logits(Switch((0.0, 0.0))(rows, KEY)), logits(base))
    close(logits(Switch((0.0, 1.0))(rows, KEY)), logits(adapt.attach(base, each[1])), 1e-3)
    close(logits(Merge()(Switch((0.0, 1.0))(rows, KEY), KEY)), logits(adapt.attach(base, each[1])), 1e-3)
    with pytest.raises(ValueError, match="mix has 3 shares for 2 adapters"):
        Switch((1.0, 0.0, 0.0))(rows, KEY)


def test_pruning_holds_the_smallest_at_zero():
    params = Prune(0.5)(fresh(), KEY)
    w, kept = fresh()["blocks"]["attn"]["q"]["w"], params["blocks"]["attn"]["q"]["w"].mask
    assert kept.mean() == 0.5
    for layer in range(2):
        assert np.abs(w[layer])[~kept[layer]].max() <= np.abs(w[layer])[kept[layer]].min()
    two_of_four = Prune(of=(2, 4))(fresh(), KEY)["blocks"]["mlp"]["up"]["w"].mask
    assert (np.asarray(two_of_four).reshape(2, 8, 4, -1).sum(2) == 2).all()
    with pytest.raises(ValueError, match="no multiple of 5"):
        Prune(of=(2, 5))(fresh(), KEY)


def test_full_bias_and_last_layers_are_patterns_of_what_is_trained():
    params = fresh()
    for pattern, some in (("*", "embed"), ("*/b|*scale", "norm/scale"), ("embed|norm/*", "embed")):
        assert some in tree.paths(tree.partition(params, pattern)[0])
    apart = unstacked(params)
    last = tree.paths(tree.partition(apart, "blocks/1/*|norm/*")[0])
    assert all(path.startswith(("blocks/1/", "norm/")) for path in last) and len(last) > 7


def test_mistakes_are_told_with_the_way_out():
    params = fresh()
    with pytest.raises(ValueError, match=r"'layers/\*' fits no matrix; there are blocks/attn/k/w"):
        Int8(where="layers/*")(params, KEY)
    with pytest.raises(ValueError, match=r"has no adapter of rank 33; use a smaller one"):
        Lora(33)(params, KEY)
    for make, said in (
        (lambda: Quantize(7), "bits=7; use 2, 3, 4"),
        (lambda: Int4(group_size=1), "group_size=1"),
        (lambda: W8A8(group_size=64), "use bits=8 and group_size=None"),
        (lambda: Lora(0), "rank=0"),
        (lambda: Prune(1.0), "share=1.0"),
        (lambda: Fp8("float16"), "dtype='float16'"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    other = adapt.adapter(Lora(2)(fresh(), KEY))
    del other["blocks"]["attn"]["q"]
    with pytest.raises(ValueError, match="no adapter in this tree"):
        adapt.adapter(params)
    wrong = adapt.adapter(Lora(2, where="*/up/*")(fresh(), KEY))
    wrong["blocks"]["mlp"]["gate"] = {"w": wrong["blocks"]["mlp"]["up"]["w"]}
    wrong["blocks"]["mlp"]["down"] = {"w": wrong["blocks"]["mlp"]["up"]["w"]}
    with pytest.raises(ValueError, match=r"adapter of blocks/mlp/down/w is for a matrix"):
        adapt.attach(params, wrong)


def test_the_dtype_of_plain_arrays_changes_and_nothing_else():
    params = Cast("bfloat16")(fresh(), KEY)
    assert params["embed"].dtype == jnp.bfloat16 and params["norm"]["scale"].dtype == jnp.float32
    close(logits(params), logits(fresh()), 0.2)
    assert CONFIG.dtype == "float32" == logits(params).dtype


@pytest.mark.parametrize("d_in", [36, 44])
def test_four_bits_whose_inputs_are_no_multiple_of_8_have_no_whole_number_products(d_in):
    with pytest.raises(ValueError, match=f"{d_in} inputs are no multiple of 8"):
        adapt.W4A8(group_size=16).of(jnp.ones((d_in, 8)))  # not: choose another group size


def test_dora_on_a_column_of_zeros_is_finite():
    w = jax.random.normal(KEY, (16, 8)).at[:, 3].set(0.0)
    found = Dora(4).on(w, 4, KEY)
    np.testing.assert_allclose(found.dense(), w, atol=1e-6)


@pytest.mark.parametrize("surgery", [Pissa(4), LoftQ(4)])
def test_adapters_of_bfloat16_matrices_are_computed_in_float32(surgery):
    w = jax.random.normal(KEY, (32, 24), "bfloat16")
    found = surgery.on(w, 4, KEY)
    expected = np.asarray(surgery.on(w.astype("float32"), 4, KEY).dense())
    np.testing.assert_allclose(found.dense(), expected, atol=1e-4)
