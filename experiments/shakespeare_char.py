"""How far do better positions, optimizer and schedule take nanoGPT's CPU run at the same number of tokens?

nanoGPT's README: 1.88 nats after 2000 steps of 12 x 64 characters, with 0.80M parameters (4 layers, 4 heads, 128 wide).
We expect RoPE, qk-norm, squared ReLU, Muon and a linear decay to zero to reach 1.70 or less.

Found:  nats per character, mean and 95 % t-interval over seeds (2026-11-22, 2 CPU cores, jax 0.10.2; commit 0bda312;
        nanogpt with the settings of 5526324), three seeds, with the paired difference to all:
        all                 1.572 +- .010                      no qk-norm          1.600 +- .011   .029 +- .008
        no muon             1.680 +- .015   .109 +- .009       cosine to a tenth   1.585 +- .019   .013 +- .025
        learned positions   1.646 +- .015   .075 +- .025       gelu                1.552 +- .010  -.019 +- .020
        nanogpt             1.881 +- .016   .310 +- .012
        Against our expectation squared ReLU does not help, and the end of the decay is within the noise.

Run:    lmx sweep experiments/shakespeare_char.py --seeds 3        (2 to 5 minutes a run on 2 CPU cores)
Data:   tiny shakespeare as input.txt in $LMX_DATA/shakespeare, or in data/shakespeare; the first 90 % trains.
Judge:  the loss over the whole of the last 10 %, in rows of 64 characters that see nothing before them.
"""

import os
from dataclasses import replace
from pathlib import Path

from lmx import Run
from lmx.data import Char, Data, Text
from lmx.models import TransformerConfig, preset
from lmx.nn import AttentionConfig, MlpConfig, NormConfig
from lmx.ops.position import Learned
from lmx.optim import AdamW, Cosine, Linear, Muon

FILE = str(Path(os.environ.get("LMX_DATA", "data"), "shakespeare", "input.txt"))


def nanogpt() -> Run:
    """nanoGPT's CPU shape and recipe: no biases, exact GELU; AdamW on every matrix, warmup 100, cosine to a tenth."""
    return Run(
        model=TransformerConfig(
            d_model=128,
            n_layers=4,
            attention=AttentionConfig(4),
            mlp=MlpConfig("gelu_exact"),
            norm=NormConfig("layer", 1e-5),
            position=Learned(64),
        ),
        data=Data(
            train=(Text(FILE, span=(0.0, 0.9)),),
            valid=(Text(FILE, span=(0.9, 1.0)),),
            tokenizer=Char(),
            seq_len=64,
            batch_size=12,
            packing="concat",
        ),
        optim=AdamW(lr=1e-3, schedule=Cosine(warmup=100, end=0.1), b2=0.99, decay="*/w|embed|position_*"),
        steps=2000,
        eval_every=2000,
        save_every=2000,
    )


def base() -> Run:
    """All changes at once."""
    start = nanogpt()
    model = preset("nano")
    return replace(
        start,
        model=replace(model, attention=replace(model.attention, qk_norm=True), mlp=MlpConfig("relu_squared")),
        optim=Muon(lr=0.01, schedule=Linear(), partner=AdamW(lr=5e-3, schedule=Linear(), clip=None)),
    )


def variants() -> dict[str, Run]:
    """Each takes one change back, or is nanoGPT as it is."""
    best, old = base(), nanogpt()
    model = best.model
    return {
        "all": best,
        "no muon": replace(best, optim=AdamW(lr=4e-3, schedule=Linear())),
        "learned positions": replace(best, model=replace(model, position=old.model.position)),
        "cosine to a tenth": replace(
            best,
            optim=replace(
                best.optim, schedule=Cosine(), partner=AdamW(lr=5e-3, schedule=Cosine(), clip=None)
            ),
        ),
        "gelu": replace(best, model=replace(model, mlp=MlpConfig("gelu"))),
        "no qk-norm": replace(best, model=replace(model, attention=replace(model.attention, qk_norm=False))),
        "nanogpt": old,
    }
