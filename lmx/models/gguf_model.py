"""A GGUF file's metadata and tensor names in the terms of the families: fields of a config.json, and entries.

Where GGUF departs from Hugging Face: Llama's query and key rows lie in neighbouring pairs, Gemma's norms have
their 1 added, Llama 3's stretched RoPE is a tensor of divisors, GPT-2's matrices are [d_out, d_in], and the experts
of a layer lie in one tensor.
Source: ggml, docs/gguf.md; gguf-py, constants.py, for the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lmx.data import Tokenizer
from lmx.data.tokenizer_gguf import beside_of, tokenizer_of
from lmx.formats import Tensor
from lmx.formats.gguf import Gguf
from lmx.models.families import FAMILIES, Family, Fields, check_counts, config_of
from lmx.models.families.mixture import MIXTRAL
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry
from lmx.ops.position import Divided, RoPE

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "qwen3moe": "qwen3_moe",
}
"""general.architecture -> family; a llama with a window is a Mistral, and with experts a Mixtral."""
DIVISORS = "rope_freqs.weight"
IDLE = {"context_length", "vocab_size", "rope.scaling.finetuned", "attention.causal", "tensor_data_layout"}
"""Keys of an architecture that change no number here."""
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{layer}.": "blk.{layer}.",
    "transformer.h.{layer}.": "blk.{layer}.",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate.": "ffn_gate_inp.",
    **{f"block_sparse_moe.experts.{{expert}}.{w}": f"ffn_{x}_exps" for x, w in MIXTRAL.items()},
    **{f"mlp.experts.{{expert}}.{x}_proj": f"ffn_{x}_exps" for x in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    "mlp.gate_up_proj": "ffn_up",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Part of a Hugging Face name -> GGUF's."""


def describe(file: Gguf, name: str) -> tuple[Family, dict[str, Any], TransformerConfig, list[Entry]]:
    """Family, fields of a config.json, config, and where the parameters lie.

    Raises: ValueError for an architecture or setting that lmx has not.
    """
    if file.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{name}: architecture {file.architecture!r:.99} is none of {', '.join(ARCHITECTURES)}"
        )
    found = _fields(file, name)
    family = FAMILIES[found["model_type"]]
    experts = sum(x.shape[0] for x in file.tensors.values() if len(x.shape) == 3)
    check_counts(found, len(file.tensors) + experts, name)
    config = config_of(family, Fields(found, name))
    config = replace(config, norm=replace(config.norm, offset=0.0))
    if DIVISORS in file.tensors:
        if not isinstance(config.position, RoPE):
            raise ValueError(f"{name}: {DIVISORS} has no counterpart in a model with {config.position}")
        divisors = tuple(file.tensors[DIVISORS].read().astype(float).tolist())
        config = replace(config, position=replace(config.position, scaling=Divided(divisors)))
    return family, found, config, entries(family, config, file.architecture)


def weights(file: Gguf) -> dict[str, Tensor]:
    """The tensors that are parameters."""
    return {name: tensor for name, tensor in file.tensors.items() if name != DIVISORS}


def tokenizer(file: Gguf) -> Tokenizer:
    return tokenizer_of(file.metadata, file.metadata.get("general.name") or "the GGUF file")


def beside(file: Gguf) -> dict[str, str]:
    """What a Hugging Face folder says of its tokenizer, of chats and of how to generate: file name -> text."""
    return beside_of(file.metadata)


def _fields(file: Gguf, name: str) -> dict[str, Any]:
    """Raises: ValueError for keys of the architecture that have no counterpart, by name."""
    a = file.architecture
    said = Fields({key: value for key, value in file.metadata.items() if key.startswith(f"{a}.")}, name)
    said.asked |= {f"{a}.{key}" for key in IDLE}

    def of(key: str, default: Any = None, kind: type | None = None) -> Any:
        if kind is not None:
            return said(f"{a}.{key}", kind, default)
        said.asked.add(f"{a}.{key}")
        return said.found.get(f"{a}.{key}", default)

    found = _described(file, name, of)
    said.finish()
    return found


