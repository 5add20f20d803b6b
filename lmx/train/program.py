"""A run's compiled functions on a mesh, made from its values and nothing else: no data, no files.

The same functions train here, and compile for a machine that is not here (`lmx plan`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import losses, models, tree
from lmx import mesh as meshes
from lmx.ops.mask import Mask, Where, sees_next
from lmx.train.load import Load
from lmx.train.state import State, new_state
from lmx.train.step import train_step
from lmx.weights.surgery import Surgery, chain

BATCH_DTYPES = {
    "tokens": np.int32,
    "labels": np.int32,
    "loss_mask": np.float32,
    "positions": np.int32,
    "segment_ids": np.int32,
}
PAIR_DTYPES = {"rejected_mask": np.float32, "pair_mask": np.float32}
TEACHER_DTYPES = {"teacher_ids": np.int32, "teacher_log_p": np.float32}


class Program(NamedTuple):
    """init(seed) -> State; step(state, batch) -> (state, metrics); evaluate(params, constants, batch) -> (sums, counts)
    of each term of `judged`; shapes: State of ShapeDtypeStruct with shardings; place(host batch) -> arrays on the mesh.
    """

    model: models.Model
    mesh: Mesh
    init: Callable[[int], State]
    step: Callable
    evaluate: Callable
    shapes: State
    place: Callable


def program(run: Any, mesh: Mesh) -> Program:
    """Compiled lazily by jax, at the first call of each function.

    Raises: ValueError if the batch does not split over the mesh, a pattern fits no parameter, or a parameter has no
      sharding rule.
    """
    meshes.check_batch(run.data.batch_size, run.n_micro, mesh)
    _check_lengths(run)
    pmap = run.mesh.pmap
    if pmap and jax.process_count() > 1:
        raise ValueError("mesh.pmap=True serves the devices of one process; set it to False with several")
    model = models.build(run.model, mesh=None if pmap else mesh, platform=mesh.devices.flat[0].platform)

    load = loaded_first(run.start)
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    base = load and load.shapes(fresh)

    def params_of(base, key):
        params = base if load else model.init(jax.random.fold_in(key, 0))
        return rest_of(run.start)(params, jax.random.fold_in(key, 1))

    shapes = jax.eval_shape(lambda base: params_of(base, jax.random.key(0)), base)
    hide = _of_classes if "classes" in shapes else _hidden_labels(run.model.attention.mask, run.data.seq_len)
    tx = run.optim.build(run.steps, tree.partition(shapes, run.trainable)[0])

    def init(base: Any, seed: jax.Array) -> State:
        key = jax.random.key(seed)
        params = params_of(base, key)
        return new_state(params, run.trainable, tx, jax.random.fold_in(key, 2))

    state_shapes = jax.eval_shape(init, base, np.uint32(0))
    first = _placed(state_shapes, mesh)
    state_shapes = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state_shapes, first
    )
    constants = run.enrich.shapes(run, state_shapes.trainable, mesh)
    state_shapes = replace(state_shapes, constants=constants)
    placed = jax.tree.map(lambda x: x.sharding, state_shapes)
    apply = partial(model.apply, keep=losses.reads(run.objective))
    one_step = partial(
        train_step, apply=apply, objective=run.objective, tx=tx, enrich=run.enrich, n_micro=run.n_micro
    )

    def step(state, batch, **more):
        batch = run.enrich.before(model, state, batch, more.get("salt", 0))
        return one_step(state, hide(batch), **more)

    fresh_state = jax.jit(init, out_shardings=first, donate_argnums=0)

    def start(seed: int) -> State:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Some donated buffers")  # codes take less
            state = fresh_state(load and load.read(fresh, None if pmap else mesh), np.uint32(seed))
        return replace(state, constants=run.enrich.constants(run, state.trainable, mesh))

    if pmap:
        step = _pmapped(step, mesh)
    else:
        step = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, P())))
    return Program(
        model,
        mesh,
        start,
        step,
        jax.jit(
            lambda params, constants, batch: _evaluate(run, model, params, constants, hide(batch)),
            out_shardings=NamedSharding(mesh, P()),
        ),
        state_shapes,
        partial(_place, NamedSharding(mesh, meshes.BATCH)),
    )


def loaded_first(start: tuple[Surgery, ...]) -> Load | None:
    """What a run's surgeries begin with, if it is a model from before."""
    return start[0] if start and isinstance(start[0], Load) else None


