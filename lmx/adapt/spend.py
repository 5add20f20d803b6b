"""Mixed precision: so many bits for each weight on average, spent where the model's output feels them most.

    minimise  sum_l KL_l(b_l)   with   sum_l n_l b_l <= bits sum_l n_l

KL_l(b) is measured: of the output's distribution when layer l alone is rounded to b bits. Layers are taken as
independent, which they nearly are while each changes the output by little. The best choice is exact, by dynamic
programming.
Source: the sensitivity of HAWQ (Dong et al. 2019, arXiv:1905.03696), measured rather than estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lmx import tree
from lmx.adapt.matrices import LAYERS, check, found
from lmx.adapt.quantize import Quantize

CHOICES = (2, 3, 4, 5, 6, 8)


def sensitivity(
    layers: Any,
    params: Any,
    tokens: Int[np.ndarray, "N T"],
    choices: Sequence[int] = CHOICES,
    group_size: int | None = 128,
    where: str = LAYERS,
    seen: Callable[[int, int], None] = lambda done, of: None,
) -> Float[np.ndarray, "L choices"]:
    """KL in nats per token of the output when one layer's matrices alone, those that `where` fits, are rounded to each
    number of bits.

    Costs L choices / 2 forward passes: layers before the one that is rounded are computed once.
    Raises: ValueError if the pattern fits no matrix of a layer.
    """
    check({"blocks": params["blocks"]}, where)
    if not found({"blocks": tree.layer(params["blocks"], 0)}, where):
        raise ValueError(
            f"pattern {where!r} chooses among layers, and bits are spent on all of them; choose among their matrices "
            'alone, as "blocks/*mlp*" does'
        )
    n_layers = tree.depth(params["blocks"])
    rest = {name: x for name, x in params.items() if name != "blocks"}
    one = jax.jit(lambda rest, of_layer, i, x: layers.layer(rest, of_layer, i, x)[0])
    ends = jax.jit(partial(_kl, layers))
    xs = [layers.enter(params, jnp.asarray(tokens))]
    for i in range(n_layers):
        xs.append(one(rest, tree.layer(params["blocks"], i), i, xs[-1]))
    losses = np.zeros((n_layers, len(choices)))
    for i in range(n_layers):
        of_layer = tree.layer(params["blocks"], i)
        for c, bits in enumerate(choices):
            rounded = Quantize(bits, group_size, where=where)({"blocks": of_layer}, jax.random.key(0))[
                "blocks"
            ]
            x = one(rest, rounded, i, xs[i])
            for later in range(i + 1, n_layers):
                x = one(rest, tree.layer(params["blocks"], later), later, x)
            losses[i, c] = float(ends(params, xs[-1], x))
        seen(i + 1, n_layers)
    return losses


def spend(
    losses: Float[np.ndarray, "L choices"], bits: float, choices: Sequence[int] = CHOICES
) -> tuple[int, ...]:
    """The bits of each layer that lose least in sum, on average at most `bits`; layers are of one size.

    Raises: ValueError if `bits` is less than the smallest choice.
    """
    n_layers = len(losses)
    if bits < min(choices):
        raise ValueError(f"bits={bits} a weight: no layer has less than {min(choices)}; ask for more")
    most = int(bits * n_layers + 1e-9)
    best = np.full((n_layers + 1, most + 1), np.inf)
    best[0] = 0
    taken = np.zeros((n_layers + 1, most + 1), int)
    for i, row in enumerate(losses):
        for loss, b in zip(row, choices):
            if b <= most:
                cost = best[i, : most + 1 - b] + loss
                better = cost < best[i + 1, b:]
                best[i + 1, b:][better] = cost[better]
                taken[i + 1, b:][better] = b
    chosen, left = [], most
    for i in range(n_layers, 0, -1):
        chosen.append(int(taken[i, left]))
        left -= chosen[-1]
    return tuple(reversed(chosen))


def _kl(layers, params, x, other):
    def row(pair):
        p, q = (jax.nn.log_softmax(layers.leave(params, h[None]).logits[0]) for h in pair)
        return (jnp.exp(p) * (p - q)).sum(-1).mean()

    return jax.lax.map(row, (x, other)).mean()
