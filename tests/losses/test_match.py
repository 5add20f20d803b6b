"""Matching of hidden states and relations against their definitions in float64 numpy with loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import values
from lmx.losses import Chunked, Loss, MatchHidden, MatchRelations, NextToken, Term, reads
from lmx.models import Out

B, T, D, WIDE = 2, 6, 8, 12
N_STUDENT, N_TEACHER = 2, 5


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def said(n_layers, width, seed, heads, **more):
    hidden = drawn(seed, n_layers, B, T, width)
    parts = {"queries": heads, "keys": heads // 2, "values": heads // 2}
    parts = {name: drawn(seed + i, n_layers, B, T, n, 8) for i, (name, n) in enumerate(parts.items(), 1)}
    return Out(hidden[-1], drawn(9, width, 4), kept={"hidden": hidden, **parts, **more})


def example(project=True):
    student = said(N_STUDENT, D, 0, 2, **({"project": drawn(50, D, WIDE)} if project else {}))
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]], jnp.int32)
    return student, {"teacher": said(N_TEACHER, WIDE if project else D, 20, 4), "segment_ids": segments}


def states(out):
    return np.asarray(out.kept["hidden"], np.float64)


@pytest.mark.parametrize("measure", ["mse", "cosine"])
@pytest.mark.parametrize(
    ("layers", "pairs"),
    [("uniform", [(0, 1), (1, 4)]), ("last", [(1, 4)]), (((0, 0), (1, 2)), [(0, 0), (1, 2)])],
)
def test_hidden_states_are_compared_pair_by_pair(measure, layers, pairs):
    student, batch = example()
    loss = MatchHidden(layers, measure)
    assert loss.pairs(N_STUDENT, N_TEACHER) == pairs
    w = np.asarray(student.kept["project"], np.float64)
    each = []
    for i, j in pairs:
        a, b = states(student)[i] @ w, states(batch["teacher"])[j]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        each.append(((a - b) ** 2).mean(-1) if measure == "mse" else 1 - cosine)
    np.testing.assert_allclose(loss(student, batch), np.mean(each, 0), rtol=1e-4, atol=1e-5)


def test_layers_are_paired_evenly_as_tinybert_has_it():
    loss = MatchHidden()
    assert loss.pairs(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert loss.pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert loss.pairs(4, 2)[-1] == (3, 1) and all(0 <= j < 2 for _, j in loss.pairs(4, 2))


def related(a, heads, segments):
    """p[b][t] = [heads, t + 1] over the tokens that token t sees, as softmax(a a' / sqrt d)."""
    a = np.asarray(a, np.float64).reshape(B, T, heads, -1)
    found = {}
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            scores = np.stack([(a[b, t] * a[b, s]).sum(-1) for s in seen], -1) / np.sqrt(a.shape[-1])
            e = np.exp(scores - scores.max(-1, keepdims=True))
            found[b, t] = e / e.sum(-1, keepdims=True)
    return found


@pytest.mark.parametrize("of", [("queries",), ("values",), ("queries", "keys", "values")])
@pytest.mark.parametrize("heads", [1, 4])
def test_relations_are_those_of_the_last_layer_in_as_many_heads_as_asked(of, heads):
    student, batch = example()
    wanted = np.zeros((B, T))
    for name in of:
        p, q = (
            related(out.kept[name][-1], heads, batch["segment_ids"]) for out in (batch["teacher"], student)
        )
        for at in p:
            wanted[at] += (p[at] * np.log(p[at] / q[at])).sum(-1).mean()
    found = MatchRelations(of, heads)(student, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert found[0, 0] == found[0, 3] == 0  # the first of a segment has nothing but itself


@pytest.mark.parametrize("loss", [MatchHidden(), MatchHidden("last", "cosine"), MatchRelations()], ids=repr)
def test_gradients_are_finite_differences_and_of_oneself_there_is_nothing_to_learn(loss):
    student, batch = example()

    def of(kept):
        return loss(Out(student.hidden, student.head, kept=kept), batch).sum()

    grads = jax.grad(of)(student.kept)
    rng, step = np.random.default_rng(0), 1e-2
    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), student.kept)
    ends = [float(of(jax.tree.map(lambda x, d, s=s: x + s * step * d, student.kept, way))) for s in (1, -1)]
    slope = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (grads, way))))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=0.02, atol=2e-2)
    student, batch = example(project=False)
    same = loss(student, batch | {"teacher": student})
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_what_does_not_fit_is_refused():
    student, batch = example(project=False)
    wide = example()[1]
    with pytest.raises(
        ValueError, match=r"student's states are 8 wide and the teacher's 12; add Project\(12\)"
    ):
        MatchHidden()(student, wide)
    with pytest.raises(ValueError, match="MatchHidden: the teacher keeps no hidden of its layers"):
        MatchHidden()(student, {"teacher": Out(student.hidden, student.head)})
    with pytest.raises(ValueError, match="MatchRelations: the teacher keeps no queries"):
        MatchRelations()(student, {})
    with pytest.raises(ValueError, match=r"pair \(0, 5\) of layers of 2 and 5; count them from 0"):
        MatchHidden(((0, 5),))(student, batch)
    with pytest.raises(ValueError, match="heads=5 do not divide the 32 features"):
        MatchRelations(heads=5)(student, batch)
    for wrong in ({"measure": "l1"}, {"layers": "first"}, {"layers": ()}):
        with pytest.raises(ValueError, match="MatchHidden: "):
            MatchHidden(**wrong)
    with pytest.raises(ValueError, match="use some of"):
        MatchRelations(("scores",))
    with pytest.raises(ValueError, match="reads more than its own positions"):
        Chunked(MatchHidden())
    assert values.parse("MatchHidden(((0, 3), (1, 11)))", Loss) == MatchHidden(((0, 3), (1, 11)))
    objective = {"h": Term(MatchHidden()), "r": Term(MatchRelations(("values",))), "ce": Term(NextToken())}
    assert reads(objective) == ("hidden", "values")
