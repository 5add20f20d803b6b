"""Says what a trained run, a preset or this machine is.

Nothing is trained or loaded; shapes are enough.

  lmx info                                 this machine: jax, devices, packages
  lmx info runs/quickstart/model           a run: parameters, memory, FLOPs, tokenizer, how far it is trained
  lmx info SmolLM2-135M-Instruct.gguf      a released model: a GGUF file or a Hugging Face folder
  lmx info --preset 1b                     a model shape known by name
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lmx import cli


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path | None] = None
    """A run's folder, a Hugging Face folder or a .gguf file."""
    preset: str | None = None
    """A model shape known by name."""
    source: Path | None = None
    """The experiment that defines the run's own classes; it is executed."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "info")
    if asked.source is not None:
        from lmx import run as runs

        runs.experiment(asked.source)
    if asked.model is not None:
        from lmx.models import pretrained

        rows = _released(asked.model) if pretrained.is_released(asked.model) else _run(asked.model)
    elif asked.preset:
        from lmx import models

        rows = _model(models.preset(asked.preset), 2048)
    else:
        rows = _machine()
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


def _machine() -> dict[str, str]:
    import os
    import platform

    import jax

    from lmx.train import cache_folder
    from lmx.train.record import PACKAGES, version

    devices = jax.devices()
    packages = ", ".join(f"{name} {v}" for name in PACKAGES if (v := version(name)))
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": packages,
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": str(jax.process_count()),
        "cpus": str(os.cpu_count()),
        "cache": str(cache_folder()),
    }


def _run(folder: Path) -> dict[str, str]:
    from lmx import run as runs
    from lmx.train import checkpoint

    run = runs.load(folder / "run.txt")
    steps = checkpoint.steps(folder / checkpoint.FOLDER)
    rows = {"run": str(folder)} | _model(run.model, run.data.seq_len)
    rows["tokenizer"] = f"{run.data.tokenizer}"
    batch = f"{run.data.batch_size} x {run.data.seq_len} tokens"
    rows["trained"] = f"{max(steps, default=0)} of {run.steps} steps of {batch}"
    rows["checkpoints"] = f"{steps}, best {checkpoint.best_step(folder / checkpoint.FOLDER)}"
    return rows


def _released(path: Path) -> dict[str, str]:
    from collections import Counter

    from lmx.models import pretrained

    found = pretrained.find(path)
    stored = Counter(tensor.stored for tensor in found.tensors.values())
    rows = {"model": str(path), "family": found.family.model_type}
    rows |= _model(found.config, min(found.context or 2048, 2048))
    rows["context"] = f"{found.context:,} tokens" if found.context else "not said"
    kinds = ", ".join(f"{n} {kind}" for kind, n in stored.most_common())
    size = sum(file.stat().st_size for file in found.files())
    rows["file"] = f"{size / 2**20:,.1f} MiB, tensors: {kinds}"
    try:
        tokenizer = found.tokenizer()
        rows["tokenizer"] = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, lossless: {tokenizer.lossless}"
    except FileNotFoundError as error:
        rows["tokenizer"] = str(error)
    return rows


def _model(config, seq_len: int) -> dict[str, str]:
    import jax

    from lmx import models

    a = config.attention
    head_dim = a.width(config.d_model)
    n, active = models.n_params(config)
    met = "" if n == active else f"; a token meets {active:,}"
    cache = 2 * config.n_layers * a.kv_heads * head_dim * jax.numpy.dtype(config.dtype).itemsize
    return {
        "shape": f"{config.n_layers} layers, d_model {config.d_model}, {a.n_heads} heads of {head_dim}"
        f" ({a.kv_heads} for keys), vocabulary {config.vocab_size}",
        "parts": f"{config.position}, {config.norm.kind} norm ({config.placement}), {config.mlp.activation}",
        "parameters": f"{n:,}, of them embedding {config.vocab_size * config.d_model:,}{met}",
        "memory": f"float32 {n * 4 / 2**20:,.1f} MiB, bfloat16 {n * 2 / 2**20:,.1f} MiB",
        "training FLOPs per token": f"{models.flops_per_token(config, seq_len):.3g} at length {seq_len}",
        "KV cache per token": f"{cache:,} bytes",
    }
