"""A fine-tuning step of a released model beside transformers with peft: one model, batch and dtype, in one run.

    pip install -e '.[peers]'
    python scripts/bench_finetune.py SmolLM2-135M-Instruct.gguf
    python scripts/bench_finetune.py SmolLM2-135M-Instruct.gguf --method full --share 1.0

The same work on both sides: float32, LoRA of rank 16 on every matrix of the layers (or everything, with --method full),
clipped AdamW, rows of tokens of which a share counts, as the answers to questions do. "lmx, every logit" computes the
head on all tokens, as transformers does; "lmx" where the loss counts alone (`lmx.losses.Counted`). Each contender is a
process of its own that waits while the others run; a round gives each of them some steps in turn. Prints the median
milliseconds of a step, tokens per second, the ratio to the fastest peer, the most memory that the process held, and the
losses of the first two steps, of which the first must agree; lmx begins with a smaller rate.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import turns

CONTENDERS = ("lmx", "lmx, every logit", "peft", "peft, heap")
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.0625, help="of the tokens that count")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="per round and contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return turns.serve(lmx_step(asked) if asked.worker.startswith("lmx") else peft_step(asked))
    from bench_train import describe_machine

    settings = ("method", "batch_size", "length", "share", "threads")
    words = [__file__, str(asked.model)]
    words += [x for name in settings for x in (f"--{name.replace('_', '-')}", str(getattr(asked, name)))]
    workers = {
        name: turns.started(name, [*words, "--worker", name], asked.threads) for name in asked.contenders
    }
    told = turns.in_turns(workers, asked.rounds, asked.steps)
    packages = ("jax", "torch", "transformers", "peft")
    facts = {"method": asked.method, "rows": f"{asked.batch_size} x {asked.length}, {asked.share:.0%} counts"}
    for name, value in (describe_machine(*packages) | facts).items():
        print(f"{name:12} {value}")
    turns.show(told, asked.batch_size * asked.length, "peft")


def rows(asked):
    """tokens [B, T] and which of them, as labels, count."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40_000, (asked.batch_size, asked.length), dtype=np.int32)
    counts = np.zeros(tokens.shape, np.float32)
    each = max(1, round(asked.share * asked.length))
    for row in counts:
        row[rng.choice(np.arange(asked.length - 1), min(each, asked.length - 1), replace=False)] = 1
    return tokens, counts


def lmx_step(asked):
    from lmx.cli.heap import keep_heap

    keep_heap()
    from dataclasses import replace

    import jax
    import numpy as np

    from lmx import Run
    from lmx.adapt import Lora
    from lmx.data import Data
    from lmx.losses import Counted, NextToken, Term
    from lmx.models import pretrained
    from lmx.optim import AdamW
    from lmx.train import Load
    from lmx.train.program import program

    loss = NextToken() if "every logit" in asked.worker else Counted(NextToken())
    run = Run(
        model=pretrained.find(asked.model).config,
        data=Data(seq_len=asked.length, batch_size=asked.batch_size),
        objective={"ce": Term(loss)},
        start=(Load(str(asked.model)),),
        optim=AdamW(lr=1e-4),
        steps=10**6,
    )
    if asked.method == "lora":
        run = replace(run, start=(*run.start, Lora(rank=RANK)), trainable="*/w/[ab]")
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


def peft_step(asked):
    if "heap" in asked.worker:
        from lmx.cli.heap import keep_heap

        keep_heap()
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        str(asked.model.parent), gguf_file=asked.model.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if asked.method == "lora":
        from peft import LoraConfig, get_peft_model

        matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=matrices))
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens, counts = rows(asked)
    ids = torch.from_numpy(tokens).long()
    labels = torch.full_like(ids, -100)
    at = torch.from_numpy(counts).bool()
    labels[:, 1:][at[:, :-1]] = ids[:, 1:][at[:, :-1]]

    def step() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
