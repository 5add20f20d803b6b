"""GGUF files of our models: read back by ourselves, and with --peers by llama.cpp (in `cyllama`)."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_cpp import LlamaCpp

from lmx import adapt, tree
from lmx.data import Bpe, Byte, ChatTemplate
from lmx.formats import gguf, safetensors
from lmx.models import build, gguf_export, layers, pretrained
from lmx.models.families import FAMILIES, Fields

FOLDER = Path(__file__).parent / "families"
BYTES = Byte().train()
TEXT = "The river carries 1234 boats, don't stop! नदी नावों को ले जाती है। क्षेत्र 👩🏽‍🚀🙂 " * 4


def saved(path, config, params, tokenizer=BYTES, kind="F32", **more):
    fallen = gguf_export.save(path, config, params, tokenizer, kind=kind, context=128, **more)
    return pretrained.find(path), fallen


def logits(config, params, tokens):
    return jax.jit(build(config).apply)(params, {"tokens": jnp.asarray(tokens, jnp.int32)}).logits


def with_bytes(found, **changed):
    """A case of `families` with as many tokens as bytes need; what it answers for its own is as before."""
    config = replace(found.config, vocab_size=BYTES.vocab_size, **changed)
    params, more = dict(pretrained.load(found)), BYTES.vocab_size - found.config.vocab_size
    params["embed"] = jnp.pad(params["embed"], ((0, more), (0, 0)), constant_values=1.0)
    if "head" in params:
        params["head"] = jnp.pad(params["head"], ((0, 0), (0, more)), constant_values=1.0)
    return config, params


WRITTEN = {
    "gpt2": "gpt2",
    "gpt2-untied": "gpt2",
    "llama": "llama",
    "llama-heads": "llama",
    "llama-linear": "llama",
    "llama-yarn": "llama",
    "llama3": "llama",
    "mistral-full": "llama",
    "olmo2": "olmo2",
    "phi3-partial": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3-moe": "qwen3moe",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_file_has_the_logits_of_transformers(name, tmp_path):
    found = pretrained.find(FOLDER / name)
    again, fallen = saved(tmp_path / "a.gguf", *with_bytes(found), like=found.family.model_type)
    expected = {k: x.read() for k, x in safetensors.read(FOLDER / name / "expected.safetensors").items()}
    got = logits(again.config, pretrained.load(again), expected["tokens"])[..., : found.config.vocab_size]
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=2e-5)
    assert again.gguf.architecture == WRITTEN[name] and not fallen
    kinds = {x.stored for x in again.tensors.values()}
    assert kinds == {"F32"} and again.context == 128


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_norms_of_gemma_hold_their_one(name, tmp_path):
    found = pretrained.find(FOLDER / name)
    a = replace(found.config.attention, scale=found.config.attention.head_dim**-0.5)
    config, params = with_bytes(found, attention=a)
    again, _ = saved(tmp_path / "a.gguf", config, params)
    tokens = np.random.default_rng(0).integers(0, 259, (2, 24))
    want = logits(config, params, tokens)
    np.testing.assert_allclose(logits(again.config, pretrained.load(again), tokens), want, rtol=0, atol=2e-5)
    held = again.tensors["output_norm.weight"].read()
    np.testing.assert_allclose(held, params["norm"]["scale"] + 1, rtol=1e-6)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("mistral", r"llama has no counterpart for attention.mask=SlidingWindow\(size=5\)"),
        ("mixtral", r"llama has no counterpart for attention.mask=SlidingWindow\(size=5\)"),
        ("qwen2-windows", r"qwen2 has no counterpart for attention.local=Local\(window=5"),
        ("llama-biases", r"llama has no counterpart for mlp=MlpConfig\(.*bias=True\)"),
        ("gemma3", r"gemma3 has no counterpart for attention.scale=0.28867"),
        ("gemma2-caps", r"gemma2 has no counterpart for attention.scale="),
        ("qwen3-moe-plain", "qwen3moe has no counterpart for mlp=.*renormalise=False"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, problem, tmp_path):
    found = pretrained.find(FOLDER / name)
    with pytest.raises(
        ValueError, match=f"no architecture of GGUF that lmx writes .*; the nearest: {problem}"
    ):
        saved(tmp_path / "a.gguf", *with_bytes(found), like=found.family.model_type)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type, fields", [("qwen3", "LLAMA3"), ("olmo2", "YARN")])
def test_scaling_that_llama_cpp_has_not_seen_in_an_architecture_is_refused(model_type, fields, tmp_path):
    config, params = small(model_type, rope_parameters=globals()[fields])
    with pytest.raises(ValueError, match=f"llama.cpp leaves .* out of account in {model_type}"):
        saved(tmp_path / "a.gguf", config, params, like=model_type)


def small(model_type, rng=0, tokens=320, **changed):
    """A random model of 256 features, every parameter drawn, as released ones would be named."""
    said = {
        "vocab_size": tokens,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "query_pre_attn_scalar": 64,
        "sliding_window": None,
    }
    if model_type == "gpt2":
        said = {"vocab_size": tokens, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 128}
    family = FAMILIES[model_type]
    config = family.config(Fields(said | changed, "test"))
    rng = np.random.default_rng(rng)
    norm = 1 - config.norm.offset

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        about = norm if "scale" in name else 0.0
        std = 0.2 if x.ndim < 2 + name.startswith("['blocks']") else 0.06
        return jnp.asarray(rng.normal(about, std, x.shape), jnp.float32)

    return config, jax.tree_util.tree_map_with_path(draw, pretrained.shapes(config))


@pytest.mark.parametrize("kind", gguf.BLOCKS)
def test_types_are_as_asked_with_fine_ends_and_plain_vectors(kind, tmp_path):
    config, params = small("llama", tie_word_embeddings=False)
    found, fallen = saved(tmp_path / "a.gguf", config, params, kind=kind)
    assert not fallen
    for name, tensor in found.tensors.items():
        ends = kind.endswith("K") and name in ("token_embd.weight", "output.weight")
        want = "F32" if len(tensor.shape) == 1 else "Q6_K" if ends else kind
        assert tensor.stored == want, name
    weights = np.asarray(params["blocks"]["mlp"]["up"]["w"][1]).T
    off = found.tensors["blk.1.ffn_up.weight"].read().astype(np.float32) - weights
    most = {"F32": 0, "F16": 4e-4, "BF16": 4e-3, "Q8_0": 0.006, "Q2_K": 0.3, "Q3_K": 0.16}.get(kind, 0.09)
    assert np.linalg.norm(off) <= most * np.linalg.norm(weights)


@pytest.mark.parametrize(
    "kind, width, want",
    [
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q3_K", 96, "Q4_0"),
        ("Q8_0", 48, "F16"),
    ],
)
def test_rows_that_blocks_do_not_divide_have_another_type_and_are_reported(kind, width, want, tmp_path):
    config, params = small("llama", hidden_size=width, head_dim=24)
    found, fallen = saved(tmp_path / "a.gguf", config, params, kind=kind)
    head = "F16" if kind == "Q8_0" else "Q8_0"
    assert fallen["token_embd.weight"] == head and fallen["blk.0.ffn_up.weight"] == want
    assert found.tensors["blk.0.ffn_down.weight"].stored == kind and "blk.0.ffn_down.weight" not in fallen
    assert all(found.tensors[name].stored == x for name, x in fallen.items())


def test_what_came_with_a_model_goes_with_it(tmp_path):
    tokenizer = Bpe(320, pattern="gpt2").train([TEXT]).ending_with([2, 5])
    config, params = small("qwen3", tokens=330)
    template = "{{ bos_token }}{{ messages[0].content }} नमस्ते"
    chat = ChatTemplate(template, {"bos_token": "<|bos|>"})
    found, _ = saved(tmp_path / "मॉडल.gguf", config, params, tokenizer, chat=chat)
    again = found.tokenizer()
    assert (again.bos_id, again.eos_id, again.pad_id, again.end_ids) == (1, 2, 0, (2, 5))
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.decode(again.encode(TEXT)) == TEXT
    assert again.token(tokenizer.vocab_size) == "[PAD0]" and again.vocab_size == 330
    read = pretrained.chat(found.beside(), found.path)
    assert read.source == template and read.specials["bos_token"] == "<|bos|>"
    silent, _ = saved(tmp_path / "b.gguf", config, params, tokenizer.without("bos_token"), bos_id=1)
    assert silent.tokenizer().bos_id is None and silent.gguf.metadata["tokenizer.ggml.bos_token_id"] == 1


def test_weights_that_are_not_finite_are_named(tmp_path):
    config, params = small("llama")
    params["blocks"]["attn"]["q"]["w"] = params["blocks"]["attn"]["q"]["w"].at[1, 3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match=r"tensor blk\.1\.attn_q\.weight: some values are not finite"):
        saved(tmp_path / "a.gguf", config, params)
    assert not list(tmp_path.iterdir())


WITH_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "family, more", [("llama", {}), ("gpt2", {}), ("phi3", {}), ("mixtral", WITH_EXPERTS)]
)
def test_importance_reaches_the_tensor_and_the_surgery_is_the_file(family, more, tmp_path):
    """Joined and turned matrices and those of experts: the error that a text's inputs weigh falls in each."""
    config, params = small(family, **more)
    tokens = np.random.default_rng(0).integers(0, 320, (4, 32))
    found = adapt.importance(layers(config), params, tokens)
    errors = []
    for given in ({}, found):
        file, _ = saved(tmp_path / "a.gguf", config, params, like=family, kind="Q4_K", importance=given)
        read = pretrained.load(file)
        made = adapt.Gguf("Q4_K", importance=given)(params, jax.random.key(0))
        off = {}
        for path in found:
            of_file, of_surgery, w = (tree.nodes(x)[path] for x in (read, made, params))
            off[path] = float((found[path][..., None] * (of_file - w) ** 2).sum())
            if not path.endswith("router/w"):
                np.testing.assert_array_equal(of_file, of_surgery)
        errors.append(off)
    assert found.keys() >= {"blocks/attn/q/w", "blocks/attn/o/w"}
    for path, plain in errors[0].items():
        assert errors[1][path] < 0.99 * plain or path.endswith("router/w"), path


YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}
NO = {"rope_theta": 1e4, "rope_type": "default"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
PEERS = {
    "llama": ("llama", {}, 3e-5),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}, 3e-5),
    "yarn": ("llama", {"rope_parameters": YARN}, 3e-5),
    "linear": ("llama", {"rope_parameters": LINEAR, "attention_bias": True}, 3e-5),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 3e-5),
    "qwen2": ("qwen2", {}, 3e-5),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}, 3e-5),
    "qwen3": ("qwen3", {}, 3e-5),
    "qwen3-moe": ("qwen3_moe", EXPERTS, 3e-5),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}, 3e-5),
    "olmo2": ("olmo2", {}, 3e-5),
    "gemma2": (
        "gemma2",
        {"sliding_window": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        4e-3,
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7}, 4e-3),
    "gemma3-linear": (
        "gemma3_text",
        {
            "sliding_window": 16,
            "num_hidden_layers": 7,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": NO},
        },
        4e-3,
    ),
    "gpt2": ("gpt2", {}, 4e-3),
}
"""Case -> family, fields, and how far llama.cpp's float32 logits may lie off; its GELU is a table of float16."""


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_llama_cpp_finds_the_same_logits_and_tokens(name, tmp_path):
    model_type, changed, atol = PEERS[name]
    tokenizer = Bpe(320, pattern="llama3").train([TEXT])
    config, params = small(model_type, tokens=tokenizer.vocab_size, **changed)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 48)
    want = np.asarray(logits(config, params, ids[None]))[0]
    assert want.std() > 0.1
    for kind, off in (("F32", atol), ("F16", atol + 2e-2)):
        saved(tmp_path / "a.gguf", config, params, tokenizer, kind=kind, like=model_type)
        peer = LlamaCpp(tmp_path / "a.gguf")
        np.testing.assert_allclose(peer.logits(ids), want, rtol=0, atol=off * max(want.std(), 1))
        if kind == "F32":
            assert peer.greedy(ids, 8) == _greedy(config, params, ids, 8)
            assert peer.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", [kind for kind in gguf.BLOCKS if kind[0] == "Q" or kind == "BF16"])
def test_llama_cpp_finds_the_logits_of_rounded_weights(name, kind, tmp_path):
    """Which it multiplies with activations that it rounds too, to 8 bits in blocks as wide as those of the weights."""
    model_type, changed, _ = PEERS[name]
    config, params = small(model_type, **changed)
    found, _ = saved(tmp_path / "a.gguf", config, params, kind=kind)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 48)
    want = np.asarray(logits(found.config, pretrained.load(found), ids[None]))[0]
    off = LlamaCpp(tmp_path / "a.gguf").logits(ids) - want
    assert off.std() < (0.01 if kind == "BF16" else 0.05) * want.std()


@pytest.mark.peers
def test_llama_cpp_keeps_vowel_signs_with_their_letters(tmp_path):
    """In the build of `xllamacpp`, which tells how many tokens a prompt has, with one bos."""
    import xllamacpp

    tokenizer = Bpe(320).train([TEXT])
    config, params = small("llama", tokens=tokenizer.vocab_size)
    with pytest.warns(UserWarning, match="will not open the file"):
        saved(tmp_path / "a.gguf", config, params, tokenizer)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(tmp_path / "a.gguf"), 128, False
    server = xllamacpp.Server(settings)
    for text in (
        "HELLO Worlds, I'LL",
        "नदी नावों को",
        "क्षत्रिय में हैं। ई के की",
        TEXT[:60],
        "naïve é x/y\n\n 123456 🙂",
    ):
        answer = server.handle_completions({"prompt": text, "max_tokens": 1, "cache_prompt": False})
        assert answer["usage"]["prompt_tokens"] == 1 + len(tokenizer.encode(text)), text


def _greedy(config, params, ids, n):
    """The n likeliest tokens, each from a row of one length, which compiles once."""
    apply, ids = jax.jit(build(config).apply), list(ids)
    row = np.zeros((1, len(ids) + n), np.int32)
    for _ in range(n):
        row[0, : len(ids)] = ids
        ids.append(int(apply(params, {"tokens": jnp.asarray(row)}).logits[0, len(ids) - 1].argmax()))
    return ids[-n:]


@pytest.mark.peers
@pytest.mark.real
def test_llama_cpp_goes_on_as_we_do_with_a_released_model(smollm2, tmp_path):
    source = pretrained.find(smollm2)
    tokenizer = source.tokenizer()
    found, fallen = saved(
        tmp_path / "a.gguf", source.config, pretrained.load(source), tokenizer, "Q8_0", bos_id=1
    )
    assert not fallen and found.tokenizer().hash == tokenizer.hash
    peer, params = LlamaCpp(tmp_path / "a.gguf"), pretrained.load(found)
    for text in ("The capital of France is", "नमस्ते दुनिया 🙂", "Don't   stop: 1 2 3"):
        ids = tokenizer.encode(text)
        assert peer.encode(text) == ids
        assert peer.greedy(ids, 12) == _greedy(found.config, params, ids, 12)
