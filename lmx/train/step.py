"""The one training step: pretraining, adapters, preferences and distillation differ in what they pass to it.

    g = sum over micro-batches of  d/d(trainable)  sum over terms of  weight * sum(loss * mask) / n

n counts the tokens of each term over the whole batch, so gradients do not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lmx import tree
from lmx.losses import counts, log_p, total
from lmx.train.state import State


@dataclass(frozen=True)
class Enrich:
    """(constants, batch) -> batch with more entries, inside the compiled step; this one adds none.

    Its constants are arrays that never change and are not saved with a run, but made again when it resumes.
    """

    def files(self) -> list[Path]:
        """What it reads, whose hashes a run's checkpoints keep."""
        return []

    def check(self, run: Any, tokenizer: Any) -> None:
        """Before a run starts. Raises: ValueError if what it adds does not fit the run, or the run's tokenizer."""

    def shapes(self, run: Any, trainable: Any, mesh: Mesh) -> Any:
        """Its constants as ShapeDtypeStruct, each with its place on the mesh, without reading or making an array.

        Args:
          trainable: the parameters that learn, as ShapeDtypeStruct, with None in place of the others.
        """
        return None

    def constants(self, run: Any, trainable: Any, mesh: Mesh) -> Any:
        """Its constants, outside of compiled programs, so they may come from files.

        Args:
          trainable: the parameters that learn, before they have. The step gives up their buffers: copy what is kept.
        """
        return None

    def __call__(self, constants: Any, batch: dict, answer: Callable[[Any], Any]) -> dict:
        """The batch with more entries, through which no gradient passes.

        Args:
          answer: other values for what is trainable -> what the run's model answers to the batch with them.
        """
        return batch


@dataclass(frozen=True)
class Reference(Enrich):
    """Adds `reference` [B, T] float32: the log probability, in nats, that each label had when the run started.

    What is not trainable is shared with the model: beside an adapter only another copy of the adapter is kept.
    """

    def shapes(self, run: Any, trainable: Any, mesh: Mesh) -> Any:
        return trainable

    def constants(self, run: Any, trainable: Any, mesh: Mesh) -> Any:
        return jax.tree.map(jnp.copy, trainable)

    def __call__(self, constants: Any, batch: dict, answer: Callable[[Any], Any]) -> dict:
        return batch | {"reference": log_p(answer(constants), batch)}


def train_step(
    state: State,
    batch: dict,
    *,
    apply: Callable,
    objective: dict,
    tx: optax.GradientTransformation,
    enrich: Callable = Enrich(),
    n_micro: int = 1,
    reduce: Callable = lambda sums: sums,
    salt: int | jax.Array = 0,
) -> tuple[State, dict]:
    """One update from a batch of [B, T] arrays, cut into n_micro parts of B / n_micro rows.

    An update whose loss or gradient is not finite is left out and counted; the step still counts.
    Args:
      reduce: sums a tree over devices, where the step sees one device's share (`pmap`); there `salt` is its number.
    Returns: (state, metrics): loss, each term, grad_norm, tokens, skipped and streak as float32 or int32 scalars.
      Tokens are those that count, a mean over terms; there are none where all terms are of pairs.
    """
    n = reduce(counts(objective, batch))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), salt)

    def loss_fn(trainable, micro, i):
        micro = enrich(state.constants, micro, lambda x: apply(tree.combine(x, state.frozen), micro))
        out = apply(tree.combine(trainable, state.frozen), micro, jax.random.fold_in(key, i))
        return total(objective, out, micro, n)

    (loss, terms), grads = reduce(_sum_over_micro(loss_fn, state.trainable, batch, n_micro))
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    trainable, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (trainable, opt_state),
        (state.trainable, state.opt_state),
    )
    missed = (~finite).astype(jnp.int32)
    new = replace(
        state,
        step=state.step + 1,
        trainable=trainable,
        opt_state=opt_state,
        skipped=state.skipped + missed,
        streak=(state.streak + 1) * missed,
    )
    metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": new.skipped, "streak": new.streak}
    tokens = [n[name] for name, term in objective.items() if not term.loss.of_pairs]
    metrics |= {"tokens": sum(tokens) / len(tokens)} if tokens else {}
    return new, metrics | ({} if len(terms) == 1 else terms)


def _sum_over_micro(loss_fn, trainable, batch, n_micro):
    """((loss, terms), gradients) summed over the micro-batches, each spread over all devices that hold the batch."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if n_micro == 1:
        return grad_fn(trainable, batch, 0)
    micros = jax.tree.map(lambda x: x.reshape(-1, n_micro, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], micros)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, trainable, first, jnp.int32(0))
    )

    def add(sums, xs):
        return jax.tree.map(jnp.add, sums, grad_fn(trainable, *xs)), None

    return jax.lax.scan(add, zeros, (micros, jnp.arange(n_micro, dtype=jnp.int32)))[0]
