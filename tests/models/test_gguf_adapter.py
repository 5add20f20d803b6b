"""Adapters as GGUF files: by llama.cpp's rules in numpy, and with --peers by llama.cpp itself (in `xllamacpp`)."""

import json
from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gguf_export import BYTES, logits, with_bytes
from test_peft import KEY, Base, trained

from lmx.adapt import Dora, Lora, Merge, adapter, attach
from lmx.models import gguf_adapter, gguf_export, gguf_model, weight_map

KINDS = {
    "llama": ("llama", Lora(3, alpha=8.0)),
    "ranks": ("llama-heads", Lora(3, stabilised=True, ranks={"*attn/q/w": 5})),
    "qwen3": ("qwen3", Lora(3)),
    "gpt2": ("gpt2", Lora(2)),
    "phi3": ("phi3", Lora(2)),
    "head": ("llama", Lora(3, where="head|*attn/k/w")),
    "mixture": ("mixtral", Lora(2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_mean_what_is_merged(kind, tmp_path):
    """W + alpha / R (B A) for each pair of tensors, as llama-adapter.cpp has it, is our merged model's GGUF tensor."""
    name, surgery = KINDS[kind]
    base, path = Base(name), tmp_path / "अनुकूलक.gguf"
    alone = trained(base, surgery)
    gguf_adapter.save(path, base.family, base.config, alone)
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items()}
    a = said["general.architecture"]
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    entries = gguf_model.entries(base.family, base.config, a)
    before, after = (
        dict(weight_map.dump(entries, params, np.dtype(np.float32)))
        for params in (base.params, Merge()(attach(base.params, alone), KEY))
    )
    arrays = {x.name: np.array(x.data) for x in reader.tensors}
    found = {key.removesuffix(".lora_a") for key in arrays if key.endswith("_a")}
    changed = {key for key, x in before.items() if not np.array_equal(x, after[key])}
    assert found == changed and len(arrays) == 2 * len(found)
    for key in found:
        A, B = arrays[f"{key}.lora_a"], arrays[f"{key}.lora_b"]
        delta = said["adapter.lora.alpha"] / B.shape[-1] * (B.astype(np.float64) @ A)
        np.testing.assert_allclose(before[key] + delta, after[key], rtol=0, atol=1e-5, err_msg=key)


def test_what_llama_cpp_has_not_is_refused(tmp_path):
    base = Base("llama")
    for surgery, said in (
        (Dora(2), "blocks/attn/q/w: llama.cpp has no counterpart for DoRA; merge it"),
        (Lora(2, where="embed"), "embed: llama.cpp has no counterpart for an adapter on the embedding"),
    ):
        with pytest.raises(ValueError, match=said):
            gguf_adapter.save(
                tmp_path / "a.gguf", base.family, base.config, adapter(surgery(base.params, KEY))
            )
    assert not list(tmp_path.iterdir())


def log_probs(model, lora, ids, n):
    """What llama.cpp says of the token after ids, [n]; keys and values in float32."""
    import xllamacpp

    said = xllamacpp.CommonParams()
    said.model.path, said.n_ctx, said.n_parallel, said.warmup, said.verbosity = str(model), 64, 1, False, 0
    said.cpuparams.n_threads = 1
    said.cache_type_k = said.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    said.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    said.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in lora]
    asked = {"prompt": ids, "max_tokens": 1, "logprobs": n, "temperature": -1.0}
    found = xllamacpp.Server(said).handle_completions(asked)
    found = json.loads(found) if isinstance(found, str) else found
    top = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == n
    return np.array([one["logprob"] for one in sorted(top, key=lambda one: one["id"])])


@pytest.mark.peers
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"phi3", "mixture"}))
def test_llama_cpp_puts_it_on_the_model(kind, tmp_path):
    """Of phi3 and mixtral the test models have windows, which llama.cpp has not for them; Gelu is a table there."""
    pytest.importorskip("xllamacpp")
    name, surgery = KINDS[kind]
    base = Base(name)
    alone, ids = trained(base, surgery), np.asarray(base.tokens)[0].tolist()
    config, params = with_bytes(base.found)
    model, lora, n = tmp_path / "model.gguf", tmp_path / "अनुकूलक.gguf", config.vocab_size
    gguf_export.save(model, config, params, BYTES, kind="F32", context=128)
    whole = attach(base.params, alone)
    if kind == "head":  # its rows are as many as tokens
        low = whole["head"]
        more = n - base.config.vocab_size
        low = replace(low, base=params["head"], b=jnp.pad(low.b, ((0, 0), (0, more))))
        whole = {**params, "blocks": whole["blocks"], "head": low}
        alone = adapter(whole)
    gguf_adapter.save(lora, base.family, config, alone)
    for files, ours in (((), params), ((lora,), attach(params, alone))):
        want = jax.nn.log_softmax(logits(config, ours, [ids])[0, -1])
        got = log_probs(model, files, ids, n)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 if name == "gpt2" else 2e-4)
