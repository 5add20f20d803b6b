"""Optimizers and schedules as values: `AdamW(lr=3e-4, schedule=WSD()).build(steps, params)` is optax's."""

from lmx.optim.adafactor import Adafactor
from lmx.optim.base import Update, clip_by_norm, lr_at
from lmx.optim.elementwise import AdamW, Lion, Sgd
from lmx.optim.ema import ema, ema_params
from lmx.optim.muon import Muon, orthogonal
from lmx.optim.schedules import WSD, Constant, Cosine, Linear, Schedule

__all__ = [
    "WSD",
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "Linear",
    "Lion",
    "Muon",
    "Schedule",
    "Sgd",
    "Update",
    "clip_by_norm",
    "ema",
    "ema_params",
    "lr_at",
    "orthogonal",
]
