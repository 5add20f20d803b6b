"""generate: against a plain loop over `apply`, and against a model whose every completion is known."""

import dataclasses
import functools

import jax
import numpy as np
import numpy_model
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from parrot import parrot

from lmx.data import Byte
from lmx.generate import Completion, Sampling, completions, generate
from lmx.generate.rows import Decoder, _programs
from lmx.models import build, unstacked
from lmx.models.presets import llama
from lmx.nn import AttentionConfig, Local, MlpConfig
from lmx.ops.mask import Causal, PrefixLM, SlidingWindow
from lmx.ops.position import T5, Learned, RoPE

BYTES = Byte().train(["the byte tokenizer learns nothing"])
PROMPTS = ["a", "नमस्", "", "The quick fox"]
GREEDY = Sampling(temperature=0.0, max_tokens=10)
LOCAL = {"attention": AttentionConfig(n_heads=4, n_kv_heads=2, local=Local(4, "LG"))}


@functools.cache
def make(vocab_size=BYTES.vocab_size, **more):
    config = llama(
        16, 2, 4, n_kv_heads=2, vocab_size=vocab_size, init_std=0.5, mlp=MlpConfig(d_ff=24), unroll=1
    )
    model = build(dataclasses.replace(config, **more))
    return model, jax.jit(model.init)(jax.random.key(3))


def prompt_ids(prompt):
    return [BYTES.bos_id, *BYTES.encode(prompt)]


def greedy_loop(model, params, ids, n):
    """argmax of the float64 forward pass of the whole sequence, once per token; and its log probability."""
    tokens, logprobs = list(ids), []
    for _ in range(n):
        log_p = numpy_model.log_softmax(numpy_model.logits(params, model.config, [tokens])[0, -1])
        tokens.append(int(log_p.argmax()))
        logprobs.append(log_p.max())
    return tokens[len(ids) :], logprobs


def text_of(tokens):
    return b"".join(map(BYTES.token_bytes, tokens)).decode("utf-8", "replace")


@pytest.mark.parametrize(
    "more",
    [
        {"position": RoPE()},
        {"position": Learned(96)},
        {"position": T5(n_buckets=8, max_distance=16), "logit_softcap": 3.0},
        {"attention": AttentionConfig(n_heads=2, mask=SlidingWindow(4)), "tie_head": False},
    ],
    ids=["rope", "learned", "t5", "window"],
)
def test_greedy_equals_a_loop_over_the_whole_sequence(more):
    model, params = make(**more)
    for prompt, got in zip(PROMPTS, generate(model, params, BYTES, PROMPTS, GREEDY)):
        tokens, logprobs = greedy_loop(model, params, prompt_ids(prompt), len(got.tokens))
        assert got.tokens == tuple(tokens)
        np.testing.assert_allclose(got.logprobs, logprobs, rtol=1e-4, atol=1e-5)
        assert got.reason == ("eos" if got.tokens[-1] == BYTES.eos_id else "length")
        assert got.text == text_of(tokens)


def test_repetition_penalty_counts_prompt_and_completion_but_not_padding():
    model, params = make()
    prompts = ["abab", "abcdefghijklmnopqrstuvwxyz"]
    got = generate(model, params, BYTES, prompts, dataclasses.replace(GREEDY, repetition_penalty=1.7))
    for prompt, completion in zip(prompts, got):
        tokens = prompt_ids(prompt)
        for token in completion.tokens:
            x = numpy_model.logits(params, model.config, [tokens])[0, -1]
            seen = np.isin(np.arange(len(x)), tokens)
            x = np.where(seen, np.where(x > 0, x / 1.7, x * 1.7), x)
            assert token == x.argmax()
            tokens.append(token)
    assert [c.tokens for c in got] != [c.tokens for c in generate(model, params, BYTES, prompts, GREEDY)]


@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=12, seed=5), Sampling(0.8, 20, 0.9, 0.02, 1.2, 12)], ids=repr
)
def test_a_row_of_a_batch_equals_the_prompt_alone(sampling):
    model, params = make()
    together = generate(model, params, BYTES, PROMPTS, sampling)
    for r, prompt in enumerate(PROMPTS):
        alone = generate(model, params, BYTES, [prompt], sampling, rows=[r])[0]
        assert alone.tokens == together[r].tokens and alone.reason == together[r].reason
        np.testing.assert_allclose(alone.logprobs, together[r].logprobs, rtol=1e-4, atol=1e-5)


