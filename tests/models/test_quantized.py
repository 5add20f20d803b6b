"""Quantized models as Hugging Face folders, written and read bit for bit."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import FOLDER

from lmx import tree
from lmx.formats import safetensors
from lmx.mesh import MeshConfig
from lmx.models import about, build, preset, pretrained
from lmx.weights import LowRank, Masked, Quantized, dense, quantize
from lmx.weights.quantized import to_float8, to_table

MATRICES = "blocks/attn/*/w|blocks/mlp/up/w|blocks/mlp/gate/w|blocks/mlp/down/w|blocks/mlp/experts/*/w"


def small(name="nano"):
    """A model of our own whose sizes 32 divides."""
    attention = replace(preset(name).attention, n_heads=4, head_dim=16)
    mlp = replace(preset(name).mlp, d_ff=96)
    return replace(
        preset(name), attention=attention, mlp=mlp, vocab_size=48, d_model=64, n_layers=2, init_std=0.1
    )


def model(name="llama"):
    """(config, params, like) of a stored family, or of a model of our own."""
    if name.startswith("own"):
        config = small("gpt2-124m" if name == "own gpt2" else "nano")
        return config, build(config).init(jax.random.key(0)), None
    found = pretrained.find(FOLDER / name)
    return found.config, pretrained.load(found), found.fields


def in_codes(params, how, where=MATRICES):
    return tree.map_at(lambda path, w: how(w), params, where)


def ordered(w, bits=4, size=32, symmetric=True):
    """Quantized with the inputs of each layer in an order of its own, within groups as they come."""
    rng = np.random.default_rng(w.shape[-2])
    order = np.stack([rng.permutation(w.shape[-2]) for _ in range(w.shape[0])])
    order = jnp.asarray(np.sort(order.reshape(w.shape[0], -1, size)).reshape(order.shape), jnp.int32)
    turned = jnp.take_along_axis(w, order[..., None], 1)
    return replace(quantize(turned, bits, size, symmetric, scale_dtype="float16"), order=order)


def logits(config, params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 48, (2, 24)), jnp.int32)
    return jax.jit(build(config).apply)(params, {"tokens": tokens}).logits


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


HOW = {
    "int4": lambda w: quantize(w, 4, 8),
    "int4 half": lambda w: quantize(w, 4, 8, scale_dtype="bfloat16"),
    "int3 affine": lambda w: quantize(w, 3, symmetric=False),
    "int8": lambda w: quantize(w),
    "int8 groups affine": lambda w: quantize(w, 8, 8, symmetric=False),
    "int8 activations": lambda w: quantize(w, activations="int8"),
    "calibrated": lambda w: replace(
        quantize(w, activations="int8"), input_scale=jnp.full((*w.shape[:-2], 1), 0.1)
    ),
    "float8": to_float8,
}
PLACES = [("llama", how) for how in HOW] + [
    ("phi3", "int4"),
    ("phi3", "int3 affine"),
    ("mixtral", "int4"),
    ("qwen3-moe", "int8 groups affine"),
]


@pytest.mark.parametrize("name, how", PLACES)
def test_compressed_tensors_there_and_back(name, how, tmp_path):
    config, params, like = model(name)
    params = in_codes(params, HOW[how])
    pretrained.save(tmp_path, config, params, like=like)
    found = pretrained.find(tmp_path)
    again = pretrained.load(found)
    same(again, params)
    assert "quantization_config" not in found.fields
    if how == "int4":
        np.testing.assert_array_equal(logits(found.config, again), logits(config, params))


@pytest.mark.parametrize(
    "name, how",
    [
        ("own", lambda w: quantize(w, 4, 32, scale_dtype="float16")),
        ("own", lambda w: quantize(w, 3, None, False, scale_dtype="float16")),
        ("own", ordered),
        ("own", lambda w: ordered(w, 8, 16, False)),
        ("own gpt2", lambda w: quantize(w, 2, 32, scale_dtype="float16")),
    ],
)
def test_gptq_there_and_back(name, how, tmp_path):
    config, params, like = model(name)
    params = in_codes(params, how)
    pretrained.save(tmp_path, config, params, like=like, layout="gptq")
    found = pretrained.find(tmp_path)
    again = pretrained.load(found)
    same(again, params)
    if how is ordered:
        np.testing.assert_array_equal(logits(found.config, again), logits(config, params))
    config_json = json.loads((tmp_path / "config.json").read_text())
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == config_json.pop(
        "quantization_config"
    )
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    same(pretrained.load(pretrained.find(tmp_path)), params)


def test_parts_of_one_tensor_may_share_an_order(tmp_path):
    config, params, _ = model("own")
    params = in_codes(params, ordered)
    config = replace(config, attention=replace(config.attention, n_kv_heads=4))
    pretrained.save(tmp_path, config, params, like={"model_type": "phi3", "pad_token_id": 0}, layout="gptq")
    assert "model.layers.0.self_attn.qkv_proj.qweight" in safetensors.read(tmp_path)
    same(pretrained.load(pretrained.find(tmp_path)), params)


def test_mixed_settings_are_groups_by_name(tmp_path):
    config, params, like = model("llama")
    mixed = in_codes(params, HOW["int4"])
    mixed["blocks"]["mlp"]["down"]["w"] = quantize(params["blocks"]["mlp"]["down"]["w"], activations="int8")
    mixed["blocks"]["attn"]["q"]["w"] = params["blocks"]["attn"]["q"]["w"]
    mixed["head"] = quantize(params["head"], 4, 8)
    pretrained.save(tmp_path, config, mixed, like=like)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision" and len(said["config_groups"]) == 2
    assert said["ignore"] == [r"re:model\.layers\.\d+\.self_attn\.q_proj$"]
    found = pretrained.find(tmp_path)
    same(pretrained.load(found), mixed)
    told = about.released(found)["quantized"]
    assert "11 matrices: pack-quantized, 4 bits in groups of 8, symmetric" in told
    assert (
        "2 matrices: int-quantized, 8 bits with a scale for each output, symmetric, int8 activations" in told
    )
    with pytest.raises(ValueError, match=r"one setting for all matrices.*use layout='compressed-tensors'"):
        config, params, _ = model("own")
        mixed = in_codes(params, lambda w: quantize(w, 4, 32, scale_dtype="float16"))
        mixed["blocks"]["attn"]["q"]["w"] = quantize(params["blocks"]["attn"]["q"]["w"], 8)
        pretrained.save(tmp_path, config, mixed, layout="gptq")


def test_a_mesh_gets_the_same_codes(tmp_path):
    config, params, _ = model("own")
    params = in_codes(params, lambda w: quantize(w, 4, 32, symmetric=False))
    pretrained.save(tmp_path, config, params)
    same(pretrained.load(pretrained.find(tmp_path), MeshConfig(data=1, fsdp=2, tensor=4).build()), params)


NO = {
    "nf4": (lambda w: to_table(w, group_size=8), None, "a table of 16, as NF4.*make it dense"),
    "adapter": (
        lambda w: LowRank(quantize(w), w[..., :2], jnp.swapaxes(w, -1, -2)[..., :2, :], 1.0),
        None,
        "blocks/attn/q/w: it is LowRank, which no layout holds; merge it",
    ),
    "mask": (lambda w: Masked(w, w > 0), None, "it is Masked, which no layout holds"),
    "order": (ordered, "compressed-tensors", "in another order.*use layout='gptq'"),
    "groups": (lambda w: quantize(w, 4, 24), None, "groups that divide its 64 inputs, not of 24"),
    "bits": (lambda w: quantize(w, 5), "gptq", "it has 5 bits, and gptq 2, 3, 4 or 8"),
    "float8": (to_float8, "gptq", "it has 8-bit floats, and gptq"),
    "activations": (lambda w: quantize(w, activations="int8"), "gptq", "rounds activations to int8"),
    "scales": (
        lambda w: quantize(w, 4),
        "gptq",
        r"q_proj: a scale of it is no float16.*scale_dtype='float16'",
    ),
    "layout": (lambda w: quantize(w, 4), "awq", "layout='awq'; use compressed-tensors or gptq"),
}


@pytest.mark.parametrize("name", NO)
def test_what_a_layout_cannot_hold_is_refused(name, tmp_path):
    how, layout, message = NO[name]
    config, params, _ = model("own")
    with pytest.raises(ValueError, match=message):
        pretrained.save(tmp_path, config, in_codes(params, how, "blocks/attn/q/w"), layout=layout)
    assert not (tmp_path / "config.json").exists()


def test_what_a_family_cannot_hold_is_refused(tmp_path):
    config, params, like = model("phi3")
    for how in (HOW["int4"], lambda w: quantize(w)):
        half = in_codes(params, HOW["int4"], "blocks/attn/k/w")
        half["blocks"]["attn"]["v"]["w"] = how(params["blocks"]["attn"]["v"]["w"])
        with pytest.raises(
            ValueError, match=r"attn/q/w, .*qkv_proj.weight joins them, but .* not quantized alike"
        ):
            pretrained.save(tmp_path, config, half, like=like)
    config, params, like = model("gpt2")
    with pytest.raises(ValueError, match=r"blocks/attn/o/w: transformers keeps it in a Conv1D"):
        pretrained.save(tmp_path, config, in_codes(params, HOW["int4"]), like=like)
    with pytest.raises(ValueError, match=r"gptq wants inputs and outputs that 32 divides, not 16 and 16"):
        pretrained.save(tmp_path, config, in_codes(params, HOW["int4"]), like=like, layout="gptq")
    embed = in_codes(params, lambda w: quantize(w), "embed")
    with pytest.raises(
        ValueError, match=r"embed: no layout holds it quantized, as its groups run over the rows"
    ):
        pretrained.save(tmp_path, config, embed, like=like)
    with pytest.raises(ValueError, match=r"layout='gptq': no matrix of this model is quantized"):
        pretrained.save(tmp_path, config, params, like=like, layout="gptq")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same model in both layouts."""
    config, params, _ = model("own")
    params = in_codes(params, lambda w: quantize(w, 4, 32, scale_dtype="float16"))
    found = {layout: tmp_path_factory.mktemp(layout) for layout in ("compressed-tensors", "gptq")}
    for layout, at in found.items():
        pretrained.save(at, config, params, layout=layout)
    return found


