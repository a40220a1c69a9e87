"""DEEP-GRPO's choice of steps, a branching rule that learns from how branches ended."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .scores import TreeScores
from .tree import RolloutTree


class Pivot:
    """DEEP-GRPO (arXiv 2602.14169): failed rollouts are continued from where they can probably still be saved.

        P(step) ~ P(success | u) * u^gamma        u = its place in the rollout, in (0, 1]

    `P(success | u)` is a logistic regression on how branches ended so far, over the whole training. Steps are drawn
    without replacement (Gumbel's trick), from the initial rollouts that failed; where none did, from all of them.
    """

    uses_rewards = True
    gamma = 0.1  # as in the authors' code, like the two numbers below
    window = 10_000  # branches that are remembered
    least = 10  # branches without which nothing is fitted

    def __init__(self):
        self.seen: list[tuple[float, float]] = []  # u, and whether a branch from there ended in success
        self.slope = self.intercept = 0.0

    def __call__(self, tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
        place_N, failed_N = self._places(tree)
        # log(sigmoid) + gamma log(u) + Gumbel noise: the largest is a draw from the distribution
        log_chance_N = -np.log1p(np.exp(-self.slope * place_N - self.intercept))
        priority = log_chance_N + self.gamma * np.log(place_N) + rng.gumbel(size=len(tree))
        if (failed_N & (scores.children > 0)).any():
            priority[~failed_N] = np.nan
        return priority

    @staticmethod
    def _places(tree: RolloutTree) -> tuple[np.ndarray, np.ndarray]:
        """`u` of every step of the initial rollouts, NaN elsewhere, and whether its rollout failed; `(N,)` both."""
        place_N, failed_N = np.full(len(tree), np.nan), np.zeros(len(tree), dtype=bool)
        for leaf, round in enumerate(tree.rounds):
            if round == 0:
                path = tree.path(tree.leaves[leaf])
                place_N[path] = np.arange(1, len(path) + 1) / max(len(path), 1)
                failed_N[path] = tree.success[leaf] < 0.5
        return place_N, failed_N

    def evidence(self, tree: RolloutTree, scores: TreeScores) -> list[list[float]]:
        place_N, _ = self._places(tree)
        ends = [
            [float(place_N[tree.branch_steps[leaf]]), float(tree.success[leaf] >= 0.5)]
            for leaf, round in enumerate(tree.rounds)
            if round > 0 and tree.success[leaf] == tree.success[leaf]
        ]
        return [each for each in ends if each[0] == each[0]]

    def learn(self, evidence: Sequence[Sequence[float]]) -> None:
        self.seen = [*self.seen, *((place, success) for place, success in evidence)][-self.window :]
        self._fit()

    def _fit(self) -> None:
        """Newton's method for the logistic regression, with a penalty of half the squared slope."""
        self.slope = self.intercept = 0.0
        if len(self.seen) <= self.least or len({success for _, success in self.seen}) < 2:
            return
        place, success = np.array(self.seen).T
        features, weights = np.stack([place, np.ones_like(place)], axis=1), np.zeros(2)
        for _ in range(20):
            chance = 1 / (1 + np.exp(-features @ weights))
            gradient = features.T @ (chance - success) + [weights[0], 0]
            curvature = features.T @ (features * (chance * (1 - chance))[:, None]) + np.diag([1, 0])
            weights -= np.linalg.solve(curvature, gradient)
        self.slope, self.intercept = weights.tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = [(float(place), float(success)) for place, success in state["seen"]]
        self._fit()
