"""Who may attend to whom: boolean functions of positions and segments, joined by `&`.

    (Causal() & SameSegment())(q, k)[b, 0, t, s]  =  True where query t of row b may see key s.

A mask reads positions and segments, never array indices, so the same mask serves packed training rows and
decoding, where the keys are cache slots in any order. Axes: B rows, T queries, S keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Where(NamedTuple):
    """Where tokens stand: positions [B, T] int32 in their segment, from 0, and segment_ids [B, T] int32.

    Segment 0 is padding or an empty cache slot.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


@dataclass(frozen=True)
class Mask(ABC):
    """A rule that allows pairs; the base of all masks."""

    @abstractmethod
    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        """True where the query may attend to the key."""

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    @property
    def reach(self) -> int | None:
        """How many latest positions, a query's own included, it can see at most; None if unbounded."""
        return None

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The masks that `&` joined here, in order."""
        return (self,)


@dataclass(frozen=True)
class And(Mask):
    """Allows what both allow; `a & b` builds it."""

    a: Mask
    b: Mask

    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        return self.a(q, k) & self.b(q, k)

    @property
    def reach(self) -> int | None:
        return min((r for r in (self.a.reach, self.b.reach) if r is not None), default=None)

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.a.parts + self.b.parts


@dataclass(frozen=True)
class Full(Mask):
    """Everyone sees everyone."""

    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        return jnp.broadcast_to(jnp.bool_(True), _distance(q, k).shape)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees its own position and earlier ones."""

    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        return _distance(q, k) >= 0


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query sees the latest `size` positions, its own included: 0 <= i - j < size.

    Raises: ValueError if size < 1.
    Source: Jiang et al. 2023 (Mistral), arXiv:2310.06825, section 2; the window counts the query itself, as
    in HF.
    """

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"SlidingWindow: size={self.size} lets a token see nothing; use 1 or more")

    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        distance = _distance(q, k)
        return (distance >= 0) & (distance < self.size)

    @property
    def reach(self) -> int | None:
        return self.size


@dataclass(frozen=True)
class PrefixLM(Mask):
    """The first `length` positions of a segment see each other; later ones see what is not later than they.

    Raises: ValueError if length < 0.
    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.2.1 (figure 4, right).
    """

    length: int

    def __post_init__(self):
        if self.length < 0:
            raise ValueError(f"PrefixLM: length={self.length} is negative; use 0 (plain causal) or more")

    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        return (_distance(q, k) >= 0) | (k.positions < self.length)[:, None, None, :]


@dataclass(frozen=True)
class SameSegment(Mask):
    """Query and key belong to one segment, and it is not padding."""

    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        mine = q.segment_ids[:, None, :, None]
        return (mine == k.segment_ids[:, None, None, :]) & (mine != 0)


EVERY = -1
"""The segment of keys that belong to all segments: learned ones that stand before any text."""


@dataclass(frozen=True)
class SameOrEvery(Mask):
    """As SameSegment, and keys of segment EVERY belong to every query that is not padding."""

    def __call__(self, q: Where, k: Where) -> Bool[Array, "B 1 T S"]:
        mine, theirs = q.segment_ids[:, None, :, None], k.segment_ids[:, None, None, :]
        return ((mine == theirs) | (theirs == EVERY)) & (mine != 0)


def sees_next(mask: Mask, where: Where) -> Bool[Array, "B T"]:
    """True where a token may attend to the position after its own, which holds what it is to predict."""
    here, following = (
        Where((where.positions + step).reshape(-1, 1), where.segment_ids.reshape(-1, 1)) for step in (0, 1)
    )
    return mask(here, following).reshape(where.positions.shape)


def _distance(q: Where, k: Where) -> Int[Array, "B 1 T S"]:
    return q.positions[:, None, :, None] - k.positions[:, None, None, :]
