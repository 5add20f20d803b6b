"""Texts as the model itself sees them, and for each question the examples that lie nearest to it.

    e(text) = mean over the text's tokens of the last hidden states, of length 1
    nearest(question) = the k examples of largest e(question) . e(example)

Source: Liu et al. 2022, "What makes good in-context examples for GPT-3?", arXiv:2101.06804, section 3.2, with the
embeddings of the model that is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lmx.evals.likelihood import batches
from lmx.generate.reading import padded
from lmx.tasks import Example

if TYPE_CHECKING:
    from lmx.run import Trained


@dataclass(frozen=True)
class Nearest:
    """The k training examples whose questions are nearest to the one asked, the nearest last; of equally near ones the
    first in the records. Every question has its own, so that prompts share less of a prefix.

    Raises: ValueError for a k below 1.
    """

    k: int

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"Nearest: k={self.k}; use 1 or more")

    def __call__(
        self, model: Trained, examples: Sequence[Example], questions: Sequence[str], **how: int
    ) -> list[tuple[Example, ...]]:
        """The examples to show before each question. how: as `embed` has it.

        Raises: ValueError if there are fewer examples than k.
        """
        if self.k > len(examples):
            raise ValueError(
                f"Nearest: k={self.k}, and there are {len(examples)} training examples; use that or less"
            )
        found = embed(model, [*(x.question for x in examples), *questions], **how)
        there, here = found[: len(examples)], found[len(examples) :]
        return [
            tuple(examples[i] for i in np.argsort(-(there @ one), kind="stable")[: self.k][::-1])
            for one in here
        ]


def embed(model: Trained, texts: Sequence[str], *, batch_tokens: int = 2048) -> Float[np.ndarray, "N D"]:
    """Each text as a vector of length 1, float32. Of a text longer than the model's positions those that fit are read.

    The bos in front is read, and left out of the mean: what it becomes is the same in every text.
    Args:
      batch_tokens: read at once, padding included.
    Raises: ValueError for a text without tokens.
    """
    tokenizer, config = model.tokenizer, model.model.config
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    limit = config.position.max_len()
    ids = [(bos + own)[:limit] for own in tokenizer.encode_batch(list(texts))]
    for text, row in zip(texts, ids):
        if len(row) == len(bos):
            raise ValueError(f"embed: {text!r:.99} has no tokens; leave it out")
    found = np.zeros((len(ids), config.d_model), np.float32)
    for batch in batches(list(map(len, ids)), 0, batch_tokens, limit):
        tokens, lengths = padded([ids[i] for i in batch.rows], batch.size)
        vectors = np.asarray(_program(model.model)(model.params, tokens, np.int32(len(bos)), lengths))
        found[batch.rows[: batch.real]] = vectors[: batch.real]
    return found


@functools.lru_cache(maxsize=16)
def _program(model):
    @jax.jit
    def vectors(params, tokens, start, lengths):
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        real = at < lengths[:, None]
        batch = {"tokens": tokens, "positions": at, "segment_ids": real.astype(jnp.int32)}
        hidden = model.apply(params, batch).hidden.astype(jnp.float32)
        # The sum has the direction of the mean.
        total = jnp.where((real & (at >= start))[..., None], hidden, 0.0).sum(1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-30)

    return vectors
