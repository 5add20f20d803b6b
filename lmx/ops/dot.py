"""Sums of products with float32 sums, in the form that is fast where the program will run.

A 16-bit input has been rounded by the caller; every form multiplies those numbers exactly and adds them in
float32, so forms differ only in the order of the sums. GPU and TPU get the plain dot. On a CPU the choice is:

| inputs             | CPU                           | form                |
|--------------------|-------------------------------|---------------------|
| float32, float64   | any                           | plain               |
| bfloat16           | with bfloat16 units           | plain               |
| bfloat16           | without, or `a` has one row   | widened to float32  |
| float16            | any                           | widened to float32  |

Widening is 1.6 times as fast as XLA's own emulation on AVX2; with AMX the plain dot of one row is 11 times
slower than it. Products a^T b (`gram`) and a few rows by b^T (`rows_by`) have forms of their own there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lmx.ops.barrier import once
from lmx.ops.native import cpu_flags

UNITS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Flags of /proc/cpuinfo that promise bfloat16 products: x86 matrix units, x86 vectors, Arm vectors."""
FEW = 48
"""Up to so many float32 rows a CPU multiplies sooner with the matrix first; from 64 on both forms cost the same."""


def dot(
    a: Float[Array, ...],
    b: Float[Array, ...],
    over_a: Sequence[int],
    over_b: Sequence[int],
    batch: int = 0,
) -> Float[Array, ...]:
    """Sums a over axes `over_a` with b over axes `over_b`, once per index of the first `batch` axes of both.

    a and b have one dtype. Returns: float32 (float64 for float64): axes `batch`, then those left of a and b.
    """
    together = tuple(range(batch))
    plain = functools.partial(_plain, axes=((tuple(over_a), tuple(over_b)), (together, together)))
    if a.dtype in (jnp.float32, jnp.float64):
        return plain(a, b)
    rows = math.prod(n for i, n in enumerate(a.shape) if i >= batch and i not in over_a)
    native = a.dtype == jnp.bfloat16 and rows > 1 and bfloat16_units()
    return lax.platform_dependent(
        a, b, cpu=plain if native else functools.partial(_widened, plain), default=plain
    )


def rows_by(x: Float[Array, "*b K"], w: Float[Array, "M K"]) -> Float[Array, "*b M"]:
    """x w^T, in the dtype of the sums.

    XLA:CPU copies the second factor of each product into an order of its own, so that 4 to 32 rows take 1.4 to 1.7
    times as long as x w^T than as (w x^T)^T (`scripts/bench_rows.py`). The barrier keeps XLA from turning the latter
    into the former.
    """
    rows = math.prod(x.shape[:-1])

    def plain(x, w):
        return dot(x, w, (x.ndim - 1,), (1,))

    def matrix_first(x, w):
        y = once(dot(w, x.reshape(rows, x.shape[-1]), (1,), (1,)))
        return y.T.reshape(*x.shape[:-1], w.shape[0])

    few = x.dtype == jnp.float32 and rows <= FEW
    return lax.platform_dependent(x, w, cpu=matrix_first if few else plain, default=plain)


def gram(a: Float[Array, "*b K"], b: Float[Array, "*b M"], batch: int = 0) -> Float[Array, "*c K M"]:
    """a^T b over the leading axes, once per index of the first `batch` of them: the gradient of a matrix from
    its inputs and its outputs' gradient."""
    rows = tuple(range(batch, a.ndim - 1))
    return lax.platform_dependent(
        a,
        b,
        cpu=functools.partial(_gram_on_cpu, batch=batch),
        default=lambda a, b: dot(a, b, rows, rows, batch),
    )


def _gram_on_cpu(a, b, batch):
    """With one axis of rows, and the narrower factor transposed in memory before the dot, if rows are even.

    Summing over the first axis of both leaves AMX idle (4 times slower) and XLA's vector kernels too (1.4
    times, at 768 rows); given two axes of rows, XLA writes out the transpose of `a` however wide it is.
    """
    lead, (K, M) = a.shape[:batch], (a.shape[-1], b.shape[-1])
    n, rows = math.prod(lead), math.prod(a.shape[batch:-1])
    a, b = a.reshape(n, rows, K), b.reshape(n, rows, M)
    if rows % 2 or (K > M and M % 2):
        product = dot(a, b, (1,), (1,), 1)
    elif K <= M:
        product = dot(_turned(a), b, (2,), (1,), 1)
    else:
        product = _turned(dot(_turned(b), a, (2,), (1,), 1))
    return product.reshape(*lead, K, M)


def _turned(x: Float[Array, "n r c"]) -> Float[Array, "n c r"]:
    """The transpose, by a split, a transpose and a merge that XLA:CPU does not fold into a dot. r is even."""
    n, r, c = x.shape
    return x.reshape(n, r // 2, 2, c).transpose(0, 3, 1, 2).reshape(n, c, r)


def bfloat16_units() -> bool:
    """Whether this machine's CPU multiplies bfloat16 itself; False where /proc/cpuinfo does not say."""
    return bool(UNITS & cpu_flags())


def _plain(a, b, axes):
    sums = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return lax.dot_general(a, b, axes, preferred_element_type=sums)


def _widened(plain, a, b):
    return plain(a.astype(jnp.float32), b.astype(jnp.float32))
