"""A completion shown while it is written."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from lmx.generate.decode import Completion, Prompt, Writer, _prompt_ids, steps
from lmx.generate.sampling import Sampling


def stream(
    model,
    params,
    tokenizer,
    prompt: Prompt,
    sampling: Sampling = Sampling(),
    *,
    row: int = 0,
    chunk: int = 4,
) -> Generator[str, None, Completion]:
    """Yields the completion in parts of whole grapheme clusters; joined they are the text `generate` returns.

    No part is empty, ends inside a UTF-8 character or cluster, or shows any of a stop string. The text lags
    by one cluster, and further where it may become a stop string. The generator returns the `Completion`.

    Args:
      row: which random stream; `generate` gives row r of a batch stream r.
      chunk: tokens per compiled call: 1 shows each as soon as it can, more spends less time between calls.
    Raises: as `generate`, when the first part is asked for.
    """
    ids = _prompt_ids(model, tokenizer, [prompt], sampling.max_tokens)
    writer, done, shown = Writer(tokenizer, sampling), np.zeros(1, bool), 0
    for tokens, logprobs in steps(model, params, tokenizer, ids, sampling, (row,), chunk, done):
        for token, logprob in zip(tokens[0].tolist(), logprobs[0].tolist()):
            text = writer.add(token, logprob)
            if text:
                shown += len(text)
                yield text
        done[0] = writer.reason is not None
    completion = writer.finish()
    if len(completion.text) > shown:
        yield completion.text[shown:]
    return completion
