"""Compiles a run's training step for a TPU topology and says what each chip needs.

There need be no TPU, no data and no weights. Ends with status 1 if the step does not fit.

  lmx plan experiments/shakespeare_char.py --topology v5e:2x2
  lmx plan FILE --topology v5p:4x4x4 --set mesh.fsdp=32 --set mesh.tensor=2
  lmx plan --preset 7b --topology v5e:4x4 --set mesh.data=1 --set mesh.fsdp=16 --set data.batch_size=16
  lmx plan --preset 1b --topology v5e:2x2 --thorough         the effort of a real compilation: slower, exact
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from lmx import cli


@dataclass(frozen=True)
class Options:
    file: tyro.conf.Positional[Path | None] = None
    """The experiment, unless a preset is given."""
    topology: str = "v5e:2x2"
    """Generation and shape: v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:8x8, tpu7x:2x2x1."""
    preset: str | None = None
    """A model shape known by name instead of an experiment."""
    variant: str = "base"
    set: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="PATH=VALUE")] = field(
        default_factory=list
    )
    """Changes a setting; repeat it for more."""
    thorough: bool = False
    """Compiles with full optimization."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "plan")
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator of this machine is not needed and left alone
    from lmx import models, plan, tree
    from lmx import run as runs
    from lmx.train import batch_shapes
    from lmx.train.program import program

    if (asked.file is None) == (asked.preset is None):
        raise ValueError("give an experiment file or --preset, one of the two")
    if asked.preset:
        run = runs.Run(model=models.preset(asked.preset))
    else:
        run = runs.experiment(asked.file).variant(asked.variant)
    run = run.override(cli.changes(asked.set))
    if run.mesh.pmap:
        raise ValueError("pmap needs its devices; --set mesh.pmap=false plans the same step under jit")
    if run.model.vocab_size is None:
        size = getattr(run.data.tokenizer, "vocab_size", None)
        if size is None:
            raise ValueError(
                f"the vocabulary of {run.data.tokenizer} is not known yet; --set model.vocab_size=N"
            )
        run = replace(run, model=replace(run.model, vocab_size=size))
    devices = plan.topology_devices(asked.topology)
    mesh = run.mesh.build(devices)
    compiled = program(run, mesh)
    tokens = run.data.batch_size * run.data.seq_len
    flops = tokens * models.flops_per_token(run.model, run.data.seq_len)
    with nullcontext() if asked.thorough else plan.quick_compilation():
        found = plan.plan(
            compiled.step, (compiled.shapes, batch_shapes(run, mesh)), asked.topology, len(devices), flops
        )
    rows = {
        "topology": f"{found.topology}, {found.n_devices} devices",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "parameters": f"{tree.count(compiled.shapes.params):,}",
        "tokens per step": f"{tokens:,}",
        "FLOPs per step": f"{flops:.3g}",
        "arguments per device": _bytes(found.argument_bytes),
        "temporaries per device": _bytes(found.temporary_bytes),
        "peak per device": _bytes(found.peak_bytes),
        "memory per device": _bytes(found.hbm_bytes),
        "fused kernels": str(found.kernels) if found.fits else "-",
        "fits": "yes" if found.fits else f"NO: {found.problem}",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))
    if not found.fits:
        raise SystemExit(1)


def _bytes(n: int) -> str:
    if not n:
        return "-"
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.2f} MiB"
