"""Which positional scheme reads on past the length it was trained on?

Trained on rows of 64 bytes, judged on the same text in rows of 64, 128 and 256. We expect ALiBi to gain from the longer
context, T5 to hold, RoPE and sinusoidal to fail past 64, NoPE to fail more slowly; learned positions past 64 are drawn
at random and never trained.

Found:  nats per byte in rows of 64, 128, 256, mean and 95 % t-interval of three seeds (2026-11-22, commit 0bda312,
        2 CPU cores, jax 0.10.2). RoPE is best where it was trained; only ALiBi gains from more; T5 does not hold.
        RoPE 1.762 +- .03, 1.92, 2.29; ALiBi 1.863 +- .04, 1.851, 1.846; T5 1.890 +- .03, 1.992, 2.271;
        Learned 2.01 +- .40 (one seed of three at 2.20), 2.65, 3.02; Sinusoidal 2.053 +- .02, 2.47, 2.74;
        NoPE 2.180 +- .04, 2.262, 2.384. Each scheme has the same settings, chosen for none of them.

Run:    lmx sweep experiments/positions.py --seeds 3        (about two minutes a run on 2 CPU cores)
Data:   tiny shakespeare as input.txt in $LMX_DATA/shakespeare, or in data/shakespeare; the last 10 % judges.
"""

import os
from dataclasses import replace
from pathlib import Path

from lmx import Run
from lmx.data import Data, Text
from lmx.models import TransformerConfig
from lmx.nn import AttentionConfig
from lmx.ops.position import T5, ALiBi, Learned, NoPE, RoPE, Sinusoidal
from lmx.optim import AdamW, Linear

FILE = str(Path(os.environ.get("LMX_DATA", "data"), "shakespeare", "input.txt"))


def base() -> Run:
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
        eval_lengths=(64, 128, 256),
        save_every=1000,
    )


def variants() -> dict[str, Run]:
    schemes = (NoPE(), Learned(256), Sinusoidal(scale=0.02), RoPE(), ALiBi(), T5())
    return {
        type(scheme).__name__: replace(base(), model=replace(base().model, position=scheme))
        for scheme in schemes
    }
