"""Reward densities and the IB-Score of every step of a tree (IB-TPO, arXiv 2605.28109).

For a step `s` with children `c`:

    p(s)     mean success of the leaves under s                     reward density
    rho(c)   p(c) / p(s)                                            gain ratio
    eta1(c)  rho(c) - (1 + 1/beta)                                  what the answer gains, against the entropy bonus
    eta2(c)  exp(mean log pi_old of the tokens of c)                confidence, pi(c | prefix)
    score(s) (1 + beta) / n_children * sum_c eta1(c) * eta2(c)      IB-Score
    cov(s)   Cov_c(eta1, eta2)                                      health figure

Conventions the paper leaves open: where `p(s) = 0`, `rho := 1` (no information). A child without a scored leaf is left
out of the means; where no child has one, `rho := 1` for all of them, so that the score is its confidence term alone,
`-(1 + beta)/beta * mean confidence`: what an uninformative step scores.
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
    density: np.ndarray  # p(s): NaN where no leaf under the step is scored
    gain_ratio: np.ndarray  # rho(s): NaN at the root and where the density is NaN
    eta1: np.ndarray  # rho - (1 + 1/beta)
    confidence: np.ndarray  # eta2, in (0, 1]; NaN at the root
    ib_score: np.ndarray  # NaN at steps without children
    mean_confidence: np.ndarray  # mean eta2 over all children; NaN at steps without children
    covariance: np.ndarray  # NaN at steps without children
    scored_children: np.ndarray  # how many children have a scored leaf


def step_confidence(tree: RolloutTree, kind: StepConfidence = "geometric_mean") -> np.ndarray:
    """`eta2`: probability of each step under the sampling policy, `(N,)`, NaN at the root.

    `geometric_mean` is per token, `exp(mean log pi)`; `joint` is the product, `exp(sum log pi)`. A token whose
    log-probability the engine could not give (NaN) is left out.
    """
    known = [[logprob for logprob in step.logprobs if logprob == logprob] for step in tree.steps]
    totals = np.array([sum(logprobs) for logprobs in known])
    if kind == "geometric_mean":
        totals /= [len(logprobs) or 1 for logprobs in known]
    confidence = np.exp(totals)
    confidence[0] = np.nan
    return confidence


def gain_ratio(density: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """`rho(c) = p(c) / p(parent)`, `(N,)`; 1 where the parent's density is 0, NaN at the root."""
    parent_density = density[parents]
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.where(parent_density == 0, np.where(np.isnan(density), np.nan, 1.0), density / parent_density)
    rho[0] = np.nan
    return rho


def child_mean(values: np.ndarray, parents: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean of `values` over the counted children of every step, `(N,)`; NaN where a step has none."""
    totals = np.bincount(parents[counted], weights=values[counted], minlength=len(parents))
    counts = np.bincount(parents[counted], minlength=len(parents))
    return np.divide(totals, counts, out=np.full(len(parents), np.nan), where=counts > 0)


def score_tree(
    tree: RolloutTree, success_L, *, beta: float, confidence_kind: StepConfidence = "geometric_mean"
) -> TreeScores:
    """Score a whole tree at once.

    Args:
        tree: at least one rollout.
        success_L: success of each leaf in [0, 1], NaN where unknown; `(L,)`.
        beta: the paper's beta, weight of the information about the answer.
        confidence_kind: `pi(s)`, see `step_confidence`.
    """
    parents = tree.parents()
    density = tree.leaf_mean(success_L)
    rho = gain_ratio(density, parents)
    eta1 = rho - (1 + 1 / beta)
    eta2 = step_confidence(tree, confidence_kind)

    known = ~np.isnan(eta1)
    known[0] = False
    # Where no child is scored, every child counts, with rho := 1.
    scored_children = np.bincount(parents[known], minlength=len(parents))
    counted = known | (scored_children == 0)[parents]
    counted[0] = False
    eta1_counted = np.where(known, eta1, -1 / beta)

    mean_product = child_mean(eta1_counted * eta2, parents, counted)
    mean_eta1, mean_eta2 = child_mean(eta1_counted, parents, counted), child_mean(eta2, parents, counted)
    return TreeScores(
        parents=parents,
        density=density,
        gain_ratio=rho,
        eta1=eta1,
        confidence=eta2,
        ib_score=(1 + beta) * mean_product,
        mean_confidence=child_mean(eta2, parents, parents >= 0),
        covariance=mean_product - mean_eta1 * mean_eta2,
        scored_children=scored_children,
    )
