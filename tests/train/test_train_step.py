"""The one training step, against gradients written in float64 numpy, and what each of its arguments promises.

The model is two matrices: logits = embed[token] head. Its gradients fit in four lines.
"""

from dataclasses import dataclass
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from lmx import tree
from lmx.losses import Chunked, Loss, NextToken, Term, ZLoss
from lmx.optim import AdamW, Constant
from lmx.train import Enrich, new_state, train_step
from lmx.weights import leaf

B, T, D, V = 8, 4, 5, 7
OBJECTIVE = {"ce": Term(NextToken(), 0.7), "z": Term(ZLoss(), 0.2, mask="z_mask")}


@leaf
class Answer:
    hidden: jax.Array
    head: jax.Array

    @property
    def logits(self):
        return self.hidden @ self.head


def apply(params, batch, key):
    del key
    return Answer(params["embed"][batch["tokens"]], params["head"])


def draw(seed):
    rng = np.random.default_rng(seed)
    params = {"embed": rng.standard_normal((V, D)), "head": rng.standard_normal((D, V))}
    batch = {name: rng.integers(0, V, (B, T)).astype(np.int32) for name in ("tokens", "labels")}
    share = rng.random((B, 1))  # rows differ: some have all tokens, some none
    for name in ("loss_mask", "z_mask"):
        batch[name] = (rng.random((B, T)) < share).astype(np.float32)
    batch["loss_mask"][: B // 2] = 0
    batch["loss_mask"][B // 2] = 1
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), batch


def oracle(params, batch):
    """(loss, {"ce", "z"}, gradients) of the whole batch in float64."""
    embed, head = (np.asarray(params[name], np.float64) for name in ("embed", "head"))
    hidden = embed[batch["tokens"]]
    logits = hidden @ head
    z = np.log(np.exp(logits).sum(-1))
    p, y = np.exp(logits - z[..., None]), np.eye(V)[batch["labels"]]
    ce_mask, z_mask = batch["loss_mask"].astype(np.float64), batch["z_mask"].astype(np.float64)
    n_ce, n_z = ce_mask.sum(), max(z_mask.sum(), 1)
    terms = {"ce": ((z - (logits * y).sum(-1)) * ce_mask).sum() / n_ce, "z": (z**2 * z_mask).sum() / n_z}
    d_logits = 0.7 * (p - y) * ce_mask[..., None] / n_ce + 0.2 * (2 * z * z_mask)[..., None] * p / n_z
    d_embed = np.zeros_like(embed)
    np.add.at(d_embed, batch["tokens"], d_logits @ head.T)
    grads = {"embed": d_embed, "head": np.einsum("btd,btv->dv", hidden, d_logits)}
    return 0.7 * terms["ce"] + 0.2 * terms["z"], terms, grads


DESCENT = optax.sgd(1.0)


def adam(params):
    return AdamW(lr=0.1, schedule=Constant(warmup=0), weight_decay=0.0, clip=None).build(10, params)


def fresh(params, pattern="*", tx=DESCENT, seed=0, **more):
    return new_state(params, pattern, tx, jax.random.key(seed), **more)


def step(n_micro=1, tx=DESCENT, **more):
    options = {"apply": apply, "objective": OBJECTIVE} | more
    return jax.jit(partial(train_step, tx=tx, n_micro=n_micro, **options))


STEPS = {n: step(n) for n in (1, 2, 4, 8)} | {
    "chunked": step(2, objective={**OBJECTIVE, "ce": Term(Chunked(NextToken(), 3), 0.7)})
}


@given(st.integers(0, 10**6))
@pytest.mark.parametrize("cut", STEPS)
def test_gradients_are_those_of_the_whole_batch_however_it_is_cut(cut, seed):
    """Gradient descent with a learning rate of 1: the change of a parameter is its gradient."""
    params, batch = draw(seed)
    loss, terms, grads = oracle(params, batch)
    state, metrics = STEPS[cut](fresh(params), batch)
    for name, want in grads.items():
        np.testing.assert_allclose(params[name] - state.params[name], want, atol=3e-6, err_msg=name)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for name, want in {"loss": loss, "grad_norm": norm, **terms}.items():
        np.testing.assert_allclose(metrics[name], want, rtol=2e-5, atol=1e-6, err_msg=name)
        assert metrics[name].dtype == jnp.float32
    assert metrics["tokens"] == (batch["loss_mask"].sum() + batch["z_mask"].sum()) / 2
    assert (int(state.step), int(metrics["skipped"]), int(metrics["streak"])) == (1, 0, 0)


def test_a_mean_of_means_would_fail_this_file():
    """The masks drawn here are uneven enough that dividing micro-batches by their own counts is seen."""
    params, batch = draw(0)
    _, _, whole = oracle(params, batch)
    halves = [oracle(params, {k: x[i::2] for k, x in batch.items()})[2]["head"] for i in range(2)]
    assert np.abs(sum(halves) / 2 - whole["head"]).max() > 1e-3


def quantized(seed=0):
    """The same model with an embedding of int8 that cannot be differentiated."""
    params, batch = draw(seed)
    q = jnp.round(params["embed"] * 20).astype(jnp.int8)
    return {"embed": {"q": q, "scale": jnp.full(D, 0.05)}, "head": params["head"]}, batch


def apply_quantized(params, batch, key):
    embed = params["embed"]["q"].astype(jnp.float32) * params["embed"]["scale"][None]
    return apply({"embed": embed, "head": params["head"]}, batch, key)


@pytest.mark.parametrize("pattern, trained", [("head", ["head"]), ("*scale|head", ["embed/scale", "head"])])
@pytest.mark.parametrize("n_micro", [1, 2])
def test_only_what_is_trainable_has_gradients_and_optimizer_state(pattern, trained, n_micro):
    params, batch = quantized()
    tx = adam(params)
    state = fresh(params, pattern, tx)
    assert tree.paths(state.trainable) == trained == tree.paths(state.opt_state[0][0].mean)
    assert sum(x.ndim > 0 for x in jax.tree.leaves(state.opt_state)) == 2 * len(trained)
    if trained == ["head"]:
        dense = {"embed": params["embed"]["q"].astype(jnp.float32) * 0.05, "head": params["head"]}
        _, _, grads = oracle(dense, batch)
        change, _ = step(n_micro, apply=apply_quantized)(fresh(params, pattern), batch)
        np.testing.assert_allclose(params["head"] - change.params["head"], grads["head"], atol=3e-6)
    new, _ = step(n_micro, tx, apply=apply_quantized)(state, batch)
    for path, a, b in zip(tree.paths(params), jax.tree.leaves(params), jax.tree.leaves(new.params)):
        assert a.dtype == b.dtype and (np.array_equal(a, b) != (path in trained)), path


def test_patterns_that_cannot_be_trained_are_told():
    params, _ = quantized()
    with pytest.raises(ValueError, match="'tail' fits no parameter"):
        fresh(params, "tail")
    with pytest.raises(
        ValueError, match=r"trainable='\*' selects embed/q, whose int8 values have no gradient"
    ):
        fresh(params)


@dataclass(frozen=True)
class Broken(Loss):
    """Next-token loss times the batch's own factor. root: adds a root at 0: finite, but of infinite slope."""

    root: bool = False

    def __call__(self, out, batch):
        loss = NextToken()(out, batch) * batch["factor"]
        return loss + jnp.sqrt(jnp.abs(out.hidden.sum(-1)) * batch["zero"]) if self.root else loss


def factors(batch, value):
    return {**batch, "factor": jnp.ones((B, T)).at[3, 1].set(value), "zero": jnp.zeros((B, T))}


@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "slope"])
def test_an_update_that_is_not_finite_is_left_out_counted_and_reported(bad, n_micro):
    params, batch = draw(0)
    batch["loss_mask"][:] = 1
    tx = adam(params)
    state = fresh(params, tx=tx)
    good_step = step(n_micro, tx, objective={"ce": Term(Broken())})
    bad_step = step(n_micro, tx, objective={"ce": Term(Broken(root=bad == "slope"))})
    good = factors(batch, 1.0)
    state, metrics = good_step(state, good)
    assert not int(metrics["skipped"])
    for n in (1, 2, 3):
        after, metrics = bad_step(state, factors(batch, 1.0 if bad == "slope" else bad))
        assert np.isfinite(metrics["loss"]) == (bad == "slope") and not np.isfinite(metrics["grad_norm"])
        assert (int(metrics["skipped"]), int(metrics["streak"]), int(after.step)) == (n, n, n + 1)
        for old, new in zip(
            jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((after.params, after.opt_state))
        ):
            np.testing.assert_array_equal(old, new)
        state = after
    after, metrics = good_step(state, good)
    assert (int(metrics["skipped"]), int(metrics["streak"])) == (3, 0)
    assert np.any(after.params["head"] != state.params["head"])


