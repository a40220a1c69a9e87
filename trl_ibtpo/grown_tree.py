"""What decides the growth of a tree, and what is known of a tree that is done: data, and nothing that grows.

Free of torch and TRL.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .branching import rounds_of
from .scores import StepConfidence, TreeScores
from .tree import RolloutTree, moved_by_split


@dataclass(frozen=True)
class GrowthSettings:
    """What decides the growth of a tree: fields of `IBTPOConfig`, under the same names."""

    tree_initial_rollouts: int = 4  # B0
    tree_levels: int = 9  # L
    tree_nodes_per_level: int = 1  # K
    tree_branches_per_node: int = 1  # B
    branching: str = "ib"
    allow_root_branching: bool = False
    allow_repeated_branching: bool = True
    ib_beta: float = 5.0
    step_confidence: StepConfidence = "geometric_mean"
    max_completion_length: int = 2048
    branch_lookahead: int = 0
    answer_marker: Sequence[str] | None = None
    adaptive_budget: int | None = None
    success_range: tuple[float, float] | None = None
    fork_keeps_token: bool = False
    path_filter: str | None = None

    @cached_property
    def leaves(self) -> int:
        """`G = B0 + (L - 1) K B`: of every tree, or on average with `adaptive_budget`.

        Where every initial rollout has rounds of its own, `B0 (1 + (L - 1) K B)`.
        """
        return self.tree_initial_rollouts + (self.tree_levels - 1) * self.branches_per_round * self.groups

    @cached_property
    def groups(self) -> int:
        """Parts of a tree that have rounds of their own: the tree, or each initial rollout with its branches."""
        return self.tree_initial_rollouts if rounds_of(self.branching) == "rollout" else 1

    @property
    def branches_per_round(self) -> int:
        """`K B`."""
        return self.tree_nodes_per_level * self.tree_branches_per_node


CANDIDATES_KEPT = 32  # of the steps that a round chose from: bounded, however long completions are


@dataclass(frozen=True)
class Choice:
    """What one round chose, and the best of the steps that it chose from; of tokens, only what it chose."""

    round: int  # from 1
    steps: list[int]  # chosen
    candidates: list[int]  # eligible steps of highest priority, best first; those chosen are always among them
    priorities: list[float]  # of the candidates, as the strategy gave them: IB-Scores with `ib`
    deferred: list[int]  # candidates that could only be chosen last: a branch of theirs was under way
    eligible: int  # how many steps, or tokens, could be chosen

    @classmethod
    def ranked(
        cls, round: int, steps: list[int], priority_N: np.ndarray, eligible_N: np.ndarray, deferred_N: np.ndarray
    ) -> "Choice":
        """A choice of `steps` by the priority of every step, of which the best are kept as candidates."""
        best = np.flatnonzero(eligible_N)
        values, count = -priority_N[best], len(best)
        if count > CANDIDATES_KEPT:  # sorting all of a large tree would take longer than scoring it
            kept = ~(values > np.partition(values, CANDIDATES_KEPT)[CANDIDATES_KEPT])
            best, values = best[kept], values[kept]
        best = best[values.argsort(kind="stable")[:CANDIDATES_KEPT]]
        ranked = best.tolist()
        missing = [step for step in dict.fromkeys(steps) if step not in ranked]
        if missing:
            best = np.append(best, missing)
        return cls(
            round=round,
            steps=steps,
            candidates=ranked + missing,
            priorities=priority_N[best].tolist(),
            deferred=best[deferred_N[best]].tolist(),
            eligible=count,
        )

    def after_split(self, step: int) -> "Choice":
        """The same once `step` of the tree has been split."""
        moved = {
            name: [moved_by_split(index, step) for index in getattr(self, name)]
            for name in ("steps", "candidates", "deferred")
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class GrownTree:
    """A tree that is done, and what decided its growth."""

    tree: RolloutTree
    scores: TreeScores
    settings: GrowthSettings
    choices: Sequence[Choice] = ()  # one a round
    filtered: "FilteredPaths | None" = None  # where not all leaves were kept


@dataclass(frozen=True)
class FilteredPaths:
    """What a tree was before some of its leaves were left out, see `paths`."""

    whole: GrownTree
    kept: list[int]  # leaves of the whole tree that are left
    scores_L: np.ndarray  # by which they were chosen; NaN for initial rollouts
    rewards_LF: np.ndarray  # of all leaves, by each reward function
