"""Muon: momentum whose matrices are made orthogonal, and a partner for everything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lmx import tree, values
from lmx.optim.base import Update
from lmx.optim.elementwise import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Muon(Update):
    """m <- momentum * m + (1 - momentum) * g from 0; direction = scale * orthogonal(m, or g mixed in with
    `nesterov`).

    Matrices are the last two axes [d_in, d_out] of a leaf; leading axes (stacked layers) are matrices apart.
    Embeddings, head, norms and biases go to `partner`, whose lr, schedule, decay and clip are its own: its
    clip acts on its part, after the clip of this one on all gradients. An average of parameters (`ema`)
    belongs here.
    Args:
      where: pattern of the paths that Muon updates.
      scale: "adamw" is 0.2 * sqrt(max(d_in, d_out)), which gives updates the usual root mean square of
        AdamW's (0.2), so that AdamW's lr and weight decay carry over (Liu et al. 2025, arXiv:2502.16982,
        section 2.2); "spectral" is sqrt(max(1, d_out / d_in)), Jordan's, for which lr = 0.02 is usual.
      ns_steps: Newton-Schulz iterations.
    Raises: ValueError for an unknown scale, a partner that averages, a pattern that fits nothing or fits a
      vector.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
      https://kellerjordan.github.io/posts/muon.
    """

    where: str = "blocks/*/w"
    partner: Update = field(default_factory=lambda: AdamW(clip=None))
    momentum: float = 0.95
    nesterov: bool = True
    scale: str = "adamw"
    ns_steps: int = 5

    def __post_init__(self):
        super().__post_init__()
        values.check(self, momentum="[0, 1)", ns_steps="[1, inf)")
        if self.scale not in ("adamw", "spectral"):
            raise ValueError(f'Muon: scale={self.scale!r} is unknown; use "adamw" or "spectral"')
        if self.partner.ema is not None:
            raise ValueError(f"Muon: partner.ema={self.partner.ema} would average a part; set Muon's own ema")

    def step(self, steps: int, params: Any) -> optax.GradientTransformation:
        tree.check_pattern(params, self.where)
        for keys, p in jax.tree_util.tree_leaves_with_path(params):
            path = tree.path_str(keys)
            if tree.matches(path, self.where) and len(p.shape) < 2:
                raise ValueError(
                    f"Muon: where={self.where!r} fits {path} of shape {p.shape}, which is no matrix"
                )
        parts = {"matrix": super().step(steps, params), "partner": self.partner.build(steps, params)}
        return optax.partition(parts, self._labels)

    def direction(self, params: Any) -> optax.GradientTransformation:
        def init(params):
            return MuonState(jax.tree.map(jnp.zeros_like, params))

        def update(grads, state, params=None):
            del params
            b = self.momentum
            mean = jax.tree.map(lambda m, g: b * m + (1.0 - b) * g, state.mean, grads)
            ahead = jax.tree.map(lambda m, g: b * m + (1.0 - b) * g, mean, grads) if self.nesterov else mean
            direction = jax.tree.map(lambda m: self._factor(m.shape) * orthogonal(m, self.ns_steps), ahead)
            return direction, MuonState(mean)

        return optax.GradientTransformation(init, update)

    def _factor(self, shape):
        *_, d_in, d_out = shape
        return 0.2 * max(d_in, d_out) ** 0.5 if self.scale == "adamw" else max(1.0, d_out / d_in) ** 0.5

    def _labels(self, params):
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: "matrix" if tree.matches(tree.path_str(keys), self.where) else "partner", params
        )


class MuonState(NamedTuple):
    """mean: the momentum, a tree like the parameters."""

    mean: Any


def orthogonal(m: Float[Array, "*L d_in d_out"], steps: int = 5) -> Float[Array, "*L d_in d_out"]:
    """Nearly U V^T of each matrix m = U S V^T: singular values in about [0.7, 1.2], computed in float32.

    The quintic Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X from X = m / |m|_F, on the
    smaller of the two Gram matrices. The coefficients trade convergence to exactly 1 for speed from small
    singular values; those far below |m|_F / 1000 stay small. A zero matrix stays zero.
    Source: Jordan et al. 2024 (see `Muon`), section "Newton-Schulz".
    """
    a, b, c = COEFFICIENTS
    x = m.astype(jnp.float32)
    tall = m.shape[-2] > m.shape[-1]
    if tall:
        x = jnp.swapaxes(x, -1, -2)
    x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)) + 1e-7)
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (jnp.swapaxes(x, -1, -2) if tall else x).astype(m.dtype)
