"""Whole models as tuples of pure functions."""

from lmx.models.presets import PRESETS, preset
from lmx.models.transformer import (
    RULES,
    Cache,
    Layers,
    Model,
    Out,
    Routing,
    TransformerConfig,
    build,
    flops_per_token,
    layers,
    n_params,
    prefixed,
    unstacked,
)

__all__ = [
    "PRESETS",
    "RULES",
    "Cache",
    "Layers",
    "Model",
    "Out",
    "Routing",
    "TransformerConfig",
    "build",
    "flops_per_token",
    "layers",
    "n_params",
    "prefixed",
    "preset",
    "unstacked",
]
