"""Which steps to branch: one short function per method, all behind `IBTPOConfig.branching`.

A strategy gives every step of a tree a priority; `select_steps` takes the eligible steps of highest priority. A new
method is a function with the signature of `ib` and a line in `STRATEGIES`.
"""

from collections.abc import Callable

import numpy as np

from .scores import TreeScores

Strategy = Callable[[TreeScores, np.random.Generator], np.ndarray]


def ib(scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """IB-TPO (arXiv 2605.28109): the highest IB-Score first."""
    return scores.ib_score


def confidence(scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """Lowest mean confidence of the children first: the IB-Score with all `rho = 1`, a control without rewards."""
    return -scores.mean_confidence


def random(scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """A step drawn uniformly."""
    return rng.random(len(scores.ib_score))


# `independent` never branches: all G rollouts start at the question, as in GRPO.
STRATEGIES: dict[str, Strategy | None] = {"ib": ib, "confidence": confidence, "random": random, "independent": None}


def select_steps(
    priority: np.ndarray, eligible: np.ndarray, count: int, deferred: np.ndarray | None = None
) -> list[int]:
    """The `count` eligible steps of highest priority, ties broken by the earlier step.

    Where fewer steps are eligible than asked for, they are taken again in the same order, so a tree always reaches
    its number of leaves.

    Args:
        priority: `(N,)`.
        eligible: boolean, `(N,)`, true somewhere.
        count: the paper's K.
        deferred: boolean, `(N,)`: steps taken only after all others.
    """
    ranked: list[int] = []
    for allowed in (eligible,) if deferred is None else (eligible & ~deferred, eligible & deferred):
        steps = np.flatnonzero(allowed)
        values = priority[steps]
        if len(ranked) + 1 == count and len(steps):
            best = values.argmax()  # the first of equal ones, or of those without a score
            if not np.isnan(values[best]):  # as with the paper's K = 1: nothing needs to be sorted
                return [*ranked, int(steps[best])]
        ranked += steps[np.argsort(-values, kind="stable")][: count - len(ranked)].tolist()
    return [ranked[index % len(ranked)] for index in range(count)]
