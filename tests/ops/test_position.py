"""Positions against float64 numpy written from the papers, and their properties."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.ops import position as P
from lmx.ops.position import NTK, T5, ALiBi, Learned, Linear, Llama3, NoPE, Position, RoPE, Sinusoidal, YaRN
from lmx.values import parse

EPS32 = 2.0**-23
B, T, N, H, D = 2, 6, 3, 16, 10
SCHEMES = [NoPE(), Learned(8), Sinusoidal(), Sinusoidal(100.0, 0.5), RoPE(), RoPE(5e5, 0.5, Llama3())]
SCHEMES += [RoPE(scaling=s) for s in (Linear(4.0), NTK(2.0), YaRN(4.0, 32), YaRN(2.0, 32, 16.0, 2.0, 1.25))]
SCHEMES += [ALiBi(), T5(8, 20), T5(8, 20, bidirectional=True)]


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positions(seed, length=T, top=64):
    return jnp.asarray(np.random.default_rng(seed).integers(0, top, (B, length)), jnp.int32)


# ------------------------------------------------ the base changes nothing


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_each_scheme_changes_one_thing_only(scheme):
    x, heads, where = jnp.asarray(draw(0, B, T, D)), jnp.asarray(draw(1, B, T, N, H)), positions(2, top=8)
    w = {n: jnp.asarray(draw(3, *shape)) for n, (shape, _) in scheme.weights(D, N).items()}
    changed = {
        "embed": not np.array_equal(scheme.embed(x, where, w), x),
        "rotate": not np.array_equal(scheme.rotate(heads, where), heads),
        "bias": scheme.bias(where, where, N, w) is not None,
    }
    expected = {Learned: "embed", Sinusoidal: "embed", RoPE: "rotate", ALiBi: "bias", T5: "bias"}
    assert [name for name, did in changed.items() if did] == [
        name for kind, name in expected.items() if kind is type(scheme)
    ]
    assert scheme.biased == changed["bias"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_scheme_is_rebuilt_from_its_repr(scheme):
    assert parse(repr(scheme), Position, "position") == scheme


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_dtype_of_the_stream_is_kept(scheme):
    x, heads = jnp.ones((B, T, D), jnp.bfloat16), jnp.ones((B, T, N, H), jnp.bfloat16)
    w = {n: jnp.ones(shape) for n, (shape, _) in scheme.weights(D, N).items()}
    where = positions(0, top=8)
    assert scheme.embed(x, where, w).dtype == scheme.rotate(heads, where).dtype == jnp.bfloat16
    if scheme.biased:
        assert scheme.bias(where, where, N, w).dtype == jnp.float32


# ------------------------------------------------ added to the embedding


def test_learned_adds_the_row_of_each_position():
    table, x, where = draw(0, 8, D), draw(1, B, T, D), positions(2, top=8)
    got = Learned(8).embed(jnp.asarray(x), where, {"table": jnp.asarray(table)})
    expected = [[x[b, t] + table[int(where[b, t])] for t in range(T)] for b in range(B)]
    np.testing.assert_allclose(got, expected, rtol=EPS32)


def test_learned_ends_loudly():
    scheme = Learned(T)
    table = {"table": jnp.ones((T, D))}
    assert scheme.max_len() == T
    with pytest.raises(ValueError, match=f"row of {T + 1} tokens"):
        scheme.embed(jnp.zeros((B, T + 1, D)), jnp.zeros((B, T + 1), jnp.int32), table)
    out = scheme.embed(jnp.zeros((B, T, D)), jnp.full((B, T), T, jnp.int32), table)
    assert np.isnan(out).all()


@pytest.mark.parametrize("theta, scale", [(1e4, 1.0), (100.0, 0.5)])
def test_sinusoidal_equals_the_paper(theta, scale):
    x, where = draw(0, B, T, D), positions(1)
    expected = np.array(x, np.float64)
    for b, t, i in np.ndindex(B, T, D // 2):
        angle = int(where[b, t]) / theta ** (2 * i / D)
        expected[b, t, 2 * i] += scale * math.sin(angle)
        expected[b, t, 2 * i + 1] += scale * math.cos(angle)
    got = Sinusoidal(theta, scale).embed(jnp.asarray(x), where, {})
    np.testing.assert_allclose(got, expected, atol=64 * EPS32)  # float32 angles up to 64 radians


def test_sinusoidal_needs_pairs():
    with pytest.raises(ValueError, match="d_model=5"):
        Sinusoidal().embed(jnp.zeros((B, T, 5)), positions(0), {})


# ------------------------------------------------ rotation


def frequencies(scaling, theta, d):
    """Radians per token of each pair, float64, one pair at a time."""
    out = []
    for i in range(d // 2):
        f = theta ** (-2 * i / d)
        match scaling:
            case Linear(factor):
                f = f / factor
            case NTK(factor):
                f = (theta * factor ** (d / (d - 2))) ** (-2 * i / d)
            case Llama3(factor, low, high, original):
                wavelength = 2 * math.pi / f
                if wavelength > original / low:
                    f = f / factor
                elif wavelength > original / high:
                    smooth = (original / wavelength - low) / (high - low)
                    f = (1 - smooth) * f / factor + smooth * f
            case YaRN(factor, original, fast, slow):
                first = math.floor(d * math.log(original / (fast * 2 * math.pi)) / (2 * math.log(theta)))
                last = math.ceil(d * math.log(original / (slow * 2 * math.pi)) / (2 * math.log(theta)))
                first, last = max(first, 0), min(last, d - 1)
                gamma = 1 - min(max((i - first) / (last - first), 0), 1)
                f = (1 - gamma) * f / factor + gamma * f
        out.append(f)
    return np.array(out)


def magnitude(scaling):
    match scaling:
        case YaRN(attention_factor=float(given_)):
            return given_
        case YaRN(factor):
            return 0.1 * math.log(factor) + 1
    return 1.0


SCALINGS = [
    P.Scaling(),
    Linear(4.0),
    NTK(3.0),
    YaRN(4.0, 32),
    YaRN(8.0, 4096),
    YaRN(2.0, 32, 16.0, 2.0, 1.25),
    Llama3(original_len=64),
    Llama3(8.0, 1.0, 4.0, 8192),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=repr)
@pytest.mark.parametrize("theta, fraction", [(1e4, 1.0), (5e5, 1.0), (1e4, 0.5), (1e4, 0.25)])
def test_rope_multiplies_complex_pairs_by_their_phase(scaling, theta, fraction):
    x, where = draw(0, B, T, N, H), positions(1)
    d = int(fraction * H)
    pairs = x[..., : d // 2].astype(complex) + 1j * x[..., d // 2 : d]
    phase = np.exp(1j * np.asarray(where)[..., None, None] * frequencies(scaling, theta, d))
    turned = pairs * phase * magnitude(scaling)
    expected = np.concatenate([turned.real, turned.imag, x[..., d:]], -1)
    got = RoPE(theta, fraction, scaling).rotate(jnp.asarray(x), where)
    np.testing.assert_allclose(got, expected, atol=4 * 64 * EPS32)  # |x| < 4; float32 angles up to 64 radians


@given(shift=st.integers(0, 1000), seed=st.integers(0, 2**31))
def test_rope_scores_depend_on_the_difference_alone(shift, seed):
    q, k = (jnp.asarray(draw(seed + i, B, T, N, H)) for i in range(2))
    q_where, k_where = positions(seed), positions(seed + 1)
    scheme = RoPE(fraction=0.5)

    def scores(offset):
        return jnp.einsum(
            "btnh,bsnh->bnts", scheme.rotate(q, q_where + offset), scheme.rotate(k, k_where + offset)
        )

    np.testing.assert_allclose(scores(shift), scores(0), atol=H * 16 * 1100 * EPS32)


@given(seed=st.integers(0, 2**31), scaling=st.sampled_from(SCALINGS))
def test_rope_keeps_norms_up_to_its_magnitude(seed, scaling):
    x = jnp.asarray(draw(seed, B, T, N, H))
    turned = RoPE(scaling=scaling).rotate(x, positions(seed))
    expected = magnitude(scaling) * np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), expected, rtol=8 * EPS32)


def test_rope_gradient_turns_back():
    x, g, where = jnp.asarray(draw(0, B, T, N, H)), jnp.asarray(draw(1, B, T, N, H)), positions(2)
    scheme = RoPE(fraction=0.5)
    (dx,) = jax.vjp(lambda x: scheme.rotate(x, where), x)[1](g)
    np.testing.assert_allclose(scheme.rotate(dx, where), g, atol=32 * EPS32)


@pytest.mark.parametrize("kind", [RoPE, Sinusoidal])
@pytest.mark.parametrize("theta", [0.0, -1e4, math.inf, math.nan])
def test_theta_is_positive_and_finite(kind, theta):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: theta={theta} is not in \(0, inf\)"):
        kind(theta=theta)


def test_rope_checks_its_share():
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="outside"):
            RoPE(fraction=fraction)
    with pytest.raises(ValueError, match="5 features"):
        RoPE().rotate(jnp.zeros((B, T, N, 5)), positions(0))
    with pytest.raises(ValueError, match="NTK"):
        RoPE(scaling=NTK(2.0)).rotate(jnp.zeros((B, T, N, 2)), positions(0))


# ------------------------------------------------ added to the scores


def slopes_of_the_authors(n):
    """`get_slopes` of the ALiBi repository: geometric for powers of two, else interleaved."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    below = 2 ** math.floor(math.log2(n))
    return slopes_of_the_authors(below) + slopes_of_the_authors(2 * below)[0::2][: n - below]


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 40, 112])
def test_alibi_slopes_equal_the_authors(n_heads):
    np.testing.assert_allclose(P.alibi_slopes(n_heads), slopes_of_the_authors(n_heads), rtol=1e-14)


