"""avg@k and pass@k with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95% normal interval, which says nothing where all questions agree."""

    name: str
    value: float
    low: float
    high: float
    share: bool = True  # whether every value is in [0, 1]; the interval is then, too


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k completions drawn without replacement from n, of which c are right, hold a right one."""
    if k < 1:
        raise ValueError(f"`k` is {k}; it must be at least 1.")
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} completions per question, but there are {n}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def estimate(name: str, values: Sequence[float]) -> Estimate:
    """Mean of one value per question with its normal interval."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    half = NormalDist().inv_cdf(0.975) * error
    if not ((values >= 0) & (values <= 1)).all():
        return Estimate(name, mean, mean - half, mean + half, share=False)
    return Estimate(name, mean, max(0.0, mean - half), min(1.0, mean + half))


def summarise(correct: Sequence[Sequence[float]], ks: Sequence[int], prefix: str = "") -> list[Estimate]:
    """avg@n and pass@k of values per question and completion, `(Q, n)`; pass@k only where all are 0 or 1."""
    values = np.asarray(correct, dtype=np.float64)
    n = values.shape[1]
    estimates = [estimate(f"{prefix}avg@{n}", values.mean(axis=1))]
    if np.isin(values, (0, 1)).all():
        counts = values.sum(axis=1).astype(int)
        estimates += [estimate(f"{prefix}pass@{k}", [pass_at_k(n, int(c), k) for c in counts]) for k in ks]
    return estimates
