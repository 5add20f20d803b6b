"""How a model learns the order of tokens: three functions, whose defaults change nothing.

    embed(x, positions)            what is added to the token embeddings       Learned, Sinusoidal
    rotate(q_or_k, positions)      how queries and keys are turned             RoPE
    bias(q_positions, k_positions) what is added to the attention scores       ALiBi, T5

Axes: B rows, T and S positions, D d_model, N query heads, H head_dim. Positions are counted in tokens from 0
and restart in each packed segment. A scheme's own weights are named by `weights` and arrive as the dict `w`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmx import values

Weights = dict[str, Array]


@dataclass(frozen=True)
class Position:
    """No position, and the base of every scheme that has one."""

    biased: ClassVar[bool] = False

    def weights(self, d_model: int, n_heads: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """Name -> (shape, standard deviation of the initial normal values) of each weight of the scheme."""
        return {}

    def max_len(self) -> int | None:
        """How many positions the scheme can tell apart; None if it has no end."""
        return None

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], w: Weights
    ) -> Float[Array, "B T D"]:
        """Token embeddings with positions added."""
        return x

    def rotate(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        """Queries or keys turned by their positions."""
        return x

    def bias(
        self, q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], n_heads: int, w: Weights
    ) -> Float[Array, "B N T S"] | None:
        """What is added to the scores, float32; None where `biased` is False."""
        return None


@dataclass(frozen=True)
class NoPE(Position):
    """No position: order shows through the causal mask alone. Source: arXiv:2305.19466."""


@dataclass(frozen=True)
class Learned(Position):
    """A learned vector per position, added to the embedding.

    A row longer than `n_positions` raises ValueError; a position beyond it in a shorter row gives NaN, never
    another position's vector.
    Source: Gehring et al. 2017, arXiv:1705.03122, section 3.1.
    """

    n_positions: int

    def weights(self, d_model: int, n_heads: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"table": ((self.n_positions, d_model), 0.02)}

    def max_len(self) -> int | None:
        return self.n_positions

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], w: Weights
    ) -> Float[Array, "B T D"]:
        if x.shape[1] > self.n_positions:
            raise ValueError(
                f"Learned: a row of {x.shape[1]} tokens exceeds n_positions={self.n_positions}; shorten it"
                " or train with a longer table"
            )
        return x + jnp.take(w["table"], positions, axis=0, mode="fill").astype(x.dtype)


@dataclass(frozen=True)
class Sinusoidal(Position):
    """Adds scale * sin(p theta^(-2i/D)) to feature 2i and the cosine to feature 2i + 1; D is even.

    The paper multiplies token embeddings by sqrt(D) before the sum; where embeddings are small, a small
    `scale` keeps the same balance.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """

    theta: float = 1e4
    scale: float = 1.0

    def __post_init__(self):
        values.check(self, theta="(0, inf)", scale="(-inf, inf)")

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], w: Weights
    ) -> Float[Array, "B T D"]:
        D = x.shape[-1]
        if D % 2:
            raise ValueError(f"Sinusoidal: d_model={D} is odd; sines and cosines come in pairs")
        angle = _angles(positions, _frequencies(self.theta, D))
        waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, D)
        return x + (self.scale * waves).astype(x.dtype)


@dataclass(frozen=True)
class Scaling:
    """How RoPE's frequencies change for rows longer than those trained on; this base changes nothing.

    `frequencies` maps theta and the number d of rotated features to d/2 float64 angles per position, in
    radians.
    """

    def frequencies(self, theta: float, d: int) -> np.ndarray:
        return _frequencies(theta, d)

    def magnitude(self) -> float:
        """What sines and cosines are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Linear(Scaling):
    """Positions squeezed by `factor`. Source: Chen et al. 2023, arXiv:2306.15595, equation 4."""

    factor: float

    def frequencies(self, theta: float, d: int) -> np.ndarray:
        return _frequencies(theta, d) / self.factor


@dataclass(frozen=True)
class Divided(Scaling):
    """Each pair's frequency divided by a number of its own, as GGUF files store the stretch of Llama 3."""

    by: tuple[float, ...]

    def frequencies(self, theta: float, d: int) -> np.ndarray:
        if len(self.by) != d // 2 or min(self.by) <= 0:
            raise ValueError(
                f"Divided: {len(self.by)} divisors, all to be positive, for {d // 2} feature pairs"
            )
        return _frequencies(theta, d) / np.asarray(self.by)


@dataclass(frozen=True)
class NTK(Scaling):
    """A larger base, theta * factor^(d / (d - 2)): slow pairs stretch by `factor`, the fastest stays.

    The "dynamic" form is this one with factor * S / original_len - (factor - 1) in place of factor.
    Source: bloc97 2023, "NTK-aware scaled RoPE"; written down in Peng et al. 2023, arXiv:2309.00071, section
    3.1.
    """

    factor: float

    def frequencies(self, theta: float, d: int) -> np.ndarray:
        if d < 4:
            raise ValueError(f"NTK: {d} rotated features leave no slow pair to stretch; use 4 or more")
        return _frequencies(theta * self.factor ** (d / (d - 2)), d)


@dataclass(frozen=True)
class YaRN(Scaling):
    """Squeezes pairs that turn less than `beta_slow` times in `original_len`, keeps those above `beta_fast`.

    Sines and cosines are multiplied by `magnitude`, 0.1 ln(factor) + 1 by default, which sharpens the
    softmax.
    Source: Peng et al. 2023, arXiv:2309.00071, sections 3.2-3.4; the ramp runs over pair indices and its ends
    are rounded outwards, as in the authors' code and HF.
    """

    factor: float
    original_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def frequencies(self, theta: float, d: int) -> np.ndarray:
        def pair(turns: float) -> float:
            return d * math.log(self.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair(self.beta_fast)), 0)
        high = min(math.ceil(pair(self.beta_slow)), d - 1)
        ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 1e-3), 0, 1)
        f = _frequencies(theta, d)
        return ramp * f / self.factor + (1 - ramp) * f

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3(Scaling):
    """Squeezes wavelengths above original_len / low_freq_factor, keeps those below original_len /
    high_freq_factor.

    Source: Llama 3.1 reference code (`apply_scaling`), as in HF `_compute_llama3_parameters`;
    arXiv:2407.21783, 3.4.2.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192

    def frequencies(self, theta: float, d: int) -> np.ndarray:
        f = _frequencies(theta, d)
        turns = self.original_len * f / (2 * math.pi)
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return (1 - keep) * f / self.factor + keep * f


@dataclass(frozen=True)
class RoPE(Position):
    """Turns feature pair (i, i + d/2) of each head by positions * theta^(-2i/d) radians, d = fraction * H.

    Scores then depend on positions through their difference alone. Features from d on stay as they are.
    Args:
      theta: dimensionless; larger turns more slowly and reaches further.
      fraction: share of the head's features that turn, in (0, 1].
      scaling: of the frequencies, for rows longer than those trained on.
    Raises: ValueError if fraction is outside (0, 1] or d is odd.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; halves rather than neighbours are paired, as in
    HF Llama.
    Partial rotation: GPT-NeoX, arXiv:2204.06745, section 2.1.
    """

    theta: float = 1e4
    fraction: float = 1.0
    scaling: Scaling = Scaling()

    def __post_init__(self):
        values.check(self, theta="(0, inf)")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE: fraction={self.fraction} is outside (0, 1]; use NoPE() to turn nothing")

    def rotate(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        H = x.shape[-1]
        d = int(self.fraction * H)
        if d < 2 or d % 2:
            raise ValueError(
                f"RoPE: fraction={self.fraction} of head_dim={H} is {d} features; use an even count"
            )
        angle = _angles(positions, self.scaling.frequencies(self.theta, d))[:, :, None]
        m = self.scaling.magnitude()
        cos, sin = m * jnp.cos(angle), m * jnp.sin(angle)
        x1, x2, rest = jnp.split(x, [d // 2, d], -1)
        a, b = x1.astype(jnp.float32), x2.astype(jnp.float32)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
        return jnp.concatenate([turned, rest], -1)


@dataclass(frozen=True)
class ALiBi(Position):
    """Scores fall by slope * |i - j|, a fixed slope per head; nothing is learned.

    Slopes are 2^(-8n/N) for n = 1..N where N is a power of two. Otherwise they are those of the power of two
    P below N, then every other slope of 2P, as in the authors' code.
    Source: Press et al. 2022, arXiv:2108.12409, section 3 and its repository.
    """

    biased: ClassVar[bool] = True

    def bias(
        self, q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], n_heads: int, w: Weights
    ) -> Float[Array, "B N T S"] | None:
        slopes = jnp.asarray(alibi_slopes(n_heads), jnp.float32)[None, :, None, None]
        return -slopes * jnp.abs(_relative(q_positions, k_positions))[:, None].astype(jnp.float32)


@dataclass(frozen=True)
class T5(Position):
    """A learned score per head and bucket of distance: one bucket per small distance, then ever wider ones.

    With n = i - j >= 0 and m half the buckets: bucket n for n < m, else
    min(m + floor(m * ln(n / m) / ln(max_distance / m)), n_buckets - 1). Keys ahead of the query share bucket
    0, or with `bidirectional` take the other half of the buckets.
    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, and `_relative_position_bucket` of its code.
    There the logarithm is float32; here it is float64 on the host, which differs at most where the real value
    is an integer.
    """

    n_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    biased: ClassVar[bool] = True

    def __post_init__(self):
        half = self._one_side() // 2
        if half < 1 or self.max_distance <= half:
            raise ValueError(
                f"T5: n_buckets={self.n_buckets} and max_distance={self.max_distance} leave no wide buckets;"
                f" use max_distance > {max(half, 1)} and n_buckets >= {4 if self.bidirectional else 2}"
            )

    def weights(self, d_model: int, n_heads: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"table": ((self.n_buckets, n_heads), 0.02)}

    def bias(
        self, q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], n_heads: int, w: Weights
    ) -> Float[Array, "B N T S"] | None:
        behind = _relative(q_positions, k_positions)
        buckets = jnp.asarray(self.buckets())
        bucket = buckets[jnp.clip(jnp.abs(behind) if self.bidirectional else behind, 0, self.max_distance)]
        if self.bidirectional:
            bucket = bucket + jnp.where(behind < 0, self._one_side(), 0)
        return jnp.moveaxis(w["table"].astype(jnp.float32)[bucket], -1, 1)

    def buckets(self) -> np.ndarray:
        """The bucket of each distance 0..max_distance, int32."""
        side = self._one_side()
        half = side // 2
        n = np.arange(self.max_distance + 1)
        share = np.log(np.maximum(n, 1) / half) / math.log(self.max_distance / half)
        wide = np.minimum(half + np.floor((side - half) * share + 1e-9), side - 1)
        return np.where(n < half, n, wide).astype(np.int32)

    def _one_side(self) -> int:
        return self.n_buckets // 2 if self.bidirectional else self.n_buckets


def alibi_slopes(n_heads: int) -> list[float]:
    """ALiBi's slope of each head."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]


def _frequencies(theta: float, d: int) -> np.ndarray:
    return theta ** (-np.arange(0, d, 2) / d)


def _angles(positions: Int[Array, "B T"], frequencies: np.ndarray) -> Float[Array, "B T F"]:
    return positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]


def _relative(q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"]) -> Int[Array, "B T S"]:
    return q_positions[:, :, None] - k_positions[:, None, :]
