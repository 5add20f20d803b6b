"""Which positional scheme reads on past the length it was trained on?

Trained on rows of 64 bytes, judged on the same text in rows of 64, 128 and 256. We expect ALiBi to gain from the longer
context, T5 to hold, RoPE and sinusoidal to fail past 64, NoPE to fail more slowly; learned positions past 64 are drawn
at random and never trained.

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
