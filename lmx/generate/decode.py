"""Completions of many prompts, a batch at a time: a finished row's place is taken by the next prompt at once.

Stop strings are text, which a compiled loop cannot read: with them the loop pauses every `chunk` tokens and the
host looks. What the model wrote past a stop string in the meantime is thrown away, so `chunk` changes speed and
nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lmx.generate.assemble import Assembler
from lmx.generate.rows import Decoder
from lmx.generate.sampling import Sampling
from lmx.ops.mask import Where, sees_next

Prompt = str | Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    text: whole, without special tokens, up to the stop string if one was found.
    tokens: all that were drawn, the eos or those of the stop string included.
    reason: "stop" (a stop string), "eos" (one of the tokenizer's end tokens) or "length" (max_tokens).
    logprobs: log probability of each token under the model itself, before any filter, in nats.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    logprobs: tuple[float, ...]


def generate(
    model,
    params,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),
    *,
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
    chunk: int = 16,
) -> list[Completion]:
    """One completion per prompt, in order. Prompts of any lengths run together; see `completions`."""
    many = dict(
        completions(
            model, params, tokenizer, prompts, sampling, rows=rows, batch_size=batch_size, chunk=chunk
        )
    )
    return [many[i] for i in range(len(many))]


def completions(
    model,
    params,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),
    *,
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
    chunk: int = 16,
) -> Iterator[tuple[int, Completion]]:
    """The number of each prompt and its completion, as they end.

    Args:
      params: of the model; on a CPU `lmx.models.unstacked` ones are read faster.
      prompts: texts, which get the tokenizer's bos in front, or ids, which are taken as they are. An empty
        prompt starts from bos.
      rows: the number of each prompt's random stream, 0, 1, ... by default. A prompt alone with rows=(r,)
        draws the numbers it draws as row r of a batch; its tokens differ only where rounding decides.
      batch_size: prompts under way at once; None is all.
      chunk: tokens between two looks for stop strings.
    Raises: ValueError for an empty prompt without bos, an id outside the vocabulary, a prompt that leaves no room
      for max_tokens within the model's positions, or a pattern that the tokenizer cannot spell.
    """
    ids = prompt_ids(model, tokenizer, prompts, sampling.max_tokens)
    streams = range(len(ids)) if rows is None else rows
    if len(streams) != len(ids):
        raise ValueError(f"generate: {len(streams)} rows for {len(ids)} prompts; give one number per prompt")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"generate: batch_size={batch_size}; use 1 or more")
    writers = [Writer(tokenizer, sampling) for _ in ids]
    if not ids or sampling.max_tokens == 0:
        yield from ((i, writer.finish()) for i, writer in enumerate(writers))
        return
    decoder = Decoder(model, params, tokenizer, sampling)
    slots, shared = decoder.slots(ids), decoder.shared(ids)
    n_rows = min(batch_size or len(ids), len(ids))
    waiting, under_way = deque(range(len(ids))), [0] * n_rows
    idle, shown, state = np.ones(n_rows, bool), np.zeros(n_rows, int), None
    budget = chunk if sampling.stop else sampling.max_tokens
    while True:
        taken = {int(b): waiting.popleft() for b in np.flatnonzero(idle)[: len(waiting)]}
        for group in decoder.groups({b: len(ids[i]) for b, i in taken.items()}, shared):
            some = [taken[b] for b in group]
            new = decoder.begin([ids[i] for i in some], [streams[i] for i in some], shared, slots)
            state = decoder.join(decoder.spread(new, n_rows, slots) if state is None else state, new, group)
        for b, i in taken.items():
            under_way[b], idle[b], shown[b] = i, False, 0
        if idle.all():
            return
        state = decoder.advance(state, idle, budget)
        n, tokens, logprobs = jax.device_get((state.n, state.tokens, state.logprobs))
        for b in np.flatnonzero(~idle):
            writer = writers[under_way[b]]
            for at in range(shown[b], n[b]):
                writer.add(int(tokens[b, at]), float(logprobs[b, at]))
            shown[b] = n[b]
            if writer.reason is not None:
                idle[b] = True
                yield under_way[b], writer.finish()


class Writer:
    """Collects one completion; `reason` is None until it ends, and what comes after is ignored."""

    def __init__(self, tokenizer, sampling: Sampling):
        self.reason: str | None = "length" if sampling.max_tokens == 0 else None
        self._tokenizer, self._max_tokens = tokenizer, sampling.max_tokens
        self._assembler = Assembler(sampling.stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []

    def add(self, token: int, logprob: float) -> str:
        """The text that this token makes certain, in whole grapheme clusters."""
        if self.reason is not None:
            return ""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        text = ""
        if token in self._tokenizer.end_ids:
            self.reason = "eos"
        else:
            text = self._assembler.push(self._tokenizer.token_bytes(token))
            self._text.append(text)
            if self._assembler.stopped:
                self.reason = "stop"
            elif len(self._tokens) == self._max_tokens:
                self.reason = "length"
        return text

    def finish(self) -> Completion:
        self._text.append(self._assembler.finish())
        assert self.reason is not None
        return Completion("".join(self._text), tuple(self._tokens), self.reason, tuple(self._logprobs))


def prompt_ids(model, tokenizer, prompts: Sequence[Prompt], max_tokens: int) -> list[list[int]]:
    """The ids of each prompt. Raises: as `completions`."""
    if isinstance(prompts, str):
        raise ValueError(f"generate: prompts={prompts!r} is one string; write [{prompts!r}]")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    limit = model.config.position.max_len()
    all_ids = []
    for i, prompt in enumerate(prompts):
        ids = bos + tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt] or bos
        if not ids:
            raise ValueError(
                f"prompt {i} is empty and the tokenizer has no bos token; give at least one token"
            )
        wrong = [t for t in ids if not 0 <= t < model.config.vocab_size]
        if wrong:
            raise ValueError(
                f"prompt {i} holds token {wrong[0]}, outside the model's "
                f"vocab_size={model.config.vocab_size}; use the tokenizer it was trained with"
            )
        if limit is not None and len(ids) + max_tokens - 1 > limit:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and max_tokens={max_tokens} more need "
                f"{len(ids) + max_tokens - 1} positions, but {model.config.position} has {limit}; "
                f"shorten the prompt or set max_tokens to {max(0, limit + 1 - len(ids))}"
            )
        all_ids.append(ids)
    if max_tokens:
        _check_prefix(model.config.attention.mask, [len(ids) for ids in all_ids])
    return all_ids


def _check_prefix(mask, lengths: list[int]) -> None:
    """Raises: ValueError for a prompt whose last token would see tokens that are not written yet."""
    ends = jnp.asarray(lengths, jnp.int32)[:, None] - 1
    for i in np.flatnonzero(sees_next(mask, Where(ends, jnp.ones_like(ends)))):
        raise ValueError(
            f"prompt {i} has {lengths[i]} tokens and ends within the prefix of {mask}, whose tokens see later "
            "ones; give a longer prompt"
        )
