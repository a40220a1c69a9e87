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
from typing import Literal

import numpy as np

from .tree import RolloutTree

StepConfidence = Literal["geometric_mean", "joint"]


@dataclass(frozen=True)
class TreeScores:
    """Scores of all steps of one tree; every array is `(N,)` with the root at 0 and NaN where undefined."""

    parents: np.ndarray  # -1 at the root
    children: np.ndarray  # how many
    rewarded_children: np.ndarray  # how many have a leaf under them whose success is known
    density: np.ndarray  # p(s): NaN where no success under the step is known
    gain_ratio: np.ndarray  # rho(s): NaN at the root and where the density is NaN
    eta1: np.ndarray  # rho - (1 + 1/beta)
    confidence: np.ndarray  # eta2, in (0, 1]; NaN at the root
    ib_score: np.ndarray  # NaN at steps without children
    mean_confidence: np.ndarray  # mean eta2 over all children; NaN at steps without children
    covariance: np.ndarray  # NaN at steps without children


def step_confidence(tree: RolloutTree, kind: StepConfidence = "geometric_mean") -> np.ndarray:
    """`eta2`: probability of each step under the sampling policy, `(N,)`, NaN at the root.

    `geometric_mean` is per token, `exp(mean log pi)`; `joint` is the product, `exp(sum log pi)`. A token whose
    log-probability the engine could not give (NaN) is left out.
    """
    confidence = np.exp(tree.mean_logprobs() if kind == "geometric_mean" else tree.total_logprobs())
    confidence[0] = np.nan
    return confidence


def gain_ratio(density: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """`rho(c) = p(c) / p(parent)`, `(N,)`; 1 where the parent's density is 0, NaN at the root."""
    parent_density = density[parents]
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.where(parent_density == 0, np.where(np.isnan(density), np.nan, 1.0), density / parent_density)
    rho[0] = np.nan
    return rho


def score_tree(tree: RolloutTree, *, beta: float, confidence_kind: StepConfidence = "geometric_mean") -> TreeScores:
    """Score all steps of a tree with the success that is known of its leaves.

    Args:
        tree: at least one rollout.
        beta: the paper's beta, weight of the information about the answer.
        confidence_kind: `pi(s)`, see `step_confidence`.
    """
    parents = tree.parents()
    density = tree.density()
    rho = gain_ratio(density, parents)
    eta1 = rho - (1 + 1 / beta)
    eta2 = step_confidence(tree, confidence_kind)

    def child_sum(weights_N: np.ndarray) -> np.ndarray:
        return np.bincount(parents[1:], weights_N[1:], len(parents))

    known = ~np.isnan(eta1)
    known[0] = False
    children = np.bincount(parents[1:], minlength=len(parents))
    rewarded = child_sum(known)
    # Where no success under any child is known, every child counts, with rho := 1.
    counted = known | (rewarded == 0)[parents]
    counted[0] = False
    eta1_counted, eta2_counted = np.where(known, eta1, -1 / beta) * counted, np.where(counted, eta2, 0.0)
    with np.errstate(invalid="ignore"):  # 0/0 at steps without children
        count = child_sum(counted)
        mean_product = child_sum(eta1_counted * eta2_counted) / count
        mean_eta1, mean_eta2 = child_sum(eta1_counted) / count, child_sum(eta2_counted) / count
        mean_confidence = child_sum(eta2) / children
    return TreeScores(
        parents=parents,
        children=children,
        rewarded_children=rewarded,
        density=density,
        gain_ratio=rho,
        eta1=eta1,
        confidence=eta2,
        ib_score=(1 + beta) * mean_product,
        mean_confidence=mean_confidence,
        covariance=mean_product - mean_eta1 * mean_eta2,
    )
