"""Quantized models as Hugging Face folders, read and written by transformers with compressed-tensors, and by GPTQModel
where that is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import FOLDER
from test_quantized import HOW, PLACES, in_codes, logits, model, ordered

from lmx.formats import safetensors
from lmx.models import pretrained, weight_map
from lmx.weights import Quantized, dense, quantize


def theirs(folder, **options):
    """The model as transformers reads it; every tensor of the folder must find its place."""
    import transformers

    transformers.logging.set_verbosity_error()
    found, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True, attn_implementation="eager", **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return found.eval()


def answers(found):
    import torch

    tokens = np.random.default_rng(0).integers(3, 48, (2, 24))
    with torch.no_grad():
        return found(torch.tensor(tokens)).logits.numpy()


def whole(config, params, folder):
    """The dense matrices under their names."""
    full = jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, Quantized))
    return dict(weight_map.dump(pretrained.find(folder).entries, full, np.dtype(np.float32)))


@pytest.mark.peers
@pytest.mark.parametrize(
    "name, how", [(n, how) for n, how in PLACES if how not in ("int4 half", "calibrated")]
)
def test_transformers_reads_our_compressed_tensors(name, how, tmp_path):
    """Activations are not compared: transformers rounds them by max / 127.5, lmx and vLLM by max / 127. Nor is it
    asked for experts with zeros, which its reader of experts leaves out."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    config, params, like = model(name)
    leaf = HOW["int8"] if name == "qwen3-moe" else HOW[how]
    params = in_codes(params, leaf)
    pretrained.save(tmp_path, config, params, like=like)
    found = theirs(tmp_path, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False))
    state, wanted = found.state_dict(), whole(config, params, tmp_path)
    compared = [key for key in wanted if key in state]
    assert len(compared) > 10
    for key in compared:
        np.testing.assert_array_equal(state[key].numpy(), wanted[key], err_msg=key)
    plain = jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, Quantized))
    np.testing.assert_allclose(answers(found), logits(config, plain), rtol=0, atol=2e-5)


@pytest.mark.peers
def test_transformers_rounds_inputs_as_we_do_with_a_calibrated_scale(tmp_path):
    pytest.importorskip("compressed_tensors")
    config, params, like = model("llama")
    params = in_codes(params, HOW["calibrated"])
    pretrained.save(tmp_path, config, params, like=like)
    found = answers(theirs(tmp_path))
    np.testing.assert_allclose(found, logits(config, params), rtol=0, atol=2e-5)
    plain = logits(config, jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, Quantized)))
    assert np.abs(found - plain).max() > 1e-2


@pytest.mark.peers
def test_transformers_reads_our_groups_by_name(tmp_path):
    """Through compressed-tensors' own decompression: transformers' takes the first group for all."""
    pytest.importorskip("compressed_tensors")
    config, params, like = model("llama")
    mixed = in_codes(params, HOW["int4"])
    mixed["blocks"]["mlp"]["down"]["w"] = quantize(params["blocks"]["mlp"]["down"]["w"])
    pretrained.save(tmp_path, config, mixed, like=like)
    np.testing.assert_allclose(answers(theirs(tmp_path)), logits(config, mixed), rtol=0, atol=2e-5)


