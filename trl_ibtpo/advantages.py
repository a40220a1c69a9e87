"""The advantage of every step: one short function per method, all behind `IBTPOConfig.advantage`.

Each function starts from the trajectory advantages that GRPO itself computed (whatever `scale_rewards`, reward weights
and aggregation the user chose). These are the full weighted rewards of all reward functions, shifted and scaled alike
for all trajectories of a question: with `scale_rewards="none"` a difference of two values is the papers' own,
otherwise it is in units of the standard deviation. A new method is a function of a `GradedTree` and a line in
`ADVANTAGES`; a user's own function is given to the trainer in place of a name, and works the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .scores import TreeScores
from .tree import RolloutTree
from .values import VALUES, Choice, ValueEstimate, selection_bias, sibling_baseline
from .weights import SharedTokenWeight, step_weights


@dataclass(frozen=True)
class CreditSettings:
    """What decides the advantages of a tree: fields of `IBTPOConfig`, under the same names."""

    advantage: str = "ibtpo"
    ib_coef: float = 0.1  # lambda
    sibling_kappa: float = 16.0
    value_estimate: ValueEstimate = "leaf_mean"
    selection_correction: bool = False
    shared_token_weight: SharedTokenWeight = "per_trajectory"


@dataclass(frozen=True)
class GradedTree:
    """A tree and what GRPO made of its rewards: what a method has to give steps their advantages."""

    tree: RolloutTree
    scores: TreeScores
    advantage_L: np.ndarray  # GRPO's advantage of each trajectory, NaN for an unscorable one; `(L,)`
    settings: CreditSettings = CreditSettings()
    choices: Sequence[Choice] = ()  # what the rounds of branching chose
    trained_L: np.ndarray | None = None  # whether the loss has each trajectory, `(L,)`; None: all

    @cached_property
    def value_N(self) -> np.ndarray:
        """`V(s)`, in units of GRPO's advantage, `(N,)`; NaN where no leaf under a step is scorable."""
        kind = self.settings.value_estimate
        value_N = VALUES[kind](self.tree, self.advantage_L)
        if self.settings.selection_correction:
            value_N = value_N - selection_bias(self.tree, self.advantage_L, kind, self.choices)
        return value_N

    @cached_property
    def gain_N(self) -> np.ndarray:
        """`V(s) - V(question)`, `(N,)`; 0 where no leaf under a step is scorable."""
        # GRPO has already taken the mean over the leaves off.
        plain = self.settings.value_estimate == "leaf_mean" and not self.settings.selection_correction
        value_N = self.value_N if plain else self.value_N - self.value_N[0]
        return np.nan_to_num(value_N, nan=0.0)

    @cached_property
    def gain_over_parent_N(self) -> np.ndarray:
        """`V(s) - V(parent of s)`, `(N,)`; 0 at the question and where no leaf under a step is scorable."""
        gain_N = self.value_N - self.value_N[self.tree.parents()]
        gain_N[0] = 0.0
        return np.nan_to_num(gain_N, nan=0.0)


@dataclass(frozen=True)
class StepAdvantages:
    """The two terms of each trajectory's step advantages, in the order of its path; one `(S,)` array a leaf."""

    global_terms: list[np.ndarray]  # A_GL, or all there is
    local_terms: list[np.ndarray]  # lambda * A_IB, or what a method adds within the tree

    @classmethod
    def of(cls, tree: RolloutTree, global_: np.ndarray, local: np.ndarray | None = None) -> "StepAdvantages":
        """From one value per step, `(N,)`, or per trajectory, `(L,)`; a tree has more steps than leaves."""
        paths = [tree.path(leaf) for leaf in tree.leaves]

        def spread(values: np.ndarray | None) -> list[np.ndarray]:
            if values is None:
                return [np.zeros(len(path)) for path in paths]
            if len(values) == len(tree):
                return [values[path] for path in paths]
            return [np.full(len(path), value) for path, value in zip(paths, values, strict=True)]

        return cls(spread(global_), spread(local))


AdvantageFunction = Callable[[GradedTree], StepAdvantages | np.ndarray]


def ibtpo(graded: GradedTree) -> StepAdvantages:
    """IB-TPO (arXiv 2605.28109): `A(s) = A_GL(s) + lambda * A_IB(s)`.

        A_GL(s) = mean over the leaves under s of the trajectory advantage = (p(s) - p(root)) / std(R)
        A_IB(s) = eta1(s) * confidence of s under the sampling policy

    A step under which no leaf is scorable gets 0; one under which no leaf has a known success gets `A_IB = 0`.
    """
    local_N = np.nan_to_num(graded.scores.eta1 * graded.scores.confidence, nan=0.0)
    return StepAdvantages.of(graded.tree, graded.gain_N, graded.settings.ib_coef * local_N)


