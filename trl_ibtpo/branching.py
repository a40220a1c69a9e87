"""Which steps to branch: one short function per method, all behind `IBTPOConfig.branching`.

A strategy gives every step of a tree a priority; `select_steps` takes the eligible steps of highest priority. A new
method is a function with the signature of `ib` and a line in `STRATEGIES`; a user's own function is given to the
trainer in place of a name, and works the same way.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .scores import TreeScores
from .tree import RolloutTree


class Strategy(Protocol):
    """A function, or an object that can be called like one, with attributes that may be left out."""

    uses_rewards: bool = True
    """Whether it looks at rewards. A tree of one that does not (`False`) never waits for a reward, and knows none."""

    def __call__(self, tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
        """Priority of every step, `(N,)`; NaN is last.

        Args:
            tree: as grown so far: token ids, log-probabilities, rewards. It must not be changed.
            scores: of the same tree.
            rng: the tree's own, so that trees do not depend on what else grows.
        """


class LearningStrategy(Strategy, Protocol):
    """One that learns from the trees it has chosen for. What it knows is saved with every checkpoint."""

    def evidence(self, tree: RolloutTree, scores: TreeScores) -> list[Any]:
        """What a tree that is done teaches: values that JSON can hold."""

    def learn(self, evidence: Sequence[Any]) -> None:
        """From the evidence of all trees of a generation batch, the same in every process."""

    def state_dict(self) -> dict[str, Any]:
        """What it knows, as values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""


def without_rewards(strategy: Callable) -> Callable:
    """Mark a strategy that does not look at rewards, so that no tree waits for them."""
    strategy.uses_rewards = False
    return strategy


def uses_rewards(strategy: Strategy | None) -> bool:
    """Whether a strategy looks at rewards; one that does not say is taken to."""
    return strategy is not None and getattr(strategy, "uses_rewards", True)


def ib(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """IB-TPO (arXiv 2605.28109): the highest IB-Score first."""
    return scores.ib_score


@without_rewards
def confidence(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """Lowest mean confidence of the children first: the IB-Score with all `rho = 1`, a control without rewards."""
    return -scores.mean_confidence


@without_rewards
def random(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """A step drawn uniformly."""
    return rng.random(len(tree))


# `independent` never branches: all G rollouts start at the question, as in GRPO. Of a class, each trainer has its own.
STRATEGIES: dict[str, Strategy | type | None] = {
    "ib": ib,
    "confidence": confidence,
    "random": random,
    "independent": None,
}


def make_strategy(name: str) -> Strategy | None:
    """The strategy of this name, with nothing learned yet."""
    found = STRATEGIES[name]
    return found() if isinstance(found, type) else found


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
