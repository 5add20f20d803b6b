"""A model as a GGUF file that llama.cpp opens: what `gguf_model` reads, written.

    fallen = gguf_export.save("model.gguf", config, params, tokenizer, kind="Q4_K", context=2048, chat=template)

An architecture is chosen by reading back: of the metadata that each would have for this config, the first that
`gguf_model` makes the same config of. What llama.cpp leaves out of account, such as the window of a Mistral, is no
part of the metadata here, so that a model with it is refused, not written to compute something else.
Source: ggml, docs/gguf.md; llama.cpp, src/llama-model.cpp for the keys, src/llama-quant.cpp for the types.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmx import tree
from lmx.data import ChatTemplate, Tokenizer
from lmx.data.tokenizer_gguf import metadata_of
from lmx.formats import Tensor, gguf_write
from lmx.formats.gguf import BLOCKS, Gguf
from lmx.formats.gguf_blocks import is_rounded, type_of
from lmx.models import gguf_model, pretrained, weight_map
from lmx.models.families import FAMILIES
from lmx.models.gguf_model import ARCHITECTURES, DIVISORS
from lmx.models.transformer import TransformerConfig
from lmx.models.weight_map import Entry
from lmx.nn import MoeConfig
from lmx.ops.position import Divided, Linear, Llama3, RoPE, Scaling, YaRN
from lmx.weights import Weight, dense

SCALED = {
    Divided: ("llama",),
    Llama3: ("llama",),
    Linear: ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3"),
    YaRN: ("llama", "qwen2", "qwen3", "qwen3moe"),
}
"""Scaling of RoPE -> architectures in which llama.cpp was seen to compute it."""


def save(
    path: str | Path,
    config: TransformerConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    kind: str = "F16",
    context: int,
    chat: ChatTemplate | None = None,
    bos_id: int | None = None,
    like: str | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
) -> dict[str, str]:
    """Writes a model whole or not at all; returns the matrices whose rows the kind's blocks do not divide, and their
    types.

    Args:
      kind: of the matrices, a name in `formats.gguf.BLOCKS`. Vectors, positions and routers stay float32; embedding
        and head are Q6_K where kind is a K type; a matrix whose rows are no whole blocks has the type in
        WHERE_ROWS_ARE_NO_BLOCKS.
      context: tokens the model reads at once.
      bos_id: of a token that begins texts for others, where the tokenizer has none because the model's do not.
      like: the model_type of the family to try first.
      importance: by path, as `lmx.adapt.importance` finds it.
    Raises: ValueError for a model or tokenizer that llama.cpp computes otherwise, by name, and for weights that are
      not finite; OSError.
    """
    path = Path(path)
    if kind not in BLOCKS:
        raise ValueError(f"type {kind!r:.99} is none of {', '.join(BLOCKS)}")
    params = weight_map.stacked(jax.tree.map(dense, params, is_leaf=lambda w: isinstance(w, Weight)))
    first = sorted(ARCHITECTURES, key=lambda name: ARCHITECTURES[name] != like)
    tries = {name: partial(_as_architecture, name, config, context) for name in first}
    metadata, entries, divisors = pretrained.first_same(
        _as_stored(config), tries, "architecture of GGUF that lmx writes"
    )
    a, scaling = metadata["general.architecture"], getattr(config.position, "scaling", Scaling())
    if a not in SCALED.get(type(scaling), ARCHITECTURES):
        raise ValueError(f"llama.cpp leaves {scaling} out of account in {a}; use a model without")
    metadata |= {"general.name": path.stem} | metadata_of(tokenizer, config.vocab_size, bos_id)
    metadata |= {} if chat is None else {"tokenizer.chat_template": chat.source}
    metadata |= {"general.quantization_version": 2} if kind.startswith("Q") else {}
    shapes = weight_map.theirs(entries, _shapes(params)) | {name: x.shape for name, x in divisors.items()}
    layout = {name: (shape, type_of(name, shape, kind)) for name, shape in shapes.items()}
    offset = config.norm.offset
    params = tree.map_at(lambda _, x: x + offset, params, "*norm*/scale") if offset else params
    arrays = itertools.chain(weight_map.dump(entries, params, np.dtype(np.float32)), divisors.items())
    gguf_write.write(path, metadata, layout, arrays, _by_tensor(entries, importance or {}))
    return {
        name: x
        for name, (shape, x) in layout.items()
        if is_rounded(name, shape) and shape[-1] % BLOCKS[kind][0]
    }


def _by_tensor(entries: list[Entry], importance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their tensors have our inputs as their columns, in our order; those that join ours read the same."""
    found = {}
    for entry in entries:
        if entry.ours in importance:
            mine = importance[entry.ours]
            places = np.ndindex(*mine.shape[: entry.n_leading])
            found |= {name: mine[place] for name, place in zip(entry.names(mine.shape), places)}
    return found


