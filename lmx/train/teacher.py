"""Other models that answer the same batch inside the step, for losses that learn from what they say.

    run = Run(
        enrich=Teacher("SmolLM2.gguf", start=(Int8(),)),
        objective={"kd": Term(Chunked(ForwardKL(2.0)), 0.7), "ce": Term(NextToken(), 0.3)},
        ...
    )

A teacher is another model's parameters, kept as constants of the run: spread over the mesh as the student's are,
represented as its own surgeries say, never saved with the run, and read again when it resumes. A run's own folder of
before makes it self-distillation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lmx import models
from lmx.data import Tokenizer
from lmx.data.probe import difference
from lmx.losses import reads
from lmx.losses.distill import shared_words
from lmx.mesh import shardings
from lmx.models import RULES, Out, TransformerConfig, pretrained
from lmx.train import past
from lmx.train.checkpoint import find_step
from lmx.train.step import Enrich
from lmx.weights import leaf, static
from lmx.weights.surgery import Surgery, chain


@leaf
class Tutor:
    """A model's parameters, and how it answers a batch with them. keep: what losses read of its layers."""

    params: Any
    config: TransformerConfig = static()
    mesh: Mesh | None = static()
    platform: str = static()
    keep: tuple[str, ...] = static(default=())

    def __call__(self, batch: dict) -> Out:
        model = models.build(self.config, mesh=self.mesh, platform=self.platform)
        return jax.lax.stop_gradient(model.apply(self.params, batch, keep=self.keep))


@dataclass(frozen=True)
class Teacher(Enrich):
    """Adds `teacher`, what another model answers to the batch: its `logits` are computed where a loss reads them.

    path: a run's folder, a Hugging Face folder or a GGUF file, of the run's own tokenizer. start: surgeries on it, such
    as Int8(). step, ema: of a run's checkpoint, as `Load` has them. dtype: of its activations; None is its own.
    """

    path: str
    start: tuple[Surgery, ...] = ()
    step: int | str = "latest"
    ema: bool = False
    dtype: str | None = None

    def files(self) -> list[Path]:
        path = Path(self.path)
        if pretrained.is_released(path):
            return pretrained.find(path).files()
        return [find_step(path.absolute(), self.step)]

    def check(self, run: Any, tokenizer: Tokenizer) -> None:
        """Raises: ValueError for a teacher of another tokenizer or vocabulary, or of shorter texts than the rows."""
        found = _Known.of(Path(self.path))
        if found.context is not None and run.data.seq_len > found.context:
            raise ValueError(
                f"{self.path} was made to read {found.context} tokens at once, and data.seq_len={run.data.seq_len}; "
                f"use data.seq_len={found.context} or less, or another teacher"
            )
        if told := difference(tokenizer, found.tokenizer):
            raise ValueError(
                f"{self.path} has another tokenizer than the run: {told} (the run's, then the teacher's); set "
                f"data.tokenizer=File({self.path!r}), or have it label or write text before: lmx distill"
            )
        shared_words(found.config.vocab_size, run.model.vocab_size, self.path)

    def shapes(self, run: Any, trainable: Any, mesh: Mesh) -> Tutor:
        found = _Known.of(Path(self.path))
        params = jax.eval_shape(self._changed, found.shapes(self.step), jax.random.key(0))
        placed = shardings(params, RULES, mesh)
        params = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, placed
        )
        config = replace(found.config, remat="none", dtype=self.dtype or found.config.dtype)
        platform = mesh.devices.flat[0].platform
        return Tutor(params, config, None if run.mesh.pmap else mesh, platform, reads(run.objective))

    def constants(self, run: Any, trainable: Any, mesh: Mesh) -> Tutor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="mesh: not divisible")  # `shapes` has said it
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            wanted = self.shapes(run, trainable, mesh)
            placed = jax.tree.map(lambda x: x.sharding, wanted.params)
            params = _Known.of(Path(self.path)).read(self.step, self.ema, mesh)
            if self.start:
                change = jax.jit(self._changed, out_shardings=placed, donate_argnums=0)
                params = change(params, jax.random.key(0))
            return replace(wanted, params=jax.device_put(params, placed))

    def __call__(self, constants: Tutor, batch: dict, answer: Callable[[Any], Any]) -> dict:
        return batch | {"teacher": constants(batch)}

    def _changed(self, params, key):
        return chain(*self.start)(params, key)


