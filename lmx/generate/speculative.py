"""Speculative decoding: a small model drafts n tokens, the target checks them in one step, and keeps some.

    draft:   x_1..x_n, each from q_i, the small model's distribution after the x before it
    check:   p_1..p_n+1, the target's at the same places, from one step over all of them
    keep:    x_i while u_i < p_i(x_i) / q_i(x_i), u_i uniform
    go on:   from max(p_i - q_i, 0) renormalised at the first x_i not kept, from p_n+1 after the last

Every token then follows p, whatever q is: a draft changes the time that completions take, and nothing else.
p and q are what `filtered` leaves, and a single point each where the choice is greedy. A round gives each row
its own number of tokens, 1 to n + 1; both caches then forget what was not kept.

Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318, algorithm 2.
Axes: B rows, M most tokens, n drafted tokens of a round, V ids that the tokenizer knows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmx.generate.decode import Completion, Prompt, Writer, prompt_ids
from lmx.generate.reading import bucket, padded, piece, read
from lmx.generate.sampling import Sampling, Settings, choose, filtered
from lmx.weights import leaf


@dataclass(frozen=True, eq=False)
class Draft:
    """A smaller model with the target's tokenizer, and how many tokens it drafts in a round."""

    model: Any
    params: Any
    n_tokens: int = 4

    def __post_init__(self):
        if self.n_tokens < 1:
            raise ValueError(f"Draft: n_tokens={self.n_tokens}; draft at least 1, or use `generate`")


@dataclass(frozen=True)
class Acceptance:
    """drafted: tokens that the target checked; accepted: those of them in the completions.

    steps: of the target after the prompts' own; one over B rows under way counts B times.
    """

    drafted: int
    accepted: int
    steps: int

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """Beside what it accepts, a step gives one token of the target's own."""
        return 1 + self.accepted / self.steps if self.steps else float("nan")

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(
            self.drafted + other.drafted, self.accepted + other.accepted, self.steps + other.steps
        )

    def __str__(self) -> str:
        return (
            f"{self.accepted} of {self.drafted} tokens accepted ({self.rate:.0%}), "
            f"{self.tokens_per_step:.2f} tokens per step of the target"
        )


@leaf
class State:
    """Completions under way. `last` are the two latest tokens: the target's cache lacks the second, the draft's is
    taken back to before the first. n, drafted, steps: tokens drawn, tokens checked and rounds of each row."""

    cache: Any
    draft_cache: Any
    keys: Array
    last: Int[Array, "B 2"]
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    n: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    drafted: Int[Array, " B"]
    steps: Int[Array, " B"]


def speculate(
    model,
    params,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),
    *,
    draft: Draft,
    rows: Sequence[int] | None = None,
    chunk: int = 4,
    show: Callable[[int, str], None] | None = None,
) -> tuple[list[Completion], Acceptance]:
    """What `generate` answers, in fewer steps of the target: the same tokens if greedy, else the same distribution.

    Greedy tokens differ from those of `generate` only where two are so nearly alike that the rounding of a step
    over several tokens decides. Log probabilities are the target's.

    Args:
      prompts, rows: as in `generate`; a row's completion does not depend on the others, but on n_tokens.
      chunk: rounds between two looks for stop strings, or two calls of `show`.
      show: called with a prompt's place and the text that became certain; joined, a completion's text.
    Raises: ValueError as `generate` does, for the target and for the draft; and if one of the two does not know
      all ids of the tokenizer; or if sampling has a pattern.
    """
    if sampling.pattern is not None:
        raise ValueError(
            f"draft: pattern={sampling.pattern!r:.80} is not supported with a draft; leave one of the two out"
        )
    most = sampling.max_tokens
    ids = prompt_ids(model, tokenizer, prompts, most)
    _check(model, tokenizer, draft, ids, most)
    rows = range(len(ids)) if rows is None else rows
    if len(rows) != len(ids):
        raise ValueError(f"speculate: {len(rows)} rows for {len(ids)} prompts; give one number per prompt")
    pause = chunk if sampling.stop or show else most
    show = show or (lambda place, text: None)
    writers, shown = [Writer(tokenizer, sampling) for _ in ids], [0] * len(ids)
    done, counts = np.zeros(len(ids), bool), Acceptance(0, 0, 0)
    for found, counts in _rounds(model, params, tokenizer, ids, sampling, draft, rows, pause, done):
        for b, (writer, pairs) in enumerate(zip(writers, found)):
            for token, logprob in pairs:
                text = writer.add(token, logprob)
                if text:
                    shown[b] += len(text)
                    show(b, text)
            done[b] = writer.reason is not None
    completions = [writer.finish() for writer in writers]
    for b, completion in enumerate(completions):
        if len(completion.text) > shown[b]:
            show(b, completion.text[shown[b] :])
    return completions, counts


