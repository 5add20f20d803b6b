"""Sums of products with float32 sums, in the form that is fast where the program will run.

A 16-bit input has been rounded by the caller; every form multiplies those numbers exactly and adds them in
float32, so forms differ only in the order of the sums. GPU and TPU get the plain dot. On a CPU the choice is:

| inputs             | CPU                           | form                                               |
|--------------------|-------------------------------|----------------------------------------------------|
| float32, float64   | any                           | plain                                              |
| bfloat16           | with bfloat16 units           | plain; a^T b with `a` transposed in memory first   |
| bfloat16           | without, or `a` has one row   | widened to float32                                 |
| float16            | any                           | widened to float32                                 |

Widening is 1.6 times as fast as XLA's own emulation on AVX2. With AMX the plain dot of one row, and a dot
that sums over the first axis of `a`, leave the matrix units idle: 11 and 4 times slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

UNITS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Flags of /proc/cpuinfo that promise bfloat16 products: x86 matrix units, x86 vectors, Arm vectors."""


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


def gram(a: Float[Array, "*b K"], b: Float[Array, "*b M"], batch: int = 0) -> Float[Array, "*c K M"]:
    """a^T b over the leading axes, once per index of the first `batch` of them: the gradient of a matrix from
    its inputs and its outputs' gradient."""
    rows = tuple(range(batch, a.ndim - 1))
    even = math.prod(a.shape[batch:-1]) % 2 == 0
    if a.dtype == jnp.bfloat16 and even and bfloat16_units():
        on_cpu = functools.partial(turned, batch=batch)
    else:
        on_cpu = functools.partial(_flattened, batch=batch)
    return lax.platform_dependent(a, b, cpu=on_cpu, default=lambda a, b: dot(a, b, rows, rows, batch))


def turned(a: Float[Array, "*b K"], b: Float[Array, "*b M"], batch: int = 0) -> Float[Array, "*c K M"]:
    """As `gram`, with a^T written out by a split, a transpose and a merge, which XLA:CPU does not fold back
    into the dot as it does a lone transpose. The number of rows must be even."""
    lead, K, M = a.shape[:batch], a.shape[-1], b.shape[-1]
    n, rows = math.prod(lead), math.prod(a.shape[batch:-1])
    a = a.reshape(n, rows // 2, 2, K).transpose(0, 3, 1, 2).reshape(n, K, rows)
    return _plain(a, b.reshape(n, rows, M), axes=(((2,), (1,)), ((0,), (0,)))).reshape(*lead, K, M)


def _flattened(a, b, batch):
    """With one axis of rows: XLA:CPU would write out a^T to sum over two."""
    a, b = (x.reshape(*x.shape[:batch], math.prod(x.shape[batch:-1]), x.shape[-1]) for x in (a, b))
    return dot(a, b, (batch,), (batch,), batch)


@functools.cache
def bfloat16_units() -> bool:
    """Whether this machine's CPU multiplies bfloat16 itself; False where /proc/cpuinfo does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and has_units(cpuinfo.read_text())


def has_units(cpuinfo: str) -> bool:
    """Whether the text of a /proc/cpuinfo lists one of UNITS among the flags (x86) or features (Arm)."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return any(
        UNITS & set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")
    )


def _plain(a, b, axes):
    sums = jnp.float64 if a.dtype == jnp.float64 else jnp.float32
    return lax.dot_general(a, b, axes, preferred_element_type=sums)


def _widened(plain, a, b):
    return plain(a.astype(jnp.float32), b.astype(jnp.float32))
