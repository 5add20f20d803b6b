"""The product of rows with the matrix of their group: compute-dtype inputs, float32 sums, a gradient of its own.

    y[r] = x[r] w[e]        dx[r] = g[r] w[e]^T        dw[e] = sum over r in group e of x[r]^T g[r]

for the rows r of group e, which stand together: first the rows of group 0, then those of group 1, and so on.
XLA has `ragged_dot` for this. Where it has no such kernel, as on a CPU, it multiplies every row with every
matrix, E times the work; there loops over the groups that have rows, in blocks of rows, take its place.
Axes: M rows, E groups, [K, N] each matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lmx.ops.dot import dot, gram


@jax.custom_vjp
def grouped(x: Float[Array, "M K"], w: Float[Array, "E K N"], sizes: Int[Array, E]) -> Float[Array, "M N"]:
    """Each row times the matrix of its group; inputs in x.dtype, sums in float32, result in x.dtype.

    As in `matmul`, `w` is rounded to the dtype of `x` and its gradient comes back without that rounding.
    Args:
      sizes: rows of each group; they add up to M, and 0 is allowed.
    """
    return _rows(x, w, sizes, over=1)


def _grouped_forward(x, w, sizes):
    return grouped(x, w, sizes), (x, w, sizes)


def _grouped_backward(kept, g):
    x, w, sizes = kept
    g = g.astype(x.dtype)
    return _rows(g, w, sizes, over=2), grams(x, g, sizes).astype(w.dtype), None


grouped.defvjp(_grouped_forward, _grouped_backward)


def grams(x: Float[Array, "M K"], g: Float[Array, "M N"], sizes: Int[Array, E]) -> Float[Array, "E K N"]:
    """x^T g of each group's rows, in float32; 0 where it has none."""
    return lax.platform_dependent(x, g, sizes, cpu=grams_by_blocks, default=grams_by_ragged_dot)


def _rows(x, w, sizes, over):
    """Rows of x, summed with axis `over` of w, in the dtype of x."""
    return lax.platform_dependent(
        x,
        w,
        sizes,
        cpu=lambda x, w, sizes: rows_by_blocks(x, w, sizes, over),
        default=lambda x, w, sizes: rows_by_ragged_dot(x, w, sizes, over),
    )


def rows_by_ragged_dot(x, w, sizes, over):
    dims = lax.RaggedDotDimensionNumbers((((1,), (over,)), ((), ())), [0], [0])
    return _ragged_dot(x, w.astype(x.dtype), sizes, dims).astype(x.dtype)


def grams_by_ragged_dot(x, g, sizes):
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return _ragged_dot(x, g, sizes, dims)


def _ragged_dot(a, b, sizes, dims):
    return lax.ragged_dot_general(a, b, sizes, dims, preferred_element_type=jnp.float32)


def rows_by_blocks(x, w, sizes, over):
    """The last block of a group runs into the next groups' rows, which overwrite theirs later."""
    n, size = x.shape[0], _block(x.shape[0], sizes.shape[0])
    x = jnp.pad(x, ((0, size), (0, 0)))

    def group(e, start, out):
        matrix = w[e].astype(x.dtype)

        def block(i, out):
            at = start + i * size
            y = dot(lax.dynamic_slice_in_dim(x, at, size), matrix, (1,), (over - 1,))
            return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), at, 0)

        return lax.fori_loop(0, -(-sizes[e] // size), block, out)

    return _over_groups(group, jnp.zeros((n + size, w.shape[3 - over]), x.dtype), sizes)[:n]


def grams_by_blocks(x, g, sizes):
    """The rows with which the last block of a group runs into the next are 0 here."""
    size = _block(x.shape[0], sizes.shape[0])
    shape = x.shape[1], g.shape[1]
    x, g = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x, g))

    def group(e, start, out):
        def block(i, sums):
            at = start + i * size
            mine = (jnp.arange(size) < sizes[e] - i * size)[:, None]
            rows = lax.dynamic_slice_in_dim(x, at, size)
            rows = jnp.where(mine, rows, jnp.zeros_like(rows))
            return sums + gram(rows, lax.dynamic_slice_in_dim(g, at, size))

        sums = lax.fori_loop(0, -(-sizes[e] // size), block, jnp.zeros(shape, jnp.float32))
        return out.at[e].set(sums)

    return _over_groups(group, jnp.zeros((sizes.shape[0], *shape), jnp.float32), sizes)


def _over_groups(group, out, sizes):
    """out <- group(e, first row of e, out) for each group e that has rows, in their order."""
    starts = jnp.cumsum(sizes) - sizes
    present = jnp.argsort(sizes == 0, stable=True)
    return lax.fori_loop(0, (sizes > 0).sum(), lambda i, out: group(present[i], starts[present[i]], out), out)


def _block(n_rows, n_groups):
    """Rows in a block: half a group of average size, a multiple of 8 from 8 to 128."""
    return min(128, max(8, n_rows // (2 * n_groups) // 8 * 8))