@leaf
class Mixed:
    """What several models answer together, as one: `hidden` and `heads` are theirs, `logits` the log of the mean of
    their probabilities, or the mean of the logs."""

    hidden: tuple
    heads: tuple
    softcaps: tuple = static()
    weights: tuple = static()
    mean: str = static()

    @property
    def logits(self) -> Float[Array, "B T V"]:
        each = [Out(*one).logits for one in zip(self.hidden, self.heads, self.softcaps)]
        V = min(x.shape[-1] for x in each)
        logs = [jax.nn.log_softmax(x[..., :V]) for x in each]
        if self.mean == "log_p":
            return sum(w * x for w, x in zip(self.weights, logs))
        return jax.nn.logsumexp(jnp.stack([x + jnp.log(w) for w, x in zip(self.weights, logs)]), axis=0)


@dataclass(frozen=True)
class Teachers(Enrich):
    """Adds `teacher`, what several models answer together.

    weights: share of each, adding up to 1; () is the same for all. mean: "p", of their probabilities, holds likely what
    any of them does; "log_p", of the logs, what all of them do (their geometric mean, made to add up to 1).
    """

    each: tuple[Teacher, ...]
    weights: tuple[float, ...] = ()
    mean: str = "p"

    def __post_init__(self):
        if not self.each:
            raise ValueError("Teachers: none is given; use (Teacher(path), ...)")
        if self.weights and (
            len(self.weights) != len(self.each) or min(self.weights) <= 0 or abs(sum(self.weights) - 1) > 1e-6
        ):
            raise ValueError(
                f"Teachers: weights={self.weights} are not {len(self.each)} positive shares that add up to 1"
            )
        if self.mean not in ("p", "log_p"):
            raise ValueError(f'Teachers: mean={self.mean!r}; use "p" or "log_p"')

    def files(self) -> list[Path]:
        return [path for teacher in self.each for path in teacher.files()]

    def check(self, run: Any, tokenizer: Tokenizer) -> None:
        for teacher in self.each:
            teacher.check(run, tokenizer)

    def shapes(self, run: Any, trainable: Any, mesh: Mesh) -> tuple[Tutor, ...]:
        return tuple(teacher.shapes(run, trainable, mesh) for teacher in self.each)

    def constants(self, run: Any, trainable: Any, mesh: Mesh) -> tuple[Tutor, ...]:
        return tuple(teacher.constants(run, trainable, mesh) for teacher in self.each)

    def __call__(self, constants: tuple[Tutor, ...], batch: dict, answer: Callable[[Any], Any]) -> dict:
        outs = [tutor(batch) for tutor in constants]
        hidden, heads, softcaps = zip(*((out.hidden, out.head, out.softcap) for out in outs))
        weights = self.weights or (1.0 / len(outs),) * len(outs)
        return batch | {"teacher": Mixed(hidden, heads, softcaps, weights, self.mean)}


@dataclass(frozen=True)
class _Known:
    """A model on disk: released, or of a run."""

    path: Path
    config: TransformerConfig
    context: int | None
    found: Any

    @classmethod
    def of(cls, path: Path) -> _Known:
        if pretrained.is_released(path):
            found = pretrained.find(path)
            if found.schemes:
                raise ValueError(
                    f"{path} is quantized; convert it first: lmx convert {path} runs/NAME, and give Teacher's start "
                    "an Int8() or Int4()"
                )
            return cls(path, found.config, found.context, found)
        found = past.past(path)
        kept = path / pretrained.KEPT
        context = pretrained.context(pretrained.beside(kept), kept) or found.seq_len
        return cls(path, found.model, context, found)

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path) if isinstance(self.found, past.Past) else self.found.tokenizer()

    def shapes(self, step: int | str) -> Any:
        if isinstance(self.found, past.Past):
            return past.shapes(self.path, self.found, step)
        return pretrained.shapes(self.config)

    def read(self, step: int | str, ema: bool, mesh: Mesh) -> Any:
        if not isinstance(self.found, past.Past):
            return pretrained.load(self.found, mesh)
        params = past.learned(self.path, self.found, step, ema)
        return jax.device_put(params, shardings(params, RULES, mesh))
