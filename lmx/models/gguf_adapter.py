"""LoRA adapters as GGUF files, which llama.cpp puts on a model: `llama-cli -m model.gguf --lora adapter.gguf`.

    gguf_adapter.save("adapter.gguf", found.family, found.config, alone)

A file has one alpha, and each matrix the scale alpha / R; what an adapter's own scale differs by is in its B. Rows of B
lie as those of the matrix, for llama in neighbouring pairs.
Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmx.formats import gguf_write
from lmx.models import adapter_map, gguf_model, weight_map
from lmx.models.families import Family
from lmx.models.gguf_model import ARCHITECTURES
from lmx.models.transformer import TransformerConfig
from lmx.weights import Dora

OF_FAMILY = {family: a for a, family in ARCHITECTURES.items()} | {"mistral": "llama", "mixtral": "llama"}


def save(path: str | Path, family: Family, config: TransformerConfig, alone: Any) -> None:
    """Writes the adapters of a model, in float32.

    alone: as `lmx.adapt.adapter` gives it.
    Raises: ValueError for adapters that llama.cpp does not have, by path; OSError.
    """
    a = OF_FAMILY.get(family.model_type)
    if a is None:
        raise ValueError(
            f"{family.model_type} is none of the families that GGUF files hold: {', '.join(OF_FAMILY)}"
        )
    alpha, tensors = None, {}
    for entry, name, low in adapter_map.dump(gguf_model.entries(family, config, a), alone):
        if entry.ours == adapter_map.EMBED or isinstance(low, Dora):
            what = "DoRA" if isinstance(low, Dora) else "an adapter on the embedding"
            raise ValueError(
                f"{entry.ours}: llama.cpp has no counterpart for {what}; merge it: lmx adapt merge"
            )
        rank = low.a.shape[-1]
        alpha = alpha or low.scale * rank or 1.0
        down, up = (np.swapaxes(x, -1, -2) for x in (low.a, low.b * np.float32(low.scale * rank / alpha)))
        tensors[f"{name}.lora_a"] = down
        tensors[f"{name}.lora_b"] = weight_map.pairs(up, entry.paired) if entry.paired else up
    if not tensors:
        raise ValueError("no adapter to write")
    metadata = {
        "general.architecture": a,
        "general.type": "adapter",
        "general.name": Path(path).stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    gguf_write.write(path, metadata, {name: (x.shape, "F32") for name, x in tensors.items()}, tensors.items())
