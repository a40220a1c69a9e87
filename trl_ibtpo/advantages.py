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


SharedTokenWeight = Literal["per_trajectory", "once", "sampled"]
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

    values: list[np.ndarray]  # what the loss gets: the sum of both terms, times `token_weights`
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
        shared_token_weight: see `step_weights`.
    """
    terms = ADVANTAGES[advantage](tree, scores, advantage_L, ib_coef)
    weights = step_weights(tree, shared_token_weight)
    result = TokenAdvantages([], [], [])
    for leaf, (global_S, local_S) in enumerate(zip(terms.global_terms, terms.local_terms, strict=True)):
        result.values.append(per_token(tree, leaf, (global_S + local_S) * weights[leaf]))
        result.global_terms.append(per_token(tree, leaf, global_S))
        result.local_terms.append(per_token(tree, leaf, local_S))
    return result


def step_weights(tree: RolloutTree, kind: SharedTokenWeight) -> list[np.ndarray]:
    """What the advantage of each step of each trajectory is multiplied by; one `(S,)` array a leaf.

    A step is trained once in every trajectory that passes through it, so its weight in all is the sum over these.

        per_trajectory   1 in each: its number of leaves in all          the paper's figure, TreePO, Tree-GRPO
        once             1 / leaves under it in each: 1 in all           SPO-tree
        sampled          W(leaf) = G * product of 1 / children along the path of the leaf, the question included;
                         G * product of 1 / children along the step's own path in all

    `sampled` takes a tree for what it is: `c` children of a step (the rollout that owned the step and its branches)
    are `c` samples of one continuation, so each stands for 1/c of it. The initial rollouts weigh alike however often
    they were branched, and a trajectory weighs what it is worth as a sample of the policy: where nothing that was
    sampled after a step had a say in whether it was branched, a weighted sum over trajectories has the mean that a sum
    over G independent ones has.

    Weights are positive and multiply the advantage, and every loss of TRL is proportional to an advantage that keeps
    its sign. So clipping and importance sampling act on ratios as before, and KL and entropy terms, which have no
    advantage, keep counting once per trajectory. The loss then divides as it would without weights: by the length of
    each trajectory (`grpo`, `sapo`), by the number of tokens of all trajectories (`dapo`, `bnpo`, `cispo`, `vespo`),
    by a constant (`dr_grpo`), or not at all (`luspo`).
    """
    paths = [tree.path(leaf) for leaf in tree.leaves]
    if kind == "per_trajectory":
        return [np.ones(len(path)) for path in paths]
    if kind == "once":
        shared_by_N = tree.leaf_count()
        return [1 / shared_by_N[path] for path in paths]
    children_N, parents_N = tree.child_counts(), tree.parents()
    group = len(paths)
    return [np.full(len(path), group / np.prod(children_N[parents_N[path]], dtype=float)) for path in paths]


def per_token(tree: RolloutTree, leaf: int, values_S: np.ndarray) -> np.ndarray:
    """Spread one value per step of trajectory `leaf` over its tokens, 0 on observations; `(S,)` to `(T,)`."""
    ends_S = tree.ends()[tree.path(tree.leaves[leaf])]
    return np.repeat(values_S, np.diff(ends_S, prepend=0)) * tree.sampled(leaf)
