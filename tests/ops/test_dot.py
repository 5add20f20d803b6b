"""lmx.ops.dot: every form against float64, and the form that each platform is given."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.ops import dot as module
from lmx.ops.dot import UNITS, dot, gram
from lmx.ops.matmul import matmul, matmul_transposed
from lmx.ops.native import flags_in

EPYC_MILAN = "processor\t: 0\nflags\t\t: fpu sse2 fma avx2 sha_ni\nbugs\t\t: amx_bf16_unheard_of\n"
SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n"
GRAVITON_3 = "processor\t: 0\nFeatures\t: fp asimd svebf16 i8mm bf16 dgh\n"


@pytest.fixture(params=[False, True], ids=["without units", "with units"])
def units(request, monkeypatch):
    """Programs for a CPU with and without bfloat16 units; both run on any CPU."""
    monkeypatch.setattr(module, "bfloat16_units", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(6, 4, 5), (1, 4, 5), (7, 1, 3)])
def test_dot_equals_float64(units, shape, dtype):
    n, k, m = shape
    a, b = draw((3, n, k), dtype), draw((3, m, k), dtype)
    got = jax.jit(lambda a, b: dot(a, b, (2,), (2,), batch=1))(a, b)
    assert got.dtype == jnp.float32
    close(got, np.einsum("bnk,bmk->bnm", wide(a), wide(b)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("leading", [(8,), (3, 4), (3, 5), (1,), (2, 1, 2), ()])
def test_gram_equals_float64(units, leading, dtype):
    """Odd and even numbers of rows, since the transposing form needs an even one."""
    a, b = draw((*leading, 4), dtype), draw((*leading, 6), dtype)
    got = jax.jit(gram)(a, b)
    assert got.dtype == jnp.float32
    close(got, wide(a).reshape(-1, 4).T @ wide(b).reshape(-1, 6))


@pytest.mark.parametrize("k, m", [(5, 6), (6, 5), (6, 4), (1, 1)])
def test_gram_per_index_of_a_batch_equals_float64(units, k, m):
    """Narrow with wide, wide with narrow of odd and even width."""
    a, b = draw((2, 3, 4, k), "bfloat16"), draw((2, 3, 4, m), "bfloat16")
    got = jax.jit(lambda a, b: gram(a, b, batch=2))(a, b)
    close(got, np.einsum("abnk,abnm->abkm", wide(a), wide(b)))


def test_float64_keeps_its_sums():
    with jax.enable_x64(True):
        a = jnp.array([[1.0, 2.0**-40]])
        assert float(dot(a, jnp.ones((2, 1), a.dtype), (1,), (0,))[0, 0]) == 1 + 2.0**-40


@pytest.mark.parametrize(
    "cpuinfo, answer", [(EPYC_MILAN, False), (SAPPHIRE_RAPIDS, True), (GRAVITON_3, True), ("", False)]
)
def test_units_are_read_from_cpuinfo(cpuinfo, answer):
    assert bool(UNITS & flags_in(cpuinfo)) is answer


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("function", [matmul, matmul_transposed])
def test_accelerators_get_the_plain_dot(units, function, platform):
    """Value and both gradients lowered for an accelerator on this host: three dots of bfloat16."""
    text = lowered(function, platform)
    assert products(text) == ["bf16"] * 3
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize("function", [matmul, matmul_transposed])
def test_cpu_gets_the_form_its_units_want(units, function):
    text = lowered(function, "cpu")
    assert products(text) == (["bf16"] if units else ["f32"]) * 3


@pytest.mark.parametrize("k, m", [(5, 8), (8, 5), (8, 4)])
def test_cpu_writes_out_no_transpose_of_the_wider_factor(k, m):
    """The gradient of w sums over 4 * 6 rows; the program may hold [narrow, 24], and never [wide, 24]."""

    def dw(x, g):
        return jax.vjp(lambda w: matmul(x, w), jnp.zeros((k, m)))[1](g)

    x, g = draw((4, 6, k), "float32"), draw((4, 6, m), "float32")
    assert f"f32[{max(k, m)},24]" not in jax.jit(dw).lower(x, g).compile().as_text()


@pytest.mark.parametrize("rows, first", [(1, True), (8, True), (module.FEW, True), (module.FEW + 1, False)])
def test_a_cpu_multiplies_few_rows_with_the_matrix_first(rows, first):
    """Which the compiler would undo, were it not told."""
    x, w = draw((rows, 5), "float32"), draw((96, 5), "float32")
    text = jax.jit(matmul_transposed).lower(x, w).compile().as_text()
    (dot,) = [line for line in text.splitlines() if " dot(" in line]
    assert (f"f32[96,{rows}]" in dot, f"f32[{rows},96]" in dot) == (first, not first)


def test_one_row_is_widened_even_with_units(monkeypatch):
    monkeypatch.setattr(module, "bfloat16_units", lambda: True)
    export = jax.export.export(jax.jit(matmul), platforms=["cpu"])
    assert products(export(draw((1, 4), "bfloat16"), draw((4, 6), "float32")).mlir_module()) == ["f32"]


def lowered(function, platform):
    """StableHLO of value and gradients of a product of bfloat16 [2, 4, 4] and float32 [4, 4]."""

    def both(x, w, g):
        y, pull = jax.vjp(function, x, w)
        return y, pull(g)

    x, w = draw((2, 4, 4), "bfloat16"), draw((4, 4), "float32")
    return jax.export.export(jax.jit(both), platforms=[platform])(x, w, x).mlir_module()


def products(text):
    """Dtype of the first operand of each dot."""
    return re.findall(r"stablehlo\.dot_general.*?: \(tensor<(?:\d+x)*(\w+)>", text)


def draw(shape, dtype):
    return jax.random.normal(jax.random.key(sum(shape)), shape).astype(dtype)


def wide(x):
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def close(got, want):
    """Products of at most 15 terms near 1 in size, summed in float32."""
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), want, rtol=0, atol=64 * 2.0**-23)
