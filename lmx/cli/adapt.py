"""Adapters of Hugging Face's PEFT: says what one is, merges it into its model, makes one of two models.

  lmx adapt info adapters/poet                                kind, rank, alpha, matrices, the model it is for
  lmx adapt merge SmolLM2-135M-Instruct.gguf adapters/poet merged       one model, as transformers reads it
  lmx adapt merge runs/quickstart/model adapters/poet merged --dtype bfloat16
  lmx adapt extract tuned base adapters/poet --rank 16        what tuning changed, as far as that rank can hold it
  lmx adapt extract tuned base adapters/poet --where "*attn/*"          of attention alone
  lmx adapt gguf SmolLM2-135M-Instruct.gguf adapters/poet poet.gguf     for llama-cli --lora poet.gguf

A model is a Hugging Face folder, a .gguf file or a run's folder; an adapter is a folder with adapter_config.json and
adapter_model.safetensors. LoRA, rank-stabilised LoRA and DoRA are read, on any matrices; what else a folder holds is
an error that names it, and nothing in it is executed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lmx import cli
from lmx.cli.folder import new_folder


@dataclass(frozen=True)
class Info:
    """Says what an adapter is; its model is not needed."""

    adapter: tyro.conf.Positional[Path]
    """The adapter's folder."""


@dataclass(frozen=True)
class Merge:
    """Writes the model with the adapter added to its matrices, as `lmx convert` writes a run."""

    model: tyro.conf.Positional[Path]
    """A Hugging Face folder, a .gguf file or a run's folder."""
    adapter: tyro.conf.Positional[Path]
    """The adapter's folder."""
    out: tyro.conf.Positional[Path]
    """The folder to make; it must not exist, or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of written weights; that of the model's source if not given, or float32."""


@dataclass(frozen=True)
class Extract:
    """Writes the adapter that brings BASE nearest to TUNED: of each matrix's difference the largest singular values."""

    tuned: tyro.conf.Positional[Path]
    """The model that was trained further: a Hugging Face folder, a .gguf file or a run's folder."""
    base: tyro.conf.Positional[Path]
    """The model it was trained from."""
    out: tyro.conf.Positional[Path]
    """The folder to make; it must not exist, or be empty."""
    rank: int = 16
    """Of the adapter of each matrix."""
    where: str | None = None
    """Pattern of the matrices, such as "*attn/*" or "*attn/[qv]/w|head"; those of all layers if not given."""


@dataclass(frozen=True)
class Gguf:
    """Writes the adapter as a GGUF file for llama.cpp, which puts it on the model as it runs."""

    model: tyro.conf.Positional[Path]
    """A Hugging Face folder, a .gguf file or a run's folder; its weights are not read."""
    adapter: tyro.conf.Positional[Path]
    """The adapter's folder."""
    out: tyro.conf.Positional[Path]
    """The .gguf file to make."""


Options = (
    Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Extract, tyro.conf.subcommand("extract")]
    | Annotated[Gguf, tyro.conf.subcommand("gguf")]
)


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "adapt")
    {Info: info, Merge: merge, Extract: extract, Gguf: gguf}[type(asked)](asked)


def info(asked: Info) -> None:
    from lmx.models import peft

    rows = peft.describe(asked.adapter)
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


def merge(asked: Merge) -> None:
    import jax

    from lmx.adapt import Dense, attach
    from lmx.cli.convert import release
    from lmx.models import peft, pretrained
    from lmx.run import trained

    with new_folder(asked.out) as folder:
        family, config, beside = _about(asked.model)
        peft.read(asked.adapter)  # what is refused at all is so before the weights are read
        pretrained.family_of(config, json.loads(beside.get("config.json", "{}")))
        model = trained(asked.model)
        alone = peft.load(asked.adapter, family, config, model.params)
        params = Dense()(attach(model.params, alone), jax.random.key(0))
        family = release(folder, model._replace(params=params), beside, asked.dtype)
    print(f"wrote {asked.out} as {family.model_type}; transformers reads it with {family.architecture}")


