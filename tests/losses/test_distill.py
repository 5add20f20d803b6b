"""Divergences from a teacher against their definitions in float64 numpy; gradients from finite differences."""

import itertools
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer import Out, answer, batch
from hypothesis import given

from lmx import values
from lmx.losses import Chunked, ForwardKL, Jsd, Loss, ReverseKL, Term, TotalVariation, Uld, counts, total

B, T, D, V = 3, 7, 5, 11


def logs(logits):
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def jsd(p, q, b):
    m = b * p + (1 - b) * q
    return b * kl(p, m) + (1 - b) * kl(q, m)


WANTED = {
    "forward": (ForwardKL(), kl),
    "forward T=3": (ForwardKL(3.0), lambda p, q: 9 * kl(p, q)),
    "reverse": (ReverseKL(), lambda p, q: kl(q, p)),
    "reverse T=.5": (ReverseKL(0.5), lambda p, q: 0.25 * kl(q, p)),
    "jsd": (Jsd(), lambda p, q: jsd(p, q, 0.5)),
    "jsd .1": (Jsd(beta=0.1, temperature=2.0), lambda p, q: 4 * jsd(p, q, 0.1)),
    "jsd 0": (Jsd(beta=0.0), kl),
    "jsd 1": (Jsd(beta=1.0), lambda p, q: kl(q, p)),
    "variation": (TotalVariation(), lambda p, q: 0.5 * abs(p - q).sum(-1)),
    "uld T=2": (Uld(2.0), lambda p, q: 2 * abs(np.sort(p) - np.sort(q)).sum(-1)),
    "variation T=2": (TotalVariation(2.0), lambda p, q: 2 * 0.5 * abs(p - q).sum(-1)),
}
ALONE = [name for name, (loss, _) in WANTED.items() if loss.temperature == 1.0]


def logits(out):
    return np.asarray(out.hidden, np.float64) @ np.asarray(out.head, np.float64)


def example(width=2 * D, n_words=V, seed=0):
    """A student, and a batch with the answer of a wider teacher."""
    return answer(B, T, D, V, seed), batch(B, T, V) | {"teacher": answer(B, T, width, n_words, seed + 5)}


def stored(data, k):
    """The same batch with the k likeliest tokens of the teacher in its place."""
    log_p = logs(logits(data["teacher"]))
    ids = np.argsort(-log_p, -1)[..., :k]
    found = {"teacher_ids": ids.astype(np.int32), "teacher_log_p": np.take_along_axis(log_p, ids, -1)}
    found["teacher_log_p"] = found["teacher_log_p"].astype(np.float32)
    return {name: x for name, x in data.items() if name != "teacher"} | jax.tree.map(jnp.asarray, found)


def cells(p, ids):
    """p over the tokens `ids`, and what is left of it."""
    chosen = np.take_along_axis(p, np.asarray(ids), -1)
    return np.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1)


def value_and_grads(loss, out, data):
    objective = {"kd": Term(loss)}
    n = counts(objective, data)
    return jax.value_and_grad(lambda out: total(objective, out, data, n)[0])(out)


