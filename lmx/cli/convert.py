"""Reads a released model into a run's folder, or writes a run as a folder that transformers reads, or any model as a
GGUF file that llama.cpp reads.

  lmx convert SmolLM2-135M-Instruct.gguf runs/smollm2       a GGUF file, to evaluate and to generate from
  lmx convert ~/models/Qwen3-0.6B runs/qwen3                a Hugging Face folder: config.json, safetensors, tokenizer
  lmx convert runs/qwen3 exported --dtype bfloat16          back again: what came from bfloat16 files, byte for byte
  lmx convert runs/quickstart/model exported                a model of our own, in the family that computes the same
  lmx convert runs/quickstart/model mine.gguf               one file with tokenizer and chat template, weights in F16
  lmx convert ~/models/Qwen3-0.6B small.gguf --type Q4_K    the same in 4.5 bits a weight
  lmx convert runs/qwen3 small.gguf --type Q3_K --calibration wiki.txt     finest where a text's inputs are large
  lmx convert runs/int4 exported --layout gptq              a quantized one, bit for bit as GPTQ's readers want it

The first form makes a run of no steps: its checkpoint is step 0. A GGUF file is made of a run or a released model
alike: F32 and BF16 and F16 keep or round the weights, Q8_0 costs little, Q6_K, Q5_K, Q4_K ever more; embedding and
head then stay at Q6_K. What lmx cannot represent, or llama.cpp computes otherwise, is an error that names the field,
and so is a pickle: nothing in a model's files is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lmx import cli
from lmx.cli.folder import new_folder

if TYPE_CHECKING:
    from lmx.data import Tokenizer
    from lmx.models.families import Family
    from lmx.run import Run, Trained


@dataclass(frozen=True)
class Options:
    source: tyro.conf.Positional[Path]
    """A Hugging Face folder, a .gguf file, or a run's folder."""
    out: tyro.conf.Positional[Path]
    """The folder to make; it must not exist, or be empty. A name that ends in .gguf is a GGUF file."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of written weights that are not quantized; that of the model's source if not given, or float32."""
    type: (
        Literal[
            "F32",
            "F16",
            "BF16",
            "Q8_0",
            "Q4_0",
            "Q4_1",
            "Q5_0",
            "Q5_1",
            "Q2_K",
            "Q3_K",
            "Q4_K",
            "Q5_K",
            "Q6_K",
        ]
        | None
    ) = None
    """Of a GGUF file's matrices; F16 if not given."""
    calibration: str | None = None
    """Text to see inputs of: a file, a pattern or a source. A matrix of a Q type then loses least where they are
    large."""
    samples: int = 64
    """Windows of the calibration text."""
    length: int = 512
    """Tokens of a window."""
    layout: Literal["compressed-tensors", "gptq", "dense"] | None = None
    """Of quantized matrices; compressed-tensors if not given, which vLLM and transformers read. dense writes the
    numbers that codes stand for, which loses no more than --dtype rounds; activations are then not rounded."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of a run's parameters."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "convert")
    if asked.calibration == "":
        raise ValueError(
            '--calibration "" names no text; give a file, a pattern or a source, or leave it out'
        )
    if asked.out.suffix == ".gguf":
        _to_gguf(asked)
        return
    if asked.calibration:
        raise ValueError(f"--calibration is of GGUF files; end {asked.out} in .gguf, or use `lmx quantize`")
    if asked.type:
        raise ValueError(
            f"--type {asked.type} is of GGUF files; end {asked.out} in .gguf, or use --dtype for a folder"
        )
    if asked.layout and not (asked.source / "run.txt").exists():
        raise ValueError(
            "--layout is of a folder written from a run; a released model is read as it is stored"
        )
    if (asked.source / "run.txt").exists():
        with new_folder(asked.out) as folder:
            family = _release(asked, folder)
        print(f"wrote {asked.out} as {family.model_type}; transformers reads it with {family.architecture}")
        return
    with new_folder(asked.out) as folder:
        _adopt(asked.source, folder, asked.out)
    print(f"wrote {asked.out}; `lmx info {asked.out}`, `lmx generate {asked.out}` and `lmx eval` read it")


def _to_gguf(asked: Options) -> None:
    from lmx.adapt import importance
    from lmx.cli.progress import Steps
    from lmx.cli.quantize import windows
    from lmx.models import gguf_export, layers, pretrained
    from lmx.run import trained

    kind = asked.type or "F16"
    if asked.calibration and not kind.startswith("Q"):
        raise ValueError(
            f"--calibration says nothing to --type {kind}, which rounds each number alone; use a Q type"
        )
    if os.path.lexists(asked.out):
        raise ValueError(f"{asked.out} is already there; name a new file")
    if asked.dtype:
        raise ValueError(
            f"--dtype {asked.dtype} is of folders; give a GGUF file's --type, such as F16 or Q4_K"
        )
    if (asked.source / "run.txt").exists():
        model = trained(asked.source, cli.step_of(asked.source, asked.step), asked.ema)
        kept = asked.source / pretrained.KEPT / "config.json"
        like = pretrained.read_object(kept) if kept.exists() else {}
    else:
        like, model = pretrained.find(asked.source).fields, trained(asked.source)
    found = {}
    if asked.calibration:
        seen = windows(asked.calibration, model, asked.samples, asked.length)
        with Steps("layers") as progress:
            found = importance(layers(model.run.model), model.params, seen, seen=progress)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    fallen = gguf_export.save(
        asked.out,
        model.run.model,
        model.params,
        model.tokenizer,
        kind=kind,
        context=model.context,
        chat=model.chat,
        bos_id=like.get("bos_token_id"),
        like=like.get("model_type"),
        importance=found,
    )
    if fallen:
        types = " or ".join(sorted(set(fallen.values())))
        print(
            f"{len(fallen)} matrices have rows that {kind} does not divide into blocks, and are {types} in its place"
        )
    size = asked.out.stat().st_size / 2**20
    print(f"wrote {asked.out}, {size:,.1f} MiB; `lmx chat`, `lmx generate` and llama.cpp read it")


def _adopt(source: Path, folder: Path, out: Path) -> None:
    """A released model as a run of no steps, written to `folder`, which will be `out`."""
    from lmx.data import Data
    from lmx.models import pretrained
    from lmx.run import Run

    found = pretrained.find(source)
    length = min(found.context or 1024, 1024)
    run = Run(
        model=found.config, data=Data(seq_len=length, clean=False)
    )  # released models read text as it is
    write_run(
        folder,
        out,
        run,
        pretrained.load(found),
        found.tokenizer(),
        found.beside(),
        found.files(),
        {"source": str(source)},
    )


def write_run(
    folder: Path,
    out: Path,
    run: Run,
    params: Any,
    tokenizer: Tokenizer,
    beside: dict[str, str],
    made_from: Iterable[Path],
    meta: dict,
) -> None:
    """A run of no steps, in `folder`, which will be `out`. beside: files that came with the model, name -> text."""
    from lmx.data import File
    from lmx.models import pretrained
    from lmx.train.checkpoint import FOLDER, Checkpoints
    from lmx.weights.describe import describe

    data = replace(run.data, tokenizer=File(str(out)))
    replace(run, data=data).save(folder / "run.txt")
    tokenizer.save(folder)
    kept = folder / pretrained.KEPT
    kept.mkdir()
    for name, text in beside.items():
        (kept / name).write_text(text, encoding="utf-8")
    checkpoints = Checkpoints(
        folder / FOLDER, best=None, strict=True, made_from=made_from, at=out.absolute() / FOLDER
    )
    checkpoints.save(0, {"trainable": params}, meta | {"weights": describe(params)})
    checkpoints.close()


def _release(asked: Options, folder: Path) -> Family:
    from lmx.models import pretrained
    from lmx.run import trained

    model = trained(asked.source, cli.step_of(asked.source, asked.step), asked.ema)
    beside = pretrained.beside(asked.source / pretrained.KEPT)
    return release(folder, model, beside, asked.dtype, asked.layout)


def release(
    folder: Path, model: Trained, beside: Mapping[str, str], dtype: str | None, layout: str | None = None
) -> Family:
    """Writes a model as transformers reads it, adapters merged. beside: files that came with it, name -> text."""
    import jax

    from lmx.adapt import Dense, Merge
    from lmx.models import pretrained
    from lmx.tree import nodes
    from lmx.weights import Quantized, Weight

    if "config.json" in beside:
        like, context = json.loads(beside["config.json"]), None
    else:
        like = {f"{x}_token_id": getattr(model.tokenizer, f"{x}_id") for x in ("bos", "eos", "pad")}
        context = model.run.data.seq_len
    key = jax.random.key(0)
    if layout == "dense":
        if not any(isinstance(w, Quantized) for w in nodes(model.params, Quantized).values()):
            raise ValueError("--layout dense: no matrix of this model is quantized; leave the layout out")
        params, layout = Dense()(model.params, key), None
    else:
        params = Merge()(model.params, key)
        if isinstance(params["embed"], Weight):
            params = Dense("embed")(params, key)
            print("the embedding is written as plain numbers: no layout holds it in codes")
    family = pretrained.save(
        folder, model.run.model, params, like=like, context=context, dtype=dtype, layout=layout
    )
    model.tokenizer.save(folder)
    for name, text in beside.items():
        if name != "config.json":
            (folder / name).write_text(text, encoding="utf-8")
    return family
