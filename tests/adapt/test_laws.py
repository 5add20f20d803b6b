"""The algebra of weights: laws that hold for every matrix, and for every chain of surgeries in any order."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import KEY, fresh, moved

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
    LoftQ,
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
from lmx.adapt.gptq import lost
from lmx.nn import Inputs
from lmx.train import Load
from lmx.train.checkpoint import Checkpoints
from lmx.weights import NF4, Bank, Fake, LowRank, Masked, Quantized, Transposed, dense, linear, lookup, quantize
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
    match draw(st.sampled_from(["normal", "columns of zeros", "ties", "one outlier", "one sign", "one value"])):
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
    params = fresh()
    w = jnp.where(jnp.arange(2)[:, None, None] == 1, size, 1.0) * jnp.ones((2, 32, 32))
    params["blocks"]["attn"]["q"]["w"] = w
    for surgery in (Quantize, Qat):
        with pytest.raises(ValueError, match=rf"^blocks/attn/q/w: .* {said}, .* float16 holds no scale; use {surgery.__name__}\("):
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
    return jnp.asarray(w, jnp.float32), Inputs(gram, jnp.asarray(np.abs(x).max(0), jnp.float32), jnp.float32(len(x)))


METHODS = {
    "gptq": lambda plain: Gptq(plain.bits, plain.group_size, symmetric=plain.symmetric),
    "gptq in order": lambda plain: Gptq(plain.bits, plain.group_size, False, symmetric=plain.symmetric),
    "awq": lambda plain: Awq(plain, Rounded(plain), steps=4),
}


@pytest.mark.parametrize("name", METHODS)
@given(case=seen(), bits=st.sampled_from([2, 3, 4, 8]), size=st.sampled_from([8, None]), symmetric=st.booleans())
def test_what_has_seen_inputs_loses_no_more_of_outputs_than_rounding(name, case, bits, size, symmetric):
    w, inputs = case
    plain = Quantize(bits, size, symmetric)

    def of_output(found):
        off = f64(dense(found)) - f64(w)
        return np.sqrt((off * (f64(inputs.gram) @ off)).sum())

    found = METHODS[name](plain)({"w": w}, inputs)["w"]
    size = np.sqrt((f64(w) * (f64(inputs.gram) @ f64(w))).sum())
    assert of_output(found) <= of_output(plain.of(w)) + 1e-5 * size
