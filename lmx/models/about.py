"""What a model is, in words: its shape, its cost, and of a released one its files."""

from __future__ import annotations

from collections import Counter

import jax.numpy as jnp

from lmx.models.pretrained import Pretrained
from lmx.models.transformer import TransformerConfig, flops_per_token, n_params


def released(found: Pretrained) -> dict[str, str]:
    """Name -> value of what the files of a released model say; no weight is read."""
    stored = Counter(tensor.stored for tensor in found.tensors.values())
    rows = {"model": str(found.path), "family": found.family.model_type}
    rows |= shape(found.config, min(found.context or 2048, 2048))
    rows["context"] = f"{found.context:,} tokens" if found.context else "not said"
    kinds = ", ".join(f"{n} {kind}" for kind, n in stored.most_common())
    size = sum(file.stat().st_size for file in found.files())
    if found.schemes:
        kinds_of = Counter(map(str, found.schemes.values())).most_common()
        rows["quantized"] = "; ".join(f"{n} matrices: {scheme}" for scheme, n in kinds_of)
    rows["file"] = f"{size / 2**20:,.1f} MiB, tensors: {kinds}"
    try:
        tokenizer = found.tokenizer()
        rows["tokenizer"] = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, lossless: {tokenizer.lossless}"
    except FileNotFoundError as error:
        rows["tokenizer"] = str(error)
    return rows


def shape(config: TransformerConfig, seq_len: int) -> dict[str, str]:
    """Name -> value of a model that need not exist; FLOPs are those of training on rows of seq_len tokens."""
    a = config.attention
    head_dim = a.width(config.d_model)
    n, active = n_params(config)
    met = "" if n == active else f"; a token meets {active:,}"
    cache = 2 * config.n_layers * a.kv_heads * head_dim * jnp.dtype(config.dtype).itemsize
    return {
        "shape": f"{config.n_layers} layers, d_model {config.d_model}, {a.n_heads} heads of {head_dim}"
        f" ({a.kv_heads} for keys), vocabulary {config.vocab_size}",
        "parts": f"{config.position}, {config.norm.kind} norm ({config.placement}), {config.mlp.activation}",
        "parameters": f"{n:,}, of them embedding {config.vocab_size * config.d_model:,}{met}",
        "memory": f"float32 {n * 4 / 2**20:,.1f} MiB, bfloat16 {n * 2 / 2**20:,.1f} MiB",
        "training FLOPs per token": f"{flops_per_token(config, seq_len):.3g} at length {seq_len}",
        "KV cache per token": f"{cache:,} bytes",
    }
