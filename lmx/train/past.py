"""What a run of before has learned, read from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmx import tree, values
from lmx.models import TransformerConfig, build
from lmx.models.transformer import AIDS
from lmx.train import stored
from lmx.train.checkpoint import find_step, load_params
from lmx.train.load import checkpointed
from lmx.train.program import loaded_first, rest_of
from lmx.weights.describe import describe
from lmx.weights.surgery import Surgery


@dataclass(frozen=True)
class Past:
    """Of a run's settings those that its parameters follow from, and the length of its rows."""

    model: TransformerConfig
    start: tuple[Surgery, ...]
    trainable: str
    seed: int
    seq_len: int


def past(folder: Path) -> Past:
    """Raises: FileNotFoundError if there is no run; ValueError naming the setting that cannot be read."""
    path = folder / "run.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no model; give the folder of a run, a Hugging Face folder or a GGUF file"
        )
    text = path.read_text(encoding="utf-8")
    kinds = {
        "model": TransformerConfig,
        "start": tuple[Surgery, ...],
        "trainable": str,
        "seed": int,
        "data.seq_len": int,
    }
    return Past(*(values.part(text, name, kind, str(path)) for name, kind in kinds.items()))


def shapes(folder: Path, run: Any, step: int | str = "latest") -> Any:
    """Of `learned`, as ShapeDtypeStruct; no weight is read. run: the folder's, as `Past` or whole."""
    load = loaded_first(run.start)
    if load is None or run.trainable == "*":
        return checkpointed(find_step(folder.absolute(), step))
    base = load.shapes(_fresh(run))
    return _without_aids(jax.eval_shape(rest_of(run.start), base, jax.random.key(0)))


def learned(folder: Path, run: Any, step: int | str = "latest", ema: bool = False) -> Any:
    """The parameters, on what they were loaded from where what learned alone is saved.

    Raises: FileNotFoundError, ValueError as `load_params`; ValueError if what they stand on has changed.
    """
    load = loaded_first(run.start)
    if load is None or run.trainable == "*":
        return load_params(folder, None, step, ema)
    checkpoint = find_step(folder.absolute(), step)
    load.check_unchanged(checkpoint)
    base = load.read(_fresh(run))
    key = jax.random.fold_in(jax.random.key(np.uint32(run.seed)), 1)
    made = _without_aids(jax.jit(rest_of(run.start))(base, key))
    trainable, frozen = tree.partition(made, run.trainable)
    params = tree.combine(load_params(folder, trainable, step, ema), frozen)
    known = stored.about(checkpoint)["meta"].get("weights")
    if known is not None and json.loads(json.dumps(describe(params))) != _without_aids(known):
        raise ValueError(
            f"{folder}: the start in run.txt makes other weights than {checkpoint} was trained with, such as another "
            "alpha or other bits; bring the old run.txt back"
        )
    return params


def _without_aids(params: dict) -> dict:
    return {name: x for name, x in params.items() if name not in AIDS}


def _fresh(run: Any) -> Any:
    return jax.eval_shape(build(run.model).init, jax.random.key(0))