def extract(asked: Extract) -> None:
    from lmx import adapt, tree
    from lmx.cli.progress import Progress
    from lmx.models import peft
    from lmx.weights import is_matrix

    if asked.rank < 1:
        raise ValueError(f"--rank {asked.rank}; use 1 or more")
    if asked.where == "":
        raise ValueError('--where "" fits no path; name a pattern such as "*attn/*", or leave it out')
    where = asked.where or adapt.LAYERS
    with new_folder(asked.out) as folder, Progress() as progress:
        family, config, _ = _about(asked.base)
        base, tuned = _params(asked.base), _params(asked.tuned)
        changes = _changes(asked, base, tuned)
        chosen = [path for path in changes if is_matrix(path) and tree.matches(path, where)]
        if not chosen:
            raise ValueError(f"no matrix that fits {where!r} differs; those that do are {', '.join(changes)}")
        total, done = sum(changes[path][1] for path in chosen), 0

        def seen(path: str) -> None:
            nonlocal done
            done += changes[path][1]
            progress("singular values", done, total)

        progress("singular values", 0, total)
        alone = adapt.extract(tuned, base, asked.rank, "|".join(chosen), seen)
        peft.save(folder, family, config, alone, base=str(asked.base))
    print(_table(alone, changes))
    print(f"wrote {asked.out}; `lmx adapt info {asked.out}` says what it is")


def gguf(asked: Gguf) -> None:
    from lmx.models import gguf_adapter, peft

    if asked.out.suffix != ".gguf":
        raise ValueError(f"{asked.out}: name a file that ends in .gguf")
    if os.path.lexists(asked.out):
        raise ValueError(f"{asked.out} is already there; name a new file")
    family, config, _ = _about(asked.model)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    gguf_adapter.save(asked.out, family, config, peft.load(asked.adapter, family, config))
    print(f"wrote {asked.out}; `llama-cli -m MODEL.gguf --lora {asked.out}` reads it")


def _about(source: Path) -> tuple[Any, Any, dict[str, str]]:
    """Family and config of a model, and what came beside its weights: name -> text."""
    from lmx import run as runs
    from lmx.models import pretrained

    if pretrained.is_released(source):
        found = pretrained.find(source)
        return found.family, found.config, found.beside()
    config = runs.load(source / "run.txt").model
    beside = pretrained.beside(source / pretrained.KEPT)
    like = json.loads(beside.get("config.json", "{}"))
    return pretrained.family_of(config, like), config, beside


def _params(source: Path) -> Any:
    from lmx.models import pretrained
    from lmx.run import trained

    if pretrained.is_released(source):
        return pretrained.load(pretrained.find(source))
    return trained(source).params


def _changes(asked: Extract, base: Any, tuned: Any) -> dict[str, tuple[float, int]]:
    """Path -> (sum of squares of the difference, bytes) of the parameters that differ.

    Raises: ValueError if they are not of one model, not finite, or equal.
    """
    import numpy as np

    from lmx import tree
    from lmx.weights import Weight, dense, shape_of

    before, after = tree.nodes(base, Weight), tree.nodes(tuned, Weight)
    for path in {**before, **after}:
        here, there = (shape_of(x[path]) if path in x else "missing" for x in (before, after))
        if here != there:
            raise ValueError(
                f"{path} is {here} in {asked.base} and {there} in {asked.tuned}: not of one model"
            )
    found = {}
    for path, w in before.items():
        there, here = np.asarray(dense(after[path])), np.asarray(dense(w))
        for model, x in ((asked.tuned, there), (asked.base, here)):
            if not np.isfinite(x).all():
                raise ValueError(
                    f"{model}: {path} holds numbers that are not finite; train it anew, or fetch it"
                )
        difference = there - here
        if size := float(np.square(difference, dtype=np.float64).sum()):
            found[path] = (size, difference.nbytes)
    if not found:
        raise ValueError(f"{asked.tuned} and {asked.base} are equal; there is nothing to extract")
    return found


def _table(alone: Any, changes: dict[str, tuple[float, int]]) -> str:
    """What each adapter holds of its matrix's difference, and of the model's, in squares."""
    import numpy as np

    from lmx import tree
    from lmx.report.table import Table
    from lmx.weights import Transposed, Weight

    whole = sum(size for size, _ in changes.values())
    rows, kept = [], 0.0
    for path, w in tree.nodes(alone, Weight).items():
        low = w.base if isinstance(w, Transposed) else w
        a, b = (np.asarray(x, np.float64) for x in (low.a, low.b))
        held = float((np.swapaxes(a, -1, -2) @ a * (b @ np.swapaxes(b, -1, -2))).sum()) * low.scale**2
        kept += held
        rows.append(
            (path, low.a.shape[-1], f"{held / changes[path][0]:.1%}", f"{changes[path][0] / whole:.1%}")
        )
    left = [path for path in changes if path not in {row[0] for row in rows}]
    columns = ("matrix", "rank", "held", "of the whole difference")
    text = Table(columns, tuple(rows), caption="sums of squares").text()
    lost = f"; not in it: {', '.join(left)} ({sum(changes[p][0] for p in left) / whole:.1%})" if left else ""
    return f"{text}\nthe adapter holds {kept / whole:.1%} of the whole difference{lost}"
