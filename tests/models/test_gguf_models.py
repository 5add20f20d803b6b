"""The models of `families` as GGUF files, under the names that the gguf package gives: the same logits."""

import json
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import FOLDER

from lmx.formats import gguf as gguf_format
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


def written(name, path, more=None, **changed):
    """The GGUF file of a case, with `more` tensors; `changed` replaces metadata."""
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
    for key, x in (more or {}).items():
        writer.add_tensor(key, x)
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
        ({"attention.head_count": "four"}, "llama.attention.head_count is 'four', not a whole number from 0"),
        ({"attention.head_count": 3}, "n_heads=3 is not a multiple of n_kv_heads=2"),
        (
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
            "rope_type='longrope' has no counterpart",
        ),
        ({"expert_count": 4, "expert_used_count": 2}, "blk.0.ffn_gate_inp.weight is missing"),
        ({"expert_shared_count": 1}, "no counterpart in lmx for llama.expert_shared_count=1"),
        ({"attention.value_length": 8}, "value_length differs"),
        ({"rope.scaling.attn_factor": 1.5}, "no counterpart in lmx for attn_factor=1.5"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "model.gguf: NormConfig: eps"),
        ({"attention.key_length": "four"}, "llama.attention.key_length is 'four', not a whole number"),
        ({"attention.key_length": 0}, "head_dim"),
        ({"rope.dimension_count": -1.5}, "llama.rope.dimension_count is -1.5, not a whole number"),
        ({"attention.sliding_window": 2**32 - 1}, "sliding_window is 4294967295, not a whole number from 0"),
    ],
)
def test_what_does_not_fit_is_named(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrained.find(written("llama", tmp_path / "model.gguf", **changed))


def test_an_unknown_architecture_is_named(tmp_path):
    path = written("llama", tmp_path / "model.gguf", **{"general.architecture": "llamb"})
    with pytest.raises(ValueError, match=f"architecture 'llamb' is none of {', '.join(ours.ARCHITECTURES)}"):
        pretrained.find(path)


def test_a_part_of_each_head_turns_without_a_key_for_its_size(tmp_path):
    """As llama.cpp's converter writes Phi 3: rope.dimension_count alone."""
    given, left = (
        pretrained.find(written("phi3-partial", tmp_path / f"{i}.gguf", **changed)).config
        for i, changed in enumerate(({}, {"attention.key_length": None}))
    )
    assert given.position.fraction == 0.5 and left == given


def test_divisors_without_rotation_are_refused(tmp_path):
    path = written("gpt2", tmp_path / "model.gguf", more={"rope_freqs.weight": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"model\.gguf: rope_freqs\.weight has no counterpart"):
        pretrained.find(path)


@pytest.mark.parametrize("name, n_layers", [("gemma2-caps", 46), ("gemma3", 62)])
def test_scores_of_gemma_27b_are_divided_by_its_width_per_head(name, n_layers, tmp_path):
    """As llama.cpp does, which knows these models by their number of layers (llama-model.cpp, f_attention_scale)."""
    tensors = gguf_format.read(written(name, tmp_path / "few.gguf")).tensors
    one = {key: x.read() for key, x in tensors.items() if key.startswith("blk.0.")}
    n = json.loads((FOLDER / name / "config.json").read_text())["num_hidden_layers"]
    more = {key.replace("blk.0.", f"blk.{i}."): x for i in range(n, n_layers) for key, x in one.items()}
    few, many = (
        pretrained.find(path).fields
        for path in (
            tmp_path / "few.gguf",
            written(name, tmp_path / "27b.gguf", block_count=n_layers, more=more),
        )
    )
    assert few["query_pre_attn_scalar"] == few["head_dim"]
    assert (
        many["query_pre_attn_scalar"] == many["hidden_size"] / many["num_attention_heads"] != many["head_dim"]
    )


def test_ends_that_are_no_ids_are_told():
    said = ours.beside(gguf_format.Gguf("llama", {"tokenizer.ggml.eos_token_id": [2]}, {}))
    with pytest.raises(ValueError, match=r"eos_token_id=\[\[2\]\]; use an id"):
        pretrained.end_ids(said, Path("model.gguf"))
