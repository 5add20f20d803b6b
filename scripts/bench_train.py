"""Our compiled training step beside a plain PyTorch GPT of the same shape, in one run, on the same device.

    pip install -e '.[peers]'
    python scripts/bench_train.py --shape cpu --precision float32 bfloat16
    python scripts/bench_train.py --shape baby --rounds 8 --out baby.json
    python scripts/bench_train.py --shape 350m --precision bfloat16           # an NVIDIA GPU, with '.[peers,cuda]'

The same work on both sides: learned positions, LayerNorm without shift, tanh GELU, tied head, clipped AdamW, float32
parameters; bfloat16 is autocast in PyTorch and `dtype="bfloat16"` here. PyTorch runs eager and compiled, each as it is
and with the heap kept as `lmx train` keeps its own (`lmx.cli.heap`), which spares page faults. Each contender is a
process of its own that waits while the others run; a round gives each of them some steps in turn, so that a machine
that speeds up or slows down does so for all. Prints the median milliseconds of a step, tokens per second, the ratio to
the fastest PyTorch of the same precision, and the share of the fastest matmul measured on this machine.

Where PyTorch sees a GPU both run there, one contender after another, as its memory holds one model at a time; float32
products may then be TF32 on both sides, and the peak is the vendor's for dense products in that precision (MFU).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import turns

SHAPES = {  # layers, heads, d_model, T, B, vocabulary
    "cpu": (4, 4, 128, 64, 12, 65),
    "baby": (6, 6, 384, 256, 8, 65),
    "baby64": (6, 6, 384, 256, 64, 65),
    "350m": (24, 16, 1024, 2048, 8, 50304),
    "1b": (20, 16, 2048, 2048, 4, 50304),
}
CONTENDERS = {
    "cpu": ("lmx", "eager", "eager, heap", "compile", "compile, heap"),
    "cuda": ("lmx", "eager", "compile"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="per round and contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write every time as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        serve(*asked.worker, asked.shape, asked.threads)
        return
    if not _version("torch"):
        sys.exit("bench_train: torch is not installed; pip install -e '.[peers]'")
    contenders = [(name, precision) for precision in asked.precision for name in CONTENDERS[torch_device()]]
    at_once = [contenders] if torch_device() == "cpu" else [[contender] for contender in contenders]
    before = {precision: peak(precision) for precision in asked.precision}
    times = {}
    for group in at_once:
        times |= _measured(group, asked)
    _report(asked, times, {precision: max(before[precision], peak(precision)) for precision in before})


def _measured(contenders: list[tuple[str, str]], asked) -> dict[tuple[str, str], list[float]]:
    """The seconds of every step of each of them, in rounds."""
    words = [__file__, "--shape", asked.shape, "--threads", str(asked.threads), "--worker"]
    workers = {
        contender: turns.started(" in ".join(contender), [*words, *contender], asked.threads)
        for contender in contenders
    }
    told = turns.in_turns(workers, asked.rounds, asked.steps)
    return {contender: of["seconds"] for contender, of in told.items()}


def serve(contender: str, precision: str, shape: str, threads: int) -> None:
    """A contender."""
    if contender == "lmx":
        import jax

        if (jax.default_backend() == "gpu") != (torch_device() == "cuda"):
            sys.exit(
                f"bench_train: jax runs on {jax.default_backend()}, torch on {torch_device()}; install both for one"
            )
        step, _ = lmx_step(precision, shape)
    else:
        step = torch_step(contender, precision, shape, threads)
    turns.serve(step)


def lmx_step(precision: str, shape: str):
    """(step, text): one step and its loss, and what gives the compiled program as text."""
    from lmx.cli.heap import keep_heap

    keep_heap()
    import jax
    import numpy as np

    from lmx import Run
    from lmx.data import Data
    from lmx.models import TransformerConfig
    from lmx.nn import AttentionConfig, MlpConfig, NormConfig
    from lmx.ops.position import Learned
    from lmx.optim import AdamW
    from lmx.train.program import program

    L, N, D, T, B, V = SHAPES[shape]
    model = TransformerConfig(
        vocab_size=V,
        d_model=D,
        n_layers=L,
        attention=AttentionConfig(N),
        mlp=MlpConfig("gelu"),
        norm=NormConfig("layer", 1e-5),
        position=Learned(T),
        dtype=precision,
    )
    run = Run(model=model, data=Data(seq_len=T, batch_size=B), optim=AdamW(), steps=10**6)
    compiled = program(run, run.mesh.build())
    tokens = np.random.default_rng(0).integers(0, V, (B, T), dtype=np.int32)
    batch = compiled.place(
        {
            "tokens": tokens,
            "labels": np.roll(tokens, -1, 1),
            "loss_mask": np.ones((B, T), np.float32),
            "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
            "segment_ids": np.ones((B, T), np.int32),
        }
    )
    state = compiled.init(0)

    def step() -> float:
        nonlocal state
        state, metrics = compiled.step(state, batch)
        return float(metrics["loss"])

    def text() -> str:
        return compiled.step.lower(compiled.shapes, jax.eval_shape(lambda: batch)).compile().as_text()

    return step, text


def torch_step(kind: str, precision: str, shape: str, threads: int):
    from lmx.cli.heap import keep_heap

    kind, *heap = kind.split(", ")
    if heap:
        keep_heap()
    import torch
    from torch import nn
    from torch.nn import functional as F

    device = torch_device()
    torch.set_default_device(device)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA's default
    torch.manual_seed(0)
    L, N, D, T, B, V = SHAPES[shape]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x):
            heads = (y.view(B, T, N, D // N).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(D, 2))
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place = nn.Embedding(V, D), nn.Embedding(T, D)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(D, bias=False)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, 0, 0.02)

        def forward(self, tokens, labels):
            x = self.embed(tokens) + self.place(torch.arange(T))
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(F.linear(self.norm(x), self.embed.weight).view(-1, V), labels.view(-1))

    gpt = Gpt()
    decayed = [p for n, p in gpt.named_parameters() if p.dim() > 1 and n.startswith("blocks")]
    others = [p for n, p in gpt.named_parameters() if p.dim() < 2 or not n.startswith("blocks")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(gpt) if kind == "compile" else gpt
    tokens = torch.randint(0, V, (B, T))
    labels = torch.roll(tokens, -1, 1)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = forward(tokens, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def peak(precision: str) -> float:
    """FLOP/s: the vendor's for a GPU; on a processor, that of the fastest float32 product of two 1024 x 1024
    matrices, of numpy's and of torch's."""
    import numpy as np
    import torch

    from lmx.train.peak import peak_flops

    if torch_device() == "cuda":
        return peak_flops(torch.cuda.get_device_name(), precision) or float("nan")
    a = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    b = torch.from_numpy(a)
    best = float("inf")
    for product in (lambda: a @ a, lambda: b @ b) * 40:
        begin = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def describe(shape: str) -> dict[str, str]:
    """What a figure depends on: machine, shape, versions, commit."""
    L, N, D, T, B, V = SHAPES[shape]
    shape = f"{L} layers, {N} heads, d_model {D}, T {T}, B {B}, vocabulary {V}"
    return {"shape": shape} | describe_machine("jax", "torch")


def describe_machine(*packages: str) -> dict[str, str]:
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
        "commit": _commit(),
    }


def _report(asked, times: dict[tuple[str, str], list[float]], peaks: dict[str, float]) -> None:
    L, _, D, T, B, V = SHAPES[asked.shape]
    flops = B * T * (6 * (12 * L * D * D + V * D) + 12 * L * D * T)
    medians = {contender: statistics.median(seconds) for contender, seconds in times.items()}
    about = describe(asked.shape) | {
        "device": torch_device(),
        "threads": str(asked.threads),
        "matmul peak": ", ".join(f"{flops / 1e9:.0f} GFLOP/s ({name})" for name, flops in peaks.items()),
    }
    for name, value in about.items():
        print(f"{name:12} {value}")
    print(f"\n{'precision':10} {'contender':14} {'ms':>8} {'tokens/s':>10} {'ratio':>6} {'of peak':>8}")
    for (contender, precision), median in medians.items():
        best = min(
            seconds for (name, other), seconds in medians.items() if other == precision and name != "lmx"
        )
        print(
            f"{precision:10} {contender:14} {1e3 * median:8.1f} {B * T / median:10,.0f} {best / median:6.2f} "
            f"{flops / median / peaks[precision]:8.1%}"
        )
    if asked.out:
        seconds = {f"{contender} {precision}": times[contender, precision] for contender, precision in times}
        asked.out.write_text(json.dumps({"about": about, "seconds": seconds}, indent=1), encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
