"""Rows under way: compiled programs that begin them from prompts, join them to others, and draw their tokens.

    begin:    cache = prompts;  t_0 ~ p(. | prompt)
    join:     new rows take the places of rows that have ended
    advance:  until a row ends:  cache += t_i;  t_{i+1} ~ p(. | prompt, t_0..t_i)

Each is compiled once for each room of the cache, and `begin` for each size of a piece, so that rows which come and go
soon meet no new program.
Axes: B rows, R new rows, W tokens of padded prompts, M most tokens drawn, V vocab_size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmx.data.tokenizer_json import common
from lmx.generate.constraint import Constraint, constraint
from lmx.generate.reading import bucket, keeps, padded, piece, read
from lmx.generate.sampling import Sampling, choose
from lmx.weights import leaf

READ = 256
"""Tokens read at once: on a CPU enough to fill its units, elsewhere little beside a step of a large batch."""
LEAST = 16
"""A beginning of fewer tokens is not worth to be read apart."""


@leaf
class Rows:
    """`token` is the last of the n tokens that a row has drawn, not yet in its cache; keys are its random stream; state
    is where it stands in the pattern."""

    cache: Any
    keys: Array
    token: Int[Array, " B"]
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    n: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    state: Int[Array, " B"] | None


class Known(NamedTuple):
    """The first n tokens of prompts, and a cache of one row that holds them; nothing is known by default."""

    n: int = 0
    cache: Any = None


class Decoder:
    """A model's programs under one `Sampling`: `begin`, `join` and `advance` above, called with host values."""

    def __init__(self, model, params, tokenizer, sampling: Sampling):
        params = {name: x for name, x in params.items() if name != "classes"}  # text needs the head of words
        self.limit = model.config.position.max_len()
        self._params, self._sampling, self._config = params, sampling, model.config
        self._programs = _programs(model)
        settings = sampling.settings()
        self._room = bucket(sampling.max_tokens, None)
        pattern, vocab_size = sampling.pattern, model.config.vocab_size
        self._rule = {
            "settings": settings,
            "ends": np.array(tokenizer.end_ids or (-1,), np.int32),
            "most": np.int32(sampling.max_tokens),
            "top_k": sampling.top_k if "temperature" in settings else 0,
            "n_words": min(vocab_size, tokenizer.vocab_size),
            "tokens": None if pattern is None else constraint(pattern, tokenizer, vocab_size),
        }

    def keeps(self, n: int) -> bool:
        """Whether what the model makes of a row's first n tokens serves whatever follows them."""
        return keeps(self._config.attention.mask, n)

    def shared(self, ids: Sequence[Sequence[int]]) -> Known:
        """The tokens that all prompts begin with, at most all but one of each, read once for all."""
        n = self.shared_length(ids)
        return Known(n, self.begin([ids[0][:n]], [0], Known()).cache) if n else Known()

    def shared_length(self, ids: Sequence[Sequence[int]]) -> int:
        """How many tokens `shared` reads; 0 where it does not pay or would not serve."""
        n = min(common(ids), *(len(row) - 1 for row in ids))
        return n if len(ids) > 1 and n >= LEAST and self.keeps(n) else 0

    def slots(self, ids: Sequence[Sequence[int]], parts: int = 8) -> int:
        """Room in the cache for each of these prompts and its completion, in sizes as `bucket` has them."""
        return bucket(max(map(len, ids)) + self._sampling.max_tokens - 1, self.limit, parts)

    def groups(self, lengths: Mapping[int, int], known: Known) -> Iterator[list[int]]:
        """Keys of prompts of so many tokens in groups for one `begin` each: either alone or, where they are short, READ
        tokens of a piece together, so that few programs are compiled and little padding is read."""
        by_size: dict[int, list[int]] = {}
        for key, n in sorted(lengths.items(), key=lambda item: item[1]):
            by_size.setdefault(piece(self._config, n, known.n), []).append(key)
        for size, keys in by_size.items():
            together = max(1, READ // size)
            whole = len(keys) // together * together
            yield from (keys[i : i + together] for i in range(0, whole, together))
            yield from ([key] for key in keys[whole:])

    def begin(
        self, ids: Sequence[Sequence[int]], streams: Sequence[int], known: Known, slots: int | None = None
    ) -> Rows:
        """Rows that have read their prompts and drawn one token.

        Args:
          streams: the number of each row's random stream.
          known: what all of them begin with.
          slots: of the cache; None takes those the prompts need.
        """
        longest = max(map(len, ids))
        slots = bucket(longest, self.limit) if slots is None else slots
        size = piece(self._config, longest, known.n)
        prompts, lengths = padded(ids, slots + size)
        return self._programs.begin(
            self._params,
            known.cache,
            prompts,
            np.int32(known.n),
            lengths,
            np.uint32(self._sampling.seed),
            np.asarray(streams, np.uint32),
            size=size,
            slots=slots,
            room=self._room,
            **self._rule,
        )

    def spread(self, new: Rows, n_rows: int, slots: int) -> Rows:
        """So many places with so much room, for others to join; until then the first of `new` is in each."""
        return self._programs.spread(new, n_rows, slots)

    def join(self, rows: Rows, new: Rows, at: Sequence[int]) -> Rows:
        """`rows`, used up, with new[i] in place at[i]."""
        return self._programs.join(rows, new, np.asarray(at, np.int32))

    def advance(self, rows: Rows, idle: np.ndarray, budget: int) -> Rows:
        """`rows`, used up, with up to `budget` more tokens each, fewer if one of those that are not `idle` [B] ends."""
        return self._programs.advance(self._params, rows, idle.copy(), np.int32(budget), **self._rule)


class _Programs(NamedTuple):
    begin: Any
    spread: Any
    join: Any
    advance: Any


@functools.lru_cache(maxsize=16)
def _programs(model) -> _Programs:
    def draw(rows, logits, settings, ends, most, tokens: Constraint | None, top_k, n_words):
        words = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        if n_words < logits.shape[-1]:
            logits = jnp.where(words < n_words, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.n)
        allowed = None if tokens is None else tokens.allowed(rows.state)
        token, logprob = choose(logits, keys, settings, top_k, rows.seen, allowed)
        (B, M), live = rows.tokens.shape, ~rows.done
        at = jnp.arange(B), jnp.where(live, rows.n, M)
        n = rows.n + live.astype(jnp.int32)
        return replace(
            rows,
            token=token,
            tokens=rows.tokens.at[at].set(token, mode="drop"),
            logprobs=rows.logprobs.at[at].set(logprob, mode="drop"),
            n=n,
            done=rows.done | (token[:, None] == ends[None]).any(1) | (n >= most),
            seen=None if rows.seen is None else rows.seen | (words == token[:, None]),
            state=None if tokens is None else tokens.after(rows.state, token),
        )

    rule = ("top_k", "n_words")

    @functools.partial(jax.jit, static_argnames=("size", "slots", "room", *rule))
    def begin(params, cache, prompts, start, lengths, seed, streams, *, size, slots, room, **settings):
        R, W = prompts.shape
        if cache is None:
            cache = model.new_cache(R, slots, params)
        else:
            cache = cache.take(jnp.zeros(R, jnp.int32)).resize(slots)
        logits, cache = read(model, params, cache, prompts, start, lengths, size)
        seen = None
        if "repetition_penalty" in settings["settings"]:
            valid = jnp.arange(W, dtype=jnp.int32)[None] < lengths[:, None]
            seen = jnp.zeros(logits.shape, bool).at[jnp.arange(R)[:, None], prompts].max(valid)
        rows = Rows(
            cache=cache,
            keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), streams),
            token=jnp.zeros(R, jnp.int32),
            tokens=jnp.zeros((R, room), jnp.int32),
            logprobs=jnp.zeros((R, room), jnp.float32),
            n=jnp.zeros(R, jnp.int32),
            done=jnp.zeros(R, bool),
            seen=seen,
            state=None if settings["tokens"] is None else jnp.zeros(R, jnp.int32),
        )
        return draw(rows, logits, **settings)

    @functools.partial(jax.jit, static_argnames=("n_rows", "slots"))
    def spread(new, n_rows, slots):
        first = jnp.zeros(n_rows, jnp.int32)
        rest = jax.tree.map(lambda x: x[first], replace(new, cache=None))
        return replace(rest, cache=new.cache.take(first).resize(slots))

    @functools.partial(jax.jit, donate_argnums=0)
    def join(rows, new, at):
        def put(x, y):
            return x.at[at].set(y)

        rest = jax.tree.map(put, replace(rows, cache=None), replace(new, cache=None))
        return replace(rest, cache=rows.cache.place(new.cache, at))

    @functools.partial(jax.jit, static_argnames=rule, donate_argnums=1)
    def advance(params, rows, idle, budget, **settings):
        def more(carry):
            k, rows = carry
            return (k < budget) & ~(rows.done & ~idle).any()

        def body(carry):
            k, rows = carry
            out, cache = model.step(params, rows.cache, rows.token[:, None], ~rows.done[:, None])
            return k + 1, draw(replace(rows, cache=cache), out.logits[:, 0], **settings)

        rows = replace(rows, done=rows.done | idle)
        return jax.lax.while_loop(more, body, (jnp.int32(0), rows))[1]

    return _Programs(begin, spread, join, advance)
