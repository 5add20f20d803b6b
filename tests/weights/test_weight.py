"""One verb for every representation of a matrix: plain, transposed, and leaves that are defined here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import tree
from lmx.nn import Linear
from lmx.weights import LowRank, Transposed, Weight, dense, leaf, linear, lookup, shape_of
from lmx.weights.surgery import Surgery, chain


@leaf
class Signs(Weight):
    """Says only what a leaf must: its shape, and itself as a dense matrix. int8 signs, a scale per column."""

    q: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        return self.q.shape

    def dense(self):
        return self.q.astype(jnp.float32) * self.scale[..., None, :]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def low_rank(base=None, lead=()):
    return LowRank(
        normal(0, *lead, 6, 5) if base is None else base, normal(1, *lead, 6, 2), normal(2, *lead, 2, 5), 2.0
    )


def signs(lead=()):
    return Signs(jnp.sign(normal(3, *lead, 6, 5)).astype(jnp.int8), jnp.abs(normal(4, *lead, 5)))


def kinds(lead=()):
    return {
        "array": normal(0, *lead, 6, 5),
        "transposed": Transposed(normal(0, *lead, 5, 6)),
        "low rank": low_rank(lead=lead),
        "signs": signs(lead),
        "low rank on signs": low_rank(signs(lead), lead),
        "transposed low rank": Transposed(
            LowRank(normal(0, *lead, 5, 6), normal(1, *lead, 5, 2), normal(2, *lead, 2, 6), 2.0)
        ),
    }


def float64(w):
    """The matrix written out by hand."""
    match w:
        case Transposed(base):
            return np.swapaxes(float64(base), -1, -2)
        case LowRank(base, a, b, alpha):
            return float64(base) + np.asarray(a, np.float64) @ np.asarray(b, np.float64) * alpha / a.shape[-1]
        case Signs(q, scale):
            return np.asarray(q, np.float64) * np.asarray(scale, np.float64)[..., None, :]
    return np.asarray(w, np.float64)


@pytest.mark.parametrize("name", kinds())
def test_linear_lookup_and_dense_are_of_one_matrix(name):
    w, want = kinds()[name], float64(kinds()[name])
    x, ids = normal(5, 2, 3, 6), jnp.array([[0, 5, 2], [2, 2, 1]])
    assert shape_of(w) == want.shape == (6, 5)
    np.testing.assert_allclose(dense(w), want, atol=1e-5)
    np.testing.assert_allclose(linear(x, w), np.asarray(x, np.float64) @ want, atol=1e-5)
    rows = lookup(w, ids)
    np.testing.assert_allclose(rows, want[np.asarray(ids)], atol=1e-5)
    assert (rows.dtype, rows.shape) == (jnp.float32, (2, 3, 5))


@pytest.mark.parametrize("name", kinds())
def test_the_activation_chooses_the_dtype_and_logits_keep_the_sums(name):
    """bfloat16 inputs give bfloat16, and in float32 the sums of the same products, not their rounding."""
    w, x = kinds()[name], normal(5, 3, 6).astype(jnp.bfloat16)
    y, wide = linear(x, w), linear(x, w, "float32")
    assert (y.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(wide, np.asarray(x, np.float64) @ float64(w), rtol=0.03, atol=0.1)
    assert np.any(np.asarray(wide) != np.asarray(wide.astype(jnp.bfloat16).astype(jnp.float32)))


def test_float32_sums_of_bfloat16_products():
    """1 + 2^-9 is no bfloat16: it survives in a float32 result and is lost in a bfloat16 one."""
    x, w = jnp.array([1.0, 2.0**-9], jnp.bfloat16), jnp.ones((2, 1))
    for leaf_ in (w, Transposed(w.T)):
        assert float(linear(x, leaf_)[0]) == 1.0
        assert float(linear(x, leaf_, "float32")[0]) == 1.0 + 2.0**-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_of_float32_results(dtype, turned):
    """dx has the dtype of x, dw is float32; both are those of the rounded gradient."""
    x, w, g = normal(0, 4, 6).astype(dtype), normal(1, 6, 5), normal(2, 4, 5)
    y, pull = jax.vjp(lambda x, w: linear(x, Transposed(w.T) if turned else w, "float32"), x, w)
    dx, dw = pull(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, x.dtype, jnp.float32)
    X, W, G = (np.asarray(a.astype(dtype).astype(jnp.float32), np.float64) for a in (x, w, g))
    eps = 2.0**-8 if dtype == "bfloat16" else 2.0**-20
    np.testing.assert_allclose(np.asarray(dx.astype(jnp.float32)), G @ W.T, rtol=eps, atol=eps)
    np.testing.assert_allclose(dw, X.T @ G, rtol=1e-5, atol=1e-5)


def test_a_leaf_is_a_node_of_the_tree():
    w = low_rank(signs())
    assert tree.paths({"w": w}) == ["w/base/q", "w/base/scale", "w/a", "w/b"]
    doubled = jax.tree.map(lambda x: x + x, w)
    assert isinstance(doubled.base, Signs) and doubled.alpha == 2.0
    assert jax.tree.structure(w) != jax.tree.structure(dataclasses.replace(w, alpha=3.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.alpha = 1.0


@pytest.mark.parametrize("name", kinds())
def test_a_stack_of_layers_scans(name):
    """Every field leads with [L]; scan over it gives each layer its own."""
    stack = kinds(lead=(3,))[name]
    x = normal(6, 2, 6)
    assert shape_of(stack) == (3, 6, 5)
    _, y = jax.lax.scan(lambda c, w: (c, linear(x, w)), None, stack)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ float64(stack), atol=1e-5)
    np.testing.assert_allclose(dense(stack), float64(stack), atol=1e-5)


def test_gradients_reach_what_is_trained_and_integers_stay_out():
    w, x = low_rank(signs()), normal(5, 4, 6)
    trained, frozen = tree.partition(w, "a|b")
    grads = jax.grad(lambda t: linear(x, tree.combine(t, frozen)).sum())(trained)
    assert tree.paths(grads) == ["a", "b"]
    g, X = np.ones((4, 5)), np.asarray(x, np.float64)
    a, b = np.asarray(w.a, np.float64), np.asarray(w.b, np.float64)
    np.testing.assert_allclose(grads.a, X.T @ g @ b.T, atol=1e-4)  # alpha / R = 1
    np.testing.assert_allclose(grads.b, (X @ a).T @ g, atol=1e-4)


def test_modules_take_any_leaf_of_the_right_shape():
    layer = Linear(5, std=0.1, bias=True)
    x = normal(5, 2, 6)
    params = layer.init(jax.random.key(0), x)["params"]
    assert params["w"].dtype == jnp.float32 and not params["b"].any()
    for w in kinds().values():
        y = layer.apply({"params": {"w": w, "b": jnp.full(5, 0.5)}}, x)
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ float64(w) + 0.5, atol=1e-5)
    with pytest.raises(ValueError, match=r"w has shape \(5, 6\), this model wants \(6, 5\)"):
        layer.apply({"params": {"w": Transposed(low_rank()), "b": params["b"]}}, x)


def test_a_leaf_that_does_not_say_what_it_is_is_told():
    @leaf
    class Vague(Weight):
        q: jax.Array

    with pytest.raises(TypeError, match="Vague does not say its shape"):
        shape_of(Vague(jnp.ones(1)))
    with pytest.raises(TypeError, match="Vague cannot be made dense"):
        linear(jnp.ones((1, 1)), Vague(jnp.ones(1)))


@dataclasses.dataclass(frozen=True)
class Noise(Surgery):
    scale: float = 1.0

    def __call__(self, params, key):
        return jax.tree.map(lambda x: x + self.scale * jax.random.normal(key, x.shape), params)


def test_surgeries_chain_in_order_each_with_its_key():
    params, key = {"w": jnp.zeros(3)}, jax.random.key(0)
    assert chain()(params, key)["w"] is params["w"] and Surgery()(params, key) is params
    once, twice = chain(Noise())(params, key)["w"], chain(Noise(), Noise())(params, key)["w"]
    assert np.abs(twice - 2 * once).max() > 0.1
    np.testing.assert_array_equal(chain(Surgery(), Noise())(params, key)["w"] + once, twice)
