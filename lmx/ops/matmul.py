"""The matrix product of every linear layer: compute-dtype inputs, float32 sums, a gradient of its own.

The product is y = x w. Its gradients are dx = g w^T and dw = x^T g, each one dot with float32 accumulation.
Weights are stored float32 and rounded here to the dtype of the activations; `dw` comes back without that
rounding, in the dtype of `w`, while `dx` has the dtype of `x`. Autodiff would
turn dw over, which costs a CPU a quarter of the training step. `lmx.ops.dot` picks each form by platform.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float

from lmx.ops.dot import dot, gram, rows_by

PRODUCT = "product"
"""By this name rematerialisation knows the results of matrix products, which have gradients of their own."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "*b K"], w: Float[Array, "K M"], dtype: str | None = None) -> Float[Array, "*b M"]:
    """x w over the last axis of `x`: inputs in x.dtype, sums in float32 or wider, result in `dtype`.

    dtype: None means that of x; "float32" keeps the sums as they are. The gradient that comes back is
      rounded to x.dtype before its two products, either way.
    Raises: ValueError if the last axis of `x` is not the first axis of `w`.
    """
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x {x.shape} and w {w.shape} must be [..., K] and [K, M] with one K")
    return dot(x, w.astype(x.dtype), (x.ndim - 1,), (0,)).astype(dtype or x.dtype)


def _matmul_forward(x, w, dtype):
    return matmul(x, w, dtype), (x, w)


def _matmul_backward(_, kept, g):
    x, w = kept
    g = g.astype(x.dtype)
    dx = dot(g, w.astype(x.dtype), (g.ndim - 1,), (1,))
    return dx.astype(x.dtype), gram(x, g).astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_transposed(
    x: Float[Array, "*b D"], e: Float[Array, "V D"], dtype: str | None = None
) -> Float[Array, "*b V"]:
    """x e^T: the logits of a head tied to the embedding table `e`. Dtypes as in `matmul`.

    Raises: ValueError if `x` and `e` differ in their last axis.
    """
    if x.ndim < 1 or e.ndim != 2 or x.shape[-1] != e.shape[1]:
        raise ValueError(
            f"matmul_transposed: x {x.shape} and e {e.shape} must be [..., D] and [V, D] with one D"
        )
    return rows_by(x, e.astype(x.dtype)).astype(dtype or x.dtype)


def _matmul_transposed_forward(x, e, dtype):
    return matmul_transposed(x, e, dtype), (x, e)


def _matmul_transposed_backward(_, kept, g):
    x, e = kept
    g = g.astype(x.dtype)
    dx = dot(g, e.astype(x.dtype), (g.ndim - 1,), (0,))
    return dx.astype(x.dtype), gram(g, x).astype(e.dtype)


matmul_transposed.defvjp(_matmul_transposed_forward, _matmul_transposed_backward)
