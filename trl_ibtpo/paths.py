"""Which branches of an initial rollout are trained on, behind `IBTPOConfig.path_filter` (I2B-LPO, arXiv 2601.05870).

The paper ranks paths by `S = beta I(r; a) - I(q; r)`, of a question q, a path r and the answer a, and keeps the best N
of the K branches of each initial rollout. It publishes no estimator; these two are this package's, normalised by
length:

    advantage   mean over the tokens after the fork of A_t H_t
    pmi         beta [log p(a | q, r) - log p(a | q)] / |a| - [log p(r | q) - log p(r)] / |r|

Names of shapes: `_L` leaves, `_T` tokens of a trajectory.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .grown_tree import Choice, FilteredPaths, GrownTree
from .scores import score_tree
from .tree import RolloutTree


def advantage_scores(tree: RolloutTree, advantages: Sequence[np.ndarray]) -> np.ndarray:
    """IBRO's surrogate of the information a path has: mean of `A_t H_t` after its fork, `(L,)`; NaN for others.

    What a policy is uncertain of counts for a path that is better than its group, and against one that is worse.

    Args:
        tree: with entropies.
        advantages: of each token of each trajectory, `(T,)` each; NaN where a trajectory is unscorable.
    """
    scores_L, ends_N = np.full(len(tree.leaves), np.nan), tree.ends()
    for leaf, values_T in enumerate(advantages):
        if tree.rounds[leaf]:
            own = slice(ends_N[tree.branch_steps[leaf]], None)
            products = values_T[own] * tree.trajectory_entropies(leaf)[own]
            products = products[~np.isnan(products)]  # an observation has no entropy
            scores_L[leaf] = products.mean() if len(products) else np.nan
    return scores_L


def pmi_score(
    beta: float,
    answer_after_path: float,
    answer: float,
    answer_tokens: int,
    path_after_question: float,
    path: float,
    path_tokens: int,
) -> float:
    """Information of a path about the answer, less that about the question, by pointwise mutual information.

    Args:
        beta: what the answer is worth.
        answer_after_path, answer: `log p(a | q, r)` and `log p(a | q)`.
        answer_tokens: `|a|`.
        path_after_question, path: `log p(r | q)` and `log p(r)`.
        path_tokens: `|r|`; a path of no tokens has no score, NaN.
    """
    if not path_tokens:
        return np.nan
    return beta * (answer_after_path - answer) / answer_tokens - (path_after_question - path) / path_tokens


def best_paths(tree: RolloutTree, scores_L: np.ndarray, count: int) -> list[int]:
    """The leaves to keep: all initial rollouts, and of the branches of each the `count` of highest score.

    Ties go to the earlier leaf, and those without a score (NaN) come last.
    """
    groups, branched = np.array(tree.groups), np.array(tree.rounds) > 0
    kept = np.flatnonzero(~branched).tolist()
    for group in sorted(set(tree.groups)):
        own = np.flatnonzero(branched & (groups == group))
        kept += own[np.argsort(-scores_L[own], kind="stable")[:count]].tolist()
    return sorted(kept)


def keep_paths(whole: GrownTree, kept: Sequence[int], scores_L: np.ndarray, rewards_LF: np.ndarray) -> GrownTree:
    """The tree of these leaves alone, as if the others had never been sampled; what it was before goes with it.

    Args:
        whole: a tree of which no branch that is kept continues one that is not.
        kept: leaves, in order.
        scores_L: by which they were chosen.
        rewards_LF: what each reward function gave each leaf of the whole tree.
    """
    tree, steps = RolloutTree(whole.tree.prompt_ids, whole.settings.success_range), {0: 0}
    for leaf in kept:
        after = whole.tree.branch_steps[leaf]
        new = tree.open(steps[after], whole.tree.rounds[leaf], whole.tree.groups[leaf])
        own = whole.tree.path(whole.tree.leaves[leaf])[len(whole.tree.path(after)) :]
        start, first = whole.tree.ends()[after], len(tree)
        token_ids, logprobs = whole.tree.trajectory(leaf)
        sampled = whole.tree.sampled(leaf)
        tree.extend(
            new,
            token_ids[start:],
            [value if own_token else None for value, own_token in zip(logprobs, sampled, strict=True)][start:],
            (whole.tree.ends()[own] - start).tolist(),
            whole.tree.trajectory_entropies(leaf)[start:].tolist(),
        )
        steps |= {step: first + place for place, step in enumerate(own)}
    for new, leaf in enumerate(kept):
        tree.add_reward(new, whole.tree.rewards[leaf])
    scores = score_tree(tree, beta=whole.settings.ib_beta, confidence_kind=whole.settings.step_confidence)
    choices = [_moved(choice, steps) for choice in whole.choices]
    filtered = FilteredPaths(whole, list(kept), scores_L, rewards_LF)
    return GrownTree(tree, scores, whole.settings, choices, filtered)


def _moved(choice: Choice, steps: dict[int, int]) -> Choice:
    """The same choice in a tree whose steps have other numbers; forks lie on initial rollouts, which are kept."""
    moved = {name: [steps[step] for step in getattr(choice, name)] for name in ("steps", "candidates", "deferred")}
    return replace(choice, **moved)
