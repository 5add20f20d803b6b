"""Completions of a batch of prompts: prefill and single steps with a key/value cache, in compiled loops.

    start:    cache = prompts, right-padded;  t_0 ~ p(. | prompt)
    advance:  while any row goes on:  cache += t_i;  t_{i+1} ~ p(. | prompt, t_0..t_i)

The loop runs on the device until `until` tokens exist or every row is done. Stop strings are text, which a
compiled loop cannot read: with them the loop pauses every `chunk` tokens and the host looks. What the model
wrote past a stop string in the meantime is thrown away, so `chunk` changes speed and nothing else.
Axes: B rows, M most tokens, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmx.generate.assemble import Assembler
from lmx.generate.sampling import Sampling, choose
from lmx.ops.mask import Where, sees_next
from lmx.weights import leaf

Prompt = str | Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    text: whole, without special tokens, up to the stop string if one was found.
    tokens: all that were drawn, the eos or those of the stop string included.
    reason: "stop" (a stop string), "eos" (the tokenizer's end token) or "length" (max_tokens).
    logprobs: log probability of each token under the model itself, before any filter, in nats.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    logprobs: tuple[float, ...]


@leaf
class State:
    """Completions under way; `token` is the last one drawn, not yet in the cache; n counts tokens drawn."""

    cache: Any
    keys: Array
    token: Int[Array, " B"]
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    n: Int[Array, ""]


def generate(
    model,
    params,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),
    *,
    rows: Sequence[int] | None = None,
    chunk: int = 16,
) -> list[Completion]:
    """One completion per prompt, in order. Prompts of any lengths run as one batch.

    Args:
      prompts: texts, which get the tokenizer's bos in front, or ids, which are taken as they are. An empty
        prompt starts from bos.
      rows: the number of each prompt's random stream, 0, 1, ... by default. A prompt alone with rows=(r,)
        draws the numbers it draws as row r of a batch; its tokens differ only where rounding decides.
      chunk: tokens between two looks for stop strings.
    Raises: ValueError for an empty prompt without bos, an id outside the vocabulary, or a prompt that leaves
      no room for max_tokens within the model's positions.
    """
    ids = _prompt_ids(model, tokenizer, prompts, sampling.max_tokens)
    rows = range(len(ids)) if rows is None else rows
    if len(rows) != len(ids):
        raise ValueError(f"generate: {len(rows)} rows for {len(ids)} prompts; give one number per prompt")
    writers = [Writer(tokenizer, sampling) for _ in ids]
    done = np.zeros(len(ids), bool)
    pause = chunk if sampling.stop else max(sampling.max_tokens, 1)
    for tokens, logprobs in steps(model, params, tokenizer, ids, sampling, rows, pause, done):
        for b, writer in enumerate(writers):
            for token, logprob in zip(tokens[b].tolist(), logprobs[b].tolist()):
                writer.add(token, logprob)
            done[b] = writer.reason is not None
    return [writer.finish() for writer in writers]


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
        if token == self._tokenizer.eos_id:
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


def steps(
    model,
    params,
    tokenizer,
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    rows,
    pause: int,
    done: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """New tokens and their log probabilities, [B, 1..pause] each time, until every row is done or full.

    done [B]: the caller sets it between two items for rows that need no more.
    """
    most = sampling.max_tokens
    if not ids or most == 0:
        return
    start, advance = _programs(model.step, model.new_cache)
    lengths = np.array([len(row) for row in ids], np.int32)
    limit = model.config.position.max_len()
    prompts = np.full((len(ids), _bucket(int(lengths.max()), limit)), ids[0][0], np.int32)
    for b, row in enumerate(ids):
        prompts[b, : len(row)] = row
    settings = sampling.settings()
    eos = np.int32(-1 if tokenizer.eos_id is None else tokenizer.eos_id)
    n_words = min(model.config.vocab_size, tokenizer.vocab_size)
    fixed = {"top_k": sampling.top_k if "temperature" in settings else 0, "n_words": n_words}
    state = start(
        params,
        prompts,
        lengths,
        np.uint32(sampling.seed),
        np.asarray(rows, np.uint32),
        settings,
        eos,
        slots=_bucket(int(lengths.max()) + most - 1, limit),
        room=_bucket(most, None),
        **fixed,
    )
    n = 0
    while True:
        before, (n, tokens, logprobs, finished) = (
            n,
            jax.device_get((state.n, state.tokens, state.logprobs, state.done)),
        )
        yield tokens[:, before:n], logprobs[:, before:n]
        if n >= most or (finished | done).all():
            return
        state = advance(params, state, np.int32(min(n + pause, most)), done.copy(), settings, eos, **fixed)


@functools.lru_cache(maxsize=16)
def _programs(step, new_cache):
    """The two compiled programs of a model; jax compiles each once per shape and set of filters."""

    def draw(state, logits, settings, eos, top_k, n_words):
        words = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        if n_words < logits.shape[-1]:
            logits = jnp.where(words < n_words, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.n)
        token, logprob = choose(logits, keys, settings, top_k, state.seen)
        return dataclasses.replace(
            state,
            token=token,
            tokens=state.tokens.at[:, state.n].set(token),
            logprobs=state.logprobs.at[:, state.n].set(logprob),
            done=state.done | (token == eos),
            seen=None if state.seen is None else state.seen | (words == token[:, None]),
            n=state.n + 1,
        )

    @functools.partial(jax.jit, static_argnames=("slots", "room", "top_k", "n_words"))
    def start(params, prompts, lengths, seed, rows, settings, eos, *, slots, room, top_k, n_words):
        B, P = prompts.shape
        valid = jnp.arange(P, dtype=jnp.int32)[None] < lengths[:, None]
        out, cache = step(params, new_cache(B, slots), prompts, valid)
        last = out.hidden[jnp.arange(B), lengths - 1]
        logits = dataclasses.replace(out, hidden=last[:, None]).logits[:, 0]
        seen = None
        if "repetition_penalty" in settings:
            seen = jnp.zeros(logits.shape, bool).at[jnp.arange(B)[:, None], prompts].max(valid)
        state = State(
            cache=cache,
            keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows),
            token=jnp.zeros(B, jnp.int32),
            tokens=jnp.zeros((B, room), jnp.int32),
            logprobs=jnp.zeros((B, room), jnp.float32),
            done=jnp.zeros(B, bool),
            seen=seen,
            n=jnp.int32(0),
        )
        return draw(state, logits, settings, eos, top_k, n_words)

    @functools.partial(jax.jit, static_argnames=("top_k", "n_words"), donate_argnums=1)
    def advance(params, state, until, done, settings, eos, *, top_k, n_words):
        def more(state):
            return (state.n < until) & ~state.done.all()

        def body(state):
            out, cache = step(params, state.cache, state.token[:, None], ~state.done[:, None])
            return draw(
                dataclasses.replace(state, cache=cache), out.logits[:, 0], settings, eos, top_k, n_words
            )

        return jax.lax.while_loop(more, body, dataclasses.replace(state, done=state.done | done))

    return start, advance


def _prompt_ids(model, tokenizer, prompts: Sequence[Prompt], max_tokens: int) -> list[list[int]]:
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


def _bucket(n: int, limit: int | None) -> int:
    """The next power of two from 16 on, so that few programs are compiled; not above the positions."""
    size = max(16, 1 << (n - 1).bit_length())
    return size if limit is None else min(size, limit)