def grpo(graded: GradedTree) -> StepAdvantages:
    """GRPO (arXiv 2402.03300): every step of a trajectory has that trajectory's advantage."""
    return StepAdvantages.of(graded.tree, np.nan_to_num(graded.advantage_L, nan=0.0))


def treerl(graded: GradedTree) -> StepAdvantages:
    """TreeRL (arXiv 2506.11902): `A(s) = |L(s)|^(-1/2) * [(V(s) - V(root)) + (V(s) - V(parent))]`, no std.

    `|L(s)|` counts all trajectories through `s`. Each of them trains the step, so its weight in all is the square
    root; another `shared_token_weight` would weigh it twice.
    """
    discount_N = graded.tree.leaf_count() ** -0.5
    return StepAdvantages.of(graded.tree, discount_N * graded.gain_N, discount_N * graded.gain_over_parent_N)


def treepo(graded: GradedTree) -> StepAdvantages:
    """TreePO (arXiv 2508.17445): the mean of a trajectory's advantages within ever smaller groups, then whitened.

        g_d(i) = leaves that share the first d steps of trajectory i;  a_{i,d} = R_i - mean R over g_d(i)
        A_i = mean of a_{i,d} over d = 0 and those d > 0 with |g_d(i)| > 1

    Only scorable leaves count; an unscorable trajectory gets 0.
    """
    return StepAdvantages.of(graded.tree, _subgroup_advantages(graded, by_size=False))


def treepo_size_weighted(graded: GradedTree) -> StepAdvantages:
    """TreePO (arXiv 2508.17445) with larger groups counting more: the mean of `a_{i,d}` weighted by `|g_d(i)|`."""
    return StepAdvantages.of(graded.tree, _subgroup_advantages(graded, by_size=True))


def _subgroup_advantages(graded: GradedTree, by_size: bool) -> np.ndarray:
    tree, advantage_L = graded.tree, graded.advantage_L
    size_N = tree.sum_over_leaves((~np.isnan(advantage_L)).astype(float))
    mean_N = tree.leaf_mean(advantage_L)
    found_L = np.zeros(len(tree.leaves))
    for leaf in np.flatnonzero(~np.isnan(advantage_L)):
        groups = [step for step in tree.path(tree.leaves[leaf]) if size_N[step] > 1]
        groups = [0, *groups]
        weights = size_N[groups] if by_size else np.ones(len(groups))
        found_L[leaf] = np.average(advantage_L[leaf] - mean_N[groups], weights=weights)
    return found_L


treepo.whitened = treepo_size_weighted.whitened = True  # see `whiten`


def tree_grpo(graded: GradedTree) -> StepAdvantages:
    """Tree-GRPO (arXiv 2509.21240): `A_i = z(all trajectories of the question) + z(trajectories of its own tree)`.

    The first term is GRPO's advantage (a z-score with `scale_rewards="group"`); the second compares the scorable
    leaves under the same initial rollout, `(A - mean) / (std + 1e-4)`, and is 0 for one that is alone there.
    """
    tree, advantage_L = graded.tree, graded.advantage_L
    first_L = np.array([tree.path(leaf)[0] for leaf in tree.leaves])
    local_L = np.zeros(len(first_L))
    for first in set(first_L.tolist()):
        own = np.flatnonzero((first_L == first) & ~np.isnan(advantage_L))
        if len(own) > 1:
            values = advantage_L[own]
            local_L[own] = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    return StepAdvantages.of(tree, np.nan_to_num(advantage_L, nan=0.0), local_L)


def segment_value(graded: GradedTree) -> StepAdvantages:
    """SPO-tree (arXiv 2505.23564): `A(s) = V(s) - V(parent)`; its `V` is `value_estimate="backup"`.

    0 where a step is its parent's only child: nothing was sampled that it could be compared with.
    """
    return StepAdvantages.of(graded.tree, graded.gain_over_parent_N)


def sibling(graded: GradedTree) -> StepAdvantages:
    """`A(s) = V(s) - b(s)`, where `b` is the mean of other leaves, the nearer ones counting more; of this package.

    `values.sibling_baseline` gives `b` for `sibling_kappa`. No leaf under `s` enters it, which makes it a baseline
    that does not bias the gradient. With infinite kappa it is the mean of all leaves of the question that are not
    under `s`: of independent completions, GRPO's leave-one-out (RLOO) exactly. 0 where no other leaf is scorable.
    """
    baseline_N = sibling_baseline(graded.tree, graded.advantage_L, graded.settings.sibling_kappa)
    return StepAdvantages.of(graded.tree, np.nan_to_num(graded.value_N - baseline_N, nan=0.0))


