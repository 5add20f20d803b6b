"""A teacher's labels: how fast they are made beside a plain loop over `transformers`, what they take, and what is lost.

    pip install -e '.[peers]'
    python scripts/bench_label.py SmolLM2-135M-Instruct.gguf text.txt --documents 200

The loop reads one document at a time in float32 and keeps its top k log probabilities, as such scripts do; lmx writes a
whole store. Each reads the documents twice, and the second reading counts. Then, of tokens of the same text and a
student whose logits are the teacher's with noise: the mass that k labels hold, the KL divergence that they show of the
true one, and how far the gradient in the student's logits lies from the true one (L1, as a share of it).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

KS = (1, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--no-peer", action="store_true")
    asked = parser.parse_args()
    from bench_train import describe_machine

    from lmx.cli.heap import keep_heap

    keep_heap()
    from lmx.data import Data, Documents, File, prepare
    from lmx.run import trained
    from lmx.train import cache_folder

    lines = [line for line in asked.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = Documents(tuple(lines[: asked.documents]))
    data = Data((texts,), valid_share=0.0, tokenizer=File(str(asked.model)), seq_len=asked.length)
    made = prepare(data, cache_folder() / "data")
    (store,) = made.train_stores
    teacher = trained(asked.model)
    for name, value in describe_machine("jax", "torch", "transformers").items():
        print(f"{name:12} {value}")
    print(f"\n{len(store)} documents, {store.n_tokens} tokens, k = {asked.k}")
    ours = labelled(teacher, made, asked)
    print(f"lmx          {store.n_tokens / ours:8.0f} tokens/s")
    if not asked.no_peer:
        theirs = looped(asked, [np.asarray(x[: asked.length], np.int64) for x in store])
        print(f"transformers {store.n_tokens / theirs:8.0f} tokens/s;  ratio {theirs / ours:.2f}")
    lost(teacher, store)


def labelled(teacher, made, asked) -> float:
    from lmx.distill import label

    for _ in range(2):
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            label(teacher, made, out, k=asked.k, origin=[asked.model])
            seconds = time.perf_counter() - began
    return seconds


def looped(asked, documents) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(asked.model.parent), gguf_file=asked.model.name, dtype=torch.float32
    ).eval()
    for _ in range(2):
        began = time.perf_counter()
        with torch.inference_mode():
            for ids in documents:
                logits = model(torch.from_numpy(ids)[None]).logits[0]
                top, which = torch.log_softmax(logits, -1).topk(asked.k)
                top.half().numpy(), which.numpy()
        seconds = time.perf_counter() - began
    return seconds


def lost(teacher, store, n: int = 256) -> None:
    import jax.numpy as jnp

    from lmx.data.taught import coded, decoded

    tokens = jnp.asarray(np.asarray(store.tokens[:n], np.int32))[None]
    logits = np.asarray(teacher.model.apply(teacher.params, {"tokens": tokens}).logits[0], np.float64)
    rng = np.random.default_rng(0)
    log_p, log_q = map(normal, (logits, 0.8 * logits + rng.normal(0, 1, logits.shape)))
    p, q, V = np.exp(log_p), np.exp(log_q), logits.shape[1]
    true = (p * (log_p - log_q)).sum(1).mean()
    order = np.argsort(-log_p, 1)
    print(
        f"\ntrue KL {true:.4f} nats\n{'k':>6} {'bits':>5} {'bytes':>8} {'mass':>7} {'KL seen':>8} {'gradient off':>13}"
    )
    for k in (*KS, V):
        for bits in (16, 8):
            ids = order[:, :k]
            kept = np.take_along_axis(log_p, ids, 1)
            rest = (
                np.log(np.maximum(1 - np.exp(kept).sum(1, keepdims=True), 1e-300))
                if k < V
                else np.full((n, 1), -99)
            )
            kept = decoded(coded(np.concatenate([kept, rest], 1), bits), bits).astype(np.float64)
            chosen = np.take_along_axis(q, ids, 1)
            cells = np.exp(kept)
            rest_p, rest_q = (np.maximum(1 - x.sum(1), 1e-12) for x in (cells, chosen))
            seen = (cells * (kept - np.log(chosen))).sum(1) + (
                rest_p * np.log(rest_p / rest_q) if k < V else 0
            )
            target = q * (rest_p / rest_q)[:, None] if k < V else np.zeros_like(q)
            np.put_along_axis(target, ids, cells, 1)
            off = np.abs(target - p).sum() / np.abs(q - p).sum()
            size = k * (2 if V <= 1 << 16 else 4) + (k + 1) * bits // 8
            print(f"{k:6} {bits:5} {size:8} {np.exp(kept).sum(1).mean():7.4f} {seen.mean():8.4f} {off:13.4f}")


def normal(logits):
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


if __name__ == "__main__":
    main()
