"""What a token weighs that several trajectories share, behind `IBTPOConfig.shared_token_weight`."""

from typing import Literal

import numpy as np

from .tree import RolloutTree

SharedTokenWeight = Literal["per_trajectory", "once", "sampled", "first"]


def step_weights(tree: RolloutTree, kind: SharedTokenWeight, trained_L: np.ndarray | None = None) -> list[np.ndarray]:
    """What the advantage of each step of each trajectory is multiplied by; one `(S,)` array a leaf.

    Args:
        tree: the tree.
        kind: see below.
        trained_L: which trajectories the loss has, `(L,)`; None: all. TRL leaves out truncated ones with
            `mask_truncated_completions`, and `once` and `first` are one in all over the others.

    A step is trained once in every trajectory that passes through it, so its weight in all is the sum over these.

        per_trajectory   1 in each: its number of leaves in all          the paper's figure, TreePO, Tree-GRPO
        once             1 / leaves under it in each: 1 in all           SPO-tree
        sampled          W(leaf) = G * product of 1 / children along the path of the leaf, the question included;
                         G * product of 1 / children along the step's own path in all
        first            1 in the first trajectory through it, 0 in its branches: 1 in all          I2B-LPO

    `sampled` takes a tree for what it is: `c` children of a step (the rollout that owned the step and its branches)
    are `c` samples of one continuation, so each stands for 1/c of it. The initial rollouts weigh alike however often
    they were branched, and a trajectory weighs what it is worth as a sample of the policy: where nothing that was
    sampled after a step had a say in whether it was branched, a weighted sum over trajectories has the mean that a sum
    over G independent ones has.

    With `first`, a shared step has the advantage of one trajectory; with `once`, the mean of all.

    Weights are not negative and multiply the advantage, and every loss of TRL is proportional to an advantage that
    keeps its sign. So clipping and importance sampling act on ratios as before, and KL and entropy terms, which have
    no advantage, keep counting once per trajectory. The loss then divides as it would without weights: by the length
    of each trajectory (`grpo`, `sapo`), by the number of tokens of all of them (`dapo`, `bnpo`, `cispo`, `vespo`),
    by a constant (`dr_grpo`), or by their number (`luspo`).
    """
    paths = [tree.path(leaf) for leaf in tree.leaves]
    trained_L = np.ones(len(paths), dtype=bool) if trained_L is None else trained_L
    if kind == "per_trajectory":
        return [np.ones(len(path)) for path in paths]
    if kind == "once":
        shared_by_N = np.maximum(tree.sum_over_leaves(trained_L), 1)
        return [1 / shared_by_N[path] for path in paths]
    if kind == "first":
        taken_N, weights = np.zeros(len(tree), dtype=bool), []
        for path, trained in zip(paths, trained_L, strict=True):
            weights.append(np.where(taken_N[path] | (not trained), 0.0, 1.0))
            taken_N[path] |= trained
        return weights
    children_N, parents_N = tree.child_counts(), tree.parents()
    group = len(paths)
    return [np.full(len(path), group / np.prod(children_N[parents_N[path]], dtype=float)) for path in paths]
