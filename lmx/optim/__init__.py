"""Optimizers and schedules as values: `AdamW(lr=3e-4, schedule=WSD()).build(steps, params)` is optax's."""

from lmx.optim.adamw import AdamW
from lmx.optim.base import Update, lr_at
from lmx.optim.ema import ema, ema_params
from lmx.optim.schedules import WSD, Constant, Cosine, Linear, Schedule

__all__ = ["WSD", "AdamW", "Constant", "Cosine", "Linear", "Schedule", "Update", "ema", "ema_params", "lr_at"]
