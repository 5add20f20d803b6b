"""Numbers into blocks, read back by the gguf package's own formulas, with llama.cpp's errors as the yardstick."""

import gguf as library
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmx.formats.gguf import BLOCKS
from lmx.formats.gguf_blocks import AFFINE, SCALED, coded, quantize, rounded

RNG = np.random.default_rng(0)
CODED = [*SCALED, *AFFINE]
PLAIN = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def decoded(raw, kind):
    return library.dequantize(raw, library.GGMLQuantizationType[kind])


def error(x, kind, importance=None, weights=1.0):
    """Root of the weighted mean square error over that of the values."""
    off = decoded(quantize(x, kind, importance), kind) - x.astype(np.float64)
    return np.sqrt((weights * off**2).mean() / (weights * x.astype(np.float64) ** 2).mean())


# Gaussian values: llama.cpp's own quantizers, as `llama-quantize --pure` makes them.
LLAMA_CPP = {"Q2_K": 0.296, "Q3_K": 0.151, "Q4_K": 0.0714, "Q5_K": 0.0361, "Q6_K": 0.0177}
LLAMA_CPP |= {"Q4_0": 0.0859, "Q4_1": 0.0782, "Q5_0": 0.0427, "Q5_1": 0.0378, "Q8_0": 0.0054}


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_errors_are_at_most_those_of_llama_cpp(kind):
    x = RNG.normal(size=(512, 512)).astype(np.float32)
    assert error(x, kind) < 1.02 * LLAMA_CPP[kind]
    assert error(x, kind, np.ones(512)) < 1.02 * LLAMA_CPP[kind]


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if not kind.endswith("K")])
def test_types_without_k_are_those_of_the_package_to_the_byte(kind):
    x = RNG.normal(size=(3, 5, 64)).astype(np.float32)
    if kind in PLAIN:
        want = x.astype(PLAIN[kind])
    else:
        want = library.quantize(x, library.GGMLQuantizationType[kind])
    assert quantize(x, kind).tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", CODED)
@given(data=st.data())
def test_what_the_package_reads_is_what_was_meant(kind, data):
    """All float32 numbers that a type accepts, among them blocks that are constant, tiny, or of one sign."""
    n = BLOCKS[kind][0]
    numbers = st.floats(-65504, 65504, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-9])
    x = data.draw(arrays(np.float32, (2, n), elements=numbers, fill=st.sampled_from([0.0, 1.0, -3.0])))
    weights = np.ones(n, np.float32)
    meant = coded(x, kind, np.ones_like(x))
    found = decoded(quantize(x, kind, weights), kind)
    np.testing.assert_array_equal(found, meant.values())
    bits, parts, _ = (SCALED | AFFINE)[kind]
    part = np.abs(x).reshape(2, parts, -1).max(-1)
    block = np.abs(x).max(-1, keepdims=True)
    # A code's step, twice over for what least squares may cut off, and the rounding of scales: 4 bits in Q2_K.
    bound = 4 * part / 2 ** (bits - 1) + block / {"Q2_K": 8, "Q3_K": 16}.get(kind, 60) + 2.0**-19
    assert (np.abs(found - x).reshape(2, parts, -1).max(-1) <= bound).all()


@pytest.mark.parametrize("kind", CODED)
def test_importance_lowers_the_error_that_it_weighs(kind):
    x = RNG.normal(size=(64, 512)).astype(np.float32)
    importance = (RNG.normal(size=512) ** 4).astype(np.float32)
    importance[:16] = 0
    plain, asked = (error(x, kind, given, importance) for given in (None, importance))
    assert asked < (1.0 if kind in ("Q8_0", "Q6_K") else 0.95) * plain
    assert (quantize(x, kind, importance) == quantize(x, kind, 2.0**-90 * importance)).all()
    assert error(x, kind, 0 * importance) < 1.3 * LLAMA_CPP[kind]


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_pieces_and_rows_do_not_touch_each_other(kind):
    x = RNG.normal(size=(600, 2, 512)).astype(np.float32)  # more than one piece
    importance = RNG.random(512).astype(np.float32)
    whole = quantize(x, kind, importance)
    assert whole.shape == (600, 2, 512 // BLOCKS[kind][0] * BLOCKS[kind][1])
    for row in (0, 300, 599):
        assert (quantize(x[row], kind, importance) == whole[row]).all()
    assert (quantize(np.asfortranarray(x), kind, importance) == whole).all()


@pytest.mark.parametrize("kind", CODED)
def test_each_matrix_of_a_stack_may_have_an_importance(kind):
    x = RNG.normal(size=(2, 3, 5, 512)).astype(np.float32)
    importance = RNG.random((2, 3, 512)).astype(np.float32) ** 4
    whole = quantize(x, kind, importance)
    for place in np.ndindex(2, 3):
        assert (whole[place] == quantize(x[place], kind, importance[place])).all()
    with pytest.raises(ValueError, match="importance is not one number from 0"):
        quantize(x, kind, importance[0])


@pytest.mark.parametrize("kind", BLOCKS)
def test_rounded_is_what_the_file_gives_back(kind):
    x = RNG.normal(size=(3, 4, 768)).astype(np.float32)
    importance = RNG.random(768).astype(np.float32)
    for asked in (None, importance):
        want = decoded(quantize(x, kind, asked), kind) if kind in CODED else x.astype(PLAIN[kind])
        np.testing.assert_array_equal(rounded(x, kind, asked), want.astype(np.float32))


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_cannot_be_stored_is_refused(kind):
    n = BLOCKS[kind][0]
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            quantize(np.full((1, n), value, np.float32), kind)
    if kind not in ("F32", "BF16"):
        with pytest.raises(ValueError, match=f"-?1e.05 is too large for {kind}; use BF16 or F32"):
            quantize(np.full((1, n), -1e5, np.float32), kind)
    if n > 1:
        with pytest.raises(
            ValueError, match=f"{kind} packs {n} values at a time, of which rows of 48 are no"
        ):
            quantize(np.zeros((2, 48), np.float32), kind)
    for wrong in (np.ones(n + 1), -np.ones(n), np.full(n, np.nan)):
        with pytest.raises(ValueError, match="importance is not one number from 0"):
            quantize(np.zeros((2, n), np.float32), kind, wrong)


def test_an_unknown_type_is_told():
    with pytest.raises(ValueError, match="'Q7_K' is no type of tensor; use F32, F16"):
        quantize(np.zeros((1, 256), np.float32), "Q7_K")