ADVANTAGES: dict[str, AdvantageFunction] = {
    "ibtpo": ibtpo,
    "grpo": grpo,
    "treerl": treerl,
    "treepo": treepo,
    "treepo_size_weighted": treepo_size_weighted,
    "tree_grpo": tree_grpo,
    "segment_value": segment_value,
    "sibling": sibling,
}
BY_VALUE = ("ibtpo", "treerl", "segment_value", "sibling")  # those that look at `GradedTree.value_N`


@dataclass(frozen=True)
class TokenAdvantages:
    """One `(T,)` array a leaf."""

    advantages: list[np.ndarray]  # the sum of both terms
    weights: list[np.ndarray]  # what it is multiplied by
    global_terms: list[np.ndarray]
    local_terms: list[np.ndarray]

    @property
    def values(self) -> list[np.ndarray]:
        """What the loss gets; with `treepo`, before the tokens of a batch are whitened."""
        return [advantage * weight for advantage, weight in zip(self.advantages, self.weights, strict=True)]


def token_advantages(graded: GradedTree, function: AdvantageFunction | None = None) -> TokenAdvantages:
    """What each token of each trajectory gets.

    Args:
        graded: the tree.
        function: in place of the one that `settings.advantage` names. It may return one value per step, `(N,)`, or per
            trajectory, `(L,)`, or `StepAdvantages`.

    Raises:
        ValueError: where it returned something else, or a value that is not finite.
    """
    tree = graded.tree
    terms = (function or ADVANTAGES[graded.settings.advantage])(graded)
    if function is not None:
        terms = _checked(tree, function, terms)
    result = TokenAdvantages([], [], [], [])
    weights = step_weights(tree, graded.settings.shared_token_weight, graded.trained_L)
    for leaf, values in enumerate(zip(terms.global_terms, terms.local_terms, weights, strict=True)):
        global_T, local_T, weights_T = per_token(tree, leaf, np.array(values))
        result.advantages.append(global_T + local_T)
        result.weights.append(weights_T)
        result.global_terms.append(global_T)
        result.local_terms.append(local_T)
    return result


def _checked(tree: RolloutTree, function: AdvantageFunction, terms: StepAdvantages | np.ndarray) -> StepAdvantages:
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(terms, StepAdvantages):
        values = np.asarray(terms)
        if values.shape not in ((len(tree),), (len(tree.leaves),)) or values.dtype.kind not in "fiub":
            raise ValueError(
                f"The advantage function '{name}' returned {type(terms).__name__} of shape {values.shape} for a tree "
                f"of {len(tree)} steps, the question included, and {len(tree.leaves)} trajectories; return one number "
                f"per step, ({len(tree)},), or one per trajectory, ({len(tree.leaves)},)."
            )
        terms = StepAdvantages.of(tree, values.astype(float))
    wanted = [(len(tree.path(leaf)),) for leaf in tree.leaves]
    for term in ("global_terms", "local_terms"):
        shapes = [np.shape(values) for values in getattr(terms, term)]
        if shapes != wanted:
            raise ValueError(
                f"The advantage function '{name}' returned `{term}` of shapes {shapes}; the {len(wanted)} "
                f"trajectories of this tree have {wanted}, one number for each step."
            )
    if not all(np.isfinite(values).all() for values in (*terms.global_terms, *terms.local_terms)):
        raise ValueError(
            f"The advantage function '{name}' returned a number that is not finite. Steps without a scorable leaf "
            "have the value NaN; give them 0, for example with `np.nan_to_num`."
        )
    return terms


def per_token(tree: RolloutTree, leaf: int, values_S: np.ndarray) -> np.ndarray:
    """Spread values per step of trajectory `leaf` over its tokens, 0 on observations.

    `(S,)` to `(T,)`, or `(..., S)` to `(..., T)`.
    """
    ends_S = tree.ends()[tree.path(tree.leaves[leaf])]
    return np.repeat(values_S, np.diff(ends_S, prepend=0), axis=-1) * tree.sampled(leaf)


def whiten(
    values: np.ndarray, mask: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray] = lambda sums: sums
) -> np.ndarray:
    """`(A - mean) / (std + 1e-4)` over the tokens of the batch; 0 elsewhere. TreePO's last step.

    Args:
        values: `(B, T)`, not weighted.
        mask: the tokens that are trained, same shape.
        reduce: sums over all processes.
    """
    kept = values[mask]
    count, total, squares = reduce(np.array([kept.size, kept.sum(), (kept**2).sum()]))
    mean = total / max(count, 1)
    deviation = np.sqrt(max(squares / max(count, 1) - mean**2, 0.0))
    return np.where(mask, (values - mean) / (deviation + 1e-4), 0.0)