def test_seeds_and_rows_give_different_completions_and_repeat():
    model, params = make()
    run = functools.partial(generate, model, params, BYTES)
    sampling = Sampling(max_tokens=12)
    first = run(["x"] * 4, sampling)
    assert first == run(["x"] * 4, sampling)
    assert len({c.tokens for c in first}) == 4
    assert not {c.tokens for c in first} & {
        c.tokens for c in run(["x"] * 4, dataclasses.replace(sampling, seed=1))
    }


def test_first_tokens_follow_the_model():
    """Chi-square of 4,096 first tokens against the float64 forward pass, rare tokens taken together."""
    from scipy.stats import chi2

    model, params = make()
    n = 4096
    p = np.exp(numpy_model.log_softmax(numpy_model.logits(params, model.config, [prompt_ids("ab")])[0, -1]))
    got = generate(model, params, BYTES, ["ab"] * n, Sampling(max_tokens=1, seed=8))
    counts = np.bincount([c.tokens[0] for c in got], minlength=len(p))
    common = n * p >= 8
    observed = np.append(counts[common], counts[~common].sum())
    expected = n * np.append(p[common], p[~common].sum())
    assert common.sum() > 20
    assert ((observed - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, len(expected) - 1)


TEXT = "one two three, नमस्ते, four five six seven eight nine ten"


@functools.cache
def spelling(text=TEXT, end=True):
    return parrot([*BYTES.encode(text), *([BYTES.eos_id] if end else [])], BYTES.vocab_size)


def spell(stop=(), chunk=16, max_tokens=40, prompts=("",)):
    model, params = spelling()
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, stop=stop)
    return generate(model, params, BYTES, list(prompts), sampling, chunk=chunk)


def test_rows_that_end_early_leave_the_others_alone():
    """Every row spells on from its own position, and ends with its own eos."""
    model, params = spelling()
    whole = TEXT.encode()
    starts = [len(whole) - 1, 5, len(whole) - 20, 60]
    limit = len(whole) + 1
    got = generate(
        model, params, BYTES, [[9] * (n + 1) for n in starts], Sampling(0.0, max_tokens=limit - 61)
    )
    for n, completion in zip(starts, got):
        rest = whole[n : n + limit - 61]
        assert completion.text == rest.decode("utf-8", "replace")
        ended = n + limit - 61 > len(whole)
        assert completion.reason == ("eos" if ended else "length")
        assert completion.tokens == (*(b + 3 for b in rest), *([BYTES.eos_id] if ended else []))


STOPS = [
    ("three",),
    (" ",),
    ("मस्",),
    ("seven", "two t"),
    ("o three", "two"),
    ("absent",),
    ("n", "e two"),
    ("one",),
]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_stop_strings_cut_the_text_wherever_the_tokens_part(stop, chunk):
    got = spell(stop, chunk)[0]
    whole = TEXT.encode()[:40]
    ends = {s: whole.find(s.encode()) + len(s.encode()) for s in stop if s.encode() in whole}
    if not ends:
        assert got == spell()[0] and got.reason == "length"
        return
    end = min(ends.values())
    at = min(whole[:end].find(s.encode()) for s in stop if s.encode() in whole[:end])
    assert got.text == whole[:at].decode() and got.reason == "stop"
    assert got.tokens == tuple(b + 3 for b in whole[:end])


def test_a_stop_string_in_the_prompt_does_not_count():
    got = spell((" two",), prompts=["one two three "])[0]
    assert got.reason == "length" and got.text.startswith(" नम")


def test_each_row_stops_by_itself():
    """Rows begin to spell at 0, 4 and 30; the second is past the stop string already."""
    model, params = spelling()
    prompts = [[9], [9] * 6, [9] * 31]
    got = generate(model, params, BYTES, prompts, Sampling(0.0, max_tokens=12, stop=("two",)), chunk=2)
    assert [c.reason for c in got] == ["stop", "length", "length"]
    assert got[0].text == "one "
    assert [c.text.encode()[:3] for c in got[1:]] == [
        b"wo ",
        TEXT.encode()[30:].decode("utf-8", "replace").encode()[:3],
    ]


