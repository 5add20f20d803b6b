"""Every leaf against the matrix it stands for, written out in float64 from its fields."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leaves import D_IN, D_OUT, L, by_hand, f64, kinds, normal

from lmx import tree
from lmx.ops import bits
from lmx.weights import (
    NF4,
    Fake,
    LowRank,
    Transposed,
    dense,
    linear,
    linear_transposed,
    lookup,
    quantize,
    shape_of,
)
from lmx.weights.quantized import to_float8, to_table
from lmx.weights.rotated import hadamard


@pytest.mark.parametrize("name", kinds())
def test_all_verbs_are_of_one_matrix(name):
    w, want = kinds()[name], by_hand(kinds()[name])
    x, ids = normal(5, 2, 3, D_IN), jnp.array([0, 5, 2, D_OUT - 1])
    assert shape_of(w) == want.shape == (D_IN, D_OUT)
    np.testing.assert_allclose(dense(w), want, atol=2e-5)
    np.testing.assert_allclose(linear(x, w), f64(x) @ want, atol=1e-4)
    np.testing.assert_allclose(jax.jit(linear)(x, w), f64(x) @ want, atol=1e-4)
    y = normal(6, 2, 3, D_OUT)
    np.testing.assert_allclose(linear_transposed(y, w), f64(y) @ want.T, atol=1e-4)
    np.testing.assert_allclose(lookup(w, ids), want[np.asarray(ids)], atol=2e-5)
    np.testing.assert_allclose(lookup(Transposed(w), ids), want.T[np.asarray(ids)], atol=2e-5)
    assert linear(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
    assert linear(x.astype(jnp.bfloat16), w, "float32").dtype == jnp.float32


@pytest.mark.parametrize("name", kinds())
def test_a_stack_scans_and_its_gradient_is_that_of_the_matrix(name):
    stack, x = kinds((L,))[name], normal(5, 4, D_IN)

    def run(x, stack):
        return jax.lax.scan(lambda total, w: (total + linear(x, w), None), jnp.zeros((4, D_OUT)), stack)[0]

    want = by_hand(stack)
    assert shape_of(stack) == want.shape == (L, D_IN, D_OUT)
    np.testing.assert_allclose(dense(stack), want, atol=2e-5)
    y, pull = jax.vjp(lambda x: run(x, stack), x)
    np.testing.assert_allclose(y, f64(x) @ want.sum(0), atol=3e-4)
    g = normal(6, 4, D_OUT)
    np.testing.assert_allclose(pull(g)[0], f64(g) @ want.sum(0).T, atol=3e-4)


@pytest.mark.parametrize("lead", [(), (2,)])
@given(bits_=st.sampled_from([2, 3, 4, 5, 6, 8]), n=st.integers(1, 100), seed=st.integers(0, 999))
def test_packed_codes_are_a_little_endian_stream_of_bits(lead, bits_, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits_, (*lead, n)).astype(np.uint8)
    words = bits.pack(jnp.asarray(codes), bits_)
    flat = np.zeros((*lead, bits.n_words(n, bits_) * 32), np.uint64)
    for k in range(n):
        for b in range(bits_):
            flat[..., k * bits_ + b] = codes[..., k] >> b & 1
    want = (flat.reshape(*lead, -1, 32) << np.arange(32, dtype=np.uint64)).sum(-1)
    np.testing.assert_array_equal(words, want)
    np.testing.assert_array_equal(bits.unpack(words, bits_, n), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_of_one_kind_stay_finite(symmetric):
    for w in (jnp.zeros((8, 4)), jnp.full((8, 4), 3.0), jnp.full((8, 4), -1e-30), jnp.full((8, 4), 1e-9)):
        for found in (quantize(w, 4, 4, symmetric), to_table(w, group_size=4), to_float8(w)):
            assert np.isfinite(dense(found)).all()
    np.testing.assert_allclose(dense(quantize(jnp.full((8, 4), 3.0), 4, 4, False)), 3.0, rtol=1e-6)


def test_nf4_is_the_nearest_entry_times_the_largest():
    w = normal(0, 64, 5)
    largest = np.abs(f64(w)).max(0)
    scaled = f64(w) / largest
    want = np.asarray(NF4)[np.abs(scaled[..., None] - np.asarray(NF4)).argmin(-1)] * largest
    np.testing.assert_allclose(dense(to_table(w)), want, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("calibrated", [False, True])
def test_w8a8_multiplies_whole_numbers(symmetric, calibrated):
    x, w = normal(0, 4, D_IN), quantize(normal(1, D_IN, D_OUT), symmetric=symmetric, activations="int8")
    step = np.abs(f64(x)).max(-1, keepdims=True) / 127
    if calibrated:
        w = replace(w, input_scale=jnp.array([0.02]))
        step = 0.02
    q = np.clip(np.round(f64(x) / step), -127, 127)
    np.testing.assert_allclose(linear(x, w), q @ by_hand(w) * step, atol=1e-4)
    assert np.abs(linear(x, w) - f64(x) @ by_hand(w)).max() > 1e-4 or calibrated


@pytest.mark.parametrize("name", ["int8", "int4", "int4 in another order"])
def test_two_digits_of_inputs_are_256_times_finer_than_one(name):
    w = kinds()[name]
    assert w.whole and not kinds()["int4 in groups that do not divide"].whole and not kinds()["nf4"].whole
    x = normal(5, 2, 3, D_IN) * jnp.exp(normal(6, 2, 3, D_IN))
    exact = f64(x) @ by_hand(w)
    error = np.abs(linear(x, replace(w, activations="int16")) - exact).max() / np.abs(exact).max()
    rough = np.abs(linear(x, replace(w, activations="int8")) - exact).max() / np.abs(exact).max()
    assert error < 2e-4 < 2e-3 < rough and error < rough / 100


def test_fake_rounding_passes_gradients_straight():
    w, x = Fake(normal(0, D_IN, D_OUT), 3, 8), normal(1, 5, D_IN)
    g = normal(2, 5, D_OUT)
    _, pull = jax.vjp(lambda x, w: linear(x, w), x, w)
    dx, dw = pull(g)
    np.testing.assert_allclose(dx, f64(g) @ by_hand(w).T, atol=1e-4)
    np.testing.assert_allclose(dw.w, f64(x).T @ f64(g), atol=1e-4)
    np.testing.assert_allclose(linear(x, w), linear(x, w.settled()), atol=1e-4)
    both = Fake(w.w, 8, activations="int8")
    np.testing.assert_allclose(linear(x, both), linear(x, both.settled()), atol=1e-4)


def test_dora_lets_no_gradient_through_the_norm():
    w = kinds()["dora"]
    x, g = normal(5, 4, D_IN), normal(6, 4, D_OUT)
    v = by_hand(LowRank(w.base, w.a, w.b, w.alpha))
    gain = f64(w.magnitude) / np.sqrt((v**2).sum(0, keepdims=True))
    grads = jax.grad(lambda w: (linear(x, w) * g).sum())(w)
    np.testing.assert_allclose(grads.b, (f64(x) @ f64(w.a)).T @ (f64(g) * gain) * 2, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        grads.magnitude,
        ((f64(x) @ v) * f64(g)).sum(0, keepdims=True) / np.sqrt((v**2).sum(0)),
        rtol=1e-4,
        atol=1e-3,
    )


def test_rows_of_a_batch_have_adapters_of_their_own():
    bank = replace(kinds()["bank"], mix=jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    x = normal(5, 3, 7, D_IN)
    base = by_hand(bank.base)
    parts = [f64(bank.a[n]) @ f64(bank.b[n]) * float(bank.scale[n]) for n in range(2)]
    want = np.stack([base + parts[0], base + parts[1], base + parts[0] / 2 + parts[1] / 2])
    np.testing.assert_allclose(linear(x, bank), np.einsum("bti,bio->bto", f64(x), want), atol=2e-4)
    np.testing.assert_allclose(linear(x[:, 0], bank), np.einsum("bi,bio->bo", f64(x[:, 0]), want), atol=2e-4)
    with pytest.raises(ValueError, match="3 rows each have a matrix of their own"):
        dense(bank)


def test_hadamard_turns_and_turns_back():
    x = normal(0, 5, 192)
    np.testing.assert_allclose(hadamard(hadamard(x)), x, atol=1e-5)
    np.testing.assert_allclose((hadamard(x) ** 2).sum(-1), (x**2).sum(-1), rtol=1e-5)
    spike = jnp.zeros(128).at[3].set(1.0)
    np.testing.assert_allclose(jnp.abs(hadamard(spike)), 128**-0.5, rtol=1e-5)


def test_vera_draws_the_same_from_one_key_and_stores_none_of_it():
    w = kinds()["vera"]
    assert tree.paths({"w": w}) == ["w/base", "w/key", "w/d", "w/b"]
    a, b = w._drawn(w.key)
    assert (a.shape, b.shape) == ((D_IN, 6), (6, D_OUT))
    assert 0.8 < float(a.var() * D_IN) < 1.2 and 0.7 < float(b.var() * 6) < 1.3
