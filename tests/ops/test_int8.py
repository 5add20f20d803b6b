"""lmx.ops.int8: both forms of each product against numpy, and the form that each platform and shape is given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lmx.ops import int8, native, tiles
from lmx.ops.int8 import AMX_ROWS, ROWS, int4_by, int8_by

COMPILES = native.available()
needs_compiler = pytest.mark.skipif(not COMPILES, reason="needs Linux, AVX2 and llvmlite")
needs_vnni = pytest.mark.skipif(
    not (COMPILES and native.cpu_flags() >= int8.VNNI), reason="needs AVX512_VNNI and llvmlite"
)
FLAGS = {"AVX2": frozenset({"avx2", "fma"}), "VNNI": int8.VNNI | {"avx2", "fma"}}


@pytest.fixture(
    params=[pytest.param("AVX2", marks=needs_compiler), pytest.param("VNNI", marks=needs_vnni), "XLA"]
)
def form(request, monkeypatch):
    """Programs with the functions compiled here for either unit, and without them."""
    monkeypatch.setattr(native, "available", lambda: request.param in FLAGS)
    monkeypatch.setattr(native, "cpu_flags", lambda: FLAGS.get(request.param, frozenset()))


@pytest.mark.parametrize("rows", [(), (1,), (2,), (3,), (4,), (7,), (2, 3), (ROWS + 1,), (0,), (2, 0)])
@pytest.mark.parametrize("M, K", [(1, 32), (3, 33), (33, 64), (192, 576), (701, 96), (0, 32), (5, 1), (3, 0)])
def test_int8_equals_numpy_exactly(form, rows, M, K):
    x, w = whole(*rows, K), whole(M, K)
    got = jax.jit(lambda x, w: int8_by(x, w))(x, w)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, wide(x) @ wide(w).T)


def test_int8_of_the_lowest_numbers_does_not_overflow(form):
    x, w = jnp.full((5, 1536), -128, jnp.int8), jnp.full((3, 1536), -128, jnp.int8)
    np.testing.assert_array_equal(int8_by(x, w), np.full((5, 3), 1536 * 128**2))


@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (9,), (ROWS + 1,), (0,)])
@pytest.mark.parametrize(
    "M, K, groups",
    [(1, 32, 1), (33, 96, 3), (192, 576, 9), (35, 1024, 8), (3, 512, 2), (2, 48, 3), (4, 1024, 2)],
)
def test_int4_equals_float64(form, rows, M, K, groups):
    """Group sizes 32, 64, 128 and 256, and 16 and 512, which are not compiled."""
    x, code, scale = whole(*rows, K), codes(M, K), scales(M, groups)
    got = jax.jit(lambda *a: int4_by(*a))(x, packed(code), scale)
    assert got.dtype == jnp.float32
    close(got, wide(x) @ matrix(code, scale).T, code, scale)


@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("value", [-128, 127])
def test_int4_of_the_largest_group_does_not_overflow(form, value, code):
    x = jnp.full((5, 512), value, jnp.int8)
    got = int4_by(x, packed(np.full((3, 512), code)), jnp.ones((3, 2), jnp.float32))
    np.testing.assert_array_equal(got, np.full((5, 3), 512 * value * (code - 8)))


@pytest.mark.parametrize("columns, words, groups", [(64, 7, 2), (64, 8, 3), (64, 8, 0)])
def test_int4_says_which_shapes_disagree(columns, words, groups):
    with pytest.raises(
        ValueError, match=rf"x has {columns} columns, codes {words} words of 8 and scale {groups} "
    ):
        int4_by(whole(1, columns), jnp.zeros((2, words), jnp.int32), jnp.ones((2, groups), jnp.float32))


def test_scan_over_layers(form):
    x, w = whole(3, 64), whole(5, 64, 64)
    code, scale = codes(5 * 64, 64), scales(5 * 64, 2)

    def layer(x, each):
        w, c, s = each
        y = int8_by(x, w)
        return (y >> 9).astype(jnp.int8), (y, int4_by(x, c, s))

    each = (w, packed(code).reshape(5, 64, 8), scale.reshape(5, 64, 2))
    _, (ys, zs) = jax.jit(lambda x, each: lax.scan(layer, x, each))(x, each)
    x = np.asarray(x)
    for i in range(5):
        y = wide(x) @ wide(w[i]).T
        np.testing.assert_array_equal(ys[i], y)
        c, s = code[64 * i : 64 * i + 64], scale[64 * i : 64 * i + 64]
        close(zs[i], wide(x) @ matrix(c, s).T, c, s)
        x = (y >> 9).astype(np.int8)


@pytest.mark.parametrize("x_axis, w_axis", [(0, None), (None, 0), (0, 0), (1, 0)])
def test_vmap(form, x_axis, w_axis):
    x, w = whole(4, 4, 64), whole(*([4] if w_axis == 0 else []), 33, 64)
    mapped = x if x_axis is not None else x[0]
    got = jax.jit(jax.vmap(int8_by, in_axes=(x_axis, w_axis)))(mapped, w)
    want = jax.vmap(lambda x, w: x @ w.T, in_axes=(x_axis, w_axis))(
        mapped.astype(jnp.int32), w.astype(jnp.int32)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, 0), (0, 0, 0), (0, None, 0)])
def test_vmap_of_int4(form, axes):
    x, c, s = whole(2, 3, 64), packed(codes(10, 64)).reshape(2, 5, 8), scales(10, 2).reshape(2, 5, 2)
    arguments = [a if axis == 0 else a[0] for a, axis in zip((x, c, s), axes)]
    got = jax.jit(jax.vmap(int4_by, in_axes=axes))(*arguments)
    each = [[a[i] if axis == 0 else a for a, axis in zip(arguments, axes)] for i in range(2)]
    for y, (x, c, s) in zip(got, each):
        np.testing.assert_allclose(y, int4_by(x, c, s), rtol=0, atol=64 * 2.0**-24 * 128 * 8 * 64)


def test_gradients_pass_by_whole_numbers(form):
    """What is rounded has no gradient; what multiplies the sums has one."""
    w, v = whole(5, 32), jnp.linspace(-1, 1, 32)

    def sums(v):
        return int8_by(jnp.round(127 * v).astype(jnp.int8), w).astype(jnp.float32)

    got = jax.grad(lambda v: jnp.sum(sums(v) * v[:5]))(v)
    np.testing.assert_array_equal(got, np.concatenate([sums(v), np.zeros(27)]))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_the_work_is_shared_among_any_number_of_threads(threads, monkeypatch):
    """Calls at once, from several threads, each asking for more or fewer helpers than XLA's pool has threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(threads))
    target = native.register(f"test_int8_by_{threads}", tiles.int8_chunk(tiles.Avx2()))
    x, w = whole(3, 64), whole(5000, 64)
    call = jax.jit(
        lambda x, w: jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((3, 5000), jnp.int32))(
            x.astype(jnp.int16), w
        )
    )
    want = wide(x) @ wide(w).T
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: call(x, w), range(200)):
            np.testing.assert_array_equal(got, want)


@needs_compiler
@pytest.mark.parametrize(
    "rows, K, amx, compiled",
    [
        (1, 64, False, True),
        (ROWS, 64, False, True),
        (ROWS + 1, 64, False, False),
        (1, 40, False, False),
        (AMX_ROWS, 64, True, True),
        (AMX_ROWS + 1, 64, True, False),
    ],
)
def test_cpu_gets_the_function_for_few_rows_of_whole_steps(monkeypatch, rows, K, amx, compiled):
    monkeypatch.setattr(native, "cpu_flags", lambda: FLAGS["AVX2"] | ({"amx_int8"} if amx else set()))
    assert ("lmx_int8_by" in lowered(int8_by, "cpu", (rows, K), (3, K))) is compiled


def test_cpu_without_the_compiler_gets_the_dot_of_two_rows(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    text = lowered(int8_by, "cpu", (1, 64), (3, 64))
    assert "lmx_int8_by" not in text
    assert re.findall(r"dot_general.*\(tensor<(\w+)>, tensor<(\w+)>\) -> tensor<(\w+)>", text) == [
        ("2x64xi8", "3x64xi8", "2x3xi32")
    ]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_the_plain_dot(platform):
    text = lowered(int8_by, platform, (1, 64), (3, 64))
    assert "custom_call" not in text
    assert re.findall(r"dot_general.*\(tensor<(\w+)>, tensor<(\w+)>\) -> tensor<(\w+)>", text) == [
        ("1x64xi8", "3x64xi8", "1x3xi32")
    ]


def test_without_the_compiler_products_are_the_same():
    """A process in which llvmlite cannot be found."""
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "llvmlite" else find(name, *rest)
import jax.numpy as jnp
from lmx.ops import native
from lmx.ops.int8 import int8_by
print(native.available(), int8_by(jnp.full((1, 32), 3, jnp.int8), jnp.full((2, 32), -5, jnp.int8)).tolist())
print("llvmlite" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["False [[-480, -480]]", "False"], done.stderr


def lowered(function, platform, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
    return jax.jit(lambda *a: function(*a)).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def whole(*shape):
    """Whole numbers from -128 to 127."""
    return jnp.asarray(np.random.default_rng(shape).integers(-128, 128, shape, dtype=np.int8))


def codes(M, K):
    return np.random.default_rng((M, K)).integers(0, 16, (M, K))


def scales(M, groups):
    return jnp.asarray(np.random.default_rng((M, groups)).uniform(0.5, 1.5, (M, groups)), jnp.float32)


def packed(code):
    """Eight codes to a word, the first in its lowest bits."""
    words = sum(code[:, i::8].astype(np.uint64) << np.uint64(4 * i) for i in range(8))
    return jnp.asarray(words.astype(np.uint32).view(np.int32))


def matrix(code, scale):
    return (code - 8) * np.repeat(np.float64(scale), code.shape[1] // scale.shape[1], axis=1)


def wide(a):
    return np.asarray(a, np.int64)


def close(got, want, code, scale):
    """Float32 sums of K products with x up to 128: each of at most K roundings is half a unit of the sum of sizes."""
    sizes = 128 * np.abs(matrix(code, scale)).sum(1).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=code.shape[1] * 2.0**-24 * sizes)
