"""Means with Student's intervals, and Holm's correction of their p-values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mpmath
import numpy as np


def two_sided_p(t: float, degrees: int) -> float:
    """Probability under Student's distribution of a value at least as far from 0 as `t`."""
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


@cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """Half width, in standard errors, of an interval at that level."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - level else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval; the interval and p are NaN for fewer than two values."""

    count: int
    mean: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        count = len(values)
        if count < 2:
            return cls(count, float(values[0]) if count else math.nan, math.nan, math.nan, math.nan)
        mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
        half = t_quantile(count - 1) * error
        p = two_sided_p(mean / error, count - 1) if error else float(mean == 0)
        return cls(count, mean, mean - half, mean + half, p)

    def text(self, sign: bool = False) -> str:
        """In points (percent)."""
        if not self.count:
            return "none done"
        form = "{:+.1f}" if sign else "{:.1f}"
        mean, low, high = (form.format(100 * value) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if self.count > 1 else f"{mean} (one seed)"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction; NaN stays, and does not count as a claim."""
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected
