"""Whole models as tuples of pure functions."""

from lmx.models.presets import PRESETS, preset
from lmx.models.transformer import (
    RULES,
    Cache,
    Model,
    Out,
    Routing,
    TransformerConfig,
    build,
    flops_per_token,
    n_params,
)

__all__ = [
    "PRESETS",
    "RULES",
    "Cache",
    "Model",
    "Out",
    "Routing",
    "TransformerConfig",
    "build",
    "flops_per_token",
    "n_params",
    "preset",
]