def test_eos_ends_before_a_stop_string_and_text_is_whole():
    model, params = spelling("ab\n")
    got = generate(model, params, BYTES, [""], Sampling(0.0, max_tokens=4, stop=("\n\n",)))[0]
    assert got == Completion("ab\n", (100, 101, 13, BYTES.eos_id), "eos", got.logprobs)


def test_an_incomplete_character_at_the_end_is_replaced():
    got = spell(max_tokens=17)[0]
    assert got.text == TEXT.encode()[:17].decode("utf-8", "replace") and got.text.endswith("�")


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_max_tokens_is_exact(n):
    got = spell(max_tokens=n)[0]
    assert got.reason == "length" and len(got.tokens) == len(got.logprobs) == n
    assert got.text == TEXT.encode()[:n].decode("utf-8", "replace")


def test_no_prompts_and_prompts_of_ids():
    model, params = make()
    assert generate(model, params, BYTES, [], GREEDY) == []
    as_text = generate(model, params, BYTES, ["hey", ""], GREEDY)
    assert as_text == generate(model, params, BYTES, [prompt_ids("hey"), []], GREEDY)
    assert as_text == generate(model, params, BYTES, [np.array(prompt_ids("hey")), [BYTES.bos_id]], GREEDY)


def test_ids_beyond_the_tokenizer_are_never_drawn():
    """A vocabulary padded to 512: half of all draws would fall into the padding."""
    model, params = make(vocab_size=512)
    got = generate(model, params, BYTES, ["x"] * 4, Sampling(temperature=5.0, max_tokens=16))
    assert max(token for c in got for token in c.tokens) < BYTES.vocab_size


def test_lengths_and_temperatures_share_programs():
    model, params = make(d_model=20, attention=AttentionConfig(n_heads=2))
    begin, *_, advance = _programs(model)
    for n, t, most in ((1, 0.5, 5), (3, 0.9, 8), (9, 2.0, 3), (4, 0.7, 6)):
        generate(model, params, BYTES, ["x" * n], Sampling(temperature=t, top_p=0.9, max_tokens=most, seed=n))
    assert begin._cache_size() == advance._cache_size() == 1


def test_parameters_spread_over_a_mesh_give_the_same_tokens():
    model, params = make()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    spread = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp" if x.shape[-1] % 2 == 0 else None))
        ),
        params,
    )
    want = generate(model, params, BYTES, PROMPTS, GREEDY)
    got = generate(model, spread, BYTES, PROMPTS, GREEDY)
    assert [c.tokens for c in got] == [c.tokens for c in want]


def test_bfloat16_models_generate():
    model, params = make(dtype="bfloat16")
    for completion in generate(model, params, BYTES, PROMPTS, GREEDY):
        assert np.isfinite(completion.logprobs).all() and 1 <= len(completion.tokens) <= 10


def test_errors_say_where_and_what_to_do():
    model, params = make(position=Learned(24))
    with pytest.raises(
        ValueError, match=r"prompt 1 has 17 tokens and max_tokens=9 .* 25 positions.*24.*max_tokens to 8"
    ):
        generate(model, params, BYTES, ["ok", "x" * 16], Sampling(max_tokens=9))
    assert len(generate(model, params, BYTES, ["x" * 16], Sampling(0.0, max_tokens=8))[0].tokens) <= 8
    with pytest.raises(ValueError, match=r"prompt 0 holds token 300.*vocab_size=259"):
        generate(model, params, BYTES, [[300]], GREEDY)
    with pytest.raises(ValueError, match="one string"):
        generate(model, params, BYTES, "hello", GREEDY)
    with pytest.raises(ValueError, match="2 rows for 1 prompts"):
        generate(model, params, BYTES, ["a"], GREEDY, rows=(1, 2))


def test_an_empty_prompt_needs_a_bos_token():
    from lmx.data import Tokenizer

    rust = BYTES._rust
    without = Tokenizer(type(rust).from_str(rust.to_str()), {"bos_token": None})
    model, params = make()
    with pytest.raises(ValueError, match="prompt 1 is empty and the tokenizer has no bos"):
        generate(model, params, without, ["a", ""], GREEDY)
    assert generate(model, params, without, ["a"], GREEDY) == generate(
        model, params, BYTES, [BYTES.encode("a")], GREEDY
    )


