"""The layouts of codes against bit streams written out as Python's whole numbers, and there and back."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.formats import codes
from lmx.formats.codes import Scheme
from lmx.ops import bits as traced
from lmx.weights import Quantized, dense


def values(w):
    return dense(jax.tree.map(jnp.asarray, w))


def stream(row, bits, n_words):
    """Words int32 of one stream: code k in bits [k b, (k + 1) b) of a whole number."""
    number = sum(int(code) << (k * bits) for k, code in enumerate(row))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(n_words)]
    return np.array(words, np.uint32).view(np.int32)


def drawn(seed, bits, d_in=64, d_out=32, size=None, symmetric=True, order=False, dtype=np.float16):
    """Codes from 0, scales, zeros from 0 and the group of each input, in the order of the inputs."""
    rng = np.random.default_rng(seed)
    groups = d_in // (size or d_in)
    q = rng.integers(0, 2**bits, (d_out, d_in))
    scale = rng.uniform(0.01, 0.1, (d_out, groups)).astype(dtype)
    zero = np.full((d_out, groups), 2 ** (bits - 1))
    if not symmetric:
        zero = rng.integers(0, 2**bits, (d_out, groups))
    group = np.arange(d_in) // (size or d_in)
    return q, scale, zero, rng.permutation(group) if order else group


def matrix(q, scale, zero, group):
    """[d_in, d_out], float64."""
    return ((q - zero[:, group]) * scale[:, group].astype(np.float64)).T


def gptq_by_hand(q, scale, zero, group, bits, first):
    """Tensors of a GPTQ file; what `first` stores where a zero is 0 is left to its readers."""
    d_out, d_in = q.shape
    held = zero - 1 if first else zero
    return {
        "qweight": np.stack([stream(row, bits, d_in * bits // 32) for row in q], 1),
        "qzeros": np.stack([stream(column, bits, d_out * bits // 32) for column in held.T]),
        "scales": scale.T,
        "g_idx": group.astype(np.int32),
    }


def packed_by_hand(q, scale, zero, bits, symmetric):
    d_out, d_in = q.shape
    found = {
        "weight_packed": np.stack([stream(row, bits, -(-d_in * bits // 32)) for row in q]),
        "weight_scale": scale,
        "weight_shape": np.array([d_out, d_in]),
    }
    if not symmetric:
        columns = [stream(column, bits, -(-d_out * bits // 32)) for column in zero.T]
        found["weight_zero_point"] = np.stack(columns, 1)
    return found


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", codes.GPTQ)
@pytest.mark.parametrize("size, order", [(None, False), (32, False), (32, True)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_the_stream_of_its_codes(bits, form, size, order, symmetric):
    q, scale, zero, group = drawn(bits, bits, size=size, symmetric=symmetric, order=order)
    if form == "gptq":
        zero = np.maximum(zero, 1)
    tensors = gptq_by_hand(q, scale, zero, group, bits, form == "gptq")
    scheme = Scheme(form, bits, size, symmetric)
    w = codes.unpack(scheme, tensors, *q.shape)
    np.testing.assert_array_equal(values(w), matrix(q, scale, zero, group).astype(np.float32))
    same(codes.pack(scheme, w), tensors)
    said = codes.stored(scheme, *q.shape)
    assert {name: want.shape for name, want in said.items()} == {n: x.shape for n, x in tensors.items()}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_0_comes_back_from_the_first_version_as_gptqmodel_adds_words(bits):
    q, scale, zero, group = drawn(0, bits, size=32, symmetric=False)
    zero[::3] = 0
    tensors = gptq_by_hand(q, scale, zero, group, bits, False)
    ones = np.uint32(sum(1 << k for k in range(0, 32, bits)))
    tensors["qzeros"] = (tensors["qzeros"].view(np.uint32) - ones).view(np.int32)
    scheme = Scheme("gptq", bits, 32, False)
    w = codes.unpack(scheme, tensors, *q.shape)
    np.testing.assert_array_equal(w.zero.astype(int) + 2 ** (bits - 1), zero)
    same(codes.pack(scheme, w), tensors)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("d_in, size", [(64, None), (64, 16), (40, 8), (20, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized_is_the_stream_of_its_codes(bits, d_in, size, symmetric):
    q, scale, zero, group = drawn(bits, bits, d_in, 24, size, symmetric, dtype=np.float32)
    tensors = packed_by_hand(q, scale, zero, bits, symmetric)
    scheme = Scheme("pack-quantized", bits, size, symmetric)
    w = codes.unpack(scheme, tensors, *q.shape)
    np.testing.assert_allclose(values(w), matrix(q, scale, zero, group), rtol=1e-7)
    same(codes.pack(scheme, w), tensors)
    said = codes.stored(scheme, *q.shape)
    assert {n: want.shape for n, want in said.items() if n != "weight_g_idx"} == {
        n: x.shape for n, x in tensors.items()
    }


def test_an_older_pack_quantized_names_the_group_of_each_input():
    q, scale, zero, group = drawn(1, 4, size=16, order=True)
    tensors = packed_by_hand(q, scale, zero, 4, True) | {"weight_g_idx": group.astype(np.int32)}
    scheme = Scheme("pack-quantized", 4, 16)
    np.testing.assert_allclose(
        values(codes.unpack(scheme, tensors, *q.shape)), matrix(q, scale, zero, group), rtol=1e-7
    )
    tensors["weight_g_idx"][:] = -1
    assert codes.unpack(scheme, tensors, *q.shape).order is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_holds_the_numbers_themselves(symmetric):
    q, scale, zero, group = drawn(2, 8, symmetric=symmetric, dtype=np.float32)
    tensors = {"weight": (q - 128).astype(np.int8), "weight_scale": scale}
    if not symmetric:
        tensors["weight_zero_point"] = (zero - 128).astype(np.int8)
    scheme = Scheme("int-quantized", 8, symmetric=symmetric, activations="int8")
    w = codes.unpack(scheme, tensors, *q.shape)
    np.testing.assert_allclose(values(w), matrix(q, scale, zero, group), rtol=1e-6)
    assert w.activations == "int8"
    same(codes.pack(scheme, w), tensors)
    few = {"weight": (q % 16 - 8).astype(np.int8), "weight_scale": scale}
    w = codes.unpack(Scheme("int-quantized", 4), few, *q.shape)
    np.testing.assert_array_equal(jax.tree.map(jnp.asarray, w).codes(), few["weight"])
    with pytest.raises(ValueError, match="weight holds -128 to 127, more than 4 bits do"):
        codes.unpack(Scheme("int-quantized", 4), tensors, *q.shape)


def test_float_quantized_holds_8_bit_floats():
    rng = np.random.default_rng(3)
    q = rng.normal(size=(32, 64)).astype(ml_dtypes.float8_e4m3fn)
    tensors = {"weight": q, "weight_scale": rng.uniform(0.1, 1, (32, 1)).astype(np.float32)}
    scheme = Scheme("float-quantized", 8)
    w = codes.unpack(scheme, tensors, 32, 64)
    np.testing.assert_allclose(values(w), (q.astype(np.float64) * tensors["weight_scale"]).T, rtol=1e-7)
    same(codes.pack(scheme, w), tensors)


@given(st.data())
def test_leaves_come_back_bit_for_bit(data):
    layout = data.draw(st.sampled_from(["compressed-tensors", "gptq"]))
    bits = data.draw(st.sampled_from(codes.GPTQ_BITS if layout == "gptq" else range(2, 9)))
    size = data.draw(st.sampled_from([None, 16, 32]))
    symmetric, seed = data.draw(st.booleans()), data.draw(st.integers(0, 2**32))
    order = layout == "gptq" and size is not None and data.draw(st.booleans())
    q, scale, zero, group = drawn(seed, bits, 64, 32, size, symmetric, order)
    by_place = np.argsort(group, kind="stable").astype(np.int32)
    w = Quantized(
        codes.to_words(q[:, by_place], bits) if bits < 8 else (q[:, by_place] - 128).astype(np.int8),
        scale,
        None if symmetric else (zero - 2 ** (bits - 1)).astype(np.int8),
        by_place if (np.diff(group) < 0).any() else None,
        bits=bits,
        d_in=64,
        group_size=size or 64,
    )
    scheme = codes.scheme_of(w, layout, 32)
    again = codes.unpack(scheme, codes.pack(scheme, w), 32, 64)
    if symmetric and again.zero is not None:
        assert not again.zero.any()
        again = replace(again, zero=None)
    for name in ("q", "scale", "zero", "order"):
        np.testing.assert_array_equal(getattr(again, name), getattr(w, name), err_msg=name)
    assert (again.bits, again.d_in, again.group_size) == (w.bits, w.d_in, w.group_size)


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_the_leaf(bits):
    found = np.random.default_rng(bits).integers(0, 2**bits, (3, 70)).astype(np.uint8)
    words = codes.to_words(found, bits)
    np.testing.assert_array_equal(words, traced.pack(jnp.asarray(found), bits))
    np.testing.assert_array_equal(codes.of_words(words, bits, 70), found)


def changed(name, at, value):
    q, scale, zero, group = drawn(4, 4, size=16)
    tensors = gptq_by_hand(q, scale, zero, group, 4, True)
    tensors[name] = tensors[name].copy()
    tensors[name][at] = value
    return tensors


@pytest.mark.parametrize(
    "at, value, message",
    [
        (0, 4, "g_idx names group 0 to 4 of 4"),
        (0, -7, "names group -7"),
        (5, 3, "gives group 0 15 inputs, not 16"),
    ],
)
def test_groups_that_are_not_there_are_told(at, value, message):
    with pytest.raises(ValueError, match=message):
        codes.unpack(Scheme("gptq", 4, 16), changed("g_idx", at, value), 32, 64)


def test_another_shape_than_the_config_says_is_told():
    q, scale, zero, _ = drawn(5, 4)
    tensors = packed_by_hand(q, scale, zero, 4, True) | {"weight_shape": np.array([64, 32])}
    with pytest.raises(ValueError, match=r"weight_shape is \[64, 32\] where the config makes it \[32, 64\]"):
        codes.unpack(Scheme("pack-quantized", 4), tensors, 32, 64)


@pytest.mark.parametrize(
    "settings, message",
    [
        (("gptq", 5), "bits=5; gptq has 2, 3, 4, 8"),
        (("pack-quantized", 9), "bits=9"),
        (("float-quantized", 4), "float-quantized has 8"),
        (("marlin", 4), "format='marlin'.*pack-quantized"),
        (("gptq", 4, 0), "group_size=0"),
    ],
)
def test_schemes_that_are_none_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        Scheme(*settings)
