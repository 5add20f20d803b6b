"""GPTQ: each row of a matrix is rounded in turn, and the rows after it take up the error that it makes in the output.

    H = X^T X + damp mean(diag) I,   H^-1 = U^T U,  U upper triangular
    e_i = (w_i - round(w_i)) / U_ii;   w_j -= U_ij e_i  for j > i

w_i is what multiplies input i, for all outputs. Scales of a group are fitted when its first row's turn has come, to
what the rows have become by then; with clip to the share of their range that loses least. With act_order inputs come
by falling size, so that those that matter most are rounded while there are many rows left to make up for it.
Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1; act-order and clip are from the authors' code.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.ops.rounding import clipped, codes, grid, values

BLOCK = 128
"""Rows between two updates of all that follow."""


class Solved(NamedTuple):
    """q, scale, zero and order as in `Quantized`; damp: the share of the mean that made H positive definite."""

    q: Int[Array, "d_out d_in"]
    scale: Float[Array, "d_out groups"]
    zero: Int[Array, "d_out groups"] | None
    order: Int[Array, " d_in"] | None
    damp: Float[Array, ""]


@partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "act_order", "scale_dtype", "clip"))
def gptq(
    w: Float[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    act_order: bool,
    damp: float,
    scale_dtype: str = "float16",
    clip: bool = True,
) -> Solved:
    """Codes that keep x w near for inputs x with sum x x^T = gram, in float32.

    An input that is always 0 gets weight 0. damp grows tenfold until H has a Cholesky factor; not finite after that
    means that gram is not.
    """
    d_in, d_out = w.shape
    size = min(group_size or d_in, d_in)
    dead = jnp.diag(gram) <= 0
    gram = gram + jnp.diag(dead.astype(jnp.float32))
    w = jnp.where(dead[:, None], 0.0, w.astype(jnp.float32))
    order = jnp.argsort(-jnp.diag(gram)) if act_order else None
    if order is not None:
        w, gram = w[order], gram[order][:, order]
    upper, damp = _factor(gram, damp)

    block = size * math.ceil(64 / size) if size <= BLOCK else (size if size < d_in else BLOCK)
    short = -d_in % block
    rows = jnp.pad(w, ((0, short), (0, 0)))
    upper = jnp.pad(upper, ((0, short), (0, short))) + jnp.diag(jnp.arange(d_in + short) >= d_in).astype(
        jnp.float32
    )
    fit = partial(clipped if clip else grid, bits=bits, symmetric=symmetric, dtype=scale_dtype)
    whole = fit(w.T) if size == d_in else None

    def one_block(rows, start):
        here = jax.lax.dynamic_slice_in_dim(rows, start, block)
        u = jax.lax.dynamic_slice(upper, (start, start), (block, block))

        def one_row(j, carry):
            here, q, errors, scales, zeros, now = carry
            if whole is None:
                group = jax.lax.dynamic_slice_in_dim(here, j // size * size, size)
                now = jax.lax.cond(j % size == 0, lambda: fit(group.T), lambda: now)
            scale, zero = now
            row = jax.lax.dynamic_index_in_dim(here, j, keepdims=False)
            code = codes(row, scale, zero, bits)
            error = (row - values(code, scale, zero)) / u[j, j]
            here = here - u[j][:, None] * error[None]
            at = j // size if whole is None else 0
            scales = scales.at[at].set(scale)
            zeros = None if zero is None else zeros.at[at].set(zero)
            return here, q.at[j].set(code), errors.at[j].set(error), scales, zeros, now

        n_groups = block // size if whole is None else 1
        first = (
            (jnp.ones(d_out), None if symmetric else jnp.zeros(d_out, jnp.int8)) if whole is None else whole
        )
        empty = (
            here,
            jnp.zeros((block, d_out), jnp.int8),
            jnp.zeros((block, d_out)),
            jnp.ones((n_groups, d_out)),
            None if symmetric else jnp.zeros((n_groups, d_out), jnp.int8),
            first,
        )
        _, q, errors, scales, zeros, _ = jax.lax.fori_loop(0, block, one_row, empty)
        rest = jax.lax.dynamic_slice_in_dim(upper, start, block)
        return rows - rest.T @ errors, (q, scales, zeros)

    _, (q, scales, zeros) = jax.lax.scan(one_block, rows, jnp.arange(0, d_in + short, block))
    n_groups = math.ceil(d_in / size)

    def joined(x, n):
        return None if x is None else x.reshape(-1, d_out)[:n].T

    return Solved(
        joined(q, d_in),
        joined(scales, n_groups),
        joined(zeros, n_groups),
        order,
        jnp.asarray(damp, jnp.float32),
    )


def _factor(gram, damp):
    """(U, damp) with U^T U the inverse of gram + damp mean(diag) I, by one Cholesky factor from the last row up."""
    mean = jnp.diag(gram).mean()
    eye = jnp.eye(len(gram))

    def upper(damp):
        turned = (gram + damp * mean * eye)[::-1, ::-1]
        factor = jnp.linalg.cholesky(turned)[::-1, ::-1]
        return jax.scipy.linalg.solve_triangular(factor, eye, lower=False)

    def again(carry):
        damp, found = carry
        return ~jnp.isfinite(found).all() & (damp < 1e3)

    def more(carry):
        damp = jnp.maximum(carry[0], 1e-4) * 10
        return damp, upper(damp)

    start = jnp.asarray(damp, jnp.float32)
    damp, found = jax.lax.while_loop(again, more, (start, upper(start)))
    return found, damp


@jax.jit
def lost(
    w: Float[Array, "*E d_in d_out"], other: Float[Array, "*E d_in d_out"], gram: Float[Array, "*E d_in d_in"]
) -> Array:
    """|X (w - other)|^2 / |X w|^2: the share of the output that changes, float32; of experts, of them together."""
    apart = w - other
    return (apart * (gram @ apart)).sum() / jnp.maximum((w * (gram @ w)).sum(), 1e-30)
