"""speculate: the tokens of `generate` where it is greedy, and its distribution, enumerated, where it draws."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import numpy_model
import pytest
from parrot import parrot

from lmx.data import Byte
from lmx.generate import Sampling, generate, speculative
from lmx.generate.speculative import Acceptance, Draft, speculate
from lmx.models import build
from lmx.models.presets import llama
from lmx.nn import AttentionConfig, MlpConfig, MoeConfig
from lmx.ops.mask import PrefixLM, SlidingWindow
from lmx.ops.position import T5, Learned

BYTES = Byte().train(["the byte tokenizer learns nothing"])
PROMPTS = ["a", "नमस्", "", "The quick fox", "भारत के लोग और उनकी भाषाएँ"]
GREEDY = Sampling(temperature=0.0, max_tokens=24)


@functools.cache
def make(seed=3, vocab_size=BYTES.vocab_size, n_layers=2, **more):
    config = llama(
        16, n_layers, 4, n_kv_heads=2, vocab_size=vocab_size, init_std=0.5, mlp=MlpConfig(d_ff=24), unroll=1
    )
    model = build(dataclasses.replace(config, **more))
    return model, jax.jit(model.init)(jax.random.key(seed))


@functools.cache
def noisy(scale, seed=3, **more):
    """The target with noise on its parameters: right often, not always."""
    model, params = make(seed, **more)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    spread = [x + scale * x.std() * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return model, jax.tree.unflatten(tree, spread)


DRAFTS = {
    "itself": lambda **more: make(**more),
    "another": lambda **more: make(11, n_layers=1, **more),
    "itself with noise": lambda **more: noisy(0.05, **more),
}


@pytest.mark.parametrize(
    ("name", "n_tokens"), [("itself", 5), ("another", 2), ("itself with noise", 1), ("itself with noise", 4)]
)
def test_greedy_tokens_are_those_without_a_draft(name, n_tokens):
    want = generate(*make(), BYTES, PROMPTS, GREEDY)
    got, acceptance = speculate(
        *make(), BYTES, PROMPTS, GREEDY, draft=Draft(*DRAFTS[name](), n_tokens=n_tokens)
    )
    assert [c.tokens for c in got] == [c.tokens for c in want]
    assert [(c.text, c.reason) for c in got] == [(c.text, c.reason) for c in want]
    for a, b in zip(got, want):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-5)
    assert acceptance.accepted + acceptance.steps == sum(len(c.tokens) - 1 for c in got)
    if name == "itself":
        assert acceptance.accepted == acceptance.drafted or any(c.reason == "eos" for c in got)
        assert acceptance.tokens_per_step > 0.85 * (n_tokens + 1)
    if name == "another":
        assert acceptance.rate < 0.5
    if name == "itself with noise":
        assert 0.2 < acceptance.rate < 1


@pytest.mark.parametrize(
    "more",
    [
        {"position": Learned(64)},
        {"position": T5(n_buckets=8, max_distance=16), "logit_softcap": 3.0},
        {"attention": AttentionConfig(n_heads=2, mask=SlidingWindow(4)), "tie_head": False},
    ],
    ids=["learned", "t5", "window"],
)
def test_every_kind_of_model_goes_back(more):
    """Rows stand at different places, and go back by different numbers of tokens."""
    prompts = [p[:6] for p in PROMPTS]
    want = generate(*make(**more), BYTES, prompts, GREEDY)
    got, acceptance = speculate(*make(**more), BYTES, prompts, GREEDY, draft=Draft(*noisy(0.1, **more)))
    assert [c.tokens for c in got] == [c.tokens for c in want]
    assert 0 < acceptance.accepted < acceptance.drafted


@pytest.mark.parametrize(
    ("n_tokens", "mlp"), [(60, MlpConfig(d_ff=24)), (3, MoeConfig(d_ff=24, n_experts=4))]
)
def test_the_last_position_is_reached_and_not_passed(n_tokens, mlp):
    """Learned positions end, and one beyond would give NaN; rows fill them to the last, more or less of them."""
    model, params = make(position=Learned(32), mlp=mlp)
    prompts = [[5] * 12, [9] * 3, [7]]
    sampling = dataclasses.replace(GREEDY, max_tokens=21)
    want = generate(model, params, BYTES, prompts, sampling)
    for draft in (Draft(model, params, n_tokens), Draft(*make(11, position=Learned(40)), n_tokens)):
        got, _ = speculate(model, params, BYTES, prompts, sampling, draft=draft)
        assert [c.tokens for c in got] == [c.tokens for c in want]
        assert np.isfinite([x for c in got for x in c.logprobs]).all()


@pytest.mark.parametrize("most", [0, 1, 2, 7])
def test_max_tokens_is_exact(most):
    sampling = dataclasses.replace(GREEDY, max_tokens=most)
    got, acceptance = speculate(*make(), BYTES, PROMPTS, sampling, draft=Draft(*make()))
    assert [c.tokens for c in got] == [c.tokens for c in generate(*make(), BYTES, PROMPTS, sampling)]
    assert acceptance.accepted <= acceptance.drafted <= max(0, most - 1) * len(PROMPTS)


TEXT = "one two three, नमस्ते, four five six"


@functools.cache
def spelling(text=TEXT):
    """(model, params); the model is the same for every text, so that its programs are."""
    parts = parrot([*BYTES.encode(text), BYTES.eos_id, *BYTES.encode(text)], BYTES.vocab_size)
    return parts if text == TEXT else (spelling()[0], parts[1])


@pytest.mark.parametrize("wrong", [TEXT, TEXT.replace("w", "v").replace("f", "g"), "x" * len(TEXT.encode())])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_each_row_ends_at_its_own_eos_wherever_in_a_round(wrong, n_tokens):
    n = len(TEXT.encode())
    prompts = [[9] * (n + 1 - k) for k in (1, 2, 3, 5, 8, 30)]
    got, _ = speculate(
        *spelling(),
        BYTES,
        prompts,
        dataclasses.replace(GREEDY, max_tokens=40),
        draft=Draft(*spelling(wrong), n_tokens),
    )
    for prompt, completion in zip(prompts, got):
        rest = TEXT.encode()[len(prompt) - 1 :]
        assert completion.tokens == (*(b + 3 for b in rest), BYTES.eos_id) and completion.reason == "eos"


@pytest.mark.parametrize("stop", [("three",), (" ",), ("मस्",), ("o three", "two"), ("absent",)], ids=repr)
@pytest.mark.parametrize("chunk", [1, 3])
def test_stop_strings_cut_as_without_a_draft(stop, chunk):
    sampling = Sampling(temperature=0.0, max_tokens=40, stop=stop)
    draft = Draft(*spelling(TEXT.replace("r", "l")), 3)
    prompts = [[9], [9] * 6]
    got, _ = speculate(*spelling(), BYTES, prompts, sampling, draft=draft, chunk=chunk)
    want = generate(*spelling(), BYTES, prompts, sampling)
    assert [(c.text, c.tokens, c.reason) for c in got] == [(c.text, c.tokens, c.reason) for c in want]


def test_show_tells_each_rows_text_as_it_comes():
    told = {0: [], 1: []}
    got, _ = speculate(
        *spelling(),
        BYTES,
        [[9], [9] * 16],
        Sampling(0.0, max_tokens=30),
        draft=Draft(*spelling()),
        chunk=1,
        show=lambda place, text: told[place].append(text),
    )
    assert ["".join(told[b]) for b in told] == [c.text for c in got] and len(told[0]) > 5


def test_repetition_penalty_sees_what_was_drafted_before():
    """Tokens within a round count as seen, and those refused do not."""
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1.7)
    want = generate(*make(), BYTES, PROMPTS, sampling)
    assert [c.tokens for c in want] != [c.tokens for c in generate(*make(), BYTES, PROMPTS, GREEDY)]
    for name in DRAFTS:
        got, acceptance = speculate(*make(), BYTES, PROMPTS, sampling, draft=Draft(*DRAFTS[name](), 3))
        assert [c.tokens for c in got] == [c.tokens for c in want]
        assert name != "itself" or acceptance.tokens_per_step > 3


SETTINGS = [
    Sampling(seed=5, max_tokens=12),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, max_tokens=12),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_a_row_of_a_batch_equals_the_prompt_alone(sampling):
    draft = Draft(*noisy(0.1), 3)
    together, _ = speculate(*make(), BYTES, PROMPTS, sampling, draft=draft)
    assert (
        together
        == speculate(*make(), BYTES, PROMPTS, dataclasses.replace(sampling, stop=("absent",)), draft=draft)[0]
    )
    for r, prompt in enumerate(PROMPTS[:3]):
        (alone,), _ = speculate(*make(), BYTES, [prompt], sampling, draft=draft, rows=[r])
        assert alone.tokens == together[r].tokens and alone.reason == together[r].reason
        np.testing.assert_allclose(alone.logprobs, together[r].logprobs, rtol=1e-4, atol=1e-5)


def test_a_draft_that_is_the_target_is_always_believed():
    sampling = Sampling(temperature=0.9, top_p=0.95, max_tokens=25, seed=2)
    got, acceptance = speculate(*make(), BYTES, ["ab"] * 8, sampling, draft=Draft(*make(), 3))
    ended = sum(c.reason == "eos" for c in got)
    assert acceptance.drafted - acceptance.accepted <= 3 * ended
    assert len({c.tokens for c in got}) == 8


def exact(params, config, prompt, sampling, n, eos):
    """{tokens: probability} of all completions of n tokens, or fewer ending in eos, in float64.

    The filters are written again from their papers, for single rows.
    """

    def following(tokens):
        x = numpy_model.logits(params, config, [tokens])[0, -1]
        if sampling.repetition_penalty != 1:
            seen = np.isin(np.arange(len(x)), tokens)
            x = np.where(
                seen, np.where(x > 0, x / sampling.repetition_penalty, x * sampling.repetition_penalty), x
            )
        p = np.exp((x - x.max()) / sampling.temperature)
        if sampling.top_k:
            p[np.argsort(p)[: -sampling.top_k]] = 0
        order = np.argsort(-p)
        before = np.cumsum(p[order] / p.sum()) - p[order] / p.sum()
        p[order[before >= sampling.top_p]] = 0
        p[p < sampling.min_p * p.max()] = 0
        return p / p.sum()

    found = {(): 1.0}
    for _ in range(n):
        longer = {}
        for tokens, mass in found.items():
            if tokens and tokens[-1] == eos:
                longer[tokens] = mass
                continue
            for token, p in enumerate(following([*prompt, *tokens])):
                if p > 0:
                    longer[(*tokens, token)] = mass * p
        found = longer
    return found


def surprise(n_rows, sampling, n_tokens, seed):
    """p-value of the chi-square of all completions of 3 tokens against their exact probabilities."""
    from scipy.stats import chi2

    V, prompt = 6, [3, 5, 4]
    target, draft = make(vocab_size=V), make(11, vocab_size=V, n_layers=1)
    sampling = dataclasses.replace(sampling, max_tokens=3, seed=seed)
    want = exact(target[1], target[0].config, prompt, sampling, 3, BYTES.eos_id)
    assert sum(want.values()) == pytest.approx(1, abs=1e-9) and len(want) > 10
    got, acceptance = speculate(*target, BYTES, [prompt] * n_rows, sampling, draft=Draft(*draft, n_tokens))
    assert 0.1 < acceptance.rate < 0.9
    counts = dict.fromkeys(want, 0)
    for completion in got:
        counts[completion.tokens] += 1  # KeyError: a completion that cannot be
    expected = n_rows * np.array([*want.values()])
    observed = np.array([*counts.values()])
    common = expected >= 8
    expected, observed = (np.append(x[common], x[~common].sum()) for x in (expected, observed))
    expected, observed = expected[expected > 0], observed[expected > 0]
    return chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)


DRAWN = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.2, top_k=4, min_p=0.05),
    Sampling(temperature=0.9, repetition_penalty=1.5),
]


@pytest.mark.parametrize("sampling", DRAWN, ids=repr)
def test_completions_follow_the_target_whatever_the_draft(sampling):
    assert surprise(8192, sampling, 2, seed=1) > 1e-3


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_completions_follow_the_target_for_other_numbers_of_drafted_tokens(n_tokens):
    assert surprise(8192, Sampling(), n_tokens, seed=2) > 1e-3


def test_drawing_from_p_where_a_token_was_refused_does_not_pass_for_the_target(monkeypatch):
    """The power of the tests above: the same rows betray a rule that is a little wrong."""
    monkeypatch.setattr(speculative, "_programs", speculative._programs.__wrapped__)
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    assert surprise(8192, Sampling(), 2, seed=1) < 1e-9


def test_logprobs_are_the_targets_before_filters():
    model, params = make()
    sampling = Sampling(temperature=0.7, top_k=5, max_tokens=8)
    (got,), _ = speculate(model, params, BYTES, ["ab"], sampling, draft=Draft(*make(11)))
    ids = [BYTES.bos_id, *BYTES.encode("ab")]
    log_p = numpy_model.log_softmax(numpy_model.logits(params, model.config, [[*ids, *got.tokens]])[0])
    want = [log_p[len(ids) - 1 + i, token] for i, token in enumerate(got.tokens)]
    np.testing.assert_allclose(got.logprobs, want, rtol=1e-4, atol=1e-4)


def test_vocabularies_of_other_sizes_serve_if_both_cover_the_tokenizer():
    """Padding to 512 and to 300 in the two models: what lies beyond the tokenizer is neither drafted nor drawn."""
    target, draft = make(vocab_size=512), make(11, vocab_size=300)
    want = generate(*target, BYTES, PROMPTS, GREEDY)
    assert [c.tokens for c in speculate(*target, BYTES, PROMPTS, GREEDY, draft=Draft(*draft))[0]] == [
        c.tokens for c in want
    ]
    hot = Sampling(temperature=5.0, max_tokens=16)
    got, _ = speculate(*target, BYTES, PROMPTS, hot, draft=Draft(*draft))
    assert max(token for c in got for token in c.tokens) < BYTES.vocab_size


def test_rounds_batches_and_temperatures_share_programs():
    target, draft = make(d_model=20, attention=AttentionConfig(n_heads=2)), make(11)
    start, advance = speculative._programs(target[0], draft[0])
    for n, t, most in ((1, 0.5, 5), (3, 0.9, 8), (9, 2.0, 6), (4, 0.7, 6)):
        sampling = Sampling(temperature=t, top_p=0.9, max_tokens=most, seed=n, stop=("q",))
        speculate(*target, BYTES, ["x" * n], sampling, draft=Draft(*draft, 3), chunk=1)
    assert start._cache_size() == advance._cache_size() == 1


def test_errors_say_where_and_what_to_do():
    target = make()
    with pytest.raises(ValueError, match=r"vocab_size=6, the target's 259.*259 ids.*same tokenizer"):
        speculate(*target, BYTES, ["a"], GREEDY, draft=Draft(*make(vocab_size=6)))
    short = Draft(*make(position=Learned(24)))
    with pytest.raises(ValueError, match=r"draft: prompt 0 has 17 tokens .* max_tokens to 8"):
        speculate(*target, BYTES, ["x" * 16], dataclasses.replace(GREEDY, max_tokens=9), draft=short)
    with pytest.raises(ValueError, match=r"prompt 0 .* ends within the prefix"):
        masked = AttentionConfig(n_heads=4, mask=PrefixLM(9))
        speculate(*make(attention=masked), BYTES, ["x"], GREEDY, draft=Draft(*target))
    with pytest.raises(ValueError, match="2 rows for 1 prompts"):
        speculate(*target, BYTES, ["a"], GREEDY, draft=Draft(*target), rows=(1, 2))
    with pytest.raises(ValueError, match="n_tokens=0"):
        Draft(*target, n_tokens=0)
    assert speculate(*target, BYTES, [], GREEDY, draft=Draft(*target)) == ([], Acceptance(0, 0, 0))


def test_bfloat16_models_speculate():
    model, params = make(dtype="bfloat16")
    got, acceptance = speculate(model, params, BYTES, PROMPTS, GREEDY, draft=Draft(model, params))
    assert all(np.isfinite(c.logprobs).all() for c in got) and acceptance.rate > 0.5


def test_all_pairs_of_points_are_told_apart():
    """residual of two distributions on 3 ids is max(p - q, 0); of equal ones, p."""
    grid = [np.array(x, np.float32) / 4 for x in itertools.product(range(5), repeat=3) if sum(x) == 4]
    for p, q in itertools.product(grid, repeat=2):
        left = np.asarray(speculative.residual(p[None], q[None])[0])
        np.testing.assert_array_equal(left, p if (p == q).all() else np.maximum(p - q, 0))