@pytest.mark.peers
@pytest.mark.parametrize("bits, size, symmetric", [(4, 8, True), (3, 8, False), (8, None, True)])
def test_we_read_what_compressed_tensors_writes(bits, size, symmetric, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    made = theirs(FOLDER / "llama")
    args = {
        "num_bits": bits,
        "symmetric": symmetric,
        "strategy": "group" if size else "channel",
        "group_size": size,
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    apply_quantization_config(made, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for layer in made.modules():
        if hasattr(layer, "weight_scale"):
            w = layer.weight.detach()
            w = w.reshape(len(w), -1, size or w.shape[1])
            scale, zero = calculate_qparams(w.amin(-1), w.amax(-1), scheme.weights)
            layer.weight_scale.data, layer.weight_zero_point.data = scale, zero
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    found = pretrained.find(tmp_path)
    params = pretrained.load(found)
    assert isinstance(params["blocks"]["attn"]["q"]["w"], Quantized)
    again = theirs(tmp_path, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False))
    state, wanted = again.state_dict(), whole(found.config, params, tmp_path)
    for key in wanted:
        assert torch.equal(state[key], torch.tensor(wanted[key])), key
    np.testing.assert_allclose(answers(again), logits(found.config, params), rtol=0, atol=2e-5)


@pytest.mark.peers
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric, order", [(True, True), (False, False), (False, True)])
def test_gptqmodel_reads_ours(bits, symmetric, order, tmp_path):
    """Its matrices are the products rounded to float16. Outputs without negative weights have a zero of 0."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gptqmodel")

    def how(w):
        w = w.at[..., :8].set(jnp.abs(w[..., :8]) + 0.01)
        if order:
            return ordered(w, bits, 32, symmetric)
        return quantize(w, bits, 32, symmetric, scale_dtype="float16")

    config, params, _ = model("own")
    params = in_codes(params, how)
    pretrained.save(tmp_path, config, params, layout="gptq", dtype="float16")
    settings = transformers.GPTQConfig(bits=bits, backend="gptq_torch")
    found = theirs(tmp_path, device_map="cpu", quantization_config=settings)
    wanted = whole(config, params, tmp_path)
    layers = {n: x for n, x in found.named_modules() if hasattr(x, "dequantize_weight")}
    assert len(layers) == 14
    for name, layer in layers.items():
        matrix = layer.dequantize_weight().float().numpy().T.astype(np.float16)
        np.testing.assert_array_equal(matrix, wanted[f"{name}.weight"].astype(np.float16), err_msg=name)


@pytest.mark.peers
@pytest.mark.parametrize(
    "bits, order, symmetric, form", [(4, True, False, "gptq_v2"), (2, False, False, "gptq")]
)
def test_we_read_what_gptqmodel_writes(bits, order, symmetric, form, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    gptqmodel = pytest.importorskip("gptqmodel")
    from tokenizers import Tokenizer, models

    config, params, _ = model("own")
    before, after = tmp_path / "before", tmp_path / "after"
    pretrained.save(before, config, params, like={"bos_token_id": 1, "eos_token_id": 2})
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(before)
    settings = gptqmodel.QuantizeConfig(
        bits=bits, group_size=32, desc_act=order, sym=symmetric, format=form, offload_to_disk=False,
        act_group_aware=False,
    )  # fmt: skip
    made = gptqmodel.GPTQModel.load(str(before), settings, device="cpu")
    rows = np.random.default_rng(0).integers(0, 48, (32, 64)).tolist()
    made.quantize([{"input_ids": row, "attention_mask": [1] * 64} for row in rows], batch_size=1)
    made.save(str(after))
    found = pretrained.find(after)
    params = pretrained.load(found)
    assert (params["blocks"]["attn"]["q"]["w"].order is not None) == order
    settings = transformers.GPTQConfig(bits=bits, backend="gptq_torch")
    again = theirs(after, device_map="cpu", quantization_config=settings)
    wanted = whole(found.config, params, after)
    for name, layer in again.named_modules():
        if hasattr(layer, "dequantize_weight"):
            matrix = layer.dequantize_weight().float().numpy().T.astype(np.float16)
            np.testing.assert_array_equal(matrix, wanted[f"{name}.weight"].astype(np.float16), err_msg=name)
    pretrained.save(tmp_path / "again", found.config, params, like=found.fields, layout="gptq")
    ours, read = (safetensors.read(at) for at in (tmp_path / "again", after))
    ends = ("qweight", "scales", "g_idx") + (("qzeros",) if form == "gptq_v2" else ())
    for name in (name for name in read if name.endswith(ends)):
        assert ours[name].read().tobytes() == read[name].read().tobytes(), name
