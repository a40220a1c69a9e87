"""The advantage of every step: one short function per method, all behind `IBTPOConfig.advantage`.

Each function takes the trajectory advantages that GRPO itself computed (whatever `scale_rewards`, reward weights and
aggregation the user chose) and never recomputes them. A new method is a function with the signature of `ibtpo` and a
line in `ADVANTAGES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .scores import TreeScores
from .tree import RolloutTree


@dataclass(frozen=True)
class StepAdvantages:
    """The two terms of each trajectory's step advantages, in the order of its path; one `(S,)` array a leaf."""

    global_terms: list[np.ndarray]  # A_GL
    local_terms: list[np.ndarray]  # lambda * A_IB


SharedTokenWeight = Literal["per_trajectory", "once"]
AdvantageFunction = Callable[[RolloutTree, TreeScores, np.ndarray, float], StepAdvantages]


def ibtpo(tree: RolloutTree, scores: TreeScores, advantage_L: np.ndarray, ib_coef: float) -> StepAdvantages:
    """IB-TPO (arXiv 2605.28109): `A(s) = A_GL(s) + lambda * A_IB(s)`.

        A_GL(s) = mean over the leaves under s of the trajectory advantage = (p(s) - p(root)) / std(R)
        A_IB(s) = eta1(s) * confidence of s under the sampling policy

    Args:
        tree: the rollouts of one question.
        scores: of the same tree.
        advantage_L: GRPO's advantage of each trajectory, NaN for an unscorable one; `(L,)`.
        ib_coef: lambda.

    A step under which no leaf is scorable gets 0; one under which no leaf has a known success gets `A_IB = 0`.
    """
    global_N = np.nan_to_num(tree.leaf_mean(advantage_L), nan=0.0)
    local_N = ib_coef * np.nan_to_num(scores.eta1 * scores.confidence, nan=0.0)
    paths = [tree.path(leaf) for leaf in tree.leaves]
    return StepAdvantages([global_N[path] for path in paths], [local_N[path] for path in paths])


def grpo(tree: RolloutTree, scores: TreeScores, advantage_L: np.ndarray, ib_coef: float) -> StepAdvantages:
    """GRPO (arXiv 2402.03300): every step of a trajectory has that trajectory's advantage; `ib_coef` is not used."""
    advantage_L = np.nan_to_num(advantage_L, nan=0.0)
    lengths = [len(tree.path(leaf)) for leaf in tree.leaves]
    return StepAdvantages(
        [np.full(length, advantage) for length, advantage in zip(lengths, advantage_L, strict=True)],
        [np.zeros(length) for length in lengths],
    )


ADVANTAGES: dict[str, AdvantageFunction] = {"ibtpo": ibtpo, "grpo": grpo}


@dataclass(frozen=True)
class TokenAdvantages:
    """One `(T,)` array a leaf."""

    values: list[np.ndarray]  # what the loss gets: the sum of both terms, weighted
    global_terms: list[np.ndarray]  # A_GL, not weighted
    local_terms: list[np.ndarray]  # lambda * A_IB, not weighted


def token_advantages(
    tree: RolloutTree,
    scores: TreeScores,
    advantage_L: np.ndarray,
    *,
    advantage: str = "ibtpo",
    ib_coef: float = 0.1,
    shared_token_weight: SharedTokenWeight = "per_trajectory",
) -> TokenAdvantages:
    """What each token of each trajectory gets, for the fields of `IBTPOConfig` with these names.

    Args:
        tree, scores, advantage_L, ib_coef: see `ibtpo`.
        advantage: a key of `ADVANTAGES`.
        shared_token_weight: `once` divides by the number of trajectories that share the token.
    """
    terms = ADVANTAGES[advantage](tree, scores, advantage_L, ib_coef)
    shared_by_N = tree.leaf_count()
    result = TokenAdvantages([], [], [])
    for leaf, (global_S, local_S) in enumerate(zip(terms.global_terms, terms.local_terms, strict=True)):
        values_S = global_S + local_S
        if shared_token_weight == "once":
            values_S = values_S / shared_by_N[tree.path(tree.leaves[leaf])]
        result.values.append(per_token(tree, leaf, values_S))
        result.global_terms.append(per_token(tree, leaf, global_S))
        result.local_terms.append(per_token(tree, leaf, local_S))
    return result


def per_token(tree: RolloutTree, leaf: int, values_S: np.ndarray) -> np.ndarray:
    """Spread one value per step of trajectory `leaf` over its tokens; `(S,)` to `(T,)`."""
    ends_S = tree.ends()[tree.path(tree.leaves[leaf])]
    return np.repeat(values_S, np.diff(ends_S, prepend=0))
