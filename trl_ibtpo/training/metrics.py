"""What is logged about trees, as sums and counts, so that means over processes are exact.

tree/effective_rate     share of trees whose leaves differ in success (Eff-Rate)
tree/average_success    mean success of the trajectories (Avg-Rate)
tree/initial_success    mean success of the initial rollouts alone, which no choice of a branch biases
tree/generated_tokens   newly sampled tokens per question, shared prefixes once
tree/trajectory_tokens  tokens of all trajectories per question, shared prefixes once per trajectory
                        (observations, such as results of tools, count here and not among the generated)
tree/leaves_std         standard deviation of the trajectories per question; only with `adaptive_budget`
tree/filtered           trajectories per question that `path_filter` left out; only with it, as the next
tree/filtered_success   mean success of these
tree/depth              steps per trajectory
tree/branch_position    share of a branched trajectory that was inherited, 0 at the question
tree/selected_minus_fresh  success that a step was chosen with, minus that of the rollouts that then continued it
tree/fresh_minus_fresh     the same between two rollouts that continued it at once: a control, 0 on average
ib/score                mean IB-Score of the steps with children
ib/covariance           mean Cov(eta1, eta2) of the steps with at least two children
ib/confidence           mean step confidence eta2
advantages/global_std   standard deviation of A_GL over the tokens of all trajectories
advantages/local_std    standard deviation of lambda * A_IB over the tokens of all trajectories

With tools and environments, also (`ToolHost.counts`):

tree/restored           branches per question whose environment was restored from a snapshot or a copy
tree/replayed           branches per question whose environment was brought about by executing their prefix again
tree/replay_mismatch    those of them that observed something else, and so started at the question
tools/timeouts          calls per question that took longer than `tool_timeout`
"""

from collections import defaultdict

import numpy as np
import torch

from ..advantages import TokenAdvantages
from ..grown_tree import GrownTree
from ..values import selection_differences

MEANS = (
    "tree/effective_rate",
    "tree/average_success",
    "tree/initial_success",
    "tree/generated_tokens",
    "tree/trajectory_tokens",
    "tree/filtered",
    "tree/filtered_success",
    "tree/depth",
    "tree/branch_position",
    "tree/selected_minus_fresh",
    "tree/fresh_minus_fresh",
    "ib/score",
    "ib/covariance",
    "ib/confidence",
)
LEAVES_STD = "tree/leaves_std"
ONLY_WITH = (LEAVES_STD, "tree/filtered", "tree/filtered_success")  # fields that are not always set
DEVIATIONS = ("advantages/global_std", "advantages/local_std", LEAVES_STD)


class TreeMetrics:
    """Accumulates over the trees of one generation batch."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))  # sum, sum of squares, count

    def add_tree(self, grown: GrownTree, advantages: TokenAdvantages) -> None:
        tree, scores, ends = grown.tree, grown.scores, grown.tree.ends()
        success = np.array(tree.success)
        known = success[~np.isnan(success)]
        self._add("tree/effective_rate", [len(known) > 0 and known.min() < known.max()])
        self._add("tree/average_success", known)
        if grown.settings.adaptive_budget is not None:
            self._add(LEAVES_STD, [len(tree.leaves)])
        initial = success[np.array(tree.rounds) == 0]
        if grown.settings.adaptive_budget is not None:  # independent rollouts that were granted later have round 0 too
            initial = initial[: grown.settings.tree_initial_rollouts]
        self._add("tree/initial_success", initial[~np.isnan(initial)])
        whole = tree
        if grown.filtered is not None:
            whole = grown.filtered.whole.tree
            left_out = np.delete(np.array(whole.success), grown.filtered.kept)
            self._add("tree/filtered", [len(left_out)])
            self._add("tree/filtered_success", left_out[~np.isnan(left_out)])
        self._add("tree/generated_tokens", [whole.generated_tokens])
        self._add("tree/trajectory_tokens", [tree.trajectory_tokens])
        self._add("tree/depth", [len(tree.path(leaf)) for leaf in tree.leaves])
        branched = zip(tree.branch_steps, tree.leaves, tree.rounds, strict=True)
        self._add(
            "tree/branch_position",
            [ends[after] / ends[leaf] for after, leaf, round in branched if round > 0],
        )
        selected, fresh = selection_differences(tree)
        self._add("tree/selected_minus_fresh", selected)
        self._add("tree/fresh_minus_fresh", fresh)
        self._add("ib/score", scores.ib_score[scores.children > 0])
        self._add("ib/covariance", scores.covariance[scores.children > 1])
        self._add("ib/confidence", scores.confidence[1:])
        sampled = np.concatenate([tree.sampled(leaf) for leaf in range(len(tree.leaves))])
        self._add("advantages/global_std", np.concatenate(advantages.global_terms)[sampled])
        self._add("advantages/local_std", np.concatenate(advantages.local_terms)[sampled])

    def reduce(self, accelerator) -> dict[str, float]:
        """Means and standard deviations over all processes; one collective call. NaN where nothing was seen."""
        names = [name for name in (*MEANS, *DEVIATIONS) if name not in ONLY_WITH or name in self._sums]
        # In single precision: some devices know no other.
        local = torch.tensor(np.array([self._sums[name] for name in names], np.float32), device=accelerator.device)
        total = accelerator.reduce(local, reduction="sum").cpu().double().numpy()
        values = {}
        for name, (first, second, count) in zip(names, total, strict=True):
            mean = first / count if count else float("nan")
            if name in DEVIATIONS:
                values[name] = float(np.sqrt(max(0.0, second / count - mean**2))) if count else float("nan")
            else:
                values[name] = float(mean)
        return values

    def _add(self, name: str, values) -> None:
        values = np.asarray(values, dtype=np.float64)
        self._sums[name] += (values.sum(), (values**2).sum(), values.size)


def mean_per_question(counts: dict[str, int], questions: int, accelerator) -> dict[str, float]:
    """Counts of this process, as means over the questions of all of them; one collective call."""
    local = torch.tensor([*counts.values(), questions], dtype=torch.float32, device=accelerator.device)
    *totals, questions = accelerator.reduce(local, reduction="sum").tolist()
    return {name: total / questions for name, total in zip(counts, totals, strict=True)}
