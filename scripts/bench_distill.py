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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
        workers = {name: _start(name, asked, folder) for name in asked.contenders}
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(asked.rounds):
            for name, worker in workers.items():
                times[name] += _ask(worker, asked.steps)["seconds"]
        told = {name: _ask(worker, 0) for name, worker in workers.items()}
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    facts = {
        "pair": f"teacher {asked.teacher[0]} x {asked.teacher[1]}, student {asked.student[0]} x {asked.student[1]}",
        "rows": f"{asked.batch_size} x {asked.length}, {SHARE:.0%} counts, {asked.words} words",
        "peer": next((told[name]["versions"] for name in told if name.startswith("trl")), ""),
    }
    for name, value in (describe_machine("jax") | facts).items():
        print(f"{name:12} {value}")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    peers = [seconds for name, seconds in medians.items() if name.startswith("trl")]
    print(f"\n{'contender':18} {'ms':>8} {'tokens/s':>9} {'ratio':>6} {'GiB':>6}  first losses")
    for name, median in medians.items():
        ratio = f"{min(peers) / median:6.2f}" if peers else ""
        print(
            f"{name:18} {1e3 * median:8.0f} {asked.batch_size * asked.length / median:9.0f} {ratio:>6} "
            f"{told[name]['bytes'] / 2**30:6.2f}  {' '.join(f'{x:.6f}' for x in told[name]['first'])}"
        )


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
    """A contender: reads numbers of steps from standard input, answers with the seconds of each."""
    import importlib.metadata

    step = lmx_step(asked) if asked.worker.startswith("lmx") else trl_step(asked)
    first = [step(), step()]
    names = () if asked.worker.startswith("lmx") else ("trl", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print("{}", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        told = {"seconds": seconds, "first": first, "bytes": _most_held(), "versions": versions}
        print(json.dumps(told), flush=True)


def _most_held() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _start(contender: str, asked, folder: str) -> subprocess.Popen:
    options = ["--folder", folder, "--worker", contender]
    for name in ("words", "batch_size", "length", "threads"):
        options += [f"--{name.replace('_', '-')}", str(getattr(asked, name))]
    keeps = {f"MALLOC_{name}": str(n) for name, n in KEEPS.items()} if "heap" in contender else {}
    worker = subprocess.Popen(
        [asked.peer if contender.startswith("trl") else sys.executable, __file__, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(asked.threads)} | keeps,
    )
    if not worker.stdout.readline():
        sys.exit(f"bench_distill: {contender} did not start")
    return worker


def _ask(worker: subprocess.Popen, steps: int) -> dict:
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


if __name__ == "__main__":
    main()
