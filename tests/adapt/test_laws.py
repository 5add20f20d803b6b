"""The algebra of weights: laws that hold for every matrix, and for every chain of surgeries in any order."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import KEY, moved

from lmx import adapt, tree
from lmx.adapt import (
    EVERY,
    Awq,
    Cast,
    Dense,
    Dora,
    Fp8,
    Gptq,
    Int4,
    Int8,
    Lora,
    Merge,
    Nf4,
    Pissa,
    Prune,
    Qat,
    Quantize,
    Rotate,
    Rounded,
    Settle,
    Switch,
    Vera,
    chain,
)
from lmx.nn import Inputs
from lmx.train import Load
from lmx.train.checkpoint import Checkpoints
from lmx.weights import (
    NF4,
    Bank,
    Fake,
    LowRank,
    Masked,
    Quantized,
    Transposed,
    dense,
    linear,
    lookup,
    quantize,
)
from lmx.weights import Dora as DoraLeaf
from lmx.weights import Vera as VeraLeaf
from lmx.weights.describe import describe, rebuild
from lmx.weights.quantized import to_float8, to_table


def f64(x):
    return np.asarray(x).astype(np.float64)


# One matrix


@st.composite
def matrices(draw):
    """[d_in, d_out] of three dtypes, of many sizes, and of what rounding finds hard."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = rng.normal(size=draw(st.sampled_from([(24, 5), (40, 3)])))
    match draw(
        st.sampled_from(["normal", "columns of zeros", "ties", "one outlier", "one sign", "one value"])
    ):
        case "columns of zeros":
            w[:, ::2] = 0
        case "ties":
            w = np.round(w * 2) / 2
        case "one outlier":
            w[3, 1] = 1000
        case "one sign":
            w = np.abs(w) + 1
        case "one value":
            w[:] = w[0, 0]
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    size = draw(st.sampled_from([1e-3, 1, 60] if dtype == "float16" else [1e-6, 1e-3, 1, 1e6]))
    return jnp.asarray(w * size, dtype)


def each_group(of_group, size, d_in):
    """[groups, d_out] -> [d_in, d_out]."""
    return np.repeat(of_group, size, 0)[:d_in]


