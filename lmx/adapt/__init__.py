"""Surgeries on weights: adapters, number formats and pruning, each `(params, key) -> params`, and so composable."""

from lmx.adapt.calibrate import Awq, Calibrated, Gptq, Rounded, Smooth, calibrate, importance
from lmx.adapt.classes import Classes
from lmx.adapt.lora import (
    Dense,
    Dora,
    LoftQ,
    Lora,
    Merge,
    Pissa,
    Prune,
    Switch,
    Vera,
    adapter,
    attach,
    bank,
    difference,
    extract,
    unmerge,
)
from lmx.adapt.matrices import EVERY, LAYERS
from lmx.adapt.project import Project
from lmx.adapt.quantize import W4A8, W8A8, Cast, Fp8, Gguf, Int4, Int8, Nf4, Qat, Quantize, Rotate, Settle
from lmx.adapt.spend import sensitivity, spend
from lmx.adapt.virtual import Prefix, Prompt
from lmx.weights.surgery import Surgery, chain

__all__ = [
    "EVERY",
    "LAYERS",
    "W4A8",
    "W8A8",
    "Awq",
    "Calibrated",
    "Cast",
    "Classes",
    "Dense",
    "Dora",
    "Fp8",
    "Gguf",
    "Gptq",
    "Int4",
    "Int8",
    "LoftQ",
    "Lora",
    "Merge",
    "Nf4",
    "Pissa",
    "Prefix",
    "Project",
    "Prompt",
    "Prune",
    "Qat",
    "Quantize",
    "Rotate",
    "Rounded",
    "Settle",
    "Smooth",
    "Surgery",
    "Switch",
    "Vera",
    "adapter",
    "attach",
    "bank",
    "calibrate",
    "chain",
    "difference",
    "extract",
    "importance",
    "sensitivity",
    "spend",
    "unmerge",
]
