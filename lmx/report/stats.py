"""How sure a number is: intervals over seeds, over paired runs, and over resampled data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with the range that would cover the truth in `confidence` of repeated experiments.

    low and high are NaN when the data cannot give a range (a single seed). n counts what was averaged.
    str() rounds so that the half-width keeps two digits: '3.214 ± 0.012', or '3.21 [3.18, 3.29]' if lopsided.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    confidence: float = 0.95

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "–" if math.isnan(self.value) else f"{self.value}"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.value:.4g}"
        half = (self.high - self.low) / 2
        digits = 3 if half == 0 else min(12, max(0, 1 - int(f"{half:.1e}".split("e")[1])))
        if abs(self.high + self.low - 2 * self.value) <= 1e-6 * half + 1e-12 * abs(self.value):
            return f"{self.value:.{digits}f} ± {half:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def excludes(self, value: float) -> bool:
        """Whether the range is known and leaves `value` out; for a difference, ask about 0."""
        return bool(self.low > value or self.high < value)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean and its Student-t interval, mean ± t(confidence, n - 1) * s / sqrt(n), s with n - 1 below.

    One value gives a mean without a range.
    Raises: ValueError if values is empty, holds a NaN or infinity, or confidence is outside (0, 1).
    Source: Student 1908, "The probable error of a mean", Biometrika 6(1).
    """
    x = _finite(values, "mean_interval")
    _check_confidence(confidence)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, n=1, confidence=confidence)
    half = t_quantile(0.5 + confidence / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half, len(x), confidence)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of a[i] - b[i] with its t-interval, where a[i] and b[i] share a seed (or a document).

    Pairing removes what the seed does to both, so it sees differences that two separate intervals hide.
    Raises: ValueError if the lengths differ, and as `mean_interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"paired_difference: {len(a)} values against {len(b)}; pair them by seed first")
    return mean_interval([x - y for x, y in zip(a, b)], confidence)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of `statistic` over rows of `values`.

    Args:
      values: [n] or [n, ...]; rows are resampled with replacement, so a ratio of sums takes [n, 2].
      statistic: rows [n, ...] -> a number.
      resamples: how many times to draw; the ends of the range settle near 1000.
      seed: of the draws; the result is a function of the arguments alone.
    Raises: ValueError if values is empty or holds a NaN or infinity.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    x = _finite(values, "bootstrap")
    _check_confidence(confidence)
    rng = np.random.default_rng(seed)
    draws = [float(statistic(x[rng.integers(0, len(x), len(x))])) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(statistic(x)), float(low), float(high), len(x), confidence)


def resampled_sums(rows: np.ndarray, times: int, seed: int) -> np.ndarray:
    """Column sums of rows [n, columns] drawn n at a time with replacement, [times, columns]; the draws depend on n and
    the seed alone, so that two systems' rows of the same examples are drawn alike.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    none = np.zeros((0, rows.shape[1]))
    return np.concatenate([none, *(counts @ rows for counts in resampled_counts(len(rows), times, seed))])


def resampled_counts(n: int, times: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn, [some, n] at a time, `times` in all."""
    rng, step = np.random.default_rng(seed), max(1, (1 << 22) // n)
    for start in range(0, times, step):
        k = min(step, times - start)
        drawn = rng.integers(0, n, (k, n)) + n * np.arange(k)[:, None]
        yield np.bincount(drawn.ravel(), minlength=k * n).reshape(k, n)


def drawn_interval(value: float, draws: np.ndarray, n: int) -> Interval:
    """The 2.5 and 97.5 % quantiles of those draws that have a value; NaN for a single example, n = 1."""
    draws = draws[np.isfinite(draws)]
    if n < 2 or not len(draws):
        return Interval(float(value), n=n)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(value), float(low), float(high), n)


def t_quantile(p: float, df: int) -> float:
    """The p-quantile of Student's t distribution with df degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def _finite(values: Sequence[float] | np.ndarray, where: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ValueError(f"{where}: there are no values")
    if not np.isfinite(x).all():
        broken = int((~np.isfinite(x)).sum())
        raise ValueError(f"{where}: {broken} of {x.size} values are NaN or infinite; leave those out first")
    return x


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not between 0 and 1; 0.95 is usual")
