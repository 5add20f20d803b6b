"""Prompt and prefix tuning: against float64 attention with the extra keys, real words in front, and PEFT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest

from lmx import tree
from lmx.adapt import Int4, Lora, Prefix, Prompt, chain
from lmx.mesh import MeshConfig, shardings
from lmx.models import RULES, TransformerConfig, build, layers, prefixed, pretrained, unstacked
from lmx.nn import AttentionConfig, MlpConfig
from lmx.ops.mask import Causal, SlidingWindow
from lmx.ops.position import ALiBi, Learned, RoPE

KEY, IDS = jax.random.key(4), (3, 17, 8)
TOKENS = jax.random.randint(jax.random.key(9), (2, 12), 0, 40)
PACKED = {
    "tokens": TOKENS,
    "positions": jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0], [*range(12)]], jnp.int32),
    "segment_ids": jnp.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * 12], jnp.int32),
}


@functools.cache
def make(position=RoPE(), mask=Causal(), **more):
    config = TransformerConfig(
        vocab_size=40,
        d_model=32,
        n_layers=2,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, mask=mask),
        mlp=MlpConfig(d_ff=64),
        position=position,
        init_std=0.3,
    )
    model = build(dataclasses.replace(config, **more))
    return model._replace(apply=jax.jit(model.apply)), jax.jit(model.init)(jax.random.key(0))


def close(a, b, atol=2e-4):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def walk(model, params, tokens, cut, **more):
    step, cache, pieces, start = jax.jit(model.step), model.new_cache(len(tokens), 16, params), [], 0
    for n in cut:
        out, cache = step(params, cache, tokens[:, start : start + n])
        pieces.append(out.logits)
        start += n
    return jnp.concatenate(pieces, 1)


@pytest.mark.parametrize("position", [RoPE(), ALiBi(), Learned(16)], ids=repr)
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(4)], ids=repr)
def test_a_prefix_is_extra_keys_that_every_segment_sees(position, mask):
    model, params = make(position, mask)
    params = Prefix(3)(params, KEY)
    got = model.apply(params, PACKED).logits
    want = numpy_model.logits(params, model.config, *PACKED.values())
    real = np.asarray(PACKED["segment_ids"]) > 0
    close(got[real], want[real])
    alone = model.apply(params, {"tokens": TOKENS[:1, 5:10]}).logits
    close(got[0, 5:10], alone[0])
    without = model.apply(make(position, mask)[1], PACKED).logits
    assert np.abs(got - without)[real].max() > 0.05


@pytest.mark.parametrize(
    "more", [{}, {"scale_embed": True, "init_std": 0.1}, {"mask": SlidingWindow(6)}], ids=str
)
def test_a_prompt_of_words_is_those_words_before_the_text(more):
    model, params = make(**more)
    ids = jnp.broadcast_to(jnp.asarray(IDS, jnp.int32)[None], (2, 3))
    want = model.apply(params, {"tokens": jnp.concatenate([ids, TOKENS], 1)}).logits[:, 3:]
    prompted = Prompt(ids=IDS)(params, KEY)
    close(model.apply(prompted, {"tokens": TOKENS}).logits, want)
    apart = unstacked(prompted)
    close(model.apply(apart, {"tokens": TOKENS}).logits, want)
    for form in (prompted, apart, prefixed(model.config, prompted), prefixed(model.config, apart)):
        close(walk(model, form, TOKENS, [5, 1, 6]), want)
    packed = model.apply(prompted, PACKED).logits
    close(packed[1], want[1])
    close(packed[0, 5:10], model.apply(prompted, {"tokens": TOKENS[:1, 5:10]}).logits[0])


def test_a_prompt_of_learned_positions_moves_no_text():
    """Its own positions are learned with it; those of the text stay, as do those of packed segments."""
    model, params = make(Learned(16))
    prompted = Prompt(4)(params, KEY)
    want = model.apply(prompted, {"tokens": TOKENS}).logits
    close(walk(model, prompted, TOKENS, [5, 1, 6]), want)
    as_prefix = prefixed(model.config, prompted)
    close(want, numpy_model.logits(as_prefix, model.config, TOKENS))


@pytest.mark.parametrize("surgery", [Prefix(3), Prompt(3)], ids=repr)
def test_it_goes_with_a_cache_of_codes_a_mesh_and_quantized_matrices(surgery):
    model, params = make()
    params = chain(Int4(group_size=16), surgery)(params, KEY)
    want = model.apply(params, {"tokens": TOKENS}).logits
    close(walk(model, params, TOKENS, [5, 1, 6]), want)
    close(walk(model, unstacked(params), TOKENS, [5, 1, 6]), want, 2e-3)  # codes by inputs of 16 bits
    small = walk(build(model.config, cache="int8"), params, TOKENS, [5, 1, 6])
    assert 1e-4 < np.linalg.norm(small - want) / np.linalg.norm(want) < 0.03
    mesh = MeshConfig(2, 2, 2).build()
    placed = jax.device_put(params, shardings(params, RULES, mesh))
    on_mesh = build(model.config, mesh=mesh)
    tokens = jnp.concatenate([TOKENS, TOKENS])
    close(jax.jit(on_mesh.apply)(placed, {"tokens": tokens}).logits[:2], want)


@pytest.mark.parametrize(("surgery", "pattern"), [(Prefix(3), "blocks/*prefix*"), (Prompt(3), "prompt")])
def test_the_virtual_tokens_alone_are_trained(surgery, pattern):
    model, params = make()
    trainable, frozen = tree.partition(surgery(params, KEY), pattern)
    assert tree.paths(frozen) == tree.paths(params)
    assert tree.count(trainable) == {"prompt": 3 * 32}.get(pattern, 2 * 2 * 3 * 16)

    @jax.jit
    def loss(trainable):
        logits = model.apply(tree.combine(trainable, frozen), PACKED).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], 2).mean()

    before = loss(trainable)
    for _ in range(5):
        grads = jax.grad(loss)(trainable)
        assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(grads))
        trainable = jax.tree.map(lambda x, g: x - g, trainable, grads)
    assert loss(trainable) < before - 1e-3


def test_without_virtual_tokens_the_program_has_none():
    model, params = make()
    texts = [
        jax.jit(lambda p: model.apply(p, {"tokens": TOKENS}).logits).lower(p).as_text()
        for p in (params, Prefix(5)(params, KEY))
    ]
    assert "x17x" not in texts[0] and "x17x" in texts[1]  # 5 + 12 keys


def test_mistakes_are_told_with_the_way_out():
    model, params = make()
    for make_it, said in (
        (lambda: Prompt(0), "Prompt: length=0; use 1 or more"),
        (lambda: Prompt(ids=(40,))(params, KEY), "ids hold 40, outside the vocabulary of 40"),
        (lambda: Prefix(2)(Prompt(2)(params, KEY), KEY), "there is prompt already"),
        (lambda: Prompt(2)(Prefix(2)(params, KEY), KEY), "blocks/attn/prefix/k already"),
        (lambda: layers(model.config).enter(Prompt(2)(params, KEY), TOKENS), "make it a prefix first"),
    ):
        with pytest.raises(ValueError, match=said):
            make_it()
    wrong = Prefix(2)(params, KEY)
    wrong["blocks"]["attn"]["prefix"]["k"] = jnp.zeros((2, 2, 8))
    with pytest.raises(ValueError, match=r"prefix has shape \(2, 8\), this model wants \(2, 16\)"):
        model.apply(wrong, {"tokens": TOKENS})
    both = chain(Lora(2), Prefix(2))(params, KEY)  # they stand beside each other
    assert tree.paths(tree.partition(both, "*/prefix/*|*/w/[ab]")[0])


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_gives_these_logits_for_the_same_numbers(kind, tmp_path):
    """PEFT's text stands after P positions and its prefix is not turned; ours lies P before the text: turned by -P."""
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    P, L, H = 3, 2, 4
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    kinds = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    with torch.no_grad():
        for x in theirs.parameters():
            x.normal_(0, 0.3)
        theirs.save_pretrained(tmp_path)
        theirs = peft.get_peft_model(theirs, kinds[kind](task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
        [learned] = [x for x in theirs.parameters() if x.requires_grad]
        learned.normal_(0, 0.5)
        want = theirs(torch.tensor(np.asarray(TOKENS))).logits.numpy()[:, -TOKENS.shape[1] :]
    found, learned = pretrained.find(tmp_path), jnp.asarray(learned.detach().numpy())
    params, position = pretrained.load(found), found.config.position
    if kind == "prompt":
        params = {**params, "prompt": learned}
    else:
        params = Prefix(P)(params, KEY)
        each = learned.reshape(P, L, 2, -1, H)  # k and v of layer after layer, K heads of H
        k = [position.rotate(each[None, :, i, 0], jnp.full((1, P), -P, jnp.int32)) for i in range(L)]
        prefix = params["blocks"]["attn"]["prefix"]
        prefix["k"] = jnp.stack(k).reshape(L, P, -1)
        prefix["v"] = jnp.moveaxis(each[:, :, 1], 0, 1).reshape(L, P, -1)
    got = build(found.config).apply(params, {"tokens": TOKENS}).logits
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
