"""The advantage of every step: one short function per method, all behind `IBTPOConfig.advantage`.

Each function takes the trajectory advantages that GRPO itself computed (whatever `scale_rewards`, reward weights and
aggregation the user chose) and never recomputes them. A new method is a function with the signature of `ibtpo` and a
line in `ADVANTAGES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scores import TreeScores
from .tree import RolloutTree


@dataclass(frozen=True)
class StepAdvantages:
    """The two terms of each trajectory's step advantages, in the order of its path; one `(S,)` array a leaf."""

    global_terms: list[np.ndarray]  # A_GL
    local_terms: list[np.ndarray]  # lambda * A_IB


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


def per_token(tree: RolloutTree, leaf: int, values_S: np.ndarray) -> np.ndarray:
    """Spread one value per step of trajectory `leaf` over its tokens; `(S,)` to `(T,)`."""
    lengths = [len(tree.steps[step].token_ids) for step in tree.path(tree.leaves[leaf])]
    return np.repeat(values_S, lengths)
