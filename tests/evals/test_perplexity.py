"""Perplexity against a float64 numpy forward pass and closed forms; ways of cutting that change nothing."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.data import Byte, Tokenizer, Word
from lmx.evals import compare, perplexity, summarize
from lmx.evals.perplexity import _batches, _pieces, _scorer
from lmx.models import build
from lmx.models.presets import gpt2, llama
from lmx.nn import AttentionConfig, MlpConfig
from lmx.ops.mask import Full, PrefixLM
from lmx.ops.position import Learned

BYTES = Byte().train(["bytes need no training"])
V = BYTES.vocab_size
TEXTS = ["hello world", "नमस्ते दुनिया, यह एक वाक्य है।", "", "a", " two  spaces\nand lines ", "x" * 40, "the end"]


@functools.cache
def make(kind="llama", **more):
    if kind == "llama":
        config = llama(16, 2, 4, n_kv_heads=2, vocab_size=V, init_std=0.3, mlp=MlpConfig(d_ff=24), unroll=1)
    else:
        config = gpt2(16, 1, 2, max_len=64, vocab_size=V, init_std=0.3)
    model = build(dataclasses.replace(config, **more))
    return model, jax.jit(model.init)(jax.random.key(2))


def ids_of(text):
    return [BYTES.bos_id, *(b + 3 for b in text.encode())]


def by_definition(model, params, text, seq_len, stride=None):
    """float64 nats of each token: in the first window, or the last `stride` tokens of a later one."""
    ids, stride = ids_of(text), stride or seq_len
    nats, scored, start = [], 0, 0
    while scored < len(ids) - 1:
        window = ids[start : start + seq_len + 1]
        found = numpy_model.sequence_nats(params, model.config, window)
        nats.extend(found[scored - start :])
        scored, start = start + len(found), start + stride
    return np.array(nats)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("seq_len", "stride"), [(64, None), (16, None), (16, 5), (16, 1)])
def test_equals_a_float64_forward_pass(kind, seq_len, stride):
    model, params = make(kind)
    got = perplexity(model, params, TEXTS, BYTES, seq_len=seq_len, stride=stride, batch_size=4, bootstrap=10)
    want = np.array([by_definition(model, params, text, seq_len, stride).sum() for text in TEXTS])
    np.testing.assert_allclose(got.sums[:, 0], want, rtol=1e-5)
    n_bytes, n_words = sum(len(t.encode()) for t in TEXTS), 2 + 6 + 0 + 1 + 4 + 1 + 2
    assert (got.n_documents, got.n_tokens, got.n_words, got.n_bytes) == (7, n_bytes, n_words, n_bytes)
    assert got.nats_per_token.value == pytest.approx(want.sum() / n_bytes, rel=1e-5)
    assert got.perplexity.value == pytest.approx(math.exp(want.sum() / n_bytes), rel=1e-4)
    assert got.word_perplexity.value == pytest.approx(math.exp(want.sum() / n_words), rel=1e-3)
    assert got.bits_per_byte.value == pytest.approx(want.sum() / n_bytes / math.log(2), rel=1e-5)


def test_a_sliding_window_changes_long_documents_only():
    model, params = make()
    cost = {
        s: perplexity(model, params, TEXTS, BYTES, seq_len=16, stride=s, batch_size=4, bootstrap=0)
        for s in (1, 16)
    }
    first = [by_definition(model, params, t, 16)[:16].sum() for t in TEXTS]
    assert not np.allclose(cost[1].sums[:, 0], cost[16].sums[:, 0])
    short = [i for i, t in enumerate(TEXTS) if len(t.encode()) <= 16]
    np.testing.assert_allclose(cost[1].sums[short, 0], np.array(first)[short], rtol=1e-5)


def test_zero_weights_cost_log_v_per_token():
    model, params = make()
    got = perplexity(model, jax.tree.map(jnp.zeros_like, params), TEXTS, BYTES, seq_len=16, batch_size=4)
    for x in (got.nats_per_token.value, got.nats_per_token.low, got.nats_per_token.high):
        assert x == pytest.approx(math.log(V), rel=1e-6)
    assert got.perplexity.value == pytest.approx(V, rel=1e-5)
    assert got.bits_per_byte.value == pytest.approx(math.log2(V), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_and_packing_change_nothing(batch_size):
    model, params = make()
    alone = [
        perplexity(model, params, [t], BYTES, seq_len=16, batch_size=4, bootstrap=0).sums for t in TEXTS if t
    ]
    together = perplexity(
        model, params, iter(t for t in TEXTS if t), BYTES, seq_len=16, batch_size=batch_size
    )
    np.testing.assert_allclose(together.sums, np.concatenate(alone), rtol=1e-5)


def test_the_end_of_a_document_counts_on_request():
    model, params = make()
    texts = ["hello", ""]
    got = perplexity(model, params, texts, BYTES, seq_len=16, batch_size=4, eos=True)
    want = [numpy_model.sequence_nats(params, model.config, [*ids_of(t), BYTES.eos_id]).sum() for t in texts]
    np.testing.assert_allclose(got.sums, [[want[0], 6, 1, 5], [want[1], 1, 0, 0]], rtol=1e-5)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_every_token_is_scored_once_with_the_context_promised(lengths, seq_len, stride, batch_size):
    """Documents of ids that are unique over all, so that each label tells its place."""
    stride = min(stride, seq_len)
    firsts = np.cumsum([0, *(n + 1 for n in lengths)])
    documents = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(firsts)]
    seen = []
    for batch, owner in _batches(_pieces(documents, seq_len, stride), seq_len, batch_size):
        assert batch["tokens"].shape == owner.shape == (batch_size, seq_len)
        for b, t in np.argwhere(owner >= 0):
            label, document = int(batch["labels"][b, t]), owner[b, t]
            segment = batch["segment_ids"][b] == batch["segment_ids"][b, t]
            view = batch["tokens"][b, : t + 1][segment[: t + 1]].tolist()
            assert segment[t] and batch["segment_ids"][b, t] > 0
            assert view == list(range(label - len(view), label)) and view[0] >= firsts[document]
            assert len(view) >= min(label - firsts[document], seq_len - stride + 1)
            np.testing.assert_array_equal(batch["positions"][b][segment], np.arange(segment.sum()))
            assert batch["positions"][b, t] == len(view) - 1
            seen.append(label)
    everything = [i for a, b in itertools.pairwise(firsts) for i in range(a + 1, b)]
    assert sorted(seen) == everything


def test_texts_pass_by_without_being_kept():
    """Not more than a group of texts is asked for before the first batch is scored and after each."""
    model, params = make()
    asked = []

    def texts():
        for i in range(400):
            asked.append(i)
            yield "abcdefgh" * 2

    batches = _batches(_pieces((np.arange(17, dtype=np.int32) for _ in texts()), 16, 16), 16, 2)
    next(batches)
    assert len(asked) <= 2 * 8 + 1
    got = perplexity(model, params, texts(), BYTES, seq_len=16, batch_size=2, bootstrap=0)
    assert got.n_documents == 400 and np.ptp(got.sums[:, 0]) < 1e-4


def test_one_program_serves_all_batches_and_calls():
    model, params = make(d_model=20, attention=AttentionConfig(n_heads=2))
    for texts in (["a"], TEXTS * 5):
        perplexity(model, params, texts, BYTES, seq_len=16, batch_size=4, bootstrap=0)
    assert _scorer(model.apply, V, 4, None)._cache_size() == 1


def test_logits_of_a_large_vocabulary_are_never_held_at_once():
    """[B, T, V] in float32 would be 537 MB; the compiled program says what it holds."""
    B, T, n_words = 8, 256, 65536
    model = build(dataclasses.replace(make()[0].config, vocab_size=n_words))
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = {k: np.ones((B, T), np.int32) for k in ("tokens", "labels", "positions", "segment_ids")}
    compiled = _scorer(model.apply, n_words, B, None).lower(params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * B * T * n_words * 4


def test_parameters_on_a_mesh_give_the_same():
    model, params = make()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    spread = jax.tree.map(
        lambda x: (
            jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp" if x.ndim > 1 else None)))
            if x.shape[-1] % 2 == 0
            else jax.device_put(x, NamedSharding(mesh, P()))
        ),
        params,
    )
    want = perplexity(model, params, TEXTS, BYTES, seq_len=16, batch_size=4)
    got = perplexity(build(model.config, mesh=mesh), spread, TEXTS, BYTES, seq_len=16, batch_size=4)
    np.testing.assert_allclose(got.sums, want.sums, rtol=1e-5)


def measured(seed, n, hard=1.0):
    """Documents with known sums; `hard` scales the nats."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, n)
    nats = tokens * rng.gamma(4.0, 0.5, n)
    return np.column_stack([hard * nats, tokens, tokens // 4 + 1, tokens * 3]).astype(np.float64)


def test_bootstrap_equals_a_plain_loop():
    sums = measured(0, 40)
    got = summarize(sums, bootstrap=500, seed=3)
    rng = np.random.default_rng(3)
    draws = [sums[rng.integers(0, 40, 40)].sum(0) for _ in range(500)]
    for name, i, fn in (
        ("nats_per_token", 1, lambda x: x),
        ("perplexity", 1, np.exp),
        ("word_perplexity", 2, np.exp),
        ("bits_per_byte", 3, lambda x: x / math.log(2)),
    ):
        x = getattr(got, name)
        ratios = [d[0] / d[i] for d in draws]
        assert x.value == pytest.approx(fn(sums[:, 0].sum() / sums[:, i].sum()))
        assert (x.low, x.high) == pytest.approx(tuple(fn(q) for q in np.quantile(ratios, [0.025, 0.975])))
        assert x.n == 40 and x.low < x.value < x.high


def test_intervals_cover_the_truth():
    """The ratio of expectations is 2 nats per token; intervals from 60 documents cover it 95 % of times."""
    found = [summarize(measured(seed, 60), 400).nats_per_token for seed in range(300)]
    covered = sum(x.low <= 2 <= x.high for x in found)
    assert 0.90 * 300 <= covered <= 0.985 * 300


def test_paired_differences_see_what_separate_intervals_hide():
    a, b = summarize(measured(1, 50, 1.02)), summarize(measured(1, 50))
    assert a.nats_per_token.low < b.nats_per_token.value < a.nats_per_token.high
    difference = compare(a, b)
    assert difference.nats_per_token.value == pytest.approx(a.nats_per_token.value - b.nats_per_token.value)
    assert difference.bits_per_byte.value == pytest.approx(a.bits_per_byte.value - b.bits_per_byte.value)
    for x in (difference.nats_per_token, difference.nats_per_word, difference.bits_per_byte):
        assert x.low > 0
    same = compare(b, b).bits_per_byte
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_models_with_different_tokenizers_compare_by_bytes_and_words():
    texts = ["one two three", "two three four five", "three one"]
    words = Word(vocab_size=12).train(texts)
    model, params = make()
    other = build(dataclasses.replace(model.config, vocab_size=words.vocab_size))
    a = perplexity(model, params, texts, BYTES, seq_len=16, batch_size=2)
    b = perplexity(other, jax.jit(other.init)(jax.random.key(0)), texts, words, seq_len=16, batch_size=2)
    assert a.n_words == b.n_words == 9 and a.n_bytes == b.n_bytes and a.n_tokens > b.n_tokens
    difference = compare(a, b)
    assert math.isnan(difference.nats_per_token.value)
    assert difference.bits_per_byte.value == pytest.approx(a.bits_per_byte.value - b.bits_per_byte.value)


def test_one_document_has_no_interval_and_no_words_no_word_perplexity():
    model, params = make()
    got = perplexity(model, params, ["   "], BYTES, seq_len=16, batch_size=2)
    assert math.isnan(got.perplexity.low) and math.isnan(got.perplexity.high) and got.perplexity.value > 1
    assert not math.isfinite(got.word_perplexity.value) and got.n_words == 0


def test_errors_say_where_and_what_to_do():
    model, params = make()
    run = functools.partial(perplexity, model, params, seq_len=16, batch_size=2)
    with pytest.raises(ValueError, match=r"nothing to score in 2 documents"):
        run(["", ""], BYTES)
    with pytest.raises(ValueError, match=r"stride=17 is outside \[1, seq_len=16\]"):
        run(TEXTS, BYTES, stride=17)
    with pytest.raises(ValueError, match="batch_size=0"):
        perplexity(model, params, TEXTS, BYTES, seq_len=16, batch_size=0)
    narrow = build(dataclasses.replace(model.config, vocab_size=50))
    with pytest.raises(ValueError, match=r"document 1 holds token 101.*vocab_size=50"):
        perplexity(narrow, narrow.init(jax.random.key(0)), ["\n", "abc\n"[:2]], BYTES, seq_len=16)
    untied, broken = make(tie_head=False)
    broken = broken | {"embed": broken["embed"].at[5].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"document 1 costs nan"):
        perplexity(untied, broken, ["x" * 16, "a\x02c"], BYTES, seq_len=16, batch_size=2)
    for mask in (Full(), PrefixLM(3)):
        leaky = build(dataclasses.replace(model.config, attention=AttentionConfig(n_heads=4, mask=mask)))
        with pytest.raises(ValueError, match=r"lets a token see later ones"):
            perplexity(leaky, params, TEXTS, BYTES, seq_len=16)
    short, short_params = make(position=Learned(8))
    with pytest.raises(ValueError, match="16"):
        perplexity(short, short_params, TEXTS, BYTES, seq_len=16)


def test_a_tokenizer_without_bos_needs_to_be_told():
    without = Tokenizer(type(BYTES._rust).from_str(BYTES._rust.to_str()), {"bos_token": None})
    model, params = make()
    with pytest.raises(ValueError, match=r"no bos token.*bos=eos_id"):
        perplexity(model, params, TEXTS, without, seq_len=16, batch_size=4)
    told = perplexity(model, params, TEXTS, without, seq_len=16, batch_size=4, bos=BYTES.bos_id)
    np.testing.assert_array_equal(
        told.sums, perplexity(model, params, TEXTS, BYTES, seq_len=16, batch_size=4).sums
    )
