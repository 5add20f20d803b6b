"""Learning from a teacher's distribution over the next token: divergences between it, p, and the student's, q.

    p_T = softmax(teacher logits / T),   q_T = softmax(student logits / T)

    ForwardKL         T^2 sum p_T log(p_T / q_T)                       covers all that the teacher might say
    ReverseKL         T^2 sum q_T log(q_T / p_T)                       keeps to what the teacher would say
    Jsd               T^2 (b KL(p_T || m) + (1 - b) KL(q_T || m)),     m = b p_T + (1 - b) q_T
    TotalVariation    T sum |p_T - q_T| / 2
    Uld               T sum |sorted p_T - sorted q_T|                  of any two vocabularies

    objective = {"kd": Term(Chunked(ForwardKL(2.0)), 0.7), "ce": Term(NextToken(), 0.3)}

The teacher answers online, as batch entry `teacher`, a model's answer with `logits` (`enrich=Teacher(path)` puts it
there), or was asked before: `teacher_ids` int32 [B, T, k] are its likeliest tokens, all different, and `teacher_log_p`
float32 [B, T, k] the logs of their probabilities at T = 1, in nats. Of a store the divergence is between k + 1 cells,
the last of which holds all other tokens (the tail bucket): a lower bound of the whole one, equal to it where k = V.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx import values
from lmx.losses.base import Loss

PADDING = 1024
"""Vocabularies of one tokenizer differ by fewer words than this, which a model adds so that its matrices split."""
LEAST = 1e-12
"""The least mass of a tail, which rounding may have made 0 or less."""
NOTHING = -1e30
"""The log of no probability: finite, so that 0 times it is 0."""


@dataclass(frozen=True)
class Divergence(Loss):
    """Of the student's distribution from the teacher's, per token, in nats where it is a KL.

    temperature: T, dimensionless; above 1 the unlikely tokens weigh more. A power of it keeps the gradient's scale.
    No gradient reaches the teacher. Where its vocabulary and the student's differ by fewer than PADDING words they are
    compared, with a warning, on those that both have.
    Raises: ValueError for a temperature that is not positive; when called, for a batch without a teacher, vocabularies
      that differ by more, or T other than 1 on a store that holds fewer than all tokens.
    """

    temperature: float = 1.0
    power: ClassVar[int] = 2

    def __post_init__(self):
        values.check(self, temperature="(0, inf)")

    @abstractmethod
    def between(self, log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        """Of two distributions over the same cells, each adding up to 1, without the power of the temperature."""

    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        if "teacher" in batch:
            log_p, log_q = self._online(out.logits, batch["teacher"].logits)
        elif "teacher_ids" in batch:
            log_p, log_q = self._stored(out.logits, batch["teacher_ids"], batch["teacher_log_p"])
        else:
            raise ValueError(
                f"{self}: the batch has no teacher; train with enrich=Teacher(path), or on data that a teacher labelled"
            )
        return self.temperature**self.power * self.between(jax.lax.stop_gradient(log_p), log_q)

    def _online(self, student, teacher):
        there, here = teacher.shape[-1], student.shape[-1]
        V = shared_words(there, here, type(self).__name__)
        if there != here:
            warnings.warn(
                f"the teacher has {there} words and the student {here}: what one has more is taken for padding and "
                "left out of the comparison",
                stacklevel=2,
            )
        return tuple(jax.nn.log_softmax(x[..., :V] / self.temperature) for x in (teacher, student))

    def _stored(self, student, ids, log_p):
        k, V = ids.shape[-1], student.shape[-1]
        known = ids < V
        log_p = jnp.where(known, log_p.astype(jnp.float32), NOTHING)
        chosen = jnp.take_along_axis(student, jnp.where(known, ids, 0), -1)
        if k >= V:
            chosen = jnp.where(known, chosen, NOTHING)
            return tuple(jax.nn.log_softmax(x / self.temperature) for x in (log_p, chosen))
        self._check_as_stored(k)
        log_z = jax.nn.logsumexp(student, -1, keepdims=True)
        others = jnp.put_along_axis(student, ids, -jnp.inf, -1, inplace=False, mode="drop")
        tail_p = jnp.log(jnp.maximum(1.0 - jnp.exp(log_p).sum(-1, keepdims=True), LEAST))
        tail_q = jax.nn.logsumexp(others, -1, keepdims=True) - log_z
        log_q = jnp.where(known, chosen - log_z, NOTHING)
        return jnp.concatenate([log_p, tail_p], -1), jnp.concatenate([log_q, tail_q], -1)

    def _check_as_stored(self, k):
        if self.temperature != 1.0:
            raise ValueError(
                f"{self}: of this teacher {k} likeliest tokens were stored, at temperature 1, and how the others would "
                "share their mass at another is not known; use temperature=1.0, or enrich=Teacher(path)"
            )


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """T^2 KL(p_T || q_T): the student has to cover all that the teacher holds likely.

    Its gradient in the student's logits is T (q_T - p_T).
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, less the entropy of p_T, which is constant.
    """

    def between(self, log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        return kl(log_p, log_q)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """T^2 KL(q_T || p_T): the student may leave out what it cannot hold, and says little that the teacher would not.

    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543, section 2.1, here per token and on any text.
    """

    def between(self, log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        return kl(log_q, log_p)


@dataclass(frozen=True)
class Jsd(Divergence):
    """T^2 times the generalised Jensen-Shannon divergence, between the two KLs and bounded where they are not.

    beta: share of the teacher in the mixture m, in [0, 1]. The divergence vanishes with beta at both ends, so there it
      is what it is proportional to: 0 is `ForwardKL`, 1 is `ReverseKL`.
    Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649, section 2; the ends are those of TRL's GKDTrainer.
    """

    beta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        values.check(self, beta="[0, 1]")

    def between(self, log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        b = self.beta
        if b in (0.0, 1.0):
            return kl(log_q, log_p) if b else kl(log_p, log_q)
        log_m = jnp.logaddexp(log_p + jnp.log(b), log_q + jnp.log1p(-b))
        return b * kl(log_p, log_m) + (1.0 - b) * kl(log_q, log_m)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """T sum |p_T - q_T| / 2, in [0, T]: at T = 1 the share of sampled tokens that speculative decoding would refuse.

    Source: Wen et al. 2023 (f-distill), arXiv:2307.15190, section 3.
    """

    power: ClassVar[int] = 1

    def between(self, log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)


@dataclass(frozen=True)
class Uld(Divergence):
    """T sum over i of |p_(i) - q_(i)| of probabilities sorted from the largest, for teachers of another tokenizer.

    Which words they are of is not asked, so vocabularies may be any; the smaller one has zeros at its end. A teacher of
    another tokenizer labels the positions it knows, `Term(Uld(), mask="teacher_mask")`; of its labels the words beyond
    the k are one cell.
    Source: Boizard et al. 2024 (Universal Logit Distillation), arXiv:2402.12030, equation 4.
    """

    power: ClassVar[int] = 1

    def _online(self, student, teacher):
        logs = [_sorted(jax.nn.log_softmax(x / self.temperature)) for x in (teacher, student)]
        V = max(x.shape[-1] for x in logs)
        return tuple(
            jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, V - x.shape[-1])], constant_values=NOTHING)
            for x in logs
        )

    def _stored(self, student, ids, log_p):
        k = min(log_p.shape[-1], student.shape[-1])
        self._check_as_stored(k)
        p, q = (jnp.exp(_sorted(x)) for x in (log_p.astype(jnp.float32), jax.nn.log_softmax(student)))
        cells = [jnp.concatenate([x[..., :k], 1.0 - x[..., :k].sum(-1, keepdims=True)], -1) for x in (p, q)]
        return tuple(jnp.log(jnp.maximum(x, LEAST)) for x in cells)

    def between(self, log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Float[Array, "*B"]:
        return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)


def _sorted(x):
    """From the largest, along the last axis."""
    return -jnp.sort(-x, -1)


def kl(log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """sum p log(p / q), in nats."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def shared_words(teacher: int, student: int, who: str) -> int:
    """How many words two vocabularies share, of one tokenizer whose models pad it differently.

    Raises: ValueError if they differ by PADDING or more.
    """
    if abs(teacher - student) >= PADDING:
        raise ValueError(
            f"{who}: the teacher has {teacher} words and the student {student}, more apart than padding; use models of "
            "one tokenizer, or have the teacher label the text before: lmx distill label"
        )
    return min(teacher, student)
