"""Which divergence from its teacher teaches a small student best, and how much of the teacher does it need to see?

A teacher learns tiny shakespeare, byte by byte; students half as wide and half as deep see a tenth of that text, and of
each next byte either what it is (cross-entropy), or what the teacher holds likely, or both. We expect every divergence
to beat cross-entropy, since the teacher has read ten times as much; forward KL at temperature 1 or 2 to be best by
held-out cross-entropy, whose other half it is; reverse KL, which leaves out what it cannot hold, to be worse; a JSD to
lie between by its beta; and the teacher's 16 likeliest bytes to be as good as all of them.

Run:    lmx train experiments/distill_losses.py        (the teacher, into runs/distill_losses/base: two minutes)
        lmx sweep experiments/distill_losses.py --seeds 3        (the students, under a minute each on 2 CPU cores)
Data:   tiny shakespeare as input.txt in $LMX_DATA/shakespeare, or in data/shakespeare; the last 10 % judges.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from lmx import Run
from lmx.data import Data, Text
from lmx.losses import ForwardKL, Jsd, NextToken, ReverseKL, Term, TotalVariation
from lmx.models import TransformerConfig
from lmx.nn import AttentionConfig
from lmx.optim import AdamW, Linear
from lmx.train import Teacher

FILE = str(Path(os.environ.get("LMX_DATA", "data"), "shakespeare", "input.txt"))
TEACHER = os.environ.get("LMX_TEACHER", "runs/distill_losses/base")


@dataclass(frozen=True)
class TopK(Teacher):
    """The teacher's k likeliest tokens alone, as a store of them would have them."""

    k: int = 16

    def __call__(self, constants, batch, answer):
        log_p = jax.nn.log_softmax(constants(batch).logits)
        chosen, ids = jax.lax.top_k(log_p, self.k)
        return batch | {"teacher_ids": ids, "teacher_log_p": chosen}


def base() -> Run:
    """The teacher."""
    return Run(
        model=TransformerConfig(d_model=128, n_layers=4, attention=AttentionConfig(4)),
        data=Data(
            train=(Text(FILE, span=(0.0, 0.9)),),
            valid=(Text(FILE, span=(0.9, 1.0)),),
            seq_len=64,
            batch_size=16,
            packing="concat",
        ),
        optim=AdamW(lr=3e-3, schedule=Linear()),
        steps=1000,
        eval_every=1000,
        save_every=1000,
    )


def variants() -> dict[str, Run]:
    """Students: of the same text and steps, and but for the first of the same teacher."""
    run = base()
    alone = replace(
        run,
        model=replace(run.model, d_model=64, n_layers=2),
        data=replace(run.data, train=(Text(FILE, span=(0.0, 0.09)),)),
        steps=200,
        eval_every=200,
        save_every=200,
    )

    def taught(loss, teacher=None, **more):
        objective = {"kd": Term(loss)} | more
        return replace(alone, objective=objective, enrich=teacher or Teacher(TEACHER))

    losses = {f"KL, T={t:g}": ForwardKL(t) for t in (1.0, 2.0, 4.0)}
    losses |= {"reverse KL": ReverseKL(), "variation": TotalVariation()}
    losses |= {f"JSD {b:g}": Jsd(beta=b) for b in (0.1, 0.5, 0.9)}
    students = {"cross-entropy": alone} | {name: taught(loss) for name, loss in losses.items()}
    students["half KL, half cross-entropy"] = taught(ForwardKL(), ce=Term(NextToken()))
    return students | {f"KL, top {k}": taught(ForwardKL(), TopK(TEACHER, k=k)) for k in (1, 4, 16)}
