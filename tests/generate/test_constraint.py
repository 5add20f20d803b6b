"""Completions under a pattern: against `re`, and the tokens allowed against all texts of a small language."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
from parrot import parrot

from lmx.data import Bpe, Byte
from lmx.generate import Draft, Sampling, completions, generate, speculate, stream
from lmx.generate.constraint import constraint
from lmx.generate.rows import Decoder
from lmx.generate.sampling import choose
from lmx.models import build
from lmx.models.presets import llama

BYTES = Byte().train(["the byte tokenizer learns nothing"])
HINDI = "(सकारात्मक|नकारात्मक)"
ANSWERS = ["सकारात्मक", "नकारात्मक", "सब", "a", "ab", "abक"]


@functools.cache
def merged():
    """A tokenizer with tokens that are words, letters and parts of letters."""
    return Bpe(vocab_size=280).train(["सकारात्मक नकारात्मक सब abक ab a " * 40, "the quick brown fox"])


@functools.cache
def make(vocab_size=BYTES.vocab_size):
    model = build(llama(16, 2, 4, n_kv_heads=2, vocab_size=vocab_size, init_std=0.5))
    return model, jax.jit(model.init)(jax.random.key(3))


def alternatives(texts):
    return "|".join(map(re.escape, texts))


@pytest.mark.parametrize("tokenizer", [BYTES, merged()], ids=["byte", "bpe"])
def test_allowed_tokens_are_those_after_which_some_text_still_matches(tokenizer):
    """At every beginning that tokens can spell, by brute force over the language."""
    rule = constraint(alternatives(ANSWERS), tokenizer, tokenizer.vocab_size)
    texts = [text.encode() for text in ANSWERS]
    words = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    waiting, met = [(b"", 0)], set()
    while waiting:
        start, state = waiting.pop()
        if start in met:
            continue
        met.add(start)
        allowed = set(np.flatnonzero(rule.allowed(jnp.array([state]))[0]).tolist())
        want = {i for i, word in words.items() if word and any(t.startswith(start + word) for t in texts)}
        want |= {tokenizer.eos_id} if start in texts else set()
        assert allowed == want, start
        for i in want - {tokenizer.eos_id}:
            waiting.append((start + words[i], int(rule.after(jnp.array([state]), jnp.array([i]))[0])))
    assert met == {t[:n] for t in texts for n in range(len(t) + 1)}


def test_a_token_that_leads_to_where_no_token_leads_on_is_not_allowed():
    """After ab, the third letter of abक has no token; ac can be written."""
    a, b, c, z = BYTES.encode("abcz")
    rule = constraint("abक|ac", BYTES, z + 1)
    after = rule.after(jnp.array([0]), jnp.array([a]))
    allowed = rule.allowed(after)[0]
    assert allowed[c] and not allowed[b] and int(allowed.sum()) == 1


@pytest.mark.parametrize(
    ("pattern", "sampling"),
    [
        (HINDI, Sampling(0.0)),
        (r"[a-z]{2,5}( [a-z]{1,3})?", Sampling(1.0, seed=1)),
        (r"\d{4}-(0[1-9]|1[0-2])", Sampling(3.0, top_k=5, repetition_penalty=1.3)),
        ("(a|ab)(c|bcd)?|", Sampling(1.0, top_p=0.5, min_p=0.1)),
    ],
    ids=repr,
)
def test_what_ends_by_itself_matches(pattern, sampling):
    tokenizer = merged()
    model, params = make(tokenizer.vocab_size)
    sampling = dataclasses.replace(sampling, max_tokens=40, pattern=pattern)
    got = generate(model, params, tokenizer, ["x", "नमस्ते", "", "yy"] * 4, sampling)
    assert any(c.reason == "eos" for c in got)
    for completion in got:
        text, cut = completion.text, completion.reason != "eos"
        assert regex.fullmatch(pattern, text.rstrip("\ufffd") if cut else text, partial=cut), completion


def test_a_text_that_is_whole_must_end_and_one_that_is_not_cannot():
    """The parrot wants to write on, or to end at once; its tokens are sure."""
    on = parrot(BYTES.encode("नकारात्मक और भी"), BYTES.vocab_size)
    over = parrot([BYTES.eos_id] * 100, BYTES.vocab_size)
    for model, params in (on, over):
        (got,) = generate(model, params, BYTES, [""], Sampling(0.0, max_tokens=60, pattern=HINDI))
        assert regex.fullmatch(HINDI, got.text) and got.reason == "eos"
    (cut,) = generate(*on, BYTES, [""], Sampling(0.0, max_tokens=5, pattern=HINDI))
    assert cut.reason == "length" and cut.text == "न\ufffd"
    (got,) = generate(*on, BYTES, [""], Sampling(0.0, max_tokens=60, pattern="न.*", stop=("त",)))
    assert got.reason == "stop" and got.text == "नकारा"


def test_log_probabilities_are_of_the_model_without_the_pattern():
    x = jax.random.normal(jax.random.key(0), (2, 9))
    allowed = jnp.zeros((2, 9), bool).at[:, [3, 7]].set(True)
    for settings in (Sampling(0.0).settings(), Sampling(2.0, top_p=0.9).settings()):
        token, log_p = choose(x, jax.random.split(jax.random.key(1), 2), settings, 5, None, allowed)
        assert set(token.tolist()) <= {3, 7}
        np.testing.assert_allclose(log_p, jax.nn.log_softmax(x, -1)[jnp.arange(2), token], rtol=1e-5)


def test_draws_follow_the_model_among_what_is_allowed():
    """Chi-square of first letters under [abc].* against the model's own probabilities of these three."""
    from scipy.stats import chi2

    model, params = make()
    n, ids = 2048, [BYTES.encode(x)[0] for x in "abc"]
    got = generate(model, params, BYTES, ["q"] * n, Sampling(max_tokens=1, seed=4, pattern="[abc].*"))
    logits = model.apply(params, {"tokens": jnp.array([[BYTES.bos_id, *BYTES.encode("q")]])}).logits[0, -1]
    p = np.array(jax.nn.softmax(logits[jnp.array(ids)]), np.float64)
    counts = np.array([sum(c.tokens[0] == i for c in got) for i in ids])
    assert counts.sum() == n
    assert ((counts - n * p) ** 2 / (n * p)).sum() < chi2.ppf(1 - 1e-4, 2)


