"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786), text: four norms a layer whose scales are learned from
0, embeddings times sqrt(d_model), GeGLU, local layers among global ones, a tied head.

Gemma 2 caps scores and logits and alternates; Gemma 3 has norms of query and key heads instead, five local layers
for each global one, and a slower rotation in the global ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmx.models.families.base import Family, activation, named
from lmx.models.families.fields import Fields, rope, rope_fields, window_fields, windows
from lmx.models.families.llama import LAYER, attention_entries, ends, mlp_entries, sizes
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry
from lmx.nn import AttentionConfig, MlpConfig, NormConfig

GATES = {"gelu_pytorch_tanh": "geglu"}
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_norm_out": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_norm_out": "post_feedforward_layernorm",
}


def _config(f: Fields) -> TransformerConfig:
    f("max_position_embeddings", int, 0)
    f.only(
        "hidden_act", "gelu", "gelu_pytorch_tanh"
    )  # in older files, beside hidden_activation, which counts
    f.only("use_bidirectional_attention", False)
    bias = f("attention_bias", bool, False)
    return TransformerConfig(
        vocab_size=f("vocab_size", int),
        d_model=f("hidden_size", int),
        n_layers=f("num_hidden_layers", int),
        attention=AttentionConfig(
            n_heads=f("num_attention_heads", int),
            n_kv_heads=f("num_key_value_heads", int),
            head_dim=f("head_dim", int, 256),
            scale=f("query_pre_attn_scalar", float, 256.0) ** -0.5,
            softcap=f("attn_logit_softcapping", float, None),
            bias=bias,
            out_bias=bias,
        ),
        mlp=MlpConfig(
            activation(f, "hidden_activation", "gelu_pytorch_tanh", GATES), f("intermediate_size", int)
        ),
        norm=NormConfig("rms", f("rms_norm_eps", float, 1e-6), offset=1.0),
        placement="sandwich",
        tie_head=f("tie_word_embeddings", bool, True),
        scale_embed=True,
        logit_softcap=f("final_logit_softcapping", float, None),
    )


def gemma2(f: Fields) -> TransformerConfig:
    c = replace(_config(f), position=rope(f))
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(c.n_layers)]
    mask, local = windows(f, kinds)
    return replace(c, attention=replace(c.attention, mask=mask, local=local))


def gemma3(f: Fields) -> TransformerConfig:
    c = replace(_config(f), position=rope(f, "full_attention", theta=1e6))
    every = f("sliding_window_pattern", int, f("_sliding_window_pattern", int, 6))
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c.n_layers)]
    before = f("rope_local_base_freq", float, 1e4)
    old = Fields({"rope_theta": before, "rope_parameters": f.found.get("rope_parameters")}, f.where)
    mask, local = windows(f, kinds, rope(old, "sliding_attention"))
    return replace(c, attention=replace(c.attention, mask=mask, local=local, qk_norm=True))


def gemma2_fields(c: TransformerConfig) -> dict[str, Any]:
    a = c.attention
    return sizes(c) | {
        "query_pre_attn_scalar": _whole((a.scale or a.width(c.d_model) ** -0.5) ** -2),
        "attn_logit_softcapping": a.softcap,
        "final_logit_softcapping": c.logit_softcap,
        "attention_bias": a.bias,
        "hidden_activation": named(c.mlp.activation, GATES, "mlp.activation"),
        **window_fields(a.mask, a.local, c.n_layers),
    }


def gemma3_fields(c: TransformerConfig) -> dict[str, Any]:
    slow = c.attention.local.position if c.attention.local else None
    if slow is None:
        return gemma2_fields(c)
    kinds = {"sliding_attention": rope_fields(slow), "full_attention": rope_fields(c.position)}
    return gemma2_fields(c) | {"rope_parameters": kinds, "rope_local_base_freq": slow.theta}


def entries(c: TransformerConfig) -> list[Entry]:
    norms = [Entry(f"blocks/{ours}/scale", f"{LAYER}{name}.weight") for ours, name in NORMS.items()]
    return [*ends(c), *norms, *attention_entries(c), *mlp_entries(c)]


def _whole(x: float) -> int | float:
    """x, or the whole number it is but for rounding."""
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


FAMILIES = (
    Family("gemma2", "Gemma2ForCausalLM", gemma2, gemma2_fields, entries),
    Family("gemma3_text", "Gemma3ForCausalLM", gemma3, gemma3_fields, entries),
)
