"""What a token weighs that several trajectories share, behind `IBTPOConfig.shared_token_weight`."""

from typing import Literal

import numpy as np

from .tree import RolloutTree

SharedTokenWeight = Literal["per_trajectory", "once", "sampled", "first"]


def step_weights(tree: RolloutTree, kind: SharedTokenWeight) -> list[np.ndarray]:
    """What the advantage of each step of each trajectory is multiplied by; one `(S,)` array a leaf.

    A step is trained once in every trajectory that passes through it, so its weight in all is the sum over these.

        per_trajectory   1 in each: its number of leaves in all          the paper's figure, TreePO, Tree-GRPO
        once             1 / leaves under it in each: 1 in all           SPO-tree
        sampled          W(leaf) = G * product of 1 / children along the path of the leaf, the question included;
                         G * product of 1 / children along the step's own path in all
        first            1 in the trajectory that sampled it, 0 in its branches: 1 in all           I2B-LPO

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
    by a constant (`dr_grpo`), or not at all (`luspo`).
    """
    paths = [tree.path(leaf) for leaf in tree.leaves]
    if kind == "per_trajectory":
        return [np.ones(len(path)) for path in paths]
    if kind == "once":
        shared_by_N = tree.leaf_count()
        return [1 / shared_by_N[path] for path in paths]
    if kind == "first":
        shared = [len(tree.path(after)) for after in tree.branch_steps]
        return [np.repeat([0.0, 1.0], [first, len(path) - first]) for path, first in zip(paths, shared, strict=True)]
    children_N, parents_N = tree.child_counts(), tree.parents()
    group = len(paths)
    return [np.full(len(path), group / np.prod(children_N[parents_N[path]], dtype=float)) for path in paths]
