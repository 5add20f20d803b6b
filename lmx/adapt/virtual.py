"""Virtual tokens: a frozen model is told what to do by learned numbers that stand before every text.

    run = Run(start=(Load("model"), Prompt(length=20)), trainable="prompt", ...)
    run = Run(start=(Load("model"), Prefix(length=20)), trainable="*/prefix/*", ...)

They stand at positions -P to -1, so a text keeps its positions, packed or not, and are seen where the mask lets a token
there be seen: under a sliding window by the first tokens of a segment alone. P virtual tokens, D d_model, K H the
numbers of a layer's keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmx import tree
from lmx.weights import linear, lookup, shape_of
from lmx.weights.surgery import Surgery


@dataclass(frozen=True)
class Prompt(Surgery):
    """`prompt` [P, D]: embeddings before the text, which start as those of random words of the vocabulary.

    ids: start as the embeddings of these tokens, and be as many.
    Source: Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2.
    """

    length: int = 20
    ids: tuple[int, ...] = ()

    def __post_init__(self):
        _check_length(self, self.length)

    def __call__(self, params: Any, key: jax.Array) -> Any:
        _check_bare(self, params)
        n_words = shape_of(params["embed"])[0]
        wrong = [i for i in self.ids if not 0 <= i < n_words]
        if wrong:
            raise ValueError(f"Prompt: ids hold {wrong[0]}, outside the vocabulary of {n_words}")
        drawn = jax.random.randint(tree.key_at(key, "prompt"), (self.length,), 0, n_words)
        ids = jnp.asarray(self.ids, jnp.int32) if self.ids else drawn
        return {**params, "prompt": lookup(params["embed"], ids)}


@dataclass(frozen=True)
class Prefix(Surgery):
    """`prefix/k` and `prefix/v` [P, K H] in the attention of each layer, read as a cache would hold them.

    They start as what the layer's matrices make of normal random inputs, and so have the size of its keys and values.
    Activations of real words are a better start (section 4.3 of the source): a `Prompt` that `lmx.models.prefixed`
    made a prefix of.
    Source: Li & Liang 2021, arXiv:2101.00190, section 4.2, without the MLP that makes them there.
    """

    length: int = 20

    def __post_init__(self):
        _check_length(self, self.length)

    def __call__(self, params: Any, key: jax.Array) -> Any:
        _check_bare(self, params)

        def of_layer(attn, key):
            x = jax.random.normal(key, (self.length, shape_of(attn["k"]["w"])[0]))
            return {name: linear(x, attn[name]["w"], "float32") for name in ("k", "v")}

        def with_prefix(blocks, prefix):
            return {**blocks, "attn": {**blocks["attn"], "prefix": prefix}}

        blocks = params["blocks"]
        n_layers = len(blocks) if isinstance(blocks, tuple) else len(jax.tree.leaves(blocks)[0])
        keys = jax.random.split(tree.key_at(key, "prefix"), n_layers)
        if isinstance(blocks, tuple):
            new = tuple(with_prefix(x, of_layer(x["attn"], k)) for x, k in zip(blocks, keys))
        else:
            new = with_prefix(blocks, jax.lax.map(lambda pair: of_layer(*pair), (blocks["attn"], keys)))
        return {**params, "blocks": new}


def _check_length(surgery, length: int) -> None:
    if length < 1:
        raise ValueError(f"{type(surgery).__name__}: length={length}; use 1 or more")


def _check_bare(surgery, params: Any) -> None:
    for path in tree.paths(params):
        if path == "prompt" or "/prefix/" in path:
            raise ValueError(
                f"{type(surgery).__name__}: there is {path} already; start from parameters without it"
            )
