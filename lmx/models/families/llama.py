"""Llama 2 and 3, Mistral, Qwen 2 and 3, Phi-3, OLMo 2: RMSNorm, RoPE, SwiGLU; what each changes is a line below.

llama     Touvron et al. 2023, arXiv:2307.09288; Llama 3, arXiv:2407.21783: RoPE stretched
mistral   Jiang et al. 2023, arXiv:2310.06825: a sliding window
qwen2     Yang et al. 2024, arXiv:2407.10671: biases on q, k, v; windows in the upper layers
qwen3     Yang et al. 2025, arXiv:2505.09388: a norm of each query and key head
phi3      Abdin et al. 2024, arXiv:2404.14219: q, k, v in one tensor, and gate with up
olmo2     OLMo 2, arXiv:2501.00656: norms on what sublayers write, and on all query and key heads together
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmx.models.families.base import Family, activation, named
from lmx.models.families.fields import Fields, both_spellings, rope, window_fields, windows
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry
from lmx.nn import AttentionConfig, MlpConfig, NormConfig

GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
LAYER = "model.layers.{layer}."


def decoder(f: Fields, eps: float = 1e-6, partial: bool = False) -> TransformerConfig:
    """What all of them say alike."""
    d_model, n_heads = f("hidden_size", int), f("num_attention_heads", int)
    f("max_position_embeddings", int, 0)
    f.only("hidden_act", *GATES)
    return TransformerConfig(
        vocab_size=f("vocab_size", int),
        d_model=d_model,
        n_layers=f("num_hidden_layers", int),
        attention=AttentionConfig(
            n_heads=n_heads,
            n_kv_heads=f("num_key_value_heads", int, n_heads),
            head_dim=f("head_dim", int, d_model // max(n_heads, 1)),
        ),
        mlp=MlpConfig(activation(f, "hidden_act", "silu", GATES), f("intermediate_size", int)),
        norm=NormConfig("rms", f("rms_norm_eps", float, eps)),
        position=rope(f, partial=partial),
        tie_head=f("tie_word_embeddings", bool, False),
    )


def llama(f: Fields) -> TransformerConfig:
    c = decoder(f)
    bias = f("attention_bias", bool, False)
    mlp = replace(c.mlp, bias=f("mlp_bias", bool, False))
    return replace(c, attention=replace(c.attention, bias=bias, out_bias=bias), mlp=mlp)


def mistral(f: Fields) -> TransformerConfig:
    return _one_window(f, decoder(f))


def qwen2(f: Fields) -> TransformerConfig:
    c = _windowed(f, decoder(f))
    return replace(c, attention=replace(c.attention, bias=True))


def qwen3(f: Fields) -> TransformerConfig:
    c = _windowed(f, decoder(f))
    H, bias = f("head_dim", int, 128), f("attention_bias", bool, False)
    return replace(c, attention=replace(c.attention, head_dim=H, bias=bias, out_bias=bias, qk_norm=True))


def phi3(f: Fields) -> TransformerConfig:
    f("original_max_position_embeddings", int, 0)
    return _one_window(f, decoder(f, eps=1e-5, partial=True))


def olmo2(f: Fields) -> TransformerConfig:
    f.only("attention_bias", False)
    c = decoder(f, eps=1e-5)
    return replace(c, attention=replace(c.attention, qk_norm="joint"), placement="inner")


def _one_window(f: Fields, c: TransformerConfig) -> TransformerConfig:
    kind = "sliding_attention" if f("sliding_window", int, None) else "full_attention"
    mask, local = windows(f, [kind] * c.n_layers)
    return replace(c, attention=replace(c.attention, mask=mask, local=local))


def _windowed(f: Fields, c: TransformerConfig) -> TransformerConfig:
    first = f("max_window_layers", int, 28)
    if not f("use_sliding_window", bool, False):
        f.asked |= {"sliding_window", "layer_types"}
        return c
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(c.n_layers)]
    mask, local = windows(f, kinds)
    return replace(c, attention=replace(c.attention, mask=mask, local=local))


def sizes(c: TransformerConfig) -> dict[str, Any]:
    """What they and Gemma write alike."""
    a = c.attention
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.mlp.width(c.d_model),
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.width(c.d_model),
        "rms_norm_eps": c.norm.eps,
        "tie_word_embeddings": c.tie_head,
        **both_spellings(c.position),
    }


def fields(c: TransformerConfig) -> dict[str, Any]:
    return sizes(c) | {"hidden_act": named(c.mlp.activation, GATES, "mlp.activation")}


def llama_fields(c: TransformerConfig) -> dict[str, Any]:
    return fields(c) | {"attention_bias": c.attention.bias, "mlp_bias": c.mlp.bias}


def one_window(c: TransformerConfig) -> dict[str, Any]:
    """The fields of those that have one window for all layers, or none."""
    if c.attention.local is not None:
        raise ValueError(f"attention.local={c.attention.local}: this family has one window for all layers")
    found = window_fields(c.attention.mask, None, c.n_layers)
    del found["layer_types"]  # with which it would be read as Ministral
    return fields(c) | found


def qwen2_fields(c: TransformerConfig) -> dict[str, Any]:
    found = fields(c) | window_fields(c.attention.mask, c.attention.local, c.n_layers)
    return found | {"use_sliding_window": found["sliding_window"] is not None}


def qwen3_fields(c: TransformerConfig) -> dict[str, Any]:
    return qwen2_fields(c) | {"attention_bias": c.attention.bias}


def attention_entries(c: TransformerConfig, at: str = LAYER + "self_attn.") -> list[Entry]:
    """The four projections, their biases, and the norms of queries and keys."""
    a = c.attention
    found = []
    for name in "qkvo":
        found.append(Entry(f"blocks/attn/{name}/w", f"{at}{name}_proj.weight", turned=True))
        if a.out_bias if name == "o" else a.bias:
            found.append(Entry(f"blocks/attn/{name}/b", f"{at}{name}_proj.bias"))
    if a.qk_norm:
        found += [Entry(f"blocks/attn/{x}_norm/scale", f"{at}{x}_norm.weight") for x in "qk"]
    return found


def mlp_entries(c: TransformerConfig, at: str = LAYER + "mlp.") -> list[Entry]:
    names = ("gate", "up", "down")
    found = [Entry(f"blocks/mlp/{x}/w", f"{at}{x}_proj.weight", turned=True) for x in names]
    if c.mlp.bias:
        found += [Entry(f"blocks/mlp/{x}/b", f"{at}{x}_proj.bias") for x in names]
    return found


def ends(c: TransformerConfig) -> list[Entry]:
    """Embedding, last norm and head."""
    head = [] if c.tie_head else [Entry("head", "lm_head.weight", turned=True)]
    return [Entry("embed", "model.embed_tokens.weight"), Entry("norm/scale", "model.norm.weight"), *head]


def norms(first: str = "input_layernorm", second: str = "post_attention_layernorm") -> list[Entry]:
    places = (("attn_norm", first), ("mlp_norm", second))
    return [Entry(f"blocks/{ours}/scale", f"{LAYER}{name}.weight") for ours, name in places]


def entries(c: TransformerConfig) -> list[Entry]:
    return [*ends(c), *norms(), *attention_entries(c), *mlp_entries(c)]


def olmo2_entries(c: TransformerConfig) -> list[Entry]:
    after = norms("post_attention_layernorm", "post_feedforward_layernorm")
    return [*ends(c), *after, *attention_entries(c), *mlp_entries(c)]


def phi3_entries(c: TransformerConfig) -> list[Entry]:
    H, N, K = c.attention.width(c.d_model), c.attention.n_heads, c.attention.kv_heads
    d_ff = c.mlp.width(c.d_model)
    qkv, gate_up = LAYER + "self_attn.qkv_proj.weight", LAYER + "mlp.gate_up_proj.weight"
    return [
        *ends(c),
        *norms(),
        Entry("blocks/attn/q/w", qkv, turned=True, part=(0, N * H)),
        Entry("blocks/attn/k/w", qkv, turned=True, part=(N * H, (N + K) * H)),
        Entry("blocks/attn/v/w", qkv, turned=True, part=((N + K) * H, (N + 2 * K) * H)),
        Entry("blocks/attn/o/w", LAYER + "self_attn.o_proj.weight", turned=True),
        Entry("blocks/mlp/gate/w", gate_up, turned=True, part=(0, d_ff)),
        Entry("blocks/mlp/up/w", gate_up, turned=True, part=(d_ff, 2 * d_ff)),
        Entry("blocks/mlp/down/w", LAYER + "mlp.down_proj.weight", turned=True),
    ]


FAMILIES = (
    Family("llama", "LlamaForCausalLM", llama, llama_fields, entries),
    Family("mistral", "MistralForCausalLM", mistral, one_window, entries),
    Family("qwen2", "Qwen2ForCausalLM", qwen2, qwen2_fields, entries),
    Family("qwen3", "Qwen3ForCausalLM", qwen3, qwen3_fields, entries),
    Family("phi3", "Phi3ForCausalLM", phi3, one_window, phi3_entries),
    Family("olmo2", "Olmo2ForCausalLM", olmo2, fields, olmo2_entries),
)
