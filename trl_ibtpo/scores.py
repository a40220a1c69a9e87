"""Reward densities and the IB-Score of every step of a tree (IB-TPO, arXiv 2605.28109).

For a step `s` with children `c`:

    p(s)     mean success of the leaves under s                     reward density
    rho(c)   p(c) / p(s)                                            gain ratio
    eta1(c)  rho(c) - (1 + 1/beta)                                  what the answer gains, against the entropy bonus
    eta2(c)  exp(mean log pi_old of the tokens of c)                confidence, pi(c | prefix)
    score(s) (1 + beta) / n_children * sum_c eta1(c) * eta2(c)      IB-Score
    cov(s)   Cov_c(eta1, eta2)                                      health figure

Conventions the paper leaves open: where `p(s) = 0`, `rho := 1` (no information). A child under which no success is
known is left out of the means; where there is no other, `rho := 1` for all of them, so that the score is its
confidence term alone, `-(1 + beta)/beta * mean confidence`: what an uninformative step scores. Success is in [0, 1]
for any reward (`tree.RolloutTree.add_reward`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .tree import RolloutTree

StepConfidence = Literal["geometric_mean", "joint"]


def step_confidence(tree: RolloutTree, kind: StepConfidence = "geometric_mean") -> np.ndarray:
    """`eta2`: probability of each step under the sampling policy, `(N,)`, NaN at the root.

    `geometric_mean` is per token, `exp(mean log pi)`; `joint` is the product, `exp(sum log pi)`. A token whose
    log-probability the engine could not give (NaN) is left out; a step of such tokens alone counts as certain, 1.
    """
    confidence = np.exp(tree.mean_logprobs() if kind == "geometric_mean" else tree.total_logprobs())
    confidence[0] = np.nan
    return confidence


def gain_ratio(density: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """`rho(c) = p(c) / p(parent)`, `(N,)`; 1 where the parent's density is 0, NaN at the root."""
    parent_density = density[parents]
    rho = np.where(np.isnan(density), np.nan, 1.0)
    np.divide(density, parent_density, out=rho, where=parent_density != 0)
    rho[0] = np.nan
    return rho


@dataclass(frozen=True)
class TreeScores:
    """Scores of all steps of one tree; every array is `(N,)` with the root at 0 and NaN where undefined."""

    beta: float
    parents: np.ndarray  # -1 at the root
    children: np.ndarray  # how many
    density: np.ndarray  # p(s): NaN where no success under the step is known
    confidence: np.ndarray  # eta2, in (0, 1]; NaN at the root

    @cached_property
    def gain_ratio(self) -> np.ndarray:
        """`rho(s)`: NaN at the root and where the density is NaN."""
        return gain_ratio(self.density, self.parents)

    @cached_property
    def eta1(self) -> np.ndarray:
        """`rho - (1 + 1/beta)`."""
        return self.gain_ratio - (1 + 1 / self.beta)

    @cached_property
    def rewarded_children(self) -> np.ndarray:
        """How many children have a leaf under them whose success is known."""
        return self._child_sum(~np.isnan(self.density))

    @cached_property
    def ib_score(self) -> np.ndarray:
        """`(1 + beta) / n_children * sum_c eta1(c) eta2(c)`; NaN at steps without children."""
        return (1 + self.beta) * self._mean_product

    @cached_property
    def _mean_product(self) -> np.ndarray:
        return self._child_mean(self._eta1_counted * self.confidence)

    @cached_property
    def mean_confidence(self) -> np.ndarray:
        """Mean `eta2` over all children; NaN at steps without children."""
        return _divide(self._child_sum(self.confidence), self.children)

    @cached_property
    def covariance(self) -> np.ndarray:
        """`Cov_c(eta1, eta2)`; NaN at steps without children."""
        eta1, eta2 = self._eta1_counted, self.confidence
        return self._mean_product - self._child_mean(eta1) * self._child_mean(eta2)

    @cached_property
    def _eta1_counted(self) -> np.ndarray:
        """`eta1` with `rho := 1` where no child's success is known."""
        return np.where(np.isnan(self.eta1), -1 / self.beta, self.eta1)

    @cached_property
    def _counted(self) -> np.ndarray:
        """Whether a step counts among the children of its parent."""
        return ~np.isnan(self.density) | (self.rewarded_children == 0)[self.parents]

    def _child_sum(self, values_N: np.ndarray) -> np.ndarray:
        return np.bincount(self.parents[1:], values_N[1:], len(self.parents))

    @cached_property
    def _count(self) -> np.ndarray:
        """How many children count."""
        return np.where(self.rewarded_children > 0, self.rewarded_children, self.children)

    def _child_mean(self, values_N: np.ndarray) -> np.ndarray:
        """Mean over the children that count."""
        return _divide(self._child_sum(np.where(self._counted, values_N, 0.0)), self._count)


def _divide(total_N: np.ndarray, count_N: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return total_N / np.where(count_N > 0, count_N, np.nan)


def score_tree(tree: RolloutTree, *, beta: float, confidence_kind: StepConfidence = "geometric_mean") -> TreeScores:
    """Score all steps of a tree with the success that is known of its leaves.

    Args:
        tree: at least one rollout.
        beta: the paper's beta, weight of the information about the answer.
        confidence_kind: `pi(s)`, see `step_confidence`.
    """
    return TreeScores(
        beta=beta,
        parents=tree.parents(),
        children=tree.child_counts(),
        density=tree.density(),
        confidence=step_confidence(tree, confidence_kind),
    )
