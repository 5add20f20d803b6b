"""Adapters of low rank as surgeries, and what one does with them: merge, attach, mix, extract.

    run = Run(start=(Load("model"), Lora(rank=16)), trainable="*/w/[ab]", ...)
    merged = Merge()(params, key)
    mine = adapter(params)                     the adapter alone, a tree without its base
    params = attach(base, mine)
    both = bank(base, [mine, other], mix)      several at once; mix [1, N], or [B, N] for each row of the batch

An adapter changes nothing at its start. Its letters are those of `lmx.weights.low_rank`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx import tree, weights
from lmx.adapt.matrices import LAYERS, change, found, turned, within
from lmx.adapt.quantize import Int4, Quantize
from lmx.weights import Bank, LowRank, Transposed, Weight, dense, shape_of
from lmx.weights.base import OnBase
from lmx.weights.surgery import Surgery

ADAPTERS = (LowRank, weights.Dora, weights.Vera)


@dataclass(frozen=True)
class Lora(Surgery):
    """W + s A B with A [d_in, rank] ~ N(0, 1 / d_in) and B = 0; s = alpha / rank.

    stabilised: s = alpha / sqrt(rank), which does not shrink what large ranks learn (rsLoRA).
    ranks: pattern -> rank of the matrices whose paths fit, the first that does, instead of `rank`.
    """

    rank: int = 16
    alpha: float = 16.0
    where: str = LAYERS
    stabilised: bool = False
    ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        for rank in (self.rank, *self.ranks.values()):
            if rank < 1:
                raise ValueError(f"{type(self).__name__}: rank={rank}; use 1 or more")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        def one(path, w):
            rank = next((r for pattern, r in self.ranks.items() if tree.matches(path, pattern)), self.rank)
            if rank > min(shape_of(w)[-2:]):
                raise ValueError(
                    f"{path} {shape_of(w)[-2:]} has no adapter of rank {rank}; use a smaller one"
                )
            return self.on(w, rank, tree.key_at(key, path))

        return change(params, self.where, one)

    def on(self, w: Array | Weight, rank: int, key: jax.Array) -> Weight:
        """The adapter on one matrix."""
        *lead, d_in, d_out = shape_of(w)
        a = jax.random.normal(key, (*lead, d_in, rank)) / d_in**0.5
        return LowRank(w, a, jnp.zeros((*lead, rank, d_out)), self.alpha, self.stabilised)


@dataclass(frozen=True)
class Dora(Lora):
    """Lora on the direction of each output's column, beside its length, which learns by itself."""

    def on(self, w, rank, key):
        low = super().on(w, rank, key)
        length = jnp.linalg.norm(dense(w), axis=-2, keepdims=True)
        return weights.Dora(w, low.a, low.b, length, self.alpha, self.stabilised)


@dataclass(frozen=True)
class Pissa(Lora):
    """Lora that starts from the largest singular values, which the base then lacks.

    Source: Meng et al. 2024, arXiv:2404.02948.
    """

    def on(self, w, rank, key):
        w = dense(w)
        a, b = factors(w, rank)
        low = LowRank(w, a, b, self.alpha, self.stabilised)
        low = replace(low, a=a / low.scale)
        return replace(low, base=w - low.a @ low.b * low.scale)


@dataclass(frozen=True)
class LoftQ(Lora):
    """A quantized base and an adapter that starts from what its rounding lost, each fitted to the other in turns.

    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """

    to: Quantize = Int4()
    rounds: int = 5

    def on(self, w, rank, key):
        w = dense(w)
        low = LowRank(w, *factors(jnp.zeros_like(w), rank), self.alpha, self.stabilised)
        for _ in range(self.rounds):
            base = self.to.of(w - low.a @ low.b * low.scale)
            a, b = factors(w - dense(base), rank)
            low = replace(low, base=base, a=a / low.scale, b=b)
        return low


@dataclass(frozen=True)
class Vera(Surgery):
    """W + A d B b: two vectors learn, on random matrices that all layers share and none stores."""

    rank: int = 256
    where: str = LAYERS

    def __call__(self, params: Any, key: jax.Array) -> Any:
        def one(path, w):
            *lead, _, d_out = shape_of(w)
            keys = jnp.broadcast_to(jax.random.key_data(key), (*lead, *jax.random.key_data(key).shape))
            return weights.Vera(w, keys, jnp.full((*lead, 1, self.rank), 0.1), jnp.zeros((*lead, 1, d_out)))

        return change(params, self.where, one)


@dataclass(frozen=True)
class Merge(Surgery):
    """Adapters added to what they stand on: plain float32 matrices. Masks above them, and other matrices, stay."""

    where: str = "*"

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return change(params, self.where, lambda path, w: within(w, (*ADAPTERS, Bank), dense))


