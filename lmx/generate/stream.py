"""A completion shown while it is written."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.generate.decode import Completion, Prompt, Writer, prompt_ids
from lmx.generate.rows import Decoder, Known
from lmx.generate.sampling import Sampling


@dataclass
class Memory:
    """What a model has read of a conversation: given to every `stream`, each reads only what is new.

    ids: the tokens whose keys and values `cache` holds, one row.
    """

    ids: Sequence[int] = ()
    cache: Any = None

    def recall(self, decoder: Decoder, ids: Sequence[int]) -> Known:
        """The beginning of `ids` that is remembered, at most all but one token."""
        n = 0
        while n < min(len(self.ids), len(ids) - 1) and self.ids[n] == ids[n]:
            n += 1
        return Known(n, self.cache.rewind(jnp.full(1, n, jnp.int32))) if decoder.keeps(n) else Known()


def stream(
    model,
    params,
    tokenizer,
    prompt: Prompt,
    sampling: Sampling = Sampling(),
    *,
    row: int = 0,
    chunk: int = 4,
    memory: Memory | None = None,
) -> Generator[str, None, Completion]:
    """Yields the completion in parts of whole grapheme clusters; joined they are the text `generate` returns.

    No part is empty, ends inside a UTF-8 character or cluster, or shows any of a stop string. The text lags
    by one cluster, and further where it may become a stop string. The generator returns the `Completion`.

    Args:
      row: which random stream; `generate` gives row r of a batch stream r.
      chunk: tokens per compiled call: 1 shows each as soon as it can, more spends less time between calls.
      memory: of this model and these params; holds the prompt and the completion afterwards.
    Raises: as `generate`, when the first part is asked for.
    """
    [ids] = prompt_ids(model, tokenizer, [prompt], sampling.max_tokens)
    writer = Writer(tokenizer, sampling)
    memory = Memory() if memory is None else memory
    shown = 0
    if writer.reason is None:
        decoder = Decoder(model, params, tokenizer, sampling)
        known, slots = memory.recall(decoder, ids), decoder.slots([ids], parts=2)
        if known.n:  # a conversation meets a new program only where its room doubles
            slots = max(slots, known.cache.positions.shape[1])
        rows = decoder.begin([ids], [row], known, slots)
        drawn: list[int] = []
        while True:
            n, *found = jax.device_get((rows.n, rows.tokens, rows.logprobs))
            tokens, logprobs = (x[0, len(drawn) : n[0]].tolist() for x in found)
            drawn += tokens
            memory.ids, memory.cache = [*ids, *drawn[:-1]], rows.cache
            for token, logprob in zip(tokens, logprobs):
                text = writer.add(token, logprob)
                if text:
                    shown += len(text)
                    yield text
            if writer.reason is not None:
                break
            memory.ids = ()  # until the step is done, which uses the cache up
            rows = decoder.advance(rows, np.zeros(1, bool), chunk)
    completion = writer.finish()
    if len(completion.text) > shown:
        yield completion.text[shown:]
    return completion
