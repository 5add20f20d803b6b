"""Shapes people know by name."""

from __future__ import annotations

from lmx.models.transformer import TransformerConfig
from lmx.nn import AttentionConfig, MlpConfig, NormConfig
from lmx.ops.position import Learned, RoPE


def gpt2(d_model: int, n_layers: int, n_heads: int, max_len: int = 1024, **more) -> TransformerConfig:
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, tanh GELU, biases, tied head."""
    return TransformerConfig(
        d_model=d_model,
        n_layers=n_layers,
        attention=AttentionConfig(n_heads=n_heads, bias=True, out_bias=True),
        mlp=MlpConfig("gelu", bias=True),
        norm=NormConfig("layer", 1e-5, bias=True),
        position=Learned(max_len),
        **more,
    )


def llama(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int | None = None, **more
) -> TransformerConfig:
    """Llama (Touvron et al. 2023): RoPE, RMSNorm, SwiGLU, no biases."""
    return TransformerConfig(
        d_model=d_model,
        n_layers=n_layers,
        attention=AttentionConfig(n_heads=n_heads, n_kv_heads=n_kv_heads),
        position=RoPE(),
        **more,
    )


PRESETS: dict[str, TransformerConfig] = {
    "nano": llama(128, 4, 4),
    "baby": llama(384, 6, 6),
    "gpt2-124m": gpt2(768, 12, 12, vocab_size=50257),
    "350m": llama(1024, 24, 16, vocab_size=32768, tie_head=False, dtype="bfloat16"),
    "1b": llama(2048, 20, 16, vocab_size=32768, tie_head=False, dtype="bfloat16", remat="dots"),
    "7b": llama(4096, 32, 32, vocab_size=32000, tie_head=False, dtype="bfloat16", remat="full"),
}


def preset(name: str) -> TransformerConfig:
    """Raises: ValueError naming the presets if there is none of that name."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