@dataclass(frozen=True)
class Dense(Surgery):
    """Every matrix as a plain float32 array, whatever it was."""

    where: str = "*"

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return change(params, self.where, lambda path, w: dense(w))


@dataclass(frozen=True)
class Switch(Surgery):
    """Other shares of the adapters of a `bank`: one for each, or a row of them for each row of the batch."""

    mix: tuple[float, ...] | tuple[tuple[float, ...], ...]

    def __call__(self, params: Any, key: jax.Array) -> Any:
        mix = jnp.asarray(self.mix, jnp.float32)
        return change(params, "*", lambda path, w: within(w, Bank, lambda w: _mixed(w, mix)))


@dataclass(frozen=True)
class Prune(Surgery):
    """The smallest numbers of each matrix held at zero.

    share: of the numbers, in [0, 1). of: None compares all of a matrix; (n, m) drops n of each m inputs in a row, as
    (2, 4) for the units of some GPUs, whatever the share.
    """

    share: float = 0.5
    of: tuple[int, int] | None = None
    where: str = LAYERS

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"Prune: share={self.share} must lie in [0, 1)")
        if self.of is not None and not 0 < self.of[0] < self.of[1]:
            raise ValueError(f"Prune: of={self.of}; use (n, m) with 0 < n < m, such as (2, 4)")

    def __call__(self, params: Any, key: jax.Array) -> Any:
        return change(
            params, self.where, lambda path, w: weights.Masked(w, self._kept(path, jnp.abs(dense(w))))
        )

    def _kept(self, path, size):
        *lead, d_in, d_out = size.shape
        if self.of is None:
            flat = size.reshape(*lead, -1)
            order = jnp.argsort(jnp.argsort(flat, -1), -1)
            return (order >= round(self.share * d_in * d_out)).reshape(size.shape)
        n, m = self.of
        if d_in % m:
            raise ValueError(
                f"{path} has {d_in} inputs, no multiple of {m}; choose other matrices or another of"
            )
        parts = size.reshape(*lead, d_in // m, m, d_out)
        order = jnp.argsort(jnp.argsort(parts, -2), -2)
        return (order >= n).reshape(size.shape)


def adapter(params: Any) -> Any:
    """The adapters of a tree alone: leaves without a base, None in place of everything else.

    Raises: ValueError if there is none, or if one lies below another or below a mask, and so is not all that changed.
    """

    def one(keys, w):
        if isinstance(w, Transposed):
            inner = one(keys, w.base)
            return None if inner is None else Transposed(inner)
        below = w
        while isinstance(below, OnBase):
            below = below.base
            if isinstance(below, (*ADAPTERS, Bank)):
                raise ValueError(
                    f"{tree.path_str(keys)}: its {type(below).__name__} lies below a {type(w).__name__}, and none of "
                    "the two is the whole change; merge the lower one before there is an upper one: Merge()"
                )
        return replace(w, base=None) if isinstance(w, ADAPTERS) else None

    alone = jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda w: isinstance(w, Weight))
    if not jax.tree.leaves(alone):
        raise ValueError(f"no adapter in this tree; its matrices are {', '.join(found(params))}")
    return alone


def attach(params: Any, alone: Any) -> Any:
    """The adapters of `adapter` on these parameters; merged adapters of the same kind may stand below them.

    Raises: ValueError if an adapter's matrix is missing or of another shape.
    """
    bases, adapters = found(params), found(alone)
    missing = [path for path, w in adapters.items() if w is not None and path not in bases]
    if missing:
        raise ValueError(
            f"the adapter is for {missing[0]}, which this model has not; it has {', '.join(bases)}"
        )

    def one(path, w):
        mine = turned(path, adapters[path])
        shape, own = shape_of(w), _shape_without_base(mine)
        if any(m is not None and m != n for m, n in zip(own, shape)) or len(own) != len(shape):
            raise ValueError(f"the adapter of {path} is for a matrix {own}, but it is {shape} here")
        return replace(mine, base=w)

    return change(params, "|".join(path for path, w in adapters.items() if w is not None), one)


def unmerge(merged: Any, adapted: Any) -> Any:
    """`adapted` as it was before `Merge`, from what was merged: base = merged - s A B, exact within float32.

    Raises: ValueError for a DoRA adapter, whose base cannot be had from its product.
    """
    found_merged = found(merged)

    def one(path, w, whole):
        if isinstance(w, weights.Dora):
            raise ValueError(
                f"{path}: a DoRA adapter loses the length of its base when merged; keep the base"
            )
        if isinstance(w, (*ADAPTERS, Bank)):
            added = dense(replace(w, base=jnp.zeros(shape_of(w))))
            return replace(w, base=one(path, w.base, whole - added))
        if isinstance(w, OnBase) and isinstance(whole, OnBase):
            return replace(w, base=one(path, w.base, whole.base))
        return whole

    return change(adapted, "*", lambda path, w: one(path, w, turned(path, found_merged[path])))


