"""Learning from what happens inside a teacher: its hidden states, and which tokens its heads relate to which.

    run = Run(
        enrich=Teacher(path),
        start=(Project(576),),                                          the teacher's width, where they differ
        objective={"hidden": Term(MatchHidden()), "relations": Term(MatchRelations()), "ce": Term(NextToken())},
    )

Layers are counted from 0. Both models keep what these losses read of all their layers, and nothing where none reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx import values
from lmx.losses.base import Loss
from lmx.losses.distill import LEAST, NOTHING, kl


@dataclass(frozen=True)
class MatchHidden(Loss):
    """mean over pairs of layers and features of (h_student W - h_teacher)**2, per token, of the layers' outputs.

    layers: "uniform" pairs layer i of the student's L with the teacher's of number round((i + 1) L' / L) - 1, so the
      last ones with each other; "last" is that pair alone; or the pairs themselves, ((student, teacher), ...).
    measure: "mse", or "cosine", 1 - cos of the angle between them, to which how long they are is all the same.
    W is the `project` of `lmx.adapt.Project`, shared by all pairs, or nothing where the widths are the same.
    Raises: ValueError, when called, for a batch without such a teacher, a layer that is not there, or widths that
      differ without a W.
    Source: Jiao et al. 2019 (TinyBERT), arXiv:1909.10351, equations 6 and 8; Sanh et al. 2019 (DistilBERT),
      arXiv:1910.01108, section 3, for the cosine.
    """

    layers: str | tuple[tuple[int, int], ...] = "uniform"
    measure: str = "mse"
    local: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("hidden",)

    def __post_init__(self):
        if self.measure not in ("mse", "cosine"):
            raise ValueError(f'MatchHidden: measure={self.measure!r}; use "mse" or "cosine"')
        if isinstance(self.layers, str) and self.layers not in ("uniform", "last"):
            raise ValueError(
                f'MatchHidden: layers={self.layers!r}; use "uniform", "last" or ((student, teacher), ...)'
            )
        if not self.layers:
            raise ValueError('MatchHidden: layers=() matches nothing; use "uniform"')

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        student, teacher = _kept(self, out, batch)
        mine, theirs = student["hidden"], teacher["hidden"]
        pairs = self.pairs(mine.shape[0], theirs.shape[0])
        mine, theirs = (x[jnp.array(at)].astype(jnp.float32) for x, at in zip((mine, theirs), zip(*pairs)))
        if "project" in student:
            mine = mine @ student["project"].astype(jnp.float32)
        if mine.shape[-1] != theirs.shape[-1]:
            raise ValueError(
                f"MatchHidden: the student's states are {mine.shape[-1]} wide and the teacher's {theirs.shape[-1]}; "
                f"add Project({theirs.shape[-1]}) to start"
            )
        if self.measure == "mse":
            return jnp.square(mine - theirs).mean((0, -1))
        squares = jnp.square(mine).sum(-1) * jnp.square(theirs).sum(-1)
        return 1.0 - ((mine * theirs).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, LEAST))).mean(0)

    def pairs(self, n_student: int, n_teacher: int) -> list[tuple[int, int]]:
        """(layer of the student, layer of the teacher), from 0.

        Raises: ValueError for a pair of which a layer is not there.
        """
        if self.layers == "uniform":
            return [(i, max(0, round((i + 1) * n_teacher / n_student) - 1)) for i in range(n_student)]
        if self.layers == "last":
            return [(n_student - 1, n_teacher - 1)]
        for pair in self.layers:
            if not (0 <= pair[0] < n_student and 0 <= pair[1] < n_teacher):
                raise ValueError(
                    f"MatchHidden: pair {pair} of layers of {n_student} and {n_teacher}; count them from 0"
                )
        return list(self.layers)


@dataclass(frozen=True)
class MatchRelations(Loss):
    """mean over relation heads of KL(softmax(A A^T / sqrt d) of the teacher || of the student), per token.

    Row t of a relation says how much token t has to do with each token of its segment up to itself. A is the last
    layer's queries, keys or values, all heads side by side, cut anew into the same number of relation heads in both
    models; so neither widths nor heads need agree, and no projection is learned. Memory grows with T squared.
    of: what is related, summed. heads: relation heads, which divide the width of each A in both models.
    Raises: ValueError, when called, for a batch without such a teacher, or widths that the heads do not divide.
    Source: Wang et al. 2020 (MiniLMv2), arXiv:2012.15828, equations 4 to 6, whose relations are not causal.
    """

    of: tuple[str, ...] = ("queries", "keys", "values")
    heads: int = 8
    local: ClassVar[bool] = False

    def __post_init__(self):
        values.check(self, heads="[1, inf)")
        if not self.of or set(self.of) - {"queries", "keys", "values"}:
            raise ValueError(f'MatchRelations: of={self.of}; use some of "queries", "keys", "values"')

    @property
    def reads(self) -> tuple[str, ...]:
        return self.of

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        both = _kept(self, out, batch)
        segments = batch.get("segment_ids", jnp.ones(out.hidden.shape[:2], jnp.int32))
        T = segments.shape[1]
        seen = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(T, dtype=bool)[None]
        total = jnp.float32(0)
        for name in self.of:
            teacher, student = (self._relation(kept[name][-1], seen) for kept in both[::-1])
            total += kl(teacher, student).mean(1)
        return total

    def _relation(self, x, seen):
        """Logs [B, R, T, T] of how token t relates to token s."""
        B, T = x.shape[:2]
        width = x.shape[2] * x.shape[3]
        if width % self.heads:
            raise ValueError(
                f"MatchRelations: heads={self.heads} do not divide the {width} features of a layer; use a divisor"
            )
        x = x.reshape(B, T, self.heads, -1).astype(jnp.float32)
        scores = jnp.einsum("btrd,bsrd->brts", x, x) / x.shape[-1] ** 0.5
        return jax.nn.log_softmax(jnp.where(seen[:, None], scores, NOTHING))


def _kept(loss, out, batch):
    """What the layers of (the student, the teacher) were asked for."""
    name = type(loss).__name__
    teacher = batch.get("teacher")
    for who, found, way in (
        ("the student", out, "train with a Run whose objective holds this loss"),
        ("the teacher", teacher, "train with enrich=Teacher(path), one alone"),
    ):
        kept = getattr(found, "kept", None) or {}
        if missing := [x for x in loss.reads if x not in kept]:
            raise ValueError(f"{name}: {who} keeps no {missing[0]} of its layers; {way}")
    return out.kept, teacher.kept