@pytest.mark.parametrize("n_heads", [3, 8])
def test_alibi_falls_with_distance(n_heads):
    q_where, k_where = positions(0), positions(1, length=9)
    got = ALiBi().bias(q_where, k_where, n_heads, {})
    q_where, k_where = np.asarray(q_where), np.asarray(k_where)
    slopes = slopes_of_the_authors(n_heads)
    expected = np.zeros((B, n_heads, T, 9))
    for b, n, t, s in np.ndindex(expected.shape):
        expected[b, n, t, s] = -slopes[n] * abs(int(q_where[b, t]) - int(k_where[b, s]))
    np.testing.assert_allclose(got, expected, rtol=2 * EPS32)


def t5_bucket(relative, bidirectional, n_buckets, max_distance):
    """`_relative_position_bucket` of T5's code for one relative = key - query, in float64."""
    bucket, n = 0, -relative
    if bidirectional:
        n_buckets //= 2
        bucket += n_buckets if n < 0 else 0
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = n_buckets // 2
    if n < max_exact:
        return bucket + n
    wide = math.log(n / max_exact) / math.log(max_distance / max_exact) * (n_buckets - max_exact)
    return bucket + min(max_exact + int(wide + 1e-9), n_buckets - 1)


@pytest.mark.parametrize(
    "scheme", [T5(), T5(8, 20), T5(32, 128, True), T5(2, 5), T5(10, 300, True), T5(7, 9)]
)
def test_t5_reads_the_bucket_of_each_distance(scheme):
    table = draw(0, scheme.n_buckets, N)
    where = jnp.asarray(np.stack([np.arange(0, 400, 7), np.arange(58)]), jnp.int32)
    got = np.asarray(scheme.bias(where, where, N, {"table": jnp.asarray(table)}))
    where = np.asarray(where)
    for b, t, s in np.ndindex(2, 58, 58):
        relative = int(where[b, s]) - int(where[b, t])
        bucket = t5_bucket(relative, scheme.bidirectional, scheme.n_buckets, scheme.max_distance)
        assert np.array_equal(got[b, :, t, s], table[bucket]), relative


def test_t5_checks_its_buckets():
    for wrong in (lambda: T5(1), lambda: T5(3, bidirectional=True), lambda: T5(32, 16)):
        with pytest.raises(ValueError, match="max_distance"):
            wrong()