def check_gradients(loss, out, data, wanted):
    """Of the mean over the tokens that count, in random directions of the student's head."""
    got = np.asarray(value_and_grads(loss, out, data)[1].head, np.float64)
    mask, head = np.asarray(data["loss_mask"]), np.asarray(out.head, np.float64)
    rng = np.random.default_rng(1)
    for _ in range(4):
        way, step = rng.normal(size=head.shape), 1e-5
        ends = [
            (wanted(np.asarray(out.hidden, np.float64) @ (head + side * step * way)) * mask).sum()
            / mask.sum()
            for side in (1, -1)
        ]
        np.testing.assert_allclose((got * way).sum(), (ends[0] - ends[1]) / (2 * step), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", WANTED)
def test_each_token_has_the_value_and_gradient_of_the_definition(name):
    loss, of = WANTED[name]
    out, data = example()

    def wanted(student):
        return of(*(np.exp(logs(x / loss.temperature)) for x in (logits(data["teacher"]), student)))

    np.testing.assert_allclose(loss(out, data), wanted(logits(out)), rtol=1e-5, atol=1e-6)
    check_gradients(loss, out, data, wanted)


@pytest.mark.parametrize("k", [1, 4, V - 1])
@pytest.mark.parametrize("name", ALONE)
def test_of_a_store_the_cells_are_its_tokens_and_all_others(name, k):
    loss, of = WANTED[name]
    out, data = example()
    top = stored(data, k)
    p = cells(np.exp(logs(logits(data["teacher"]))), top["teacher_ids"])

    def wanted(student):
        return of(p, cells(np.exp(logs(student)), top["teacher_ids"]))

    np.testing.assert_allclose(loss(out, top), wanted(logits(out)), rtol=1e-4, atol=1e-5)
    check_gradients(loss, out, top, wanted)


@pytest.mark.parametrize("name", WANTED)
def test_a_store_of_all_tokens_equals_the_teacher_at_every_temperature(name):
    loss, _ = WANTED[name]
    if "uld" in name:  # which does not know how many words its teacher has
        loss = Uld()
    out, data = example()
    a, b = value_and_grads(loss, out, data), value_and_grads(loss, out, stored(data, V))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


@given(seed=st.integers(0, 10_000), name=st.sampled_from(ALONE))
def test_more_of_the_teacher_never_lowers_a_divergence_and_the_whole_bounds_it(seed, name):
    out, data = example(seed=seed)
    loss, _ = WANTED[name]
    found = [np.asarray(loss(out, stored(data, k))) for k in (1, 4, 8, V)]
    for fewer, more in itertools.pairwise(found):
        assert (fewer <= more + 1e-5).all()


@pytest.mark.parametrize("k", [0, 4, V])
@pytest.mark.parametrize("name", WANTED)
def test_nothing_to_learn_from_oneself(name, k):
    loss, _ = WANTED[name]
    out, data = example()
    data["teacher"] = out
    if k and (loss.temperature == 1.0 or (k == V and "uld" not in name)):
        data = stored(data, k)
    value, grads = value_and_grads(loss, out, data)
    assert abs(value) < 1e-6
    if "variation" not in name and "uld" not in name:  # which has a kink here
        jax.tree.map(lambda x: np.testing.assert_allclose(x, 0, atol=1e-5), grads)


def test_towards_its_ends_a_jsd_is_proportional_to_the_kls():
    out, data = example()
    for b, end in ((1e-3, ForwardKL()), (1 - 1e-3, ReverseKL())):
        np.testing.assert_allclose(Jsd(beta=b)(out, data) / 1e-3, end(out, data), rtol=0.02, atol=2e-3)
    for b, end in ((0.0, ForwardKL()), (1.0, ReverseKL())):
        np.testing.assert_array_equal(Jsd(beta=b)(out, data), end(out, data))


def test_no_gradient_reaches_the_teacher_and_masked_tokens_count_for_nothing():
    out, data = example()
    for loss, _ in WANTED.values():
        to_teacher = jax.grad(lambda teacher, loss=loss: loss(out, data | {"teacher": teacher}).sum())
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(to_teacher(data["teacher"])))
    empty = stored(data, 4)
    off = (np.asarray(data["loss_mask"]) == 0)[..., None]
    empty["teacher_ids"] = jnp.where(off, 0, empty["teacher_ids"])
    empty["teacher_log_p"] = jnp.where(off, 0.0, empty["teacher_log_p"])
    for name in ALONE:
        wanted = value_and_grads(WANTED[name][0], out, stored(data, 4))
        got = value_and_grads(WANTED[name][0], out, empty)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), got, wanted)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("name", ALONE)
def test_cut_along_t_it_is_the_same(name, k):
    loss, _ = WANTED[name]
    out, data = example()
    data = stored(data, k) if k else data
    whole, cut = (value_and_grads(x, out, data) for x in (loss, Chunked(loss, 3)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), cut, whole)


@pytest.mark.parametrize("k", [0, 8])
def test_cut_along_t_neither_model_has_logits_of_a_whole_row(k):
    """Against 2 rows of 512 tokens and 8192 words: 32 MiB of each model."""
    n_rows, length, words = 2, 512, 8192
    out, teacher = (jax.eval_shape(lambda d=d: answer(n_rows, length, d, words)) for d in (16, 32))
    data = {"loss_mask": jax.ShapeDtypeStruct((n_rows, length), jnp.float32)}
    if k:
        shape = (n_rows, length, k)
        data |= {"teacher_ids": jax.ShapeDtypeStruct(shape, jnp.int32)}
        data |= {"teacher_log_p": jax.ShapeDtypeStruct(shape, jnp.float32)}
    else:
        data["teacher"] = teacher
    for loss in (ForwardKL(), ReverseKL(), Jsd(), TotalVariation()):
        f = jax.jit(jax.grad(lambda out, data, loss=loss: Chunked(loss, 32)(out, data).sum()))
        memory = f.lower(out, data).compile().memory_analysis().temp_size_in_bytes
        assert memory < n_rows * length * words * 4 / 2


