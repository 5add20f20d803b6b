"""The start of fine-tuning: the parameters of a model that was trained before, or released."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lmx import artifact
from lmx.mesh import shardings
from lmx.models import RULES, pretrained
from lmx.train import stored
from lmx.train.checkpoint import find_step, load_params
from lmx.weights import Weight, dense
from lmx.weights.surgery import Surgery


@dataclass(frozen=True)
class Load(Surgery):
    """First among a run's surgeries: `start=(Load("SmolLM2.gguf"), Lora(rank=16))`.

    path: a run's folder, a Hugging Face folder or a GGUF file. step: of a run's checkpoint, a number, "latest" or
    "best". ema: the moving average of a run's parameters. What does not learn is not saved with the run, but read from
    here again.
    """

    path: str
    step: int | str = "latest"
    ema: bool = False

    def __call__(self, params: Any, key: jax.Array) -> Any:
        """The parameters it loads, in place of `params`, which say their shapes.

        Raises: ValueError within a compiled program, which reads no files.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
            raise ValueError(
                f"{self}: a run has one Load, the first of its surgeries; remove this one or put it there"
            )
        return self.read(jax.eval_shape(lambda: params))

    def shapes(self, like: Any) -> Any:
        """What it will load, as ShapeDtypeStruct, without reading it. like: the fresh parameters of the model.

        Raises: FileNotFoundError; ValueError if it is another model.
        """
        path = Path(self.path)
        if pretrained.is_released(path):
            found = pretrained.find(path)
            if found.schemes:
                raise ValueError(f"{path} is quantized; convert it first: lmx convert {path} runs/NAME")
            there = pretrained.shapes(found.config)
        else:
            there = checkpointed(find_step(path.absolute(), self.step))
        if "classes" in there:
            raise ValueError(
                f"{path} has a head of classes already; start from the model that it was made from"
            )
        plain = jax.eval_shape(
            lambda: jax.tree.map(dense, _zeros(there), is_leaf=lambda w: isinstance(w, Weight))
        )
        stored.check_same(
            {p: (str(x.dtype), x.shape) for p, x in stored.leaves(plain).items()}, stored.leaves(like), path
        )
        return there

    def read(self, like: Any, mesh: Mesh | None = None) -> Any:
        """The parameters, spread over the mesh if there is one."""
        path = Path(self.path)
        there = self.shapes(like)
        if pretrained.is_released(path):
            return pretrained.load(pretrained.find(path), mesh)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = shardings(there, RULES, mesh) if mesh else jax.tree.map(lambda _: one, there)
        like = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), there, placed)
        return load_params(path, like, self.step, self.ema)

    def files(self) -> list[Path]:
        """What it reads."""
        path = Path(self.path)
        if pretrained.is_released(path):
            return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        return [find_step(path.absolute(), self.step)]

    def check_unchanged(self, checkpoint: Path) -> None:
        """That it reads what it read when `checkpoint` was trained on it, of which only what learned is saved.

        Raises: ValueError if it does not, as when "latest" is another step by now.
        """
        check_unchanged(self.files(), checkpoint)


def check_unchanged(files: Iterable[Path], checkpoint: Path) -> None:
    """That files are what they were when `checkpoint` was made with them, which does not hold what they do.

    Raises: ValueError naming the first that is not.
    """
    known = artifact.read(checkpoint)
    hashes = {x.hash for x in known.made_from} if known else set()
    for path in files:
        if artifact.find(path).hash not in hashes:
            raise ValueError(
                f"{path} is not what {checkpoint} was trained on, which does not hold it; bring the old one back, or "
                "name its step in run.txt: step=NUMBER of Load or Teacher"
            )


def checkpointed(folder: Path) -> Any:
    """The parameters in a checkpoint, as ShapeDtypeStruct."""
    about = stored.about(folder)
    found = stored.parameters(about).items()
    specs = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (_, (dtype, shape)) in found}
    return stored.arranged(about, specs, folder)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
