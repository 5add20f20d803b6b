"""DPO and its measures against the paper's equation, pair by pair, in float64; gradients from finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer import answer

from lmx.losses import Chunked, Dpo, Ipo, Margin, NextToken, Preferred, Term, counts, log_p, total

B, T, D, V = 3, 40, 5, 11
LENGTHS = [[(4, 6), (9, 3), (5, 5)], [(15, 20)], []]
"""Of each row its pairs: positions of the chosen and of the rejected one."""


def batch(seed=0):
    rng = np.random.default_rng(seed)
    found = {name: np.zeros((B, T), np.int32) for name in ("tokens", "segment_ids")}
    found |= {name: np.zeros((B, T), np.float32) for name in ("loss_mask", "rejected_mask", "pair_mask")}
    found["labels"] = rng.integers(0, V, (B, T)).astype(np.int32)
    for row, pairs in enumerate(LENGTHS):
        at = 0
        for s, n in enumerate((n for pair in pairs for n in pair), 1):
            found["segment_ids"][row, at : at + n] = s
            found["rejected_mask" if s % 2 == 0 else "loss_mask"][row, at + n // 2 : at + n] = 1
            at += n
            found["pair_mask"][row, at - 1] = s % 2 == 0
    found["reference"] = -rng.uniform(0.5, 4, (B, T)).astype(np.float32)
    return jax.tree.map(jnp.asarray, found)


def margins(out, batch, beta):
    """Of the paper's equation 5, without what the prompt alone decides, for each pair: log p of two whole replies."""
    logits = np.asarray(out.hidden, np.float64) @ np.asarray(out.head, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for row, pairs in enumerate(LENGTHS):
        for i in range(len(pairs)):
            rewards = []
            for s in (2 * i + 1, 2 * i + 2):
                here = np.flatnonzero(batch["segment_ids"][row] == s)
                reply = here[len(here) // 2 :]
                policy = sum(logp[row, t, batch["labels"][row, t]] for t in reply)
                rewards.append(beta * (policy - sum(float(batch["reference"][row, t]) for t in reply)))
            found.append(rewards[0] - rewards[1])
    return np.array(found)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


WANTED = {
    "dpo": (Dpo(0.3), lambda m: -np.log(sigmoid(m))),
    "smooth": (Dpo(0.3, 0.2), lambda m: -0.8 * np.log(sigmoid(m)) - 0.2 * np.log(sigmoid(-m))),
    "ipo": (Ipo(0.3), lambda m: (m / 0.3 - 1 / (2 * 0.3)) ** 2),
    "margin": (Margin(0.3), lambda m: m),
    "accuracy": (Preferred(0.3), lambda m: m > 0),
}


@pytest.mark.parametrize("name", WANTED)
def test_each_pair_has_the_value_of_the_papers_equation(name):
    loss, wanted = WANTED[name]
    out, pairs = answer(B, T, D, V), batch()
    found = np.asarray(loss(out, pairs))[pairs["pair_mask"] > 0]
    want = wanted(margins(out, pairs, 0.3))
    assert len(want) == 4 and len(set(want)) > 1
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    objective = {name: Term(loss, mask="pair_mask")}
    n = counts(objective, pairs)
    assert n[name] == 4
    np.testing.assert_allclose(total(objective, out, pairs, n)[0], want.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "smooth", "ipo"])
def test_gradients_are_those_of_the_equation(name):
    loss, wanted = WANTED[name]
    out, pairs = answer(B, T, D, V), batch()
    objective = {name: Term(loss, mask="pair_mask")}

    def of(head):
        changed = type(out)(out.hidden, head)
        return total(objective, changed, pairs, counts(objective, pairs))[0]

    got = np.asarray(jax.grad(of)(out.head), np.float64)
    rng = np.random.default_rng(1)
    head = np.asarray(out.head, np.float64)
    for _ in range(5):
        way, step = rng.normal(size=head.shape), 1e-5
        ends = [
            wanted(margins(type(out)(out.hidden, head + side * step * way), pairs, 0.3)).mean()
            for side in (1, -1)
        ]
        np.testing.assert_allclose((got * way).sum(), (ends[0] - ends[1]) / (2 * step), rtol=2e-4)


def test_a_model_that_is_its_reference_loses_log_2_in_every_pair():
    out, pairs = answer(B, T, D, V), batch()
    pairs["reference"] = log_p(out, pairs)
    for s in (0.0, 0.3):
        found = np.asarray(Dpo(smoothing=s)(out, pairs))
        np.testing.assert_allclose(found, np.log(2), rtol=1e-7)
    assert not np.asarray(Margin()(out, pairs)).any() and not np.asarray(Preferred()(out, pairs)).any()
    np.testing.assert_array_equal(Ipo(0.5)(out, pairs), np.ones((B, T), np.float32))


def test_log_p_is_of_each_label_and_finite_extremes_stay_finite():
    out, pairs = answer(B, T, D, V), batch()
    logits = np.asarray(out.logits, np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.take_along_axis(want, pairs["labels"][..., None], -1)[..., 0]
    np.testing.assert_allclose(log_p(out, pairs), want, rtol=1e-5, atol=1e-5)
    far = pairs | {"reference": pairs["reference"] - 1e4 * pairs["rejected_mask"]}
    loss, grads = jax.value_and_grad(lambda h: Dpo()(type(out)(h, out.head), far).sum())(out.hidden)
    assert np.isfinite(loss) and np.isfinite(grads).all() and loss > 1e3


def test_long_rows_hold_no_logits_of_a_whole_row():
    """Against 4 rows of 2048 tokens and 8192 words, which are 256 MiB, and twice that with their gradient."""
    shapes = {"labels": jnp.int32, "segment_ids": jnp.int32}
    shapes |= dict.fromkeys(("loss_mask", "rejected_mask", "pair_mask", "reference"), jnp.float32)
    pairs = {name: jax.ShapeDtypeStruct((4, 2048), dtype) for name, dtype in shapes.items()}
    out = jax.eval_shape(lambda: answer(4, 2048, 16, 8192))
    grad = jax.jit(jax.grad(lambda out, pairs: Dpo()(out, pairs).sum()))
    assert grad.lower(out, pairs).compile().memory_analysis().temp_size_in_bytes < 2**28 / 2


def test_what_does_not_fit_is_refused():
    out, pairs = answer(B, T, D, V), batch()
    for name, way in (("reference", r"enrich=Reference\(\)"), ("rejected_mask", "data of Preferences")):
        with pytest.raises(ValueError, match=rf"Dpo: the batch has no '{name}'; train with {way}"):
            Dpo()(out, {k: v for k, v in pairs.items() if k != name})
    for wrong in ({"beta": 0.0}, {"beta": float("nan")}, {"smoothing": 0.5}, {"smoothing": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Dpo(**wrong)
    with pytest.raises(ValueError, match=r'is of pairs of replies.*use mask="pair_mask"'):
        Term(Dpo())
    with pytest.raises(ValueError, match="is of tokens, and mask='pair_mask' counts others"):
        Term(NextToken(), mask="pair_mask")
    with pytest.raises(ValueError, match="reads more than its own positions"):
        Chunked(Dpo())
