"""What a step is worth, from what is known of the leaves under it, and what it is compared with.

All functions take one value per leaf, `(L,)`, NaN where it is not known, and return one per step, `(N,)`. A leaf whose
value is not known is left out of every mean; NaN where nothing is known under a step.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from .tree import RolloutTree

ValueEstimate = Literal["leaf_mean", "backup"]


def leaf_mean(tree: RolloutTree, values_L: np.ndarray) -> np.ndarray:
    """`V(s) = mean over the leaves under s`: a child with many leaves has a large part (IB-TPO, TreeRL, TreePO)."""
    return tree.leaf_mean(values_L)


def backup(tree: RolloutTree, values_L: np.ndarray) -> np.ndarray:
    """`V(s) = mean over the children c of V(c)`, from the leaves up: each child is one sample (SPO, 2505.23564)."""
    total, count = np.zeros(len(tree)), np.zeros(len(tree))
    for leaf, step in enumerate(tree.leaves):
        if not np.isnan(values_L[leaf]):
            total[step], count[step] = values_L[leaf], 1
    parents, total, count = tree.parents().tolist(), total.tolist(), count.tolist()
    for step in range(len(total) - 1, 0, -1):  # children before parents
        if count[step]:
            total[parents[step]] += total[step] / count[step]
            count[parents[step]] += 1
    return np.divide(total, count, out=np.full(len(tree), np.nan), where=np.array(count) > 0)


VALUES: dict[str, Callable[[RolloutTree, np.ndarray], np.ndarray]] = {"leaf_mean": leaf_mean, "backup": backup}


def sibling_baseline(tree: RolloutTree, values_L: np.ndarray, kappa: float) -> np.ndarray:
    """What each step is compared with: leaves under its parent that are not under itself, and others above.

        b_a(c) = (m mean + kappa b_a'(c)) / (m + kappa)

    `m` and `mean` are of the leaves under the ancestor `a` of `c` that are not under `c`, and `a'` is the next
    ancestor that has more of them; at the last one, `b` is their mean. The baseline of `c` is `b` at its parent, or at
    the first ancestor with other leaves than those of `c`. `kappa`, in leaves, says how much the leaves further up
    count: 0 compares with the nearest siblings alone, infinity with all other leaves of the question.

    No leaf under `c` enters, so what was sampled as `c` has no part in its own baseline. NaN at the question and where
    there is no other leaf.
    """
    known_L = ~np.isnan(values_L)
    known_N = tree.sum_over_leaves(known_L.astype(float))
    total_N = tree.sum_over_leaves(np.where(known_L, values_L, 0.0))
    leaves_N, parents_N = tree.leaf_count(), tree.parents()
    baseline_N = np.full(len(tree), np.nan)
    for step in range(1, len(tree)):
        parent = parents_N[step]
        if leaves_N[step] == leaves_N[parent] and parent > 0:  # the same leaves
            baseline_N[step] = baseline_N[parent]
            continue
        others, baseline = -1.0, np.nan
        for ancestor in [0, *tree.path(parent)]:  # fewer leaves each time; once for each set of leaves
            if known_N[ancestor] - known_N[step] in (others, 0):
                continue
            others = known_N[ancestor] - known_N[step]
            mean = (total_N[ancestor] - total_N[step]) / others
            share = 1.0 if np.isnan(baseline) else others / (others + kappa)
            baseline = mean if share == 1 else share * mean + (1 - share) * baseline
        baseline_N[step] = baseline
    return baseline_N


class Choice(Protocol):
    """What one round of branching chose, and from what (`grown_tree.Choice`)."""

    round: int
    steps: list[int]
    candidates: list[int]
    priorities: list[float]


def selection_bias(
    tree: RolloutTree, values_L: np.ndarray, kind: ValueEstimate, choices: Sequence[Choice]
) -> np.ndarray:
    """How much better steps look because they were chosen, `(N,)`; 0 at steps that were not (SIPO, arXiv 2609.34805).

    A step that is chosen for its score is chosen for the luck of the leaves that it had, and its next leaves have no
    part in that. In the round that chose `s` among candidates with scores `P` and values `V`, of the leaves known by
    then,

        expected luck = Cov(P, V) / Var(P) * (P(s) - mean P)

    is taken off the leaves that were there, so off `V(s)` in proportion to their part in it, and off every ancestor
    whose value rests on the same leaves. `P` is what the strategy ranked steps by; of many candidates, the best that
    `grown_tree.Choice` keeps.
    """
    rounds_L, bias_N = np.array(tree.rounds), np.zeros(len(tree))
    known_N = tree.sum_over_leaves((~np.isnan(values_L)).astype(float))
    for choice in choices:
        older_L = rounds_L < choice.round
        scores = np.array(choice.priorities, dtype=float)
        values = VALUES[kind](tree, np.where(older_L, values_L, np.nan))[choice.candidates]
        known = np.isfinite(scores) & ~np.isnan(values)
        if known.sum() < 2 or np.ptp(scores[known]) == 0:
            continue
        centred = scores - scores[known].mean()
        slope = np.mean(centred[known] * values[known]) / np.mean(centred[known] ** 2)
        part_N = VALUES[kind](tree, np.where(np.isnan(values_L), np.nan, older_L))
        for step in set(choice.steps):
            luck = slope * centred[choice.candidates.index(step)]
            same = [each for each in (0, *tree.path(step)) if known_N[each] == known_N[step]]
            bias_N[same] += 0.0 if np.isnan(luck) else luck * np.nan_to_num(part_N[step])
    return bias_N


def selection_differences(tree: RolloutTree) -> tuple[list[float], list[float]]:
    """Success of the leaves that a step was chosen with, minus that of the leaves sampled because it was chosen.

    Returns:
        One difference for each step that a round chose: mean of the leaves that were there before, minus mean of the
        fresh ones. Above 0 on average where luck decides what is chosen. And one for each pair of fresh leaves of the
        same choice, the first minus the second: 0 on average whatever decides. Leaves of unknown success are left out,
        and so is the question, where a tree branches for want of other steps.
    """
    success, paths = tree.success, [set(tree.path(leaf)) for leaf in tree.leaves]
    fresh_of: dict[tuple[int, int], list[int]] = {}
    for leaf, (step, round) in enumerate(zip(tree.branch_steps, tree.rounds, strict=True)):
        if round > 0 and step > 0 and not np.isnan(success[leaf]):
            fresh_of.setdefault((round, step), []).append(leaf)
    before, among = [], []
    for (round, step), fresh in fresh_of.items():
        older = [success[leaf] for leaf, path in enumerate(paths) if step in path and tree.rounds[leaf] < round]
        older = [value for value in older if not np.isnan(value)]
        if older:
            before.append(float(np.mean(older) - np.mean([success[leaf] for leaf in fresh])))
        among += [success[first] - success[second] for first, second in zip(fresh[::2], fresh[1::2], strict=False)]
    return before, among
