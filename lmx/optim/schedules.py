"""How the learning rate moves over a run of `steps` steps.

All schedules share one warmup and differ in what follows. With w warmup steps and step t counted from 0,

    lr_t = lr * (t + 1) / (w + 1)        for t < w         (the first step already moves)
    lr_t = lr * shape((t - w) / (steps - w))    for t >= w, from shape(0) = 1 to shape(1), reached at t =
    steps

and past `steps` the last value stays. Warmup is a share of the run if it is a float (0.02) and steps if it is
an int (100); the same holds for the decay of `WSD`. Values are float32 and may be traced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmx import values

Curve = Callable[[jax.typing.ArrayLike], jax.Array]


@dataclass(frozen=True)
class Schedule(ABC):
    """A shape of the learning rate: `schedule(lr, steps)` gives the function step -> learning rate.

    warmup: steps of linear growth at the start, as a share of the run (float, at most 1) or as a number
      (int).
    """

    warmup: float | int = 0.02

    def __call__(self, lr: float, steps: int) -> Curve:
        """The learning rate at each step, float32.

        Raises: ValueError if steps < 1, or if warmup (and decay) do not fit into them.
        """
        name = type(self).__name__
        if steps < 1:
            raise ValueError(f"{name}: steps={steps}; a run has 1 or more")
        warmup = n_steps(self.warmup, steps, f"{name}.warmup")
        shape = self.shaped(warmup, steps)

        def curve(step):
            t = jnp.asarray(step).astype(jnp.float32)
            return lr * jnp.where(t < warmup, (t + 1.0) / (warmup + 1.0), shape(t))

        return curve

    @abstractmethod
    def shaped(self, warmup: int, steps: int) -> Curve:
        """What follows the warmup: step (float32, >= warmup) -> share of the peak."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak, kept."""

    def shaped(self, warmup: int, steps: int) -> Curve:
        return jnp.ones_like


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from the peak down to `end` of it."""

    end: float = 0.0

    def __post_init__(self):
        values.check(self, end="[0, 1]")

    def shaped(self, warmup: int, steps: int) -> Curve:
        return lambda t: 1.0 - (1.0 - self.end) * _progress(t, warmup, steps)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak down to `end` of it.

    Source: Loshchilov & Hutter 2017 (SGDR), arXiv:1608.03983, equation 5, one cycle; `end` as in Hoffmann et
      al. 2022 (Chinchilla), arXiv:2203.15556, who decay to a tenth.
    """

    end: float = 0.1

    def __post_init__(self):
        values.check(self, end="[0, 1]")

    def shaped(self, warmup: int, steps: int) -> Curve:
        return lambda t: self.end + (1.0 - self.end) * _half_cosine(_progress(t, warmup, steps))


@dataclass(frozen=True)
class WSD(Schedule):
    """Warmup, stable, decay: the peak is kept exactly until the last `decay` of the run, then falls to `end`
    of it.

    A run can be prolonged from any checkpoint of the flat part: train it with more steps in a folder that has
    this checkpoint and no later one. Give `warmup` as steps then: a share of more steps is another warmup.
    Args:
      decay: length of the fall, a share of the whole run (float) or steps (int).
      shape: with p in [0, 1] through the fall: "linear" 1 - p, "sqrt" 1 - sqrt(p), "cosine" (1 + cos(pi p)) /
        2.
    Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, section 4; "sqrt" from Hägele et al. 2024,
      arXiv:2405.18392, section 3.
    """

    decay: float | int = 0.2
    end: float = 0.0
    shape: str = "sqrt"

    def __post_init__(self):
        values.check(self, end="[0, 1]")
        if self.shape not in _FALLS:
            raise ValueError(f"WSD: shape={self.shape!r} is unknown; use one of {', '.join(_FALLS)}")

    def shaped(self, warmup: int, steps: int) -> Curve:
        decay = n_steps(self.decay, steps, "WSD.decay")
        if warmup + decay > steps:
            raise ValueError(
                f"WSD: warmup={warmup} and decay={decay} steps exceed the run's steps={steps}; shorten one"
            )
        fall = _FALLS[self.shape]
        return lambda t: self.end + (1.0 - self.end) * fall(_progress(t, steps - decay, steps))


def n_steps(amount: float | int, steps: int, name: str) -> int:
    """A share of the run (float) or a number of steps (int), as a number of steps.

    Raises: ValueError for a share outside [0, 1] or a number outside [0, steps].
    """
    if isinstance(amount, float):
        if not 0.0 <= amount <= 1.0:
            raise ValueError(
                f"{name}={amount} is no share of a run; use a float in [0, 1], or an int for steps"
            )
        return round(amount * steps)
    if not 0 <= amount <= steps:
        raise ValueError(f"{name}={amount} steps do not fit into a run of {steps}; use a share such as 0.02")
    return amount


def _progress(t, start, stop):
    """0 up to `start`, 1 from `stop` on, and a straight line between."""
    return jnp.clip((t - start) / max(stop - start, 1), 0.0, 1.0)


def _half_cosine(p):
    return 0.5 * (1.0 + jnp.cos(jnp.pi * p))


_FALLS = {"linear": lambda p: 1.0 - p, "sqrt": lambda p: 1.0 - jnp.sqrt(p), "cosine": _half_cosine}