def distribution(
    logits: Float[Array, "B V"],
    settings: Settings,
    top_k: int = 0,
    seen: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """The probabilities that `choose` draws from; one point if the settings are greedy."""
    kept = filtered(logits, settings, top_k, seen)
    if "temperature" in settings:
        return jax.nn.softmax(kept, -1)
    return jax.nn.one_hot(jnp.argmax(kept, -1), kept.shape[-1])


def residual(p: Float[Array, "B V"], q: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """What to draw from, up to a factor, where a token drawn from q was not kept under p: max(p - q, 0)."""
    left = jnp.maximum(p - q, 0.0)
    # Rounding can refuse a token of two distributions that are alike, and leave nothing.
    return jnp.where(left.sum(-1, keepdims=True) > 0, left, p)


def _draw(p: Float[Array, "B V"], keys: Array, settings: Settings) -> Int[Array, " B"]:
    if "temperature" in settings:
        return jax.vmap(jax.random.categorical)(keys, jnp.log(p)).astype(jnp.int32)
    return jnp.argmax(p, -1).astype(jnp.int32)


def _check(model, tokenizer, draft: Draft, ids: list[list[int]], most: int) -> None:
    here, there, known = model.config.vocab_size, draft.model.config.vocab_size, tokenizer.vocab_size
    if here != there and min(here, there) < known:
        raise ValueError(
            f"draft: its vocab_size={there}, the target's {here}, and the tokenizer has {known} ids; both must "
            "know all of them, so use a draft that was trained with the same tokenizer"
        )
    try:
        prompt_ids(draft.model, tokenizer, ids, most)
    except ValueError as error:
        raise ValueError(f"draft: {error}") from None


def _rounds(
    model,
    params,
    tokenizer,
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    draft: Draft,
    rows: Sequence[int],
    pause: int,
    done: np.ndarray,
) -> Iterator[tuple[list[list[tuple[int, float]]], Acceptance]]:
    """(new tokens with log probabilities of each row, counts so far), every `pause` rounds until all are done.

    done [B]: the caller sets it between two items for rows that need no more.
    """
    most = sampling.max_tokens
    if not ids or most == 0:
        return
    ends = np.array(tokenizer.end_ids, np.int32)
    start, advance = _programs(model, draft.model)
    longest = max(map(len, ids))
    configs = model.config, draft.model.config
    slots, draft_slots = (bucket(longest + most - 1, config.position.max_len()) for config in configs)
    sizes = tuple(piece(config, longest) for config in configs)
    prompts, lengths = padded(ids, slots + max(sizes))
    settings = sampling.settings()
    fixed = {
        "top_k": sampling.top_k if "temperature" in settings else 0,
        "n_words": min(model.config.vocab_size, tokenizer.vocab_size),
    }
    state = start(
        params,
        draft.params,
        prompts,
        lengths,
        np.uint32(sampling.seed),
        np.asarray(rows, np.uint32),
        settings,
        ends,
        np.int32(most),
        sizes=sizes,
        slots=slots,
        draft_slots=draft_slots,
        room=bucket(most, None),
        **fixed,
    )
    fixed["n_tokens"] = max(1, min(draft.n_tokens, most - 1))
    before = np.zeros(len(ids), np.int32)
    while True:
        n, tokens, logprobs, finished, drafted, steps = jax.device_get(
            (state.n, state.tokens, state.logprobs, state.done, state.drafted, state.steps)
        )
        found = [
            list(zip(tokens[b, i:j].tolist(), logprobs[b, i:j].tolist()))
            for b, (i, j) in enumerate(zip(before, n))
        ]
        # Of each row's tokens the first came from its prompt, and one from each step.
        accepted = int((n - 1 - steps).sum())
        yield found, Acceptance(int(drafted.sum()), accepted, int(steps.sum()))
        if (finished | done).all():
            return
        before = n
        state = advance(
            params, draft.params, state, np.int32(pause), done.copy(), settings, ends, np.int32(most), **fixed
        )


@functools.lru_cache(maxsize=16)
def _programs(model, draft):
    """The two compiled programs of a pair of models; jax compiles each once per shape and set of filters."""

    def keys_of(keys, first, n):
        """[B, n, 3]: of token number first, first + 1, ... of each row; to draft it, to keep it, to draw it anew.

        Those of a number serve again if its token was not reached, as nothing has depended on them then.
        """
        number = first[:, None] + jnp.arange(n, dtype=jnp.int32)[None]
        one = jax.vmap(lambda key, i: jax.random.split(jax.random.fold_in(key, i), 3), (None, 0))
        return jax.vmap(one)(keys, number)

    def is_end(tokens, ends):
        return (tokens[..., None] == jnp.broadcast_to(ends, (*tokens.shape, ends.shape[0]))).any(-1)

    def logits_at(out, at, n_words):
        hidden = out.hidden[jnp.arange(at.shape[0]), at]
        return dataclasses.replace(out, hidden=hidden[:, None]).logits[:, 0, :n_words]

    def mark(seen, tokens, some):
        """seen, with those of tokens [B, t] that `some` [B, t] names."""
        if seen is None:
            return None
        rows = jnp.arange(tokens.shape[0])[:, None]
        return seen.at[rows, jnp.where(some, tokens, seen.shape[1])].set(True, mode="drop")

    @functools.partial(jax.jit, static_argnames=("sizes", "slots", "draft_slots", "room", "top_k", "n_words"))
    def start(
        params,
        draft_params,
        prompts,
        lengths,
        seed,
        rows,
        settings,
        ends,
        most,
        *,
        sizes,
        slots,
        draft_slots,
        room,
        top_k,
        n_words,
    ):
        B, W = prompts.shape
        cache, draft_cache = model.new_cache(B, slots, params), draft.new_cache(B, draft_slots, draft_params)
        logits, cache = read(model, params, cache, prompts, 0, lengths, sizes[0])
        _, draft_cache = read(draft, draft_params, draft_cache, prompts, 0, lengths, sizes[1])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
        seen = jnp.zeros((B, n_words), bool) if "repetition_penalty" in settings else None
        seen = mark(seen, prompts, jnp.arange(W, dtype=jnp.int32)[None] < lengths[:, None])
        n = jnp.zeros(B, jnp.int32)
        token, logprob = choose(logits[:, :n_words], keys_of(keys, n, 1)[:, 0, 2], settings, top_k, seen)
        return State(
            cache=cache,
            draft_cache=draft_cache,
            keys=keys,
            last=jnp.stack([prompts[jnp.arange(B), lengths - 1], token], 1),
            tokens=jnp.zeros((B, room), jnp.int32).at[:, 0].set(token),
            logprobs=jnp.zeros((B, room), jnp.float32).at[:, 0].set(logprob),
            n=n + 1,
            done=is_end(token, ends) | (most == 1),
            seen=mark(seen, token[:, None], True),
            drafted=n,
            steps=n,
        )

    def propose(draft_params, state, live, useful, keys, settings, top_k, n_words):
        """(tokens [B, n], their distributions q [B, n, V], seen before each and after all [B, n + 1, V] or None,
        cache). Only the first `useful` [B] of them enter the cache."""
        B, n = keys.shape

        def one(cache, fed, valid, seen, keys):
            out, cache = draft.step(draft_params, cache, fed, valid)
            logits = logits_at(out, jnp.full(B, fed.shape[1] - 1), n_words)
            q = distribution(logits, settings, top_k, seen)
            token = _draw(q, keys, settings)
            return (cache, token, mark(seen, token[:, None], True)), (token, q, seen)

        def next_one(carry, xs):
            (cache, token, seen), (i, keys) = carry, xs
            return one(cache, token[:, None], (i < useful)[:, None], seen, keys)

        cache = state.draft_cache.rewind(state.cache.length - 1)
        valid = jnp.broadcast_to(live[:, None], (B, 2))
        carry, first = one(cache, state.last, valid, state.seen, keys[:, 0])
        numbers = jnp.arange(1, n, dtype=jnp.int32)
        (cache, _, seen), others = jax.lax.scan(next_one, carry, (numbers, keys[:, 1:].T))
        tokens, q, seens = jax.tree.map(
            lambda x, xs: jnp.concatenate([x[:, None], jnp.moveaxis(xs, 0, 1)], 1), first, others
        )
        if seen is not None:
            seens = jnp.concatenate([seens, seen[:, None]], 1)
        return tokens, q, seens, cache

    def one_round(params, draft_params, state, settings, ends, most, top_k, n_words, n_tokens):
        B, live = state.n.shape[0], ~state.done
        rows, places = jnp.arange(B), jnp.arange(n_tokens + 1, dtype=jnp.int32)[None]
        keys = keys_of(state.keys, state.n, n_tokens + 1)
        useful = jnp.where(live, jnp.minimum(n_tokens, most - 1 - state.n), 0)
        drafts, q, seens, draft_cache = propose(
            draft_params, state, live, useful, keys[:, :-1, 0], settings, top_k, n_words
        )

        fed = jnp.concatenate([state.last[:, 1:], drafts], 1)
        length = state.cache.length
        out, cache = model.step(params, state.cache, fed, live[:, None] & (places <= useful[:, None]))
        logits = out.logits[..., :n_words]
        flat = None if seens is None else seens.reshape(-1, n_words)
        p = distribution(logits.reshape(-1, n_words), settings, top_k, flat).reshape(logits.shape)

        u = jax.vmap(jax.vmap(jax.random.uniform))(keys[:, :-1, 1])
        p_draft, q_draft = (jnp.take_along_axis(x, drafts[..., None], 2)[..., 0] for x in (p[:, :-1], q))
        kept = (u * q_draft < p_draft) & (places[:, :-1] < useful[:, None])
        n_kept = jnp.cumprod(kept, 1, dtype=jnp.int32).sum(1)
        # Where nothing was refused there is no q: what is left of p is all of it.
        refusing = jnp.where((n_kept < useful)[:, None], q[rows, jnp.minimum(n_kept, n_tokens - 1)], 0.0)
        own = _draw(residual(p[rows, n_kept], refusing), keys[rows, n_kept, 2], settings)

        padded = jnp.concatenate([drafts, own[:, None]], 1)
        new = jnp.where(places < n_kept[:, None], padded, own[:, None])
        end = is_end(new, ends) & (places <= n_kept[:, None])
        n_new = jnp.where(end.any(1), jnp.argmax(end, 1).astype(jnp.int32), n_kept) + 1
        n_new = jnp.where(live, n_new, 0)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), new[..., None], 2)[..., 0]
        some = places < n_new[:, None]
        at = jnp.where(some, state.n[:, None] + places, state.tokens.shape[1])
        following = jnp.concatenate([state.last, new], 1)
        n = state.n + n_new
        return State(
            cache=cache.rewind(length + n_new),
            draft_cache=draft_cache,
            keys=state.keys,
            last=jnp.stack([following[rows, n_new], following[rows, n_new + 1]], 1),
            tokens=state.tokens.at[rows[:, None], at].set(new, mode="drop"),
            logprobs=state.logprobs.at[rows[:, None], at].set(log_p, mode="drop"),
            n=n,
            done=state.done | end.any(1) | (n >= most),
            seen=mark(state.seen, new, some),
            drafted=state.drafted + useful,
            steps=state.steps + live.astype(jnp.int32),
        )

    @functools.partial(jax.jit, static_argnames=("top_k", "n_words", "n_tokens"), donate_argnums=2)
    def advance(params, draft_params, state, rounds, done, settings, ends, most, **fixed):
        def more(carry):
            state, i = carry
            return (i < rounds) & ~state.done.all()

        def body(carry):
            state, i = carry
            return one_round(params, draft_params, state, settings, ends, most, **fixed), i + 1

        state = dataclasses.replace(state, done=state.done | done)
        return jax.lax.while_loop(more, body, (state, jnp.int32(0)))[0]

    return start, advance
