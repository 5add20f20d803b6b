"""Prompts read in pieces against the model's own forward pass over each whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.generate.reading import SIZES, padded, piece, read
from lmx.models import TransformerConfig, build, unstacked
from lmx.nn import AttentionConfig
from lmx.ops.mask import Causal, PrefixLM, SlidingWindow
from lmx.ops.position import ALiBi, Learned

ROWS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8] * 20, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]


def make(mask=Causal(), **more):
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, mask=mask)
    model = build(TransformerConfig(vocab_size=24, d_model=16, n_layers=2, attention=attention, **more))
    return model, model.init(jax.random.key(0))


@pytest.mark.parametrize("size", [1, 4, 16, 64])
@pytest.mark.parametrize("more", [{}, {"mask": SlidingWindow(6)}, {"position": ALiBi()}], ids=str)
def test_pieces_of_any_size_read_what_the_model_reads_at_once(size, more):
    model, params = make(**more)
    tokens, lengths = padded(ROWS, 48 + size)
    got, cache = jax.jit(read, static_argnums=(0, 6))(
        model, params, model.new_cache(len(ROWS), 48), tokens, 0, lengths, size
    )
    for row, logits in zip(ROWS, got):
        want = model.apply(params, {"tokens": jnp.asarray([row])}).logits[0, -1]
        np.testing.assert_allclose(logits, want, atol=2e-6)
    assert cache.length.tolist() == [len(row) for row in ROWS]


def test_what_is_known_is_not_read_again():
    model, params = make()
    params = unstacked(params)
    tokens, lengths = padded(ROWS[2:], 48 + 64)
    cache = model.new_cache(2, 48, params)
    _, cache = read(model, params, cache, tokens, 0, np.full(2, 13, np.int32), 4)
    got, cache = read(model, params, cache, tokens, 13, lengths, 4)
    want, _ = read(model, params, model.new_cache(2, 48, params), tokens, 0, lengths, 64)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    "n, start, size",
    [
        (1, 0, 16),
        (32, 0, 16),
        (40, 0, 64),
        (190, 0, 64),
        (200, 0, 256),
        (512, 0, 256),
        (1024, 0, 1024),
        (520, 512, 16),
    ],
)
def test_the_cheapest_size_is_chosen(n, start, size):
    assert piece(make()[0].config, n, start) == size


def test_no_size_exceeds_what_the_model_can_read():
    assert piece(make(position=Learned(300))[0].config, 1000) == 256
    assert piece(make(position=Learned(9))[0].config, 5) == 9


def test_a_prefix_that_sees_what_follows_is_read_in_one_piece():
    assert piece(make(PrefixLM(50))[0].config, 40) >= 40
    assert piece(make(PrefixLM(5))[0].config, 200) in SIZES