def test_far_apart_it_stays_finite():
    """Logits up to 1e4, where q underflows wherever p has mass."""
    out, data = example()
    far = Out(1e3 * out.hidden, out.head)
    sure = Out(1e3 * data["teacher"].hidden, data["teacher"].head)
    for student, teacher in ((far, data["teacher"]), (out, sure), (far, sure)):
        for one in (data | {"teacher": teacher}, stored(data | {"teacher": teacher}, 4)):
            for name in ALONE:
                value, grads = value_and_grads(WANTED[name][0], student, one)
                assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads)), name


def test_words_that_pad_one_vocabulary_are_left_out_and_it_is_said():
    out, data = example(n_words=V + 5)
    with pytest.warns(UserWarning, match="the teacher has 16 words and the student 11.*padding"):
        found = ForwardKL()(out, data)
    p, q = (np.exp(logs(x)) for x in (logits(data["teacher"])[..., :V], logits(out)))
    np.testing.assert_allclose(found, kl(p, q), rtol=1e-5, atol=1e-6)
    wide = answer(B, T, D, V + 5)
    with pytest.warns(UserWarning, match="the teacher has 11 words and the student 16"):
        found = ReverseKL()(wide, data | {"teacher": out})
    p, q = (np.exp(logs(x)) for x in (logits(out), logits(wide)[..., :V]))
    np.testing.assert_allclose(found, kl(q, p), rtol=1e-5, atol=1e-6)
    top = stored(data, V + 5)  # a store of the padded teacher: what the student lacks is left out too
    np.testing.assert_allclose(ForwardKL()(out, top), ForwardKL()(out, data), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForwardKL()(*example())


def test_qwens_paddings_are_aligned():
    shapes = [jax.eval_shape(lambda v=v: answer(1, 2, 3, v)) for v in (151_936, 152_064)]
    with pytest.warns(UserWarning, match="the teacher has 152064 words and the student 151936"):
        found = jax.eval_shape(lambda out, t: ForwardKL()(out, {"teacher": t}), *shapes)
    assert found.shape == (1, 2)


@pytest.mark.parametrize(("words", "k"), [(7, 0), (V, 0), (2000, 0), (2000, 3), (5, 4)])
def test_of_any_two_vocabularies_sorted_probabilities_are_compared(words, k):
    out, data = example(n_words=words)
    p, q = (-np.sort(-np.exp(logs(x))) for x in (logits(data["teacher"]), logits(out)))
    if k:
        data = stored(data, k)
        p, q = (np.concatenate([x[..., :k], x[..., k:].sum(-1, keepdims=True)], -1) for x in (p, q))
    p, q = (np.pad(x, [(0, 0), (0, 0), (0, max(words, V) - x.shape[-1])]) for x in (p, q))
    found = [Uld()(out, data), Chunked(Uld(), 3)(out, data)]
    np.testing.assert_allclose(found[0], abs(p - q).sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(value_and_grads(Uld(), out, data)[1]))


def test_what_does_not_fit_is_refused():
    out, data = example()
    with pytest.raises(ValueError, match=r"ForwardKL.*no teacher; train with enrich=Teacher\(path\)"):
        ForwardKL()(out, batch(B, T, V))
    with pytest.raises(
        ValueError, match=r"temperature=2.0.*4 likeliest tokens were stored.*use temperature=1.0"
    ):
        ForwardKL(2.0)(out, stored(data, 4))
    with pytest.raises(ValueError, match=r"temperature=2.0.*use temperature=1.0"):
        Uld(2.0)(out, stored(data, V))
    with pytest.raises(
        ValueError, match="teacher has 2000 words and the student 11, more apart than padding"
    ):
        Jsd()(out, data | {"teacher": answer(B, T, D, 2000)})
    for wrong in ({"temperature": 0.0}, {"temperature": float("nan")}, {"beta": 1.5}, {"beta": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Jsd(**wrong)
    assert values.parse("Jsd(temperature=2.0, beta=0.3)", Loss) == Jsd(2.0, 0.3)