@given(
    w=matrices(),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    size=st.sampled_from([None, 8, 16]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
@settings(max_examples=60)
def test_rounding_moves_no_number_by_more_than_half_a_step_and_no_step_is_wider_than_needed(
    w, bits, size, symmetric, scale_dtype
):
    found, w = quantize(w, bits, size, symmetric, scale_dtype=scale_dtype), f64(w)
    size = size or len(w)
    groups = [w[i : i + size] for i in range(0, len(w), size)]
    low, high = (np.stack([f(x, 0) for x in groups]) for f in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    needed = (2 * np.maximum(-low, high) if symmetric else high - low) / (2**bits - 1)
    step, limits = f64(found.scale).T, jnp.finfo(scale_dtype)
    held = needed <= float(limits.max)
    wide = needed * (1 + float(limits.eps) + 1e-6) + float(limits.smallest_subnormal)
    assert (step <= np.where(needed == 0, 1, wide))[held].all()
    off, held = np.abs(f64(dense(found)) - w), each_group(held, size, len(w))
    slack = 2.0 ** (bits - 21) + 1e-5  # a symmetric scale is 2**-20 less, see `grid`; float32
    assert (off <= each_group(step, size, len(w)) * (0.5 + slack))[held].all()
    assert not np.isfinite(off[~held]).any()


@given(w=matrices(), size=st.sampled_from([8, 16, 64]))
def test_a_code_book_gives_its_nearest_entry(w, size):
    books = {
        to_table: np.asarray(NF4),
        to_float8: np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn.dtype).astype(np.float64),
    }
    for to, book in books.items():
        found = to(w, group_size=size) if to is to_table else to(w)
        step = each_group(f64(found.scale).T, found.group_size, len(w))
        nearest = np.nanmin(np.abs(f64(w)[..., None] - book * step[..., None]), -1)
        assert (np.abs(f64(dense(found)) - f64(w)) <= nearest + step * 1e-5 * np.nanmax(book)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "said"), [(1e7, "1e.07"), (1e-8, "1e-08")])
def test_scales_that_float16_does_not_hold_are_refused_with_the_way_out(size, said, symmetric):
    params = small()
    w = jnp.where(jnp.arange(2)[:, None, None] == 1, size, 1.0) * jnp.ones((2, 24, 40))
    params["blocks"]["attn"]["q"]["w"] = w
    for surgery in (Quantize, Qat):
        way_out = rf"{said}, for which float16 holds no scale; use {surgery.__name__}\(scale_dtype"
        with pytest.raises(ValueError, match=rf"^blocks/attn/q/w: its largest number is {way_out}"):
            surgery(4, 16, symmetric)(params, KEY)
    found = Int4(symmetric=symmetric, scale_dtype="float32")(params, KEY)["blocks"]["attn"]["q"]["w"]
    np.testing.assert_allclose(dense(found), w, rtol=0.07)
    compiled = jax.jit(Quantize(4, 16, symmetric))(params, KEY)["blocks"]["attn"]["q"]["w"]
    off = np.abs(f64(dense(compiled)) - f64(w))[1]
    assert (off <= 2.0**-25).all() or not np.isfinite(off).any()


# A method that has seen inputs


@st.composite
def seen(draw):
    """A matrix and the Gram matrix of inputs: of few, of many, correlated, of unlike sizes, some of them always 0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d = 32
    x = rng.normal(size=(draw(st.sampled_from([1, 5, 31, 200])), d))
    if draw(st.booleans()):
        x = x @ rng.normal(size=(d, d))
    x = x * np.exp(draw(st.sampled_from([0, 1, 3])) * rng.normal(size=d))
    x[:, rng.random(d) < draw(st.sampled_from([0, 0.3]))] = 0
    w = rng.normal(size=(d, 12)) * np.exp(draw(st.sampled_from([0, 2])) * rng.normal(size=(d, 1)))
    gram = jnp.asarray(x.T @ x, jnp.float32)
    return jnp.asarray(w, jnp.float32), Inputs(
        gram, jnp.asarray(np.abs(x).max(0), jnp.float32), jnp.float32(len(x))
    )


METHODS = {
    "gptq": lambda plain: Gptq(plain.bits, plain.group_size, symmetric=plain.symmetric),
    "gptq in order": lambda plain: Gptq(plain.bits, plain.group_size, False, symmetric=plain.symmetric),
    "awq": lambda plain: Awq(plain, Rounded(plain), steps=4),
}


@pytest.mark.parametrize("name", METHODS)
@given(case=seen(), to=st.sampled_from([(2, 8, False), (3, None, True), (4, 8, True)]))
def test_what_has_seen_inputs_loses_no_more_of_outputs_than_rounding(name, case, to):
    w, inputs = case
    plain = Quantize(*to)

    def of_output(found):
        off = f64(dense(found)) - f64(w)
        return np.sqrt((off * (f64(inputs.gram) @ off)).sum())

    found = METHODS[name](plain)({"w": w}, inputs)["w"]
    assert of_output(found) <= of_output(plain.of(w)) * (1 + 1e-5)


# A chain of surgeries


def small():
    """Three matrices: an embedding, and two stacks of layers."""
    keys = jax.random.split(KEY, 3)
    q, up, embed = (
        jax.random.normal(k, shape) / shape[-2] ** 0.5
        for k, shape in zip(keys, ((2, 24, 40), (2, 40, 24), (10, 24)))
    )
    return {"embed": embed, "blocks": {"attn": {"q": {"w": q}}, "mlp": {"up": {"w": up}}}}


IDS = jnp.asarray([3, 0, 9, 3])


@jax.jit
def forward(params):
    """The least that looks up, scans over layers and has a tied head."""

    def layer(x, of_layer):
        inner = jnp.tanh(linear(x, of_layer["attn"]["q"]["w"]))
        return x + linear(inner, of_layer["mlp"]["up"]["w"]), None

    x, _ = jax.lax.scan(layer, lookup(params["embed"], IDS), params["blocks"])
    return linear(x, Transposed(params["embed"]))


def by_hand(params):
    """`forward` of dense matrices in float64."""
    embed, q, up = (
        f64(dense(w))
        for w in (params["embed"], params["blocks"]["attn"]["q"]["w"], params["blocks"]["mlp"]["up"]["w"])
    )
    x = embed[np.asarray(IDS)]
    for i in range(len(q)):
        x = x + np.tanh(x @ q[i]) @ up[i]
    return x @ embed.T


FORMATS = {
    "int8": Int8(where=EVERY),
    "int4": Int4(group_size=16, where="embed"),
    "int3 affine in groups that do not divide": Quantize(3, 9, symmetric=False),
    "int2 with bfloat16 scales": Quantize(2, 8, scale_dtype="bfloat16"),
    "nf4": Nf4(16, where=EVERY),
    "fp8": Fp8(),
    "qat": Qat(5, None, where=EVERY),
}
OTHERS = {
    "bfloat16": Cast("bfloat16"),
    "pruned": Prune(0.3, where=EVERY),
    "pruned 2:4": Prune(of=(2, 4)),
    "rotated": Rotate(where=EVERY),
    "merged": Merge(),
    "settled": Settle(),
    "dense": Dense(),
}
ADAPTERS = {
    "lora": Lora(3, where=EVERY),
    "rslora of some": Lora(2, stabilised=True, ranks={"*/up/*": 4}),
    "dora": Dora(3),
    "vera": Vera(4),
    "pissa": Pissa(2),
}

SURGERIES = FORMATS | OTHERS | ADAPTERS
CHAINS = st.lists(st.sampled_from(list(SURGERIES)), min_size=1, max_size=5)


def operated(names):
    """The small model after these surgeries, each adapter trained a little; a second number format is refused."""
    params = small()
    for i, name in enumerate(names):
        try:
            params = SURGERIES[name](params, jax.random.fold_in(KEY, i))
        except ValueError as error:
            assert name in FORMATS or name == "rotated"
            assert "is quantized already, to" in str(error) and "make it dense first: Dense()" in str(error)
        params = moved(params, i) if name in ADAPTERS else params
    return params


def close(a, b, atol=1e-4):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def kinds(w):
    """Of a leaf and of all that it stands on."""
    return {type(w)} | (kinds(w.base) if hasattr(w, "base") else set())


def kinds_of(params):
    return set().union(*(kinds(w) for w in adapt.matrices.found(params).values()))


@given(names=CHAINS)
@settings(max_examples=12)
def test_a_chain_computes_what_its_dense_matrices_do(names):
    params = operated(names)
    assert {p: x.shape for p, x in adapt.matrices.found(params).items()} == {
        p: x.shape for p, x in adapt.matrices.found(small()).items()
    }
    close(forward(params), by_hand(params))
    plain = Dense()(params, KEY)
    assert tree.paths(plain) == tree.paths(small())
    close(by_hand(plain), by_hand(params), 1e-6)


@given(names=CHAINS)
def test_merging_leaves_no_adapter_and_what_the_model_computes(names):
    params = operated([*names, "lora"])
    merged = Merge()(params, KEY)
    assert not kinds_of(merged) & {LowRank, DoraLeaf, VeraLeaf, Bank}
    close(by_hand(merged), by_hand(params), 1e-6)
    same(Merge()(merged, KEY), merged)
    if DoraLeaf not in kinds_of(params):
        again = adapt.unmerge(merged, params)
        assert LowRank in kinds_of(again)
        close(by_hand(again), by_hand(params), 1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
@given(names=CHAINS)
@settings(max_examples=6)
def test_an_adapter_changes_nothing_at_its_start(name, names):
    base = operated(names)
    params = ADAPTERS[name](base, KEY)
    close(by_hand(params), by_hand(base), 1e-5)
    alone = adapt.adapter(params) if not kinds_of(base) & {LowRank, DoraLeaf, VeraLeaf} else None
    if alone is not None and name != "pissa":
        same(adapt.attach(base, alone), params)


@given(names=CHAINS)
def test_a_chain_is_described_and_rebuilt(names):
    params = operated(names)
    arrays = dict(zip(tree.paths(params), jax.tree.leaves(params)))
    same(rebuild(json.loads(json.dumps(describe(params))), arrays.__getitem__), params)


@given(names=st.lists(st.sampled_from([x for x in SURGERIES if x != "pissa"]), min_size=1, max_size=4))
@settings(max_examples=6)
def test_a_chain_is_the_same_compiled_on_donated_arrays(names):
    """A product may be summed in another order there, so a number that lies between two codes may get the other."""
    surgeries = [SURGERIES[x] for x in dict.fromkeys(names) if x not in FORMATS]
    surgeries += [SURGERIES[x] for x in names if x in FORMATS][:1]
    if names[0] in ADAPTERS:
        surgeries += [Merge()]
    operate = chain(*surgeries)
    eager = operate(small(), KEY)
    compiled = jax.jit(operate, donate_argnums=0)(small(), KEY)
    assert jax.tree.structure(compiled) == jax.tree.structure(eager)
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for a, b in zip(*(adapt.matrices.found(x).values() for x in (compiled, eager))):
        assert (np.abs(dense(a) - dense(b)) > 1e-5).mean() < 0.01


def test_loading_and_quantizing_go_in_either_order(tmp_path):
    """Quantize after Load is Load after Quantize, bit for bit."""

    def loaded(params, folder):
        checkpoints = Checkpoints(tmp_path / folder, strict=True, best=None)
        checkpoints.save(1, {"trainable": params}, {"weights": describe(params)})
        checkpoints.close()
        return Load(str(tmp_path / folder))(small(), KEY)

    surgeries = chain(
        Prune(of=(2, 4), where="*/q/*"),
        Rotate("*/up/*"),
        Int4(group_size=16, where="embed"),
        Nf4(16, where="*/q/*"),
        Quantize(3, 9, symmetric=False, where="*/up/*"),
        Lora(3),
    )
    same(surgeries(loaded(small(), "plain"), KEY), loaded(surgeries(small(), KEY), "quantized"))


def test_an_adapter_below_another_or_a_mask_is_merged_or_refused_but_never_lost():
    first = moved(Lora(3)(small(), KEY))
    for above, stays in ((Prune(0.3), {Masked}), (Lora(2), set()), (Dora(2), set()), (Vera(2), set())):
        params = moved(above(first, KEY), 2)
        with pytest.raises(
            ValueError, match=r"^blocks/attn/q/w: its LowRank lies below a \w+, .* merge the lower"
        ):
            adapt.adapter(params)
        w = Merge()(params, KEY)["blocks"]["attn"]["q"]["w"]
        assert kinds(w) - {type(jnp.zeros(()))} == stays
        close(dense(w), dense(params["blocks"]["attn"]["q"]["w"]), 1e-6)


def test_what_lies_below_an_adapter_is_settled_and_switched():
    params = Lora(2)(Prune(0.3)(Qat(4, 8)(small(), KEY), KEY), KEY)
    settled = Settle()(params, KEY)
    assert Fake in kinds_of(params) and Fake not in kinds_of(settled) and Quantized in kinds_of(settled)
    close(by_hand(settled), by_hand(params), 1e-5)
    each = [adapt.adapter(moved(Lora(2)(small(), KEY), i)) for i in range(2)]
    mixed = Lora(2)(adapt.bank(small(), each, jnp.asarray([[0.0, 0.0]])), KEY)
    close(by_hand(mixed), by_hand(small()), 1e-6)
    close(by_hand(Switch((0.0, 1.0))(mixed, KEY)), by_hand(adapt.attach(small(), each[1])), 1e-5)


def test_an_extracted_adapter_holds_no_other_of_its_base():
    base = moved(Lora(3)(small(), KEY))
    tuned = Merge()(moved(base, 5), KEY)
    alone = adapt.extract(tuned, base, 6, "*/q/*")
    assert tree.paths(alone) == ["blocks/attn/q/w/a", "blocks/attn/q/w/b"]
    whole = adapt.attach(Merge()(base, KEY), alone)["blocks"]["attn"]["q"]["w"]
    close(dense(whole), tuned["blocks"]["attn"]["q"]["w"], 1e-5)