@pytest.mark.parametrize("sampling", [Sampling(1.5, max_tokens=30, seed=2)], ids=repr)
def test_batches_chunks_places_and_streams_change_nothing(sampling):
    """Rows end after different numbers of tokens, others take their places, and each starts its pattern anew."""
    model, params = make()
    sampling = dataclasses.replace(sampling, pattern="(हाँ|[a-z]{1,9}|नहीं, [a-z]{5,20})!", stop=("zzzz",))
    prompts = ["a", "नमस्", "", "The quick fox", "b" * 30, "c"]
    alone = [generate(model, params, BYTES, [p], sampling, rows=[i])[0] for i, p in enumerate(prompts)]
    assert len({len(c.tokens) for c in alone}) > 1
    for batch_size, chunk in ((2, 1), (3, 7), (None, 16)):
        got = dict(completions(model, params, BYTES, prompts, sampling, batch_size=batch_size, chunk=chunk))
        assert [got[i].tokens for i in range(len(prompts))] == [c.tokens for c in alone]
    for row, (prompt, want) in enumerate(zip(prompts, alone)):
        assert "".join(stream(model, params, BYTES, prompt, sampling, row=row, chunk=2)) == want.text


def test_without_a_pattern_a_program_has_nothing_of_it():
    model, params = make()

    def arrays(sampling):
        decoder = Decoder(model, params, BYTES, sampling)
        rows = decoder.begin([[1, 2]], [0], decoder.shared([[1, 2]]))
        return len(jax.tree.leaves(rows)), rows.state

    plain, state = arrays(Sampling())
    assert state is None and arrays(Sampling(pattern="a"))[0] == plain + 1


def test_patterns_of_about_a_size_share_a_program():
    one, other = (constraint(p, BYTES, BYTES.vocab_size) for p in ("abc", "abcd|e"))
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)


def test_a_model_may_have_more_ids_than_its_tokenizer_or_fewer():
    for vocab_size in (BYTES.vocab_size + 20, BYTES.vocab_size - 1):
        model, params = make(vocab_size)
        tokenizer = BYTES.ending_with([BYTES.encode("~")[0]])
        (got,) = generate(model, params, tokenizer, [[5]], Sampling(max_tokens=9, pattern="[ab]{3}"))
        assert re.fullmatch("[ab]{3}", got.text) and got.reason == "eos"


@pytest.mark.parametrize(
    ("pattern", "tokenizer", "message"),
    [
        ("ab|", BYTES.ending_with([]).without("eos_token"), "has no end token"),
        (r"[^\x00-\U0010ffff]", BYTES, "matches nothing that"),
    ],
)
def test_what_cannot_be_written_is_refused(pattern, tokenizer, message):
    model, params = make(tokenizer.vocab_size)
    with pytest.raises(ValueError, match=message):
        generate(model, params, tokenizer, [[1]], Sampling(pattern=pattern, max_tokens=4))


def test_a_model_that_lacks_the_bytes_of_a_pattern_is_told():
    with pytest.raises(ValueError, match=r"matches nothing that the tokenizer's .* tokens can spell"):
        constraint("हाँ", BYTES, BYTES.encode("z")[0] + 1)


def test_a_table_too_large_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("lmx.generate.constraint.MOST_BYTES", 2**12)
    with pytest.raises(ValueError, match=r"needs a table of .* states and .* kinds of tokens"):
        constraint("[a-z]{0,200}", BYTES, BYTES.vocab_size)


def test_a_pattern_is_checked_when_it_is_given_and_a_draft_has_none():
    with pytest.raises(ValueError, match=r"pattern: at character 0.*a \( without its \)"):
        Sampling(pattern="(")
    model, params = make()
    with pytest.raises(ValueError, match="not supported with a draft"):
        speculate(model, params, BYTES, ["a"], Sampling(pattern="a"), draft=Draft(model, params))