def _described(file: Gguf, name: str, of: Callable[..., Any]) -> dict[str, Any]:
    a = file.architecture
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{name}: the tensor token_embd.weight is missing")
    common = {
        "model_type": ARCHITECTURES[a],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if a == "gpt2":
        return common | {
            "n_embd": of("embedding_length"),
            "n_layer": of("block_count"),
            "n_head": of("attention.head_count"),
            "n_inner": of("feed_forward_length"),
            "n_positions": of("context_length"),
            "layer_norm_epsilon": of("attention.layer_norm_epsilon"),
        }
    if of("attention.value_length") not in (None, of("attention.key_length")):
        raise ValueError(
            f"{name}: {a}.attention.value_length differs from {a}.attention.key_length; lmx has one"
        )
    found = common | {
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv", of("attention.head_count")),
        "head_dim": of("attention.key_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": of("context_length"),
        "rope_parameters": _rope(of),
    }
    window = of("attention.sliding_window") or None
    if a in ("llama", "phi3") or a.startswith("gemma"):
        found["sliding_window"] = window
    if a == "llama":
        found["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        found["model_type"] = "mistral" if window else "llama"
    if a == "llama" and of("expert_count"):
        found["model_type"] = "mixtral"
        found |= {"num_local_experts": of("expert_count"), "num_experts_per_tok": of("expert_used_count")}
        found["intermediate_size"] = of("expert_feed_forward_length", found["intermediate_size"])
    if a == "qwen3moe":
        found |= {"num_experts": of("expert_count"), "num_experts_per_tok": of("expert_used_count")}
        found |= {"moe_intermediate_size": of("expert_feed_forward_length"), "norm_topk_prob": True}
    if a.startswith("gemma"):
        found["query_pre_attn_scalar"] = found["head_dim"]
        if (a, found["num_hidden_layers"]) in (("gemma2", 46), ("gemma3", 62)):  # of 27B, which no key says
            found["query_pre_attn_scalar"] = found["hidden_size"] // max(found["num_attention_heads"], 1)
    if a == "gemma2":
        found["attn_logit_softcapping"] = of("attn_logit_softcapping", 50.0)
        found["final_logit_softcapping"] = of("final_logit_softcapping", 30.0)
    if a == "gemma3":
        full = found["rope_parameters"]
        local = {"rope_type": "default", "rope_theta": of("rope.freq_base_swa", 1e4)}
        found["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        found["sliding_window_pattern"] = of("attention.sliding_window_pattern", 6)
    return found


def _rope(of: Callable[..., Any]) -> dict[str, Any]:
    kind = of("rope.scaling.type", "none")
    found = {"rope_theta": of("rope.freq_base", 1e4), "rope_type": "default" if kind == "none" else kind}
    D, heads = of("embedding_length", ..., int), of("attention.head_count", ..., int)
    H = of("attention.key_length", D // max(heads, 1), int)
    dims = of("rope.dimension_count", H, int)
    if H and dims != H:
        found["partial_rotary_factor"] = dims / H
    if kind != "none":
        found["factor"] = of("rope.scaling.factor")
    if of("rope.scaling.attn_factor", 1.0) != 1:
        found["attn_factor"] = of("rope.scaling.attn_factor")
    original = of("rope.scaling.original_context_length")
    if kind == "yarn":
        found["original_max_position_embeddings"] = original
        found |= {f"beta_{x}": of(f"rope.scaling.yarn_beta_{x}") for x in ("fast", "slow")}
    return found


def entries(family: Family, config: TransformerConfig, architecture: str) -> list[Entry]:
    """Where the parameters lie in a file of that architecture."""
    after = "post_attention_norm" if architecture in ("gemma2", "gemma3", "olmo2") else "ffn_norm"
    names = NAMES | {"post_attention_layernorm": after}
    found = []
    for entry in family.entries(config):
        theirs = entry.theirs
        for part, name in names.items():
            theirs = theirs.replace(part, name)
        turned = entry.turned or (architecture == "gpt2" and entry.ours.endswith("/w"))
        paired = 0
        if architecture == "llama" and entry.ours.startswith(("blocks/attn/q/", "blocks/attn/k/")):
            a = config.attention
            paired = a.n_heads if "/q/" in entry.ours else a.kv_heads
        found.append(replace(entry, theirs=theirs, turned=turned, paired=paired))
    return found
