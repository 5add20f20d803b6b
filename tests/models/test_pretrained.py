"""Files of models that lie, lack or hold too much: each an error that names it. Conversion there and back."""

import json
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from test_families import FOLDER

from lmx.formats import safetensors
from lmx.mesh import MeshConfig
from lmx.models import TransformerConfig, build, preset, pretrained
from lmx.nn import AttentionConfig, Local, MlpConfig, NormConfig
from lmx.ops.mask import PrefixLM
from lmx.ops.position import ALiBi, RoPE


@pytest.fixture
def copy(tmp_path):
    """A model's folder with its config changed, tensors left out, and tensors added."""

    def make(name="llama", less=(), more=(), **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        found = json.loads((FOLDER / name / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v != "gone"}))
        tensors = {k: x.read() for k, x in safetensors.read(FOLDER / name).items() if k not in less}
        safetensors.write(folder, (tensors | dict(more)).items())
        return folder

    return make


EXTRA = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"less": ["model.norm.weight"]}, r"weights and config disagree: model.norm.weight is missing"),
        ({"more": [("model.layers.0.extra", EXTRA)]}, r"model.layers.0.extra has no place in this model"),
        (
            {"more": [("model.norm.weight", EXTRA)]},
            r"model.norm.weight has shape \[2, 2\] .* makes it \[16\]",
        ),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing.*; and \d+ more"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers=1,000,000,000,000, but the file has \d+ tensors"),
        ({"name": "gemma2", "num_hidden_layers": 10**12}, r"but the file has \d+ tensors"),
        ({"name": "mixtral", "num_local_experts": 10**12}, r"but the file has \d+ tensors"),
        ({"num_attention_heads": 2**31 - 1}, r"is not a multiple of n_kv_heads=2"),
        ({"hidden_size": 2**30}, "disagree|not a multiple"),
        ({"hidden_size": "16"}, "hidden_size is '16', not a whole number from 0"),
        ({"hidden_size": -16}, "hidden_size is -16, not a whole number from 0"),
        ({"hidden_size": "gone"}, "the field hidden_size is missing"),
        ({"num_attention_heads": 0}, "n_heads=0 must be at least 1"),
        ({"rms_norm_eps": None, "hidden_act": "relu"}, "hidden_act='relu' has no counterpart"),
        ({"model_type": "llama9"}, "model_type='llama9' is none of llama, mistral"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is none of llama, mistral"),
        (
            {"model_type": "own", "auto_map": {"AutoModel": "x.Y"}},
            r"own code, named in auto_map, is never executed",
        ),
        ({"attention_sinks": 4}, "no counterpart in lmx for attention_sinks=4"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": "gone"},
            "'dynamic' has no",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: the field factor is missing"),
        (
            {"rope_parameters": {"rope_type": "default", "mscale": 2.0}},
            "no counterpart in lmx for mscale=2.0",
        ),
        ({"layer_types": ["chunked_attention"] * 2, "name": "mistral"}, "layer_types=.* does not say"),
        ({"name": "gemma2", "sliding_window": "gone"}, "sliding_window is missing"),
        (
            {"name": "llama-heads", "more": [("lm_head.weight", np.ones((48, 16), np.float32))]},
            "lm_head.weight is not",
        ),
        ({"name": "gpt2", "scale_attn_weights": False}, "scale_attn_weights=False has no counterpart"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_does_not_fit_is_named(copy, settings, message):
    with pytest.raises(ValueError, match=message):
        pretrained.find(copy(**settings))


@pytest.mark.parametrize("text", ["", "[]", "{", "nul\0", '{"a":' * 9000])
def test_a_broken_config_is_named(copy, text):
    folder = copy()
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: not a JSON object"):
        pretrained.find(folder)


def test_what_is_no_model_is_told(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match=r"no such model; give a folder with config\.json"):
        pretrained.find(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        pretrained.find(tmp_path)
    folder = copy()
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which runs any program it holds"):
        pretrained.find(folder)


def test_tensors_that_a_model_computes_itself_are_left_out(copy):
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(2)
    }
    pretrained.find(copy(more=frequencies.items()))
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for i in range(2)}
    pretrained.find(copy("gpt2", more=masks.items()))


def test_hub_files_of_gpt2_lack_the_prefix(copy, tmp_path):
    folder = copy("gpt2")
    bare = {k.removeprefix("transformer."): x.read() for k, x in safetensors.read(folder).items()}
    safetensors.write(folder, bare.items())
    a, b = (pretrained.load(pretrained.find(at)) for at in (folder, FOLDER / "gpt2"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_stored_head_that_is_the_embedding_is_tied(copy):
    embed = safetensors.read(FOLDER / "llama-heads")["model.embed_tokens.weight"].read()
    assert pretrained.find(copy("llama-heads", more=[("lm_head.weight", embed)])).config.tie_head


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back_byte_for_byte(copy, tmp_path, dtype):
    folder = copy("qwen3", dtype=dtype)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    rounded = {k: x.read().astype(kind) for k, x in safetensors.read(folder).items()}
    safetensors.write(folder, rounded.items())
    found = pretrained.find(folder)
    params = pretrained.load(found)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    pretrained.save(tmp_path / "out", found.config, params, like=found.fields)
    again = safetensors.read(tmp_path / "out")
    assert all(
        again[k].dtype == kind and again[k].read().tobytes() == x.tobytes() for k, x in rounded.items()
    )


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_mesh_gets_the_same_parameters_each_device_its_part(name):
    found = pretrained.find(FOLDER / name)
    mesh = MeshConfig(data=1, fsdp=2, tensor=4).build()
    spread, whole = pretrained.load(found, mesh), pretrained.load(found)
    jax.tree.map(np.testing.assert_array_equal, spread, whole)
    assert {shard.data.shape for shard in spread["embed"].addressable_shards} == {(12, 8)}


def test_what_half_precision_cannot_hold_is_told(tmp_path):
    found = pretrained.find(FOLDER / "llama")
    params = pretrained.load(found)
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(1e5)
    with pytest.raises(
        ValueError, match=r"model.norm.weight holds 1e\+05, too large for float16; use bfloat16"
    ):
        pretrained.save(tmp_path / "out", found.config, params, dtype="float16")
    assert not (tmp_path / "out" / "config.json").exists()


def test_our_own_shapes_are_written_as_the_family_that_computes_the_same(tmp_path):
    for name, family in (("nano", "llama"), ("gpt2-124m", "gpt2")):
        attention = replace(preset(name).attention, n_heads=4)
        config = replace(
            preset(name), attention=attention, vocab_size=32, d_model=16, n_layers=2, init_std=0.1
        )
        params = build(config).init(jax.random.key(0))
        assert pretrained.save(tmp_path / name, config, params, context=64).model_type == family
        again = pretrained.find(tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, pretrained.load(again), params)


@pytest.mark.parametrize(
    "change",
    [
        {"position": ALiBi()},
        {"norm": NormConfig("layer")},
        {"mlp": MlpConfig("relu_squared")},
        {"attention": AttentionConfig(4, mask=PrefixLM(3))},
        {"attention": AttentionConfig(4, softcap=3.0)},
        {"attention": AttentionConfig(4, local=Local(4, position=RoPE(5e5)))},
        {"placement": "post"},
    ],
    ids=str,
)
def test_what_no_family_has_is_refused_by_name(change, tmp_path):
    config = TransformerConfig(vocab_size=16, d_model=16, n_layers=2, attention=AttentionConfig(4))
    config = replace(config, **change)
    with pytest.raises(
        ValueError, match="no family that transformers reads can represent this model; the nearest"
    ):
        pretrained.save(tmp_path / "out", config, build(config).init(jax.random.key(0)))
    assert not (tmp_path / "out").exists()