def test_padding_that_is_not_finite_would_be_noticed():
    """A loss of nan under a mask of 0 is nan still: masks do not hide it in silence."""
    params, batch = draw(0)
    bad = factors(batch, np.nan)
    bad["loss_mask"] = jnp.asarray(batch["loss_mask"]).at[3, 1].set(0.0)
    _, metrics = step(objective={"ce": Term(Broken())})(fresh(params), bad)
    assert int(metrics["skipped"]) == 1


@dataclass(frozen=True)
class AddTeacher(Enrich):
    def __call__(self, constants, batch, answer):
        return batch | {"teacher": apply(constants, batch, None)}


@dataclass(frozen=True)
class Distill(Loss):
    """KL(teacher, student), whose gradient by the student's logits is p_student - p_teacher."""

    def __call__(self, out, batch):
        p, q = (jax.nn.log_softmax(x.logits) for x in (batch["teacher"], out))
        return (jnp.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("n_micro", [1, 4])
def test_constants_enrich_the_batch_and_stay(n_micro):
    params, batch = draw(0)
    teacher, _ = draw(1)
    state = fresh(params, "head", constants=teacher)
    run = step(n_micro, enrich=AddTeacher(), objective={"kd": Term(Distill())})
    new, metrics = run(state, batch)

    def softmax(params):
        e = np.exp(
            np.asarray(params["embed"], np.float64)[batch["tokens"]] @ np.asarray(params["head"], np.float64)
        )
        return e / e.sum(-1, keepdims=True)

    p, q, mask = softmax(teacher), softmax(params), batch["loss_mask"] / batch["loss_mask"].sum()
    hidden = np.asarray(params["embed"], np.float64)[batch["tokens"]]
    want = np.einsum("btd,btv,bt->dv", hidden, q - p, mask)
    np.testing.assert_allclose(params["head"] - new.params["head"], want, atol=3e-6)
    np.testing.assert_allclose(metrics["loss"], ((p * np.log(p / q)).sum(-1) * mask).sum(), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, new.constants, teacher)


@dataclass(frozen=True)
class Drawn(Loss):
    """What `apply` drew with its key."""

    def __call__(self, out, batch):
        return out.hidden[..., 0]


def apply_noise(params, batch, key):
    return Answer(
        jnp.broadcast_to(jax.random.uniform(key) * params["w"], (*batch["tokens"].shape, 1)), params["w"]
    )


def test_the_key_differs_by_step_micro_batch_device_and_run():
    noise = {f"row{i}": Term(Drawn(), mask=f"row{i}") for i in range(B)}
    batch = {"tokens": np.zeros((B, T), np.int32)} | {
        f"row{i}": np.eye(B, dtype=np.float32)[i][:, None] * np.ones((1, T), np.float32) for i in range(B)
    }
    still = optax.sgd(0.0)
    run = step(B, still, apply=apply_noise, objective=noise)
    drawn = []
    for seed, salt in [(0, 0), (0, 1), (1, 0)]:
        state = fresh({"w": jnp.ones(())}, tx=still, seed=seed)
        for _ in range(2):
            state, metrics = run(state, batch, salt=salt)
            drawn += [float(metrics[f"row{i}"]) for i in range(B)]
    assert len(set(drawn)) == len(drawn) == 6 * B
    state = fresh({"w": jnp.ones(())}, tx=still)
    again = [float(run(state, batch, salt=0)[1][f"row{i}"]) for i in range(B)]
    assert again == drawn[:B]


def test_strict_dtypes_hold_and_the_state_keeps_its_types():
    params, batch = draw(0)
    state = fresh(params)
    new, _ = STEPS[2](state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    np.testing.assert_array_equal(new.key, state.key)
