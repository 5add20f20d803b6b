"""A mixture of experts: each token goes through the few feed-forward layers that its router chose, none dropped.

    p = softmax(logits),    y = sum over e in the top_k of p of  weight_e * out_e(act(x into_e))

Token copies are sorted by expert, so that each expert's rows stand together for one grouped product, and are
put back afterwards. No expert has a capacity: all copies may go to one.
Axes: B rows, T tokens, D d_model, E experts, F width of an expert, k experts of a token.
Source: Shazeer et al. 2017, arXiv:1701.06538; without a capacity as in Gale et al. 2022 (MegaBlocks),
arXiv:2211.15841.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lmx.ops.grouped import grouped
from lmx.ops.matmul import PRODUCT

ROWS = ("data", "fsdp")
WIDTH = "tensor"


def route(
    logits: Float[Array, "*b E"], top_k: int, renormalise: bool = True
) -> tuple[Int[Array, "*b k"], Float[Array, "*b k"]]:
    """(ids, weights) of the top_k most probable experts of each token, the most probable first; weights float32.

    renormalise: divide the chosen probabilities by their sum (Mixtral), or leave them as they are (Switch).
    """
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    ids = _largest(p, top_k)
    weights = jnp.take_along_axis(p, ids, axis=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids, weights


def mix(
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    into: tuple[Float[Array, "E D F"], ...],
    out: Float[Array, "E F D"],
    activation: Callable,
) -> Float[Array, "B T D"]:
    """Each token's weighted sum over its experts, in float32; products as in `matmul`.

    activation: of as many arguments as `into` has matrices: act(up x), or act(gate x, up x).
    """
    sent = send(x, ids, out.shape[0])
    y = checkpoint_name(grouped(hidden(sent, into, activation), out, sent.sizes), PRODUCT)
    y = _permute(y, sent.back, sent.order).reshape(*ids.shape, x.shape[-1])
    return jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=2)


class Sent(NamedTuple):
    """rows: copies of tokens, those of each expert together; sizes: how many each has; rows = copies[order], and back
    is the inverse of order."""

    rows: Float[Array, "M D"]
    sizes: Int[Array, " E"]
    order: Int[Array, " M"]
    back: Int[Array, " M"]


def send(x: Float[Array, "B T D"], ids: Int[Array, "B T k"], n_experts: int) -> Sent:
    """A copy of each token for each of its experts."""
    (B, T, D), k = x.shape, ids.shape[-1]
    ids = ids.reshape(-1)
    order = jnp.argsort(ids, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.sum(jax.nn.one_hot(ids, n_experts, dtype=jnp.int32), axis=0)
    copies = jnp.broadcast_to(x[:, :, None], (B, T, k, D)).reshape(-1, D)
    return Sent(_permute(copies, order, back), sizes, order, back)


def hidden(sent: Sent, into: tuple[Float[Array, "E D F"], ...], activation: Callable) -> Float[Array, "M F"]:
    """What `out` of each expert reads."""
    return activation(*(checkpoint_name(grouped(sent.rows, w, sent.sizes), PRODUCT) for w in into))


def pick(mesh: Mesh | None = None) -> Callable:
    """The `mix` of a model: on a mesh each device mixes its own rows, with its part of every expert's width.

    Rows are divided over the mesh axes `data` and `fsdp`, F over `tensor`, where they divide evenly. Experts
    that lie divided over `fsdp` are gathered for the product, as ZeRO does with all parameters; tokens stay.
    """
    if mesh is None:
        return mix

    def on_mesh(x, ids, weights, into, out, activation):
        rows = tuple(axis for axis in ROWS if axis in mesh.shape)
        even = x.shape[0] % math.prod(mesh.shape[axis] for axis in rows) == 0
        tokens = P(rows if even else None, None, None)
        width = WIDTH if WIDTH in mesh.shape and out.shape[1] % mesh.shape[WIDTH] == 0 else None

        def local(x, ids, weights, into, out):
            y = mix(x, ids, weights, into, out, activation)
            return y if width is None else jax.lax.psum(y, width)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, P(None, None, width), P(None, width, None)),
            out_specs=tokens,
            check_vma=False,
        )(x, ids, weights, into, out)

    return on_mesh


def _largest(p, k):
    """The ids of `jax.lax.top_k`, whose operand XLA would gather from all devices that hold rows of it."""
    ids = []
    for _ in range(k):
        ids.append(jnp.argmax(p, axis=-1))
        p = jnp.where(jax.nn.one_hot(ids[-1], p.shape[-1], dtype=bool), -1.0, p)
    return jnp.stack(ids, axis=-1)


@jax.custom_vjp
def _permute(x, order, back):
    """x[order]; the gradient goes `back` by a gather, where autodiff would scatter."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


_permute.defvjp(
    lambda x, order, back: (_permute(x, order, back), (order, back)),
    lambda kept, g: (_permute(g, kept[1], kept[0]), None, None),
)
