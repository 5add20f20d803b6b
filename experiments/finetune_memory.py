"""What does fine-tuning hold in memory: in full, by adapters, by adapters on 4 bits?

We expect adapters to shed the gradients and both of Adam's moments of the frozen matrices, 12 of 16 bytes for each of
their numbers, and 4-bit codes most of the 4 that are left; activations stay, and are what remains.

    python experiments/finetune_memory.py                     the shape of SmolLM2-135M, compiled for this CPU
    python experiments/finetune_memory.py --preset 7b --topology v5e:1x1      one TPU chip that is not here

Result of 22 November 2026 (jax 0.10.2), MiB on one device. SmolLM2's shape on a CPU, 8 x 512 tokens: parameters 513 in
full, 532 with adapters of rank 16, 229 on int8, 184 on NF4; gradients 513 against 19; optimizer 1,026 against 37;
activations and others 5,195 against 4,038. The 7b preset, 1 x 1024 tokens, on one TPU v5e chip of 16 GiB: it does not
fit in full (25,609 + 25,609 + 51,218), nor by adapters on float32; it does on int8 (7,310 + 152 + 304 + 1,329), on NF4
(4,614 + 152 + 304 + 3,811).

All figures are the compiled step's own (XLA's memory analysis) and the shapes of its state; nothing is trained.
Also runs as any experiment: `lmx plan experiments/finetune_memory.py --variant qlora --topology v5e:1x1`.
"""

import argparse
from dataclasses import replace

from lmx import Run
from lmx.adapt import Int8, Lora, Nf4
from lmx.data import Byte, Data
from lmx.mesh import MeshConfig
from lmx.models import TransformerConfig, preset
from lmx.nn import AttentionConfig, MlpConfig
from lmx.optim import AdamW

SMOLLM2 = TransformerConfig(
    vocab_size=49152,
    d_model=576,
    n_layers=30,
    attention=AttentionConfig(n_heads=9, n_kv_heads=3),
    mlp=MlpConfig(d_ff=1536),
    remat="dots",
)


def base(model: TransformerConfig = SMOLLM2, seq_len: int = 512, batch_size: int = 8) -> Run:
    data = Data(tokenizer=Byte(), seq_len=seq_len, batch_size=batch_size)
    return Run(model=model, data=data, optim=AdamW(lr=1e-4), mesh=MeshConfig(data=1))


def variants(start: Run | None = None) -> dict[str, Run]:
    run = start or base()
    adapters = {"trainable": "*/w/[ab]", "optim": AdamW(lr=1e-3)}
    return {
        "full": run,
        "lora": replace(run, start=(Lora(rank=16),), **adapters),
        "lora on int8": replace(run, start=(Int8(), Lora(rank=16)), **adapters),
        "qlora": replace(run, start=(Nf4(), Lora(rank=16)), **adapters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", help="a model shape by name instead of SmolLM2's")
    parser.add_argument("--topology", help="a TPU such as v5e:1x1 instead of this CPU")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    from lmx import plan, tree
    from lmx.report.table import Table
    from lmx.train import batch_shapes
    from lmx.train.program import program

    devices = plan.topology_devices(asked.topology)[:1] if asked.topology else jax.devices()[:1]
    model = preset(asked.preset) if asked.preset else SMOLLM2
    rows = []
    for name, run in variants(base(model, asked.seq_len, asked.batch_size)).items():
        mesh = run.mesh.build(devices)
        made = program(run, mesh)
        state = made.shapes
        with plan.quick_compilation():
            found = plan.plan(made.step, (state, batch_shapes(run, mesh)), asked.topology or "cpu", 1, 0.0)
        trainable = tree.nbytes(state.trainable)
        parts = (tree.nbytes(state.params), trainable, tree.nbytes(state.opt_state), found.temporary_bytes)
        rows.append(
            (name, tree.count(state.trainable), *(n / 2**20 for n in parts), found.problem[:40] or "yes")
        )
    columns = ("", "trained", "parameters", "gradients", "optimizer", "activations and others", "fits")
    print(Table(columns, tuple(rows), "MiB on one device").text())


if __name__ == "__main__":
    main()