def bank(params: Any, adapters: Sequence[Any], mix: Float[Array, "B N"]) -> Any:
    """Several LoRA adapters on one base; those of smaller rank are filled up with zeros.

    Raises: ValueError for adapters of another kind.
    """
    each = [found(alone) for alone in adapters]
    paths = [p for p in found(params) if any(some.get(p) is not None for some in each)]

    def one(path, w):
        mine = [turned(path, some[path]) if path in some else None for some in each]
        if not all(x is None or isinstance(x, LowRank) for x in mine):
            raise ValueError(f"{path}: only LoRA adapters share a bank; merge the others")
        rank = max(x.a.shape[-1] for x in mine if x is not None)
        *lead, d_in, d_out = shape_of(w)
        zero = LowRank(None, jnp.zeros((*lead, d_in, 1)), jnp.zeros((*lead, 1, d_out)), 1.0)
        mine = [zero if x is None else x for x in mine]
        a = jnp.stack([_filled(x.a, -1, rank) for x in mine], -3)
        b = jnp.stack([_filled(x.b, -2, rank) for x in mine], -3)
        scale = jnp.broadcast_to(jnp.asarray([x.scale for x in mine], jnp.float32), (*lead, len(mine)))
        return _mixed(Bank(w, a, b, scale, scale), mix)

    return change(params, "|".join(paths), one)


def difference(alone: Any, start: Any) -> Any:
    """The LoRA adapter whose change is that of `alone` less that of `start`, of their ranks together.

    What was trained from `Pissa` stands on a base that lacks what its adapter started as; less its start, it stands
    on the base as it was.
    Raises: ValueError for adapters of another kind, or on other matrices.
    """
    ends, starts = found(alone), found(start)
    if ends.keys() != starts.keys():
        other = sorted(ends.keys() ^ starts.keys())
        raise ValueError(f"only one of the two has an adapter for {other[0]}; take both from one run")

    def one(path, w):
        mine, first = turned(path, w), turned(path, starts[path])
        if not isinstance(mine, LowRank) or not isinstance(first, LowRank):
            raise ValueError(f"{path}: only LoRA adapters have a difference of low rank")
        a = jnp.concatenate([mine.a, first.a], -1)
        b = jnp.concatenate([mine.b, -first.b * (first.scale / mine.scale)], -2)
        grown = a.shape[-1] / mine.a.shape[-1]
        alpha = mine.alpha * (grown**0.5 if mine.stabilised else grown)
        return turned(path, LowRank(None, a, b, alpha, mine.stabilised))

    return tree.map_at(one, alone, "*", is_leaf=lambda w: isinstance(w, Weight))


def extract(
    tuned: Any, base: Any, rank: int, where: str = LAYERS, seen: Callable[[str], None] | None = None
) -> Any:
    """The adapter of this rank that brings `base` nearest to `tuned`, by SVD of the difference of each matrix.

    seen: called with the path of each matrix that is done.
    Returns: as `adapter`, with alpha = rank. Best in the Frobenius norm: Eckart & Young 1936.
    """
    goal = found(tuned)

    def one(path, w):
        a, b = factors(dense(turned(path, goal[path])) - dense(w), min(rank, *shape_of(w)[-2:]))
        if seen is not None:
            jax.block_until_ready(b)
            seen(path)
        return LowRank(w, a, b, float(a.shape[-1]))

    return adapter(change(Merge()(base, jax.random.key(0)), where, one))


def factors(w: Float[Array, "*L d_in d_out"], rank: int) -> tuple[Array, Array]:
    """A [.., d_in, rank] and B [.., rank, d_out] whose product is nearest to w, equally long."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]


def _filled(x, axis, n):
    return jnp.pad(x, [(0, n - x.shape[axis] if i == axis % x.ndim else 0) for i in range(x.ndim)])


def _mixed(w: Bank, mix) -> Bank:
    lead, n = w.a.shape[:-3], w.a.shape[-3]
    mix = mix.reshape(-1, mix.shape[-1])
    if mix.shape[-1] != n:
        raise ValueError(f"mix has {mix.shape[-1]} shares for {n} adapters; give one for each")
    return replace(w, mix=jnp.broadcast_to(mix, (*lead, *mix.shape)))


def _shape_without_base(w) -> tuple[int | None, ...]:
    if isinstance(w, weights.Vera):
        return (*w.b.shape[:-2], None, w.b.shape[-1])
    return (*w.a.shape[:-1], w.b.shape[-1])
