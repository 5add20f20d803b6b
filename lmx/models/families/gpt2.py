"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, tanh GELU, biases; matrices stored [d_in, d_out]."""

from __future__ import annotations

from typing import Any

from lmx.models.families.base import Family, activation, named
from lmx.models.families.fields import Fields
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry
from lmx.nn import AttentionConfig, MlpConfig, NormConfig
from lmx.ops.position import Learned

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "silu": "silu",
    "relu2": "relu_squared",
}
LAYER = "transformer.h.{layer}."


def config(f: Fields) -> TransformerConfig:
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    return TransformerConfig(
        vocab_size=f("vocab_size", int),
        d_model=f("n_embd", int),
        n_layers=f("n_layer", int),
        attention=AttentionConfig(f("n_head", int), bias=True, out_bias=True),
        mlp=MlpConfig(
            activation(f, "activation_function", "gelu_new", ACTIVATIONS), f("n_inner", int, None), bias=True
        ),
        norm=NormConfig("layer", f("layer_norm_epsilon", float, 1e-5), bias=True),
        position=Learned(f("n_positions", int)),
        tie_head=f("tie_word_embeddings", bool, True),
    )


def fields(c: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.attention.n_heads,
        "n_inner": c.mlp.d_ff,
        "n_positions": c.position.max_len(),
        "activation_function": named(c.mlp.activation, ACTIVATIONS, "mlp.activation"),
        "layer_norm_epsilon": c.norm.eps,
        "tie_word_embeddings": c.tie_head,
    }


def entries(c: TransformerConfig) -> list[Entry]:
    D = c.d_model
    found = [Entry("embed", "transformer.wte.weight"), Entry("position_table", "transformer.wpe.weight")]
    for ours, name in (
        ("norm", "transformer.ln_f"),
        ("blocks/attn_norm", "ln_1"),
        ("blocks/mlp_norm", "ln_2"),
    ):
        at = name if "." in name else LAYER + name
        found += [Entry(f"{ours}/scale", f"{at}.weight"), Entry(f"{ours}/bias", f"{at}.bias")]
    for ours, name in (("attn/o", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj")):
        found += [
            Entry(f"blocks/{ours}/{x}", f"{LAYER}{name}.{y}") for x, y in (("w", "weight"), ("b", "bias"))
        ]
    for i, name in enumerate("qkv"):
        part = (i * D, (i + 1) * D)
        found += [
            Entry(f"blocks/attn/{name}/{x}", f"{LAYER}attn.c_attn.{y}", part=part)
            for x, y in (("w", "weight"), ("b", "bias"))
        ]
    return found if c.tie_head else [*found, Entry("head", "lm_head.weight", turned=True)]


FAMILIES = (Family("gpt2", "GPT2LMHeadModel", config, fields, entries),)
