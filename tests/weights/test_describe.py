"""The structure of a parameter tree as JSON and back."""

import json

import jax
import jax.numpy as jnp
import pytest
from leaves import kinds

from lmx import tree
from lmx.weights.describe import KINDS, describe, rebuild


def test_every_leaf_comes_back_as_it_was():
    params = {
        "weight": {"w": jnp.ones(3)},
        "blocks": ({"a": kinds()["int4"], "b": None}, {"a": jnp.zeros(2)}),
    }
    params |= {"x": kinds((3,))}
    assert {type(w).__name__ for w in kinds().values()} == set(KINDS)
    arrays = dict(zip(tree.paths(params), jax.tree.leaves(params)))
    again = rebuild(json.loads(json.dumps(describe(params))), arrays.__getitem__)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(x is y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(params)))


@pytest.mark.parametrize(
    "described",
    [
        {"w": {"weight": "os.system", "settings": {}, "arrays": {}}},
        {"w": {"weight": "Masked", "settings": {"base": 3}, "arrays": {"mask": True}}},
        {"w": {"weight": "Masked", "settings": {}, "arrays": {"mask": True}}},
        {"w": {"weight": "Quantized", "settings": 3, "arrays": {}}},
        {"w": "Masked"},
        3,
    ],
)
def test_what_describes_nothing_is_refused(described):
    with pytest.raises(ValueError, match=r"w: |parameters: "):
        rebuild(described, lambda path: path)
