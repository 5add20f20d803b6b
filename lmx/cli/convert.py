"""Reads a released model into a run's folder, or writes a run as a folder that transformers reads.

  lmx convert SmolLM2-135M-Instruct.gguf runs/smollm2       a GGUF file, to evaluate and to generate from
  lmx convert ~/models/Qwen3-0.6B runs/qwen3                a Hugging Face folder: config.json, safetensors, tokenizer
  lmx convert runs/qwen3 exported --dtype bfloat16          back again: what came from bfloat16 files, byte for byte
  lmx convert runs/quickstart/model exported                a model of our own, in the family that computes the same
  lmx convert runs/int4 exported --layout gptq              a quantized one, bit for bit as GPTQ's readers want it

The first form makes a run of no steps: its checkpoint is step 0. What lmx cannot represent is an error that names the
field, and so is a pickle: nothing in a model's files is executed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lmx import cli


@dataclass(frozen=True)
class Options:
    source: tyro.conf.Positional[Path]
    """A Hugging Face folder, a .gguf file, or a run's folder."""
    out: tyro.conf.Positional[Path]
    """The folder to make; it must not exist, or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of written weights that are not quantized; that of the model's source if not given, or float32."""
    layout: Literal["compressed-tensors", "gptq"] | None = None
    """Of quantized matrices; compressed-tensors if not given, which vLLM and transformers read."""
    step: str = "latest"
    """Of a run's checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of a run's parameters."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "convert")
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise ValueError(f"{asked.out} is already there; name a new folder")
    if asked.out.is_mount() or (asked.out.exists() and asked.out.samefile(".")):
        raise ValueError(
            f"{asked.out} is a mounted disk or the folder you are in, which a new one cannot replace; name a folder "
            "in it"
        )
    if asked.layout and not (asked.source / "run.txt").exists():
        raise ValueError(
            "--layout is of a folder written from a run; a released model is read as it is stored"
        )
    if (asked.source / "run.txt").exists():
        with _whole(asked.out) as folder:
            family = _release(asked, folder)
        print(f"wrote {asked.out} as {family.model_type}; transformers reads it with {family.architecture}")
        return
    with _whole(asked.out) as folder:
        _adopt(asked.source, folder, asked.out)
    print(f"wrote {asked.out}; `lmx info {asked.out}`, `lmx generate {asked.out}` and `lmx eval` read it")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, which takes its name once all is there, and goes if that fails."""
    out = out.resolve()
    folder = out.with_name(f"{out.name}.partial-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} was filled by another process in the meantime; name a new folder")
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _adopt(source: Path, folder: Path, out: Path) -> None:
    """A released model as a run of no steps, written to `folder`, which will be `out`."""
    from lmx.data import Data, File
    from lmx.models import pretrained
    from lmx.run import Run
    from lmx.train.checkpoint import FOLDER, Checkpoints

    found = pretrained.find(source)
    tokenizer = found.tokenizer()
    length = min(found.context or 1024, 1024)
    data = Data(tokenizer=File(str(out)), seq_len=length, clean=False)  # released models read text as it is
    Run(model=found.config, data=data).save(folder / "run.txt")
    tokenizer.save(folder)
    kept = folder / pretrained.KEPT
    kept.mkdir()
    for name, text in found.beside().items():
        (kept / name).write_text(text, encoding="utf-8")
    made_from, at = found.files(), out / FOLDER
    checkpoints = Checkpoints(folder / FOLDER, best=None, strict=True, made_from=made_from, at=at)
    checkpoints.save(0, {"trainable": pretrained.load(found)}, {"source": str(source)})
    checkpoints.close()


def _release(asked: Options, folder: Path):
    from lmx.models import pretrained
    from lmx.run import trained

    model = trained(asked.source, cli.step_of(asked.source, asked.step), asked.ema)
    kept = asked.source / pretrained.KEPT
    if (kept / "config.json").exists():
        like, context = json.loads((kept / "config.json").read_text("utf-8")), None
    else:
        like = {f"{x}_token_id": getattr(model.tokenizer, f"{x}_id") for x in ("bos", "eos", "pad")}
        context = model.run.data.seq_len
    family = pretrained.save(
        folder,
        model.run.model,
        model.params,
        like=like,
        context=context,
        dtype=asked.dtype,
        layout=asked.layout,
    )
    model.tokenizer.save(folder)
    for path in sorted(kept.iterdir()) if kept.is_dir() else ():
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    return family