def rest_of(start: tuple[Surgery, ...]) -> Callable:
    """The surgeries after `loaded_first`, each with the key that is its own in the whole chain."""
    return chain(*(Surgery() if i == 0 and isinstance(x, Load) else x for i, x in enumerate(start)))


def judged(run: Any) -> dict[str, losses.Term]:
    """What held-out data is judged by: its next tokens or its scores, whatever a run learns, so that runs compare; but
    a run that learns from pairs by its own objective."""
    if any(term.loss.of_pairs for term in run.objective.values()):
        return run.objective
    return {"loss": losses.Term(losses.SoftLabels() if _scored(run.data) else _CrossEntropy())}


def _scored(data: Any) -> bool:
    return any(getattr(one, "scored", False) for one in data.train)


def batch_shapes(run: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of a run: [B, T] each, or [B, T, k] of a teacher's labels, rows over data and fsdp."""
    shape = (run.data.batch_size, run.data.seq_len)
    sharding = NamedSharding(mesh, meshes.BATCH)
    dtypes = BATCH_DTYPES | (PAIR_DTYPES if judged(run) is run.objective else {})
    if _scored(run.data):
        dtypes = dtypes | {"scores": np.float32}
    if run.data.teacher is not None:
        dtypes = dtypes | {"teacher_mask": np.float32}
    found = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    if run.data.teacher is not None:
        shape = (*shape, run.data.teacher.width)
        for name, dtype in TEACHER_DTYPES.items():
            found[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return found


def _placed(state: State, mesh: Mesh) -> State:
    params = state.params
    placed = meshes.shardings(params, models.RULES, mesh)
    return meshes.follow(state, params, placed, mesh)


def _check_lengths(run: Any) -> None:
    """Raises: ValueError if rows are longer than the positions that the model can tell apart."""
    limit = run.model.position.max_len()
    for name, lengths in (("data.seq_len", (run.data.seq_len,)), ("eval_lengths", run.eval_lengths)):
        for length in lengths:
            if limit is not None and length > limit:
                raise ValueError(
                    f"{name}: {length} is more than {run.model.position} has positions; raise one"
                )


def _hidden_labels(mask: Mask, seq_len: int) -> Callable[[dict], dict]:
    """batch -> batch whose masks leave out tokens that attend to their own label, as in a prefix.

    Raises: ValueError if all of them do.
    """
    places = Where(jnp.arange(seq_len, dtype=jnp.int32)[None], jnp.ones((1, seq_len), jnp.int32))
    seen = np.asarray(sees_next(mask, places))
    if seen.all():
        raise ValueError(
            f"model.attention.mask={mask} shows each of {seq_len} tokens its own label; use Causal()"
        )
    if not seen.any():
        return lambda batch: batch

    def hide(batch):
        seen = sees_next(mask, Where(batch["positions"], batch["segment_ids"]))
        masks = (name for name in ("loss_mask", "rejected_mask", "teacher_mask") if name in batch)
        return batch | {name: jnp.where(seen, 0.0, batch[name]) for name in masks}

    return hide


@dataclass(frozen=True)
class _CrossEntropy(losses.Loss):
    """`NextToken` that never holds [B, T, V]."""

    def __call__(self, out, batch):
        return -losses.log_p(out, batch)


def _evaluate(run, model, params, constants, batch):
    """(sums, counts) of each term."""
    terms = judged(run)
    if terms is run.objective:
        batch = run.enrich(constants, batch, lambda x: model.apply(tree.combine(x, params), batch))
    ones = dict.fromkeys(terms, jnp.float32(1))
    out = model.apply(params, batch, keep=losses.reads(terms))
    return losses.total(terms, out, batch, ones)[1], losses.counts(terms, batch)


def _of_classes(batch: dict) -> dict:
    """The batch with labels that do not count, which are words, as 0, which is a class."""
    return batch | {"labels": jnp.where(batch["loss_mask"] > 0, batch["labels"], 0)}


def _place(sharding, batch):
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def _pmapped(step, mesh):
    """The same step over the data axis, each device seeing its share; sums go through psum."""
    axis = "data"
    n = mesh.devices.size

    def share(state, batch):
        return step(state, batch, reduce=partial(jax.lax.psum, axis_name=axis), salt=jax.lax.axis_index(axis))

    mapped = jax.pmap(
        share, axis_name=axis, in_axes=(None, 0), out_axes=(None, None), devices=list(mesh.devices.flat)
    )
    return lambda state, batch: mapped(
        state, {name: jnp.reshape(x, (n, -1, *x.shape[1:])) for name, x in batch.items()}
    )
