"""Mixtures of experts: Mixtral (Jiang et al. 2024, arXiv:2401.04088) and Qwen3-MoE (Yang et al. 2025,
arXiv:2505.09388): a Mistral or a Qwen 3 whose feed-forward layers are MoeConfig."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmx.models.families.base import Family
from lmx.models.families.fields import Fields
from lmx.models.families.llama import (
    LAYER,
    attention_entries,
    ends,
    mistral,
    norms,
    one_window,
    qwen3,
    qwen3_fields,
)
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry
from lmx.nn import MoeConfig


def mixtral(f: Fields) -> TransformerConfig:
    c = mistral(f)
    experts = MoeConfig(
        c.mlp.activation,
        c.mlp.d_ff,
        n_experts=f("num_local_experts", int, 8),
        top_k=f("num_experts_per_tok", int, 2),
    )
    return replace(c, mlp=experts)


def qwen3_moe(f: Fields) -> TransformerConfig:
    f.only("decoder_sparse_step", 1)
    f.only("mlp_only_layers", [])
    c = qwen3(f)
    experts = MoeConfig(
        c.mlp.activation,
        f("moe_intermediate_size", int, 768),
        n_experts=f("num_experts", int, f("num_local_experts", int, 128)),
        top_k=f("num_experts_per_tok", int, 8),
        renormalise=f("norm_topk_prob", bool, False),
    )
    return replace(c, mlp=experts)


def mixtral_fields(c: TransformerConfig) -> dict[str, Any]:
    e = _experts(c)
    return one_window(c) | {"num_local_experts": e.n_experts, "num_experts_per_tok": e.top_k}


def qwen3_moe_fields(c: TransformerConfig) -> dict[str, Any]:
    e = _experts(c)
    return qwen3_fields(c) | {
        "moe_intermediate_size": e.width(c.d_model),
        "num_experts": e.n_experts,
        "num_local_experts": e.n_experts,
        "num_experts_per_tok": e.top_k,
        "norm_topk_prob": e.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _experts(c: TransformerConfig) -> MoeConfig:
    """Raises: ValueError if the feed-forward layers are no mixtures."""
    if not isinstance(c.mlp, MoeConfig):
        raise ValueError(f"mlp={c.mlp}: this family has mixtures of experts alone")
    return c.mlp


def _entries(at: str, names: dict[str, str]):
    def entries(c: TransformerConfig) -> list[Entry]:
        expert = LAYER + at + ".experts.{expert}."
        router = Entry("blocks/mlp/router/w", f"{LAYER}{at}.gate.weight", turned=True)
        stacks = [
            Entry(f"blocks/mlp/experts/{ours}/w", f"{expert}{theirs}.weight", turned=True)
            for ours, theirs in names.items()
        ]
        return [*ends(c), *norms(), *attention_entries(c), router, *stacks]

    return entries


MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}
QWEN3 = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FAMILIES = (
    Family("mixtral", "MixtralForCausalLM", mixtral, mixtral_fields, _entries("block_sparse_moe", MIXTRAL)),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe, qwen3_moe_fields, _entries("mlp", QWEN3)),
)
