"""Small models that teach and learn, and the batch that they meet over."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np

from lmx.data import Byte, Data, Documents
from lmx.losses import Chunked, ForwardKL, NextToken, Term
from lmx.models import TransformerConfig, build, pretrained
from lmx.nn import AttentionConfig
from lmx.optim import AdamW, Constant, Sgd
from lmx.run import Run
from lmx.train.program import program

V = Byte.vocab_size
B, T, LR = 8, 12, 0.3
HEADS = AttentionConfig(n_heads=4, n_kv_heads=2)
TUTOR = TransformerConfig(
    vocab_size=V, d_model=32, n_layers=2, attention=HEADS, init_std=0.2, tie_head=False, unroll=1
)
MODEL = replace(TUTOR, d_model=16, n_layers=1)
OBJECTIVE = {"kd": Term(Chunked(ForwardKL(2.0), 8), 0.7), "ce": Term(NextToken(), 0.3)}
RUN = Run(
    model=MODEL,
    data=Data(seq_len=T, batch_size=B),
    objective=OBJECTIVE,
    optim=Sgd(lr=LR, schedule=Constant(warmup=0), momentum=0.0, clip=None),
    steps=3,
)


def release(folder, config, seed, tokenizer=None, context=64):
    """A random model as others release theirs, with a byte tokenizer."""
    tokenizer = tokenizer or Byte().train()
    params = jax.jit(build(config).init)(jax.random.key(seed))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": 0}
    pretrained.save(folder, config, params, like=ids, context=context)
    tokenizer.save(folder)
    return str(folder)


@cache
def rows():
    """Two packed segments in each row."""
    rng = np.random.default_rng(0)
    found = {name: rng.integers(3, V, (B, T)).astype(np.int32) for name in ("tokens", "labels")}
    cut = rng.integers(2, T - 2, (B, 1))
    at = np.arange(T)[None]
    found["segment_ids"] = np.where(at < cut, 1, 2).astype(np.int32)
    found["positions"] = np.where(at < cut, at, at - cut).astype(np.int32)
    found["loss_mask"] = rng.integers(0, 2, (B, T)).astype(np.float32)
    return found


def made_on(run, mesh, n_devices):
    return program(replace(run, mesh=mesh), mesh.build(jax.devices()[:n_devices]))


TEXTS = tuple(f"the {i}th river carries {i * i % 97} boats; नदी {i} नावें ले जाती है" for i in range(80))


def learning(enrich, **changes):
    data = Data((Documents(TEXTS),), valid_share=0.1, seq_len=32, batch_size=8)
    run = replace(
        RUN,
        model=replace(MODEL, vocab_size=None),
        data=data,
        enrich=enrich,
        optim=AdamW(lr=1e-2),
        steps=8,
        eval_every=4,
        save_every=4,
        keep=9,
    )
    return replace(run, **changes)
