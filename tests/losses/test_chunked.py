"""Chunked(loss) is loss, in less memory."""

import dataclasses
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer import Out, answer, batch

from lmx.losses import Chunked, Counted, Loss, NextToken, Term, ZLoss, counts, total


@dataclass(frozen=True)
class Towards(Loss):
    """Cross entropy to a teacher, which stands in the batch as an answer of its own or as logits."""

    def __call__(self, out, batch):
        teacher = batch["teacher"].logits if "teacher" in batch else batch["teacher_logits"]
        chosen = jax.nn.softmax(teacher / batch["temperature"])
        return -(chosen * jax.nn.log_softmax(out.logits)).sum(-1)


def value_and_grads(loss, out, data):
    objective = {"x": Term(loss)}

    def f(out):
        return total(objective, out, data, counts(objective, data))[0]

    value, grads = jax.jit(jax.value_and_grad(f))(out)
    return {"value": value, "hidden": grads.hidden, "head": grads.head}


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("n_positions", [1, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("loss", [NextToken(0.1), ZLoss()], ids=repr)
def test_same_values_and_gradients_for_every_remainder(loss, n_positions):
    out, data = answer(3, n_positions, 8, 11, softcap=5.0), batch(3, n_positions, 11)
    np.testing.assert_allclose(Chunked(loss, 4)(out, data), loss(out, data), rtol=2e-5, atol=1e-6)
    same(value_and_grads(Chunked(loss, 4), out, data), value_and_grads(loss, out, data))


@pytest.mark.parametrize("teacher", ["answer", "logits"])
def test_a_teacher_is_cut_too(teacher):
    out, data = answer(2, 7, 4, 11), batch(2, 7, 11) | {"temperature": jnp.array(2.0)}
    taught = answer(2, 7, 6, 11, seed=5)
    data |= {"teacher": taught} if teacher == "answer" else {"teacher_logits": taught.logits}
    same(value_and_grads(Chunked(Towards(), 3), out, data), value_and_grads(Towards(), out, data))


def test_a_head_shaped_like_the_batch_is_left_whole():
    out, data = answer(2, 6, 2, 6), batch(2, 6, 6) | {"temperature": jnp.array(1.0)}
    data["teacher"] = answer(2, 6, 2, 6, seed=5)
    same(value_and_grads(Chunked(Towards(), 3), out, data), value_and_grads(Towards(), out, data))


def test_bfloat16_hidden_states():
    out, data = answer(2, 7, 8, 11), batch(2, 7, 11)
    low = dataclasses.replace(out, hidden=out.hidden.astype(jnp.bfloat16))
    a, b = value_and_grads(Chunked(NextToken(), 3), low, data), value_and_grads(NextToken(), low, data)
    assert a["hidden"].dtype == jnp.bfloat16
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x.astype(jnp.float32), y.astype(jnp.float32), rtol=0.02, atol=2e-3
        ),
        a,
        b,
    )


@pytest.mark.parametrize("n_positions", [512, 500])
def test_neither_direction_holds_the_logits_of_all_positions(n_positions):
    n_rows, size, d_model, n_words = 2, 32, 16, 8192
    objective = {"ce": Term(NextToken()), "z": Term(ZLoss(), 1e-4)}
    cut = {name: dataclasses.replace(t, loss=Chunked(t.loss, size)) for name, t in objective.items()}
    out, data = answer(n_rows, n_positions, d_model, n_words), batch(n_rows, n_positions, n_words)

    def compiled(objective):
        def f(out, data):
            return total(objective, out, data, counts(objective, data))[0]

        return jax.jit(jax.value_and_grad(f)).lower(out, data).compile()

    logits = n_rows * n_positions * n_words * 4
    chunk = n_rows * size * n_words * 4
    rest = 3 * d_model * n_words * 4 + 4 * n_rows * n_positions * d_model * 4
    assert compiled(objective).memory_analysis().temp_size_in_bytes > logits
    bounded = compiled(cut)
    assert bounded.memory_analysis().temp_size_in_bytes < 4 * chunk + rest < logits / 3
    widest = max(
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"f32\[([\d,]+)\]", bounded.as_text())
    )
    assert widest <= chunk // 4


def test_a_size_below_one_is_told():
    with pytest.raises(ValueError, match="size=0"):
        Chunked(NextToken(), 0)


def test_out_is_a_pytree_with_a_static_softcap():
    assert len(jax.tree.leaves(Out(jnp.ones((1, 1, 2)), jnp.ones((2, 3)), 30.0))) == 2


@pytest.mark.parametrize("n_positions", [1, 4, 7, 8, 13])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_where_it_counts_alone_is_the_same_and_elsewhere_nothing(n_positions, share):
    out, data = answer(3, n_positions, 8, 11, softcap=5.0), batch(3, n_positions, 11)
    data["loss_mask"] = jnp.asarray(np.random.default_rng(0).random((3, n_positions)) < share, jnp.float32)
    loss = NextToken(0.1)
    wanted = jnp.where(data["loss_mask"] > 0, loss(out, data), 0.0)
    np.testing.assert_allclose(Counted(loss, size=4)(out, data), wanted, rtol=2e-5, atol=1e-6)
    if share:
        same(value_and_grads(Counted(loss, size=4), out, data), value_and_grads(loss, out, data))


def test_another_mask_and_a_teacher_where_it_counts():
    out, data = answer(2, 7, 4, 11), batch(2, 7, 11) | {"temperature": jnp.array(2.0)}
    data |= {"teacher": answer(2, 7, 6, 11, seed=5), "replies": jnp.eye(2, 7)}
    wanted = jnp.where(data["replies"] > 0, Towards()(out, data), 0.0)
    np.testing.assert_allclose(Counted(Towards(), "replies", 3)(out, data), wanted, rtol=2e-5)


@pytest.mark.parametrize(("most", "computed"), [(0, 4), (4, 4), (5, 16), (16, 16), (17, 64), (64, 64)])
def test_as_many_positions_are_computed_as_the_fullest_row_needs(most, computed):
    seen = []

    @dataclass(frozen=True)
    class Told(NextToken):
        def __call__(self, out, batch):
            jax.debug.callback(lambda: seen.append(out.hidden.shape))
            return super().__call__(out, batch)

    out, data = answer(2, 64, 8, 11), batch(2, 64, 11)
    data["loss_mask"] = jnp.zeros((2, 64)).at[0, 64 - most :].set(1.0).at[1, :3].set(min(most, 1.0))
    wanted = jnp.where(data["loss_mask"] > 0, NextToken()(out, data), 0.0)
    found = jax.block_until_ready(jax.jit(Counted(Told()))(out, data))
    jax.effects_barrier()
    assert seen == [(2, computed, 8)]
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
