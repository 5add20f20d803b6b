"""A completion shown while it is written."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.generate.decode import Completion, Prompt, Writer, prompt_ids
from lmx.generate.rows import Decoder
from lmx.generate.sampling import Sampling
from lmx.ops.mask import Where, sees_next


@dataclass
class Memory:
    """What a model has read of a conversation: given to every `stream`, each reads only what is new.

    ids: the tokens whose keys and values `cache` holds, one row.
    """

    ids: Sequence[int] = ()
    cache: Any = None

    def recall(self, model, ids: Sequence[int], slots: int) -> tuple[int, Any]:
        """How many tokens at the start of `ids` are remembered, at most all but one, and a cache that holds them alone.

        It is taken out of the memory, since the next step uses it up.
        """
        known, self.ids = self.ids, ()
        n = 0
        while n < min(len(known), len(ids) - 1) and known[n] == ids[n]:
            n += 1
        end = jnp.full((1, 1), n - 1, jnp.int32)
        if n == 0 or sees_next(model.config.attention.mask, Where(end, jnp.ones_like(end))).any():
            return 0, None
        cache, self.cache = self.cache, None
        return n, cache.rewind(jnp.full(1, n, jnp.int32)).grow(slots)


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
      memory: of this model and these params; holds the prompt and the completion afterwards. A repetition
        penalty counts the whole prompt, so that all of it is read.
    Raises: as `generate`, when the first part is asked for.
    """
    [ids] = prompt_ids(model, tokenizer, [prompt], sampling.max_tokens)
    writer = Writer(tokenizer, sampling)
    memory = Memory() if memory is None else memory
    shown = 0
    if writer.reason is None:
        decoder = Decoder(model, params, tokenizer, sampling)
        slots = decoder.slots([ids])
        known, cache = (0, None) if sampling.repetition_penalty != 1 else memory.recall(model, ids, slots)
        rows = decoder.begin([ids[known:]], [row], slots, cache)
        drawn: list[int] = []
        while True:
            tokens, logprobs = (
                x[0, len(drawn) : rows.n[0]].tolist() for x in jax.device_get((rows.tokens, rows.logprobs))
            )
            drawn += tokens
            memory.ids, memory.cache = [*ids, *drawn[:-1]], rows.cache
            for token, logprob in zip(tokens, logprobs):
                text = writer.add(token, logprob)
                if text:
                    shown += len(text)
                    yield text
            if writer.reason is not None:
                break
            memory.ids = ()
            rows = decoder.advance(rows, np.zeros(1, bool), chunk)
    completion = writer.finish()
    if len(completion.text) > shown:
        yield completion.text[shown:]
    return completion