def _shapes(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def _as_stored(config: TransformerConfig) -> TransformerConfig:
    """With what the file says in tensors: norms hold their offset, and divisors the stretch of Llama 3."""
    by = _divisors(config)
    norm, position = replace(config.norm, offset=0.0), config.position
    return replace(config, norm=norm, position=replace(position, scaling=Divided(by)) if by else position)


def _divisors(config: TransformerConfig) -> tuple[float, ...]:
    """What each frequency is divided by, in float32; empty for a model without."""
    p = config.position
    if not isinstance(p, RoPE) or not isinstance(p.scaling, Llama3 | Divided):
        return ()
    d = int(p.fraction * config.attention.width(config.d_model))
    by = Scaling().frequencies(p.theta, d) / p.scaling.frequencies(p.theta, d)
    return tuple(by.astype(np.float32).astype(float).tolist())


def _as_architecture(
    a: str, config: TransformerConfig, context: int
) -> tuple[tuple[dict[str, Any], list[Entry], dict[str, np.ndarray]], TransformerConfig]:
    """Metadata, entries and divisors of a model in an architecture; and the config that is read back of them."""
    family = FAMILIES["mixtral" if a == "llama" and isinstance(config.mlp, MoeConfig) else ARCHITECTURES[a]]
    metadata = {"general.architecture": a}
    metadata |= {f"{a}.{key}": value for key, value in _keys(a, config, context).items()}
    entries = gguf_model.entries(family, config, a)
    divisors = {DIVISORS: np.array(by, np.float32)} if (by := _divisors(config)) else {}
    shapes = weight_map.theirs(entries, pretrained.shapes(config))
    tensors = {name: _tensor(name, np.broadcast_to(np.float32(0), shape)) for name, shape in shapes.items()}
    tensors |= {name: _tensor(name, x) for name, x in divisors.items()}
    _, _, again, _ = gguf_model.describe(Gguf(a, metadata, tensors), a)
    return (metadata, entries, divisors), again


def _tensor(name: str, x: np.ndarray) -> Tensor:
    return Tensor(name, x.shape, x.dtype, "F32", lambda start, stop: x[start:stop])


def _keys(a: str, c: TransformerConfig, context: int) -> dict[str, Any]:
    """What an architecture's metadata say of a config; what they cannot is left out."""
    attention, d_ff = c.attention, c.mlp.width(c.d_model)
    found = {
        "vocab_size": c.vocab_size,
        "context_length": c.position.max_len() or context,
        "embedding_length": c.d_model,
        "block_count": c.n_layers,
        "feed_forward_length": d_ff,
        "attention.head_count": attention.n_heads,
    }
    if isinstance(c.mlp, MoeConfig):
        found |= {"expert_count": c.mlp.n_experts, "expert_used_count": c.mlp.top_k}
        found |= {"expert_feed_forward_length": d_ff}
    if a == "gpt2":
        return found | {"attention.layer_norm_epsilon": c.norm.eps}
    H = attention.width(c.d_model)
    found |= {
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": H,
        "attention.value_length": H,
        "attention.layer_norm_rms_epsilon": c.norm.eps,
    }
    if isinstance(c.position, RoPE):
        found |= {"rope.freq_base": c.position.theta, "rope.dimension_count": int(c.position.fraction * H)}
        found |= _scaling(c.position.scaling)
    if a.startswith("gemma") and attention.local:
        found["attention.sliding_window"] = attention.local.window
    if a == "gemma2":
        caps = {"attn_logit_softcapping": attention.softcap, "final_logit_softcapping": c.logit_softcap}
        found |= {key: cap for key, cap in caps.items() if cap is not None}
    return found


def _scaling(scaling: Scaling) -> dict[str, Any]:
    if isinstance(scaling, Linear):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if isinstance(scaling, YaRN):
        found = {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling.factor)}
        return found | {"rope.scaling.original_context_length": scaling.original_len}
    return {}
