"""A distillation step beside TRL's: teacher forward and student update, one tiny pair, batch and dtype, in one run.

    python -m venv trl && trl/bin/pip install trl
    python scripts/bench_distill.py --peer trl/bin/python

Both sides read the same two Llama models from disk (float32, random, drawn here), and make the same step: the teacher
answers, the generalised JSD (beta 0.5) between both is the loss on the tokens that count, and a clipped AdamW updates
all of the student. TRL's side is its GKDTrainer's own `compute_loss` without the trainer around it, which would only
cost it time. "lmx, every logit" holds the logits of all tokens of both models, as TRL does, "lmx" those of a slice of
them (`Chunked`); "trl, heap" keeps freed memory, as the commands of lmx do. Each contender is a process of its own that
waits while the others run; a round gives each of them some steps in turn. Prints the median milliseconds of a step,
tokens per second, the ratio to the fastest peer, the most memory that the process held, and the losses of the first two
steps, which must agree.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import turns

CONTENDERS = ("lmx", "lmx, every logit", "trl", "trl, heap")
KEEPS = {"MMAP_MAX_": 0, "TRIM_THRESHOLD_": 2**31 - 1, "TOP_PAD_": 2**28, "ARENA_MAX": 1}
"""What `lmx.cli.heap` asks of malloc, as glibc reads it from the environment."""
SHARE = 0.75
"""Of the tokens that count, as of prompts with longer replies."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=int, nargs=2, default=(512, 8), help="width and layers")
    parser.add_argument("--student", type=int, nargs=2, default=(256, 4), help="width and layers")
    parser.add_argument("--words", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="per round and contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--peer", default=sys.executable, help="the python that has trl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return serve(asked)
    from bench_train import describe_machine

    with tempfile.TemporaryDirectory() as folder:
        draw(asked, Path(folder))
        words = [__file__, "--folder", folder]
        for name in ("words", "batch_size", "length", "threads"):
            words += [f"--{name.replace('_', '-')}", str(getattr(asked, name))]
        workers = {}
        for name in asked.contenders:
            python = asked.peer if name.startswith("trl") else sys.executable
            keeps = {f"MALLOC_{x}": str(n) for x, n in KEEPS.items()} if "heap" in name else {}
            workers[name] = turns.started(name, [*words, "--worker", name], asked.threads, python, keeps)
        told = turns.in_turns(workers, asked.rounds, asked.steps)
    facts = {
        "pair": f"teacher {asked.teacher[0]} x {asked.teacher[1]}, student {asked.student[0]} x {asked.student[1]}",
        "rows": f"{asked.batch_size} x {asked.length}, {SHARE:.0%} counts, {asked.words} words",
        "peer": next((told[name]["versions"] for name in told if name.startswith("trl")), ""),
    }
    for name, value in (describe_machine("jax") | facts).items():
        print(f"{name:12} {value}")
    turns.show(told, asked.batch_size * asked.length, "trl")


def draw(asked, folder: Path) -> None:
    """Both models, as transformers reads them."""
    import jax

    from lmx.models import TransformerConfig, build, pretrained
    from lmx.nn import AttentionConfig

    for seed, (name, (width, n_layers)) in enumerate(
        {"teacher": asked.teacher, "student": asked.student}.items()
    ):
        config = TransformerConfig(
            vocab_size=asked.words,
            d_model=width,
            n_layers=n_layers,
            attention=AttentionConfig(width // 64, width // 128),
            init_std=0.05,
        )
        pretrained.save(
            folder / name, config, jax.jit(build(config).init)(jax.random.key(seed)), context=4096
        )


def rows(asked):
    """tokens [B, T], and which positions count: those of a reply's tokens, before each of them."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, asked.words, (asked.batch_size, asked.length), dtype=np.int32)
    counts = np.zeros(tokens.shape, np.float32)
    counts[:, round((1 - SHARE) * asked.length) : -1] = 1
    return tokens, counts


def lmx_step(asked):
    from lmx.cli.heap import keep_heap

    keep_heap()
    import jax
    import numpy as np

    from lmx import Run
    from lmx.data import Data
    from lmx.losses import Chunked, Jsd, Term
    from lmx.models import pretrained
    from lmx.optim import AdamW, Constant
    from lmx.train import Load, Teacher
    from lmx.train.program import program

    student = f"{asked.folder}/student"
    run = Run(
        model=pretrained.find(student).config,
        data=Data(seq_len=asked.length, batch_size=asked.batch_size),
        objective={"kd": Term(Jsd() if "every logit" in asked.worker else Chunked(Jsd(), 64))},
        start=(Load(student),),
        enrich=Teacher(f"{asked.folder}/teacher"),
        optim=AdamW(lr=1e-4, schedule=Constant(warmup=0), weight_decay=0.0),
        steps=10**6,
    )
    compiled = program(run, run.mesh.build(jax.devices()[:1]))
    tokens, counts = rows(asked)
    batch = compiled.place(
        {
            "tokens": tokens,
            "labels": np.roll(tokens, -1, 1),
            "loss_mask": counts,
            "positions": np.tile(np.arange(asked.length, dtype=np.int32), (asked.batch_size, 1)),
            "segment_ids": np.ones(tokens.shape, np.int32),
        }
    )
    state = compiled.init(0)

    def step() -> float:
        nonlocal state
        state, metrics = compiled.step(state, batch)
        return float(metrics["loss"])

    return step


def trl_step(asked):
    from types import SimpleNamespace

    import torch
    from transformers import AutoModelForCausalLM

    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer

    torch.set_num_threads(asked.threads)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(
            f"{asked.folder}/{name}", dtype=torch.float32, attn_implementation="sdpa"
        )
        for name in ("teacher", "student")
    )
    teacher.eval()
    student.train()
    teacher.config.use_cache = student.config.use_cache = False
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    tokens, counts = rows(asked)
    ids = torch.from_numpy(tokens).long()
    labels = torch.full_like(ids, -100)
    at = torch.from_numpy(counts).bool()
    labels[:, 1:][at[:, :-1]] = ids[:, 1:][at[:, :-1]]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trainer = SimpleNamespace(
        teacher_model=teacher, beta=0.5, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss
    )
    n = at.sum()

    def step() -> float:
        loss = GKDTrainer.compute_loss(trainer, student, inputs, num_items_in_batch=n)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def serve(asked) -> None:
    """A contender."""
    from importlib.metadata import version

    ours = asked.worker.startswith("lmx")
    step = lmx_step(asked) if ours else trl_step(asked)
    names = () if ours else ("trl", "torch", "transformers")
    turns.serve(step, versions=", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
