"""From logits to a token: filters as pure functions of logits [B, V], applied in a fixed order.

    pattern -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

Each sees what the one before left, as in HF transformers, and is absent from the compiled program when off. A
filter removes a token by setting its logit to -inf, and never removes the likeliest. Tokens with equal logits
stay or go together, so the result does not depend on their ids. Logits are float32.
Axes: B rows, V vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmx.generate.automaton import automaton

Scalar = float | np.floating | Array
Settings = dict[str, Scalar]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a completion ends; each setting's default but max_tokens is "off".

    Args:
      temperature: logits are divided by it; 0 is greedy: the likeliest token, the lowest id among equals.
      top_k: keeps the k likeliest tokens; 0 is off.
      top_p: keeps the likeliest tokens that together reach this probability; 1 is off.
      min_p: keeps tokens at least this times as likely as the likeliest; 0 is off.
      repetition_penalty: weakens tokens of the prompt and of the completion so far; 1 is off.
      max_tokens: the completion ends after this many, eos included; 0 is allowed.
      stop: strings that end the completion; the text stops right before them.
      seed: in [0, 2**32); the same seed, prompt and row give the same completion.
      pattern: a regular expression, as `automaton` reads it. A completion whose reason is "eos" matches it from its
        first to its last character; one cut by max_tokens or a stop string begins a text that does. None is off.

    >>> Sampling(pattern="(हाँ|नहीं)", max_tokens=20).pattern
    '(हाँ|नहीं)'

    Raises: ValueError for a value that means nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0
    pattern: str | None = None

    def __post_init__(self):
        if self.pattern is not None:
            automaton(self.pattern)
        if isinstance(self.stop, str):
            raise ValueError(f"Sampling: stop={self.stop!r} is one string; write ({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise ValueError("Sampling: stop holds an empty string, which would end every completion at once")
        for name, fits, way_out in (
            ("temperature", 0 <= self.temperature < math.inf, "use 0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "use 0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "use a share in (0, 1]; 1 is off"),
            ("min_p", 0 <= self.min_p <= 1, "use a share in [0, 1]; 0 is off"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "use 1 (off) or more, such as 1.2",
            ),
            (
                "max_tokens",
                0 <= self.max_tokens <= 2**29,
                "use 0 to 2**29: positions are int32, and room for them is made in powers of two",
            ),
            ("seed", 0 <= self.seed < 2**32, "use an integer in [0, 2**32)"),
        ):
            if not fits:
                raise ValueError(f"Sampling: {name}={getattr(self, name)}; {way_out}")

    def settings(self) -> Settings:
        """The filters that are on, by name, as float32 numbers: arguments of a compiled program, so that
        another temperature needs no compilation. `top_k` is not among them: it decides array shapes."""
        on = {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty != 1 else {}
        if self.temperature > 0:
            on["temperature"] = self.temperature
            on |= {"top_p": self.top_p} if self.top_p < 1 else {}
            on |= {"min_p": self.min_p} if self.min_p > 0 else {}
        return {name: np.float32(value) for name, value in on.items()}


def choose(
    logits: Float[Array, "B V"],
    keys: Array,
    settings: Settings,
    top_k: int = 0,
    seen: Bool[Array, "B V"] | None = None,
    allowed: Bool[Array, "B V"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token for each row, int32, and its log probability before any filter, in nats.

    Args:
      keys: a random key for each row [B].
      settings, top_k: `Sampling.settings()` and `Sampling.top_k`; without a temperature the choice is greedy.
      seen: which tokens each row holds already; read only under a repetition penalty.
      allowed: the tokens that a pattern leaves to each row, at least one; None is all.
    """
    possible = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
    kept = filtered(possible, settings, top_k, seen)
    if "temperature" in settings:
        tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    else:
        tokens = jnp.argmax(kept, -1).astype(jnp.int32)
    drawn = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    return tokens, drawn - jax.nn.logsumexp(logits, -1)


def filtered(
    logits: Float[Array, "B V"],
    settings: Settings,
    top_k: int = 0,
    seen: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Logits after every filter that is on, in the order given above; softmax of them is what is drawn from.

    Sorts at most once, and only the k largest where top-k is on; greedy settings sort nothing.
    """
    if "repetition_penalty" in settings:
        logits = repetition_penalty(logits, seen, settings["repetition_penalty"])
    if "temperature" not in settings:
        return logits
    logits = temperature(logits, settings["temperature"])
    largest = None
    if top_k:
        largest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits < largest[:, -1:], -jnp.inf, logits)
    if "top_p" in settings:
        logits = top_p(logits, settings["top_p"], largest)
    if "min_p" in settings:
        logits = min_p(logits, settings["min_p"])
    return logits


def temperature(logits: Float[Array, "B V"], t: Scalar) -> Float[Array, "B V"]:
    """(logits - max) / t: their softmax is that of logits / t, and no t, however small, overflows to +inf."""
    return (logits - jnp.max(logits, -1, keepdims=True)) / t


def top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keeps tokens that fewer than k others exceed; k = 0 keeps all.

    Source: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    if k == 0:
        return logits
    largest = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0]
    return jnp.where(logits < largest[:, -1:], -jnp.inf, logits)


def top_p(
    logits: Float[Array, "B V"], p: Scalar, largest: Float[Array, "B k"] | None = None
) -> Float[Array, "B V"]:
    """Keeps tokens whose likelier ones together have probability below p: the smallest set that reaches p.

    largest: all logits above -inf in descending order, where known (one of those equal to the last
      is enough); otherwise they are sorted here.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1; the token that crosses p is kept, as there.
    """
    largest = jax.lax.sort(logits, is_stable=False)[:, ::-1] if largest is None else largest
    probability = jnp.exp(largest - jax.nn.logsumexp(logits, -1, keepdims=True))
    before = jnp.cumsum(probability, -1) - probability
    last = jnp.min(jnp.where(before < p, largest, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < last, -jnp.inf, logits)


def min_p(logits: Float[Array, "B V"], p: Scalar) -> Float[Array, "B V"]:
    """Keeps tokens with at least p times the largest probability.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    return jnp.where(logits < jnp.max(logits, -1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


def repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Scalar
) -> Float[Array, "B V"]:
    """Divides the logit of a token seen before by `penalty` if positive, multiplies it if negative.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, which always divides; a negative logit
    would so become likelier, hence the sign rule of HF transformers.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
