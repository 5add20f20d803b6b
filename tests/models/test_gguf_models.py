"""The models of `families` as GGUF files, under the names that the gguf package gives: the same logits."""

import json
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import FOLDER

from lmx.formats import safetensors
from lmx.models import build, pretrained
from lmx.models import gguf_model as ours

ARCHITECTURES = {
    "llama": "llama",
    "llama-heads": "llama",
    "llama-linear": "llama",
    "llama-yarn": "llama",
    "llama3": "llama",
    "mistral": "llama",
    "mistral-full": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2-caps": "gemma2",
    "gemma3": "gemma3",
    "gpt2": "gpt2",
    "phi3": "phi3",
    "phi3-partial": "phi3",
    "olmo2": "olmo2",
    "mixtral": "llama",
    "qwen3-moe": "qwen3moe",
}
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(45))]


def written(name, path, **changed):
    """The GGUF file of a case; `changed` replaces metadata."""
    architecture = ARCHITECTURES[name]
    config = json.loads((FOLDER / name / "config.json").read_text())
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(architecture, config) | changed).items():
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            bool: writer.add_bool,
        }
        if value is not None:
            add[type(value)](key if key.startswith("general.") else f"{architecture}.{key}", value)
    writer.add_token_list(TOKENS)
    names = gguf.get_tensor_name_map(kind, config.get("num_hidden_layers") or config["n_layer"])
    for theirs, x in with_experts_joined(safetensors.read(FOLDER / name)).items():
        stem, _, ending = theirs.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", laid_out(architecture, config, theirs, x))
    if name == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_experts_joined(tensors):
    """Name -> array, where the experts of a layer lie in one tensor [E, d_out, d_in]."""
    found = {}
    for name, tensor in tensors.items():
        found.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(tensor.read())
    return {name: np.stack(x) if ".experts." in name else x[0] for name, x in found.items()}


def metadata(a, c):
    """Keys as llama.cpp's converter writes them."""
    if a == "gpt2":
        found = {
            "embedding_length": c["n_embd"],
            "block_count": c["n_layer"],
            "context_length": c["n_positions"],
        }
        found |= {"attention.head_count": c["n_head"], "feed_forward_length": 4 * c["n_embd"]}
        return found | {"attention.layer_norm_epsilon": c["layer_norm_epsilon"]}
    rope = c["rope_parameters"].get("full_attention", c["rope_parameters"])
    heads = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    found = {
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": heads,
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(heads * rope.get("partial_rotary_factor", 1.0)),
        "attention.sliding_window": c.get("sliding_window"),
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        "expert_count": c.get("num_local_experts") or c.get("num_experts"),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        found["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    return found


def laid_out(a, c, name, x):
    if a == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return np.ascontiguousarray(x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape))
    if a.startswith("gemma"):
        x = x + 1 if "norm" in name else x
        learned = "q_norm" if a == "gemma3" else "q_proj"  # llama.cpp's scale is head_dim ** -0.5
        x = x * np.sqrt(c["head_dim"] / c["query_pre_attn_scalar"]) if learned in name else x
    conv = a == "gpt2" and x.ndim == 2 and ".h." in name
    return np.ascontiguousarray(x.T if conv else x, dtype=np.float32)


def divisors(c):
    """Llama 3's: 1 for short waves, `factor` for long ones, a mixture between (its reference code)."""
    r, H = c["rope_parameters"], c["head_dim"]
    waves = 2 * np.pi * r["rope_theta"] ** (np.arange(0, H, 2) / H)
    share = (r["original_max_position_embeddings"] / waves - r["low_freq_factor"]) / (
        r["high_freq_factor"] - r["low_freq_factor"]
    )
    share = np.clip(share, 0, 1)
    return (1 / ((1 - share) / r["factor"] + share)).astype(np.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits(name, tmp_path):
    found = pretrained.find(written(name, tmp_path / "model.gguf"))
    expected = {k: x.read() for k, x in safetensors.read(FOLDER / name / "expected.safetensors").items()}
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    logits = jax.jit(build(found.config).apply)(pretrained.load(found), {"tokens": tokens}).logits
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)
    assert found.context == 128


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"block_count": 3}, "blk.2.attn_norm.weight is missing"),
        ({"block_count": 10**9}, "num_hidden_layers=1,000,000,000, but the file has 21 tensors"),
        ({"embedding_length": 32}, "shape"),
        ({"feed_forward_length": None}, "intermediate_size is missing"),
        ({"attention.head_count": "four"}, "num_attention_heads is 'four', not a whole number from 0"),
        ({"attention.head_count": 3}, "n_heads=3 is not a multiple of n_kv_heads=2"),
        (
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
            "rope_type='longrope' has no counterpart",
        ),
        ({"expert_count": 4, "expert_used_count": 2}, "blk.0.ffn_gate_inp.weight is missing"),
        ({"expert_shared_count": 1}, "no counterpart in lmx for llama.expert_shared_count=1"),
        ({"attention.value_length": 8}, "value_length differs"),
        ({"rope.scaling.attn_factor": 1.5}, "no counterpart in lmx for attn_factor=1.5"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "eps"),
    ],
)
def test_what_does_not_fit_is_named(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrained.find(written("llama", tmp_path / "model.gguf", **changed))


def test_an_unknown_architecture_is_named(tmp_path):
    path = written("llama", tmp_path / "model.gguf", **{"general.architecture": "llamb"})
    with pytest.raises(ValueError, match=f"architecture 'llamb' is none of {', '.join(ours.ARCHITECTURES)}"):
        pretrained.find(path)