@pytest.fixture
def folder(tmp_path, written):
    """A written model whose quantization_config and tensors are then changed."""

    def make(how="compressed-tensors", less=(), more=None, group=False, inside=None, **changes):
        found = json.loads((written[how] / "config.json").read_text())
        section = found["quantization_config"]
        section = section["config_groups"]["group_0"] if group else section
        (section[inside] if inside else section).update(changes)
        (tmp_path / "config.json").write_text(json.dumps(found))
        tensors = {name: x.read() for name, x in safetensors.read(written[how]).items()}
        tensors = {name: x for name, x in tensors.items() if not name.endswith((*less, "no such"))}
        for end, change in (more or {}).items():
            tensors |= {name: change(x) for name, x in tensors.items() if name.endswith(end)}
        safetensors.write(tmp_path, tensors.items())
        return tmp_path

    return make


GROUP = {"group": True, "inside": "weights"}
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
DAMAGE = [
    ({"quant_method": "awq"}, "quant_method='awq'; lmx reads compressed-tensors and gptq: fetch"),
    ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method='fp8'"),
    ({"quant_method": 7}, "quant_method=7"),
    ({"transform_config": {"R1": {}}}, "no counterpart in lmx for transform_config"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "no counterpart in lmx for kv_cache_scheme"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config has no counterpart"),
    ({"config_groups": {"group_0": 3}}, "group_0 is 3, not an object"),
    ({"config_groups": []}, "config_groups is \\[\\], not an object"),
    ({"ignore": [3]}, "ignore=\\[3\\], not a list of texts"),
    ({"ignore": ["re:("]}, "'re:\\(' is no pattern for a name"),
    ({"ignore": ["re:((.|..|...)+)+\\d\\d\\d$"]}, "is no pattern for a name"),
    ({"group": True, "format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' with bits=4"),
    ({"group": True, "input_activations": INPUTS}, "take input_activations out of config.json"),
    ({**GROUP, "num_bits": 9}, "bits=9"),
    ({**GROUP, "num_bits": 5}, "weight_packed has shape \\[64, 8\\] where the config makes it \\[64, 10\\]"),
    ({**GROUP, "strategy": "block", "block_structure": [8, 8]}, "strategy='block' has no counterpart"),
    ({**GROUP, "group_size": 16}, "weight_scale has shape \\[64, 2\\] where the config makes it \\[64, 4\\]"),
    ({**GROUP, "group_size": 0}, "group_size=0; use 1 or more"),
    ({**GROUP, "symmetric": False}, "weight_zero_point is missing"),
    ({"less": ["1.mlp.up_proj.weight_scale"]}, "layers.1.mlp.up_proj.weight_scale is missing"),
    ({"more": {"weight_packed": lambda x: x.astype(np.float32)}}, "stored as F32 where the config makes it I32"),
    ({"how": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format='marlin'; lmx reads gptq and gptq_v2"),
    ({"how": "gptq", "bits": 8}, "qweight has shape \\[8, 64\\] where the config makes it \\[16, 64\\]"),
    ({"how": "gptq", "bits": 5}, "bits=5; gptq has 2, 3, 4, 8"),
    ({"how": "gptq", "bits": "4"}, "bits is '4', not a whole number"),
    ({"how": "gptq", "group_size": 2**40}, "group_size is 1099511627776, not a whole number"),
    ({"how": "gptq", "dynamic": {"-:lm_head": {}, ".*up.*": {"bits": 8}}}, "no counterpart in lmx for .*up"),
    ({"how": "gptq", "rotation": "hadamard"}, "no counterpart in lmx for rotation"),
    ({"how": "gptq", "pack_dtype": "int16"}, "pack_dtype='int16' has no counterpart"),
    ({"how": "gptq", "less": ["0.mlp.up_proj.scales"]}, "layers.0.mlp.up_proj.scales is missing"),
]  # fmt: skip


@pytest.mark.parametrize("settings, message", DAMAGE, ids=lambda x: str(x)[:50])
def test_what_does_not_fit_is_named(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        pretrained.find(folder(**settings))


def test_numbers_that_do_not_fit_are_named(folder):
    for settings, message in (
        (
            {"how": "gptq", "more": {"0.mlp.up_proj.g_idx": lambda x: x + 1}},
            "up_proj: g_idx names group 1 to 2 of 2",
        ),
        (
            {"more": {"weight_shape": lambda x: x[::-1] + 1}},
            r"weight_shape is \[.*\] where the config makes it",
        ),
    ):
        found = pretrained.find(folder(**settings))
        with pytest.raises(ValueError, match=message):
            pretrained.load(found)


def test_layers_that_are_not_stored_alike_are_named(folder):
    name = "model.layers.1.mlp.up_proj"
    less = [f"{name}.weight_{part}" for part in ("packed", "scale", "shape")]
    at = folder(ignore=["lm_head", name], less=less)
    tensors = {k: x.read() for k, x in safetensors.read(at).items()}
    safetensors.write(at, (tensors | {f"{name}.weight": np.zeros((96, 64), np.float32)}).items())
    with pytest.raises(
        ValueError, match=r"blocks/mlp/up/w: its layers .* several ways \(not quantized and pack"
    ):
        pretrained.load(pretrained.find(at))


def test_what_older_gptq_files_leave_out_or_add(folder):
    at = folder("gptq", less=["g_idx"])
    whole = pretrained.load(pretrained.find(at))
    tensors = {k: x.read() for k, x in safetensors.read(at).items()}
    biases = {
        k.replace("qweight", "bias"): np.zeros(x.shape[1], np.float16)
        for k, x in tensors.items()
        if "qweight" in k
    }
    safetensors.write(at, (tensors | biases).items())
    same(pretrained.load(pretrained.find(at)), whole)
    name = min(biases)
    biases[name] = biases[name] + np.float16(1)
    safetensors.write(at, (tensors | biases).items())
    with pytest.raises(ValueError, match=f"{name} has no place in this model"):
        pretrained.find(at)


def test_a_dense_model_leaves_no_config_of_codes_behind(folder):
    at = folder("gptq")
    found = pretrained.find(at)
    params = jax.tree.map(dense, pretrained.load(found), is_leaf=lambda x: isinstance(x, Quantized))
    like = json.loads((at / "config.json").read_text())
    pretrained.save(at, found.config, params, like=like)
    assert not pretrained.find(at).schemes