def test_each_token_is_drawn_anew():
    """From a model to which all tokens are alike, tokens one after the other are independent."""
    model, params = make()
    params = jax.tree.map(np.zeros_like, params)
    (found,) = generate(model, params, BYTES, ["a"], Sampling(max_tokens=200, seed=1, temperature=1.0))
    assert len(set(found.tokens)) > len(found.tokens) / 3


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_p=0.9, max_tokens=10, stop=("e",), seed=4)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_that_take_the_place_of_others_write_what_they_would_alone(sampling, batch_size):
    model, params = make()
    prompts = ["a", "नमस्ते दुनिया", "", "The quick brown fox jumps", "xyz", "no", "भारत"]
    want = [generate(model, params, BYTES, [p], sampling, rows=(i,))[0] for i, p in enumerate(prompts)]
    got = generate(model, params, BYTES, prompts, sampling, batch_size=batch_size)
    assert [(c.tokens, c.text, c.reason) for c in got] == [(c.tokens, c.text, c.reason) for c in want]
    for one, other in zip(got, want):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_place_is_taken_as_soon_as_its_row_ends():
    """The parrot's completion after n tokens begins at its n-th: rows end after 1, 2 or 20 tokens of their own."""
    text = [*BYTES.encode("x" * 40), BYTES.eos_id, *BYTES.encode("y" * 20)]
    model, params = parrot(text, BYTES.vocab_size)
    long, short = [BYTES.bos_id] * 20, [BYTES.bos_id] * 40
    found = completions(
        model, params, BYTES, [long, short, short, short], Sampling(0.0, max_tokens=60), batch_size=2
    )
    assert [(i, len(c.tokens), c.reason) for i, c in found] == [
        (1, 2, "eos"),
        (2, 2, "eos"),
        (3, 2, "eos"),
        (0, 22, "eos"),
    ]


def test_rows_that_come_and_go_meet_no_new_program():
    model, params = make(d_model=24, attention=AttentionConfig(n_heads=2))
    programs = _programs(model)
    prompts = ["a" * (1 + 5 * i % 14) for i in range(16)]
    first, more = (Sampling(1.0, max_tokens=9, seed=seed) for seed in (0, 1))
    generate(model, params, BYTES, prompts, first, batch_size=4)
    compiled = [program._cache_size() for program in programs]
    assert compiled[-1] == 1
    generate(model, params, BYTES, prompts, more, batch_size=4)
    generate(model, params, BYTES, prompts[::-1] * 2, more, batch_size=4)
    assert [program._cache_size() for program in programs] == compiled


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(6), PrefixLM(5), PrefixLM(50)])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_beginning_that_prompts_share_is_read_once_and_changes_nothing(mask, penalty):
    model, params = make(attention=AttentionConfig(n_heads=4, n_kv_heads=2, mask=mask))
    example = "अच्छा = good\nबुरा = bad\n" + "." * 30
    prompts = [example + more for more in ("नया =", "पुराना =", "", "x" * 40)]
    sampling = Sampling(0.8, max_tokens=7, seed=2, repetition_penalty=penalty)
    want = [generate(model, params, BYTES, [p], sampling, rows=(i,))[0] for i, p in enumerate(prompts)]
    got = generate(model, params, BYTES, prompts, sampling, batch_size=3)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    ids = [[BYTES.bos_id, *BYTES.encode(p)] for p in prompts]
    assert Decoder(model, params, BYTES, sampling).shared(ids).n == len(BYTES.encode(example))


def test_any_end_token_ends_a_row():
    model, params = parrot([5, 6, 7, 8, 9], BYTES.vocab_size)
    ends = BYTES.ending_with((9, 7))
    (got,) = generate(model, params, ends, [[BYTES.bos_id]], Sampling(0.0, max_tokens=9))
    assert got.tokens == (5, 6, 7) and got.reason == "eos"


@pytest.mark.parametrize("more", [{}, {"position": T5(n_buckets=8, max_distance=16)}, LOCAL])
def test_layers_one_by_one_give_the_same_completions(more):
    model, params = make(**more)
    want = generate(model, params, BYTES, PROMPTS, GREEDY)
    got = generate(model, unstacked(params), BYTES, PROMPTS, GREEDY, batch_size=2)
    assert [c.tokens for c in got] == [c.tokens for c in want]


def test_a_batch_has_at_least_one_row():
    model, params = make()
    with pytest.raises(ValueError, match="batch_size=0; use 1 or more"):
        generate(model, params, BYTES, PROMPTS, GREEDY, batch_size=0)
