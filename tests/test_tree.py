"""Paths, patterns and partitions of parameter trees."""

import subprocess
import sys
import zlib
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from lmx import tree
from lmx.weights import Weight, leaf


@leaf
class Packed(Weight):
    q: jax.Array
    scale: jax.Array


class Moments(NamedTuple):
    mean: dict
    count: int


def params():
    return {
        "blocks": {"attn": {"q": {"w": np.ones((2, 3, 4)), "b": np.zeros(4)}}, "mlp": {"w": Packed(1, 2)}},
        "embed": np.arange(6),
        "list": [np.zeros(1), (np.zeros(2),)],
    }


def test_paths_of_every_kind_of_node():
    assert tree.paths(Moments(params(), 0)) == [
        "mean/blocks/attn/q/b",
        "mean/blocks/attn/q/w",
        "mean/blocks/mlp/w/q",
        "mean/blocks/mlp/w/scale",
        "mean/embed",
        "mean/list/0",
        "mean/list/1/0",
        "count",
    ]


@pytest.mark.parametrize(
    "pattern, path, fits",
    [
        ("*", "blocks/attn/q/w", True),
        ("blocks/*/w", "blocks/attn/q/w", True),
        ("*/w", "w", False),
        ("*/w|w", "w", True),
        ("embed|head", "head", True),
        ("embed|head", "heads", False),
        ("*/[qk]/w", "blocks/k/w", True),
        ("*/[!qk]/w", "blocks/k/w", False),
        ("*/w/[ab]", "blocks/attn/q/w/a", True),
        ("BLOCKS/*", "blocks/q", False),
        ("*norm?/scale", "blocks/norm1/scale", True),
        ("", "w", False),
    ],
)
def test_patterns(pattern, path, fits):
    assert tree.matches(path, pattern) is fits


@given(st.sets(st.sampled_from(tree.paths(params())), min_size=1))
def test_partition_and_combine_undo_each_other(chosen):
    whole = params()
    selected, rest = tree.partition(whole, "|".join(chosen))
    assert set(tree.paths(selected)) == chosen
    assert set(tree.paths(rest)) == set(tree.paths(whole)) - chosen
    for found in (tree.combine(selected, rest), tree.combine(rest, selected)):
        assert jax.tree.structure(found) == jax.tree.structure(whole)
        assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole)))


def test_a_pattern_that_fits_nothing_names_paths_near_it():
    for function in (tree.partition, tree.check_pattern):
        with pytest.raises(ValueError, match=r"'\*/attn/key/w' fits no parameter; .*blocks/attn/q/w"):
            function(params(), "*/attn/key/w")
        with pytest.raises(ValueError, match="fits no parameter"):
            function({}, "*")


def test_map_at_changes_what_fits_and_keeps_the_rest():
    whole = params()
    found = tree.map_at(lambda path, x: (path, x), whole, "embed|*/b")
    assert found["embed"] == ("embed", whole["embed"]) and found["list"][0] is whole["list"][0]
    packed = tree.map_at(lambda path, w: w.q, whole, "*/mlp/w", is_leaf=lambda x: isinstance(x, Weight))
    assert packed["blocks"]["mlp"]["w"] == 1


def test_counts_and_bytes_of_arrays_and_of_shapes():
    arrays = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(5, jnp.int8), "c": None}
    for found in (arrays, jax.eval_shape(lambda: arrays)):
        assert tree.count(found) == 11 and tree.nbytes(found) == 2 * 6 + 5


def test_keys_differ_by_path_and_agree_between_processes():
    key = jax.random.key(3)
    names = ["blocks/attn/q/w", "blocks/attn/k/w", "embed", "शब्द"]
    found = [tuple(jax.random.key_data(tree.key_at(key, name)).tolist()) for name in names]
    assert len(set(found)) == len(names)
    want = jax.random.fold_in(key, zlib.crc32("शब्द".encode()))
    assert found[-1] == tuple(jax.random.key_data(want).tolist())
    script = "import jax, lmx; print(jax.random.key_data(lmx.tree.key_at(jax.random.key(3), 'embed')))"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert [int(x) for x in other.strip(" []\n").split()] == list(found[2])
