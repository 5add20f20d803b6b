"""Learning from the teacher on what the student writes itself, where its own mistakes are.

    with probability share, a batch is another: of each row a beginning stays, and the student writes what follows
    loss = D(teacher || student) at the tokens it wrote, through which, as through the draw, no gradient passes

    run = Run(
        enrich=OnPolicy(Teacher("SmolLM2.gguf"), share=0.5),
        objective={"kd": Term(Chunked(Jsd(0.5)))},
        ...
    )

It wraps any enrichment, happens inside the compiled step, and draws from the key and the number of the step: so it
needs no second loop, runs on any mesh, and a resumed run goes on bitwise. The student reads a row's beginning at once
and then writes a token at a time with its cache, `new` of them, which is what it costs.

Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from lmx import tree, values
from lmx.train.state import State
from lmx.train.step import Enrich

KNOWN = {"tokens", "labels", "loss_mask", "positions", "segment_ids"}


@dataclass(frozen=True)
class OnPolicy(Enrich):
    """What `then` adds, to batches of which a share is written by the student.

    Also adds `data_mask`: `loss_mask` of text from the data, 0 of what the student wrote, for terms that are not to
    learn from it: `Term(NextToken(), mask="data_mask")`.

    share: lambda in [0, 1], the probability that a batch is the student's. prompt: tokens of a row that stay, at least;
    all before the first that counts stay, so 1 suffices where replies alone count. What was packed into them is read as
    one text. new: tokens written after them, as far as the row has room; None means to its end. ends: ids after which a
    text is over; without any it goes on to its end. words: the student writes none of the ids from this on, which are
    its padding; None means that it has none. temperature: of the draw.
    """

    then: Enrich
    share: float = 0.5
    prompt: int = 32
    new: int | None = None
    ends: tuple[int, ...] = ()
    words: int | None = None
    temperature: float = 1.0

    def __post_init__(self):
        values.check(
            self, share="[0, 1]", prompt="[1, inf)", new="[1, inf) or None", words="[1, inf) or None"
        )
        values.check(self, temperature="(0, inf)")

    def files(self) -> list[Path]:
        return self.then.files()

    def check(self, run: Any, tokenizer: Any) -> None:
        """Raises: ValueError for rows without room, or ids that the tokenizer does not know."""
        if self.prompt >= run.data.seq_len:
            raise ValueError(
                f"OnPolicy: prompt={self.prompt} leaves no room in rows of data.seq_len={run.data.seq_len}; lower it"
            )
        known, there = tokenizer.vocab_size, self.words or run.model.vocab_size
        if there > known:
            raise ValueError(
                f"OnPolicy: the student could write {there} ids, and the tokenizer has {known}; use words={known}"
            )
        if any(not 0 <= end < known for end in self.ends):
            raise ValueError(
                f"OnPolicy: ends={self.ends} are not all ids of the tokenizer, which has {known}"
            )
        self.then.check(run, tokenizer)

    def shapes(self, run: Any, trainable: Any, mesh: Mesh) -> Any:
        return self.then.shapes(run, trainable, mesh)

    def constants(self, run: Any, trainable: Any, mesh: Mesh) -> Any:
        return self.then.constants(run, trainable, mesh)

    def __call__(self, constants: Any, batch: dict, answer: Callable[[Any], Any]) -> dict:
        return self.then(constants, batch, answer)

    def before(self, model: Any, state: State, batch: dict, salt: int | Array = 0) -> dict:
        others = sorted(set(batch) - KNOWN)
        if others:
            raise ValueError(
                f"OnPolicy: the batch has {', '.join(others)}, made for its text, which say nothing of what the "
                "student writes; learn from a Teacher(path) on plain text or conversations"
            )
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key = tree.key_at(key, "on_policy")
        ours = jax.random.uniform(jax.random.fold_in(key, 0)) < self.share
        key = jax.random.fold_in(jax.random.fold_in(key, 1), salt)
        batch = batch | {"data_mask": batch["loss_mask"]}
        return jax.lax.cond(ours, lambda: self.written(model, state.params, batch, key), lambda: batch)

    def written(self, model: Any, params: Any, batch: dict, key: jax.Array) -> dict:
        """The batch with rows that the model goes on with, each one text; `loss_mask` is 1 at what it wrote."""
        tokens, (B, T) = batch["tokens"], batch["tokens"].shape
        start = self.beginnings(batch)
        at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        out, cache = model.step(params, model.new_cache(B, T, params), tokens, at < start[:, None])
        last = jnp.take_along_axis(out.hidden, start[:, None, None] - 1, 1)
        first = self._drawn(replace(out, hidden=last), jax.random.fold_in(key, 0))

        def one(carry, i):
            cache, token = carry
            out, cache = model.step(params, cache, token[:, None])
            token = self._drawn(out, jax.random.fold_in(key, i))
            return (cache, token), token

        new = min(T if self.new is None else self.new, T)
        numbers = jnp.arange(1, new, dtype=jnp.int32)
        _, others = jax.lax.scan(one, (cache, first), numbers)
        drawn = jnp.concatenate([first[:, None], others.T], 1)  # [B, new]
        ended = jnp.isin(drawn, jnp.array(self.ends, jnp.int32))
        n = jnp.where(ended.any(1), jnp.argmax(ended, 1).astype(jnp.int32) + 1, new)

        def row(t):
            """The token at place t of each row, of its beginning or drawn."""
            ours = jnp.take_along_axis(drawn, jnp.clip(t - start[:, None], 0, new - 1), 1)
            return jnp.where(t < start[:, None], jnp.take_along_axis(tokens, jnp.minimum(t, T - 1), 1), ours)

        follows = (at >= start[:, None] - 1) & (at < (start + n)[:, None] - 1)
        some = (batch["segment_ids"] > 0).any(1)
        return batch | {
            "tokens": row(at),
            "labels": row(at + 1),
            "loss_mask": (follows & some[:, None]).astype(batch["loss_mask"].dtype),
            "positions": at.astype(batch["positions"].dtype),
            "segment_ids": (at < (start + n)[:, None]).astype(batch["segment_ids"].dtype),
            "data_mask": jnp.zeros_like(batch["data_mask"]),
        }

    def beginnings(self, batch: dict) -> Int[Array, " B"]:
        """How many tokens of each row stay, at least 1."""
        counts = batch["loss_mask"] > 0
        first = jnp.where(counts.any(1), jnp.argmax(counts, 1).astype(jnp.int32) + 1, 1)
        there = (batch["segment_ids"] > 0).sum(1, dtype=jnp.int32)
        return jnp.clip(jnp.minimum(jnp.maximum(first, self.prompt), there), 1)

    def _drawn(self, out: Any, key: jax.Array) -> Int[Array, " B"]:
        logits = out.logits[:, -1, : self.words] / self.temperature
        return jax.random.categorical(key, logits).astype(jnp.int32)
