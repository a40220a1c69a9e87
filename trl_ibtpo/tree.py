"""The tree of one question: steps with parent indices, one leaf per rollout.

Step 0 is the root, the question itself; it owns no completion tokens. Every other step owns the token ids it was
sampled as and their sampling log-probabilities. A rollout opened after a step has exactly one leaf, the last of the
steps it is extended by. Parents always come before their children, so one backward sweep over the list visits children
first.

Names of shapes here and in the modules above: `_N` steps (the root included), `_L` leaves in the order of their
rollouts, `_T` tokens of a trajectory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Step:
    """One node: a piece of a completion, and the position in the tree where it hangs."""

    parent: int  # index of the parent step, -1 for the root
    token_ids: list[int]
    logprobs: list[float]  # log pi_old of each token when it was sampled
    end: int  # completion tokens from the question to the end of this step
    children: list[int] = field(default_factory=list)


class RolloutTree:
    """All rollouts of one question, sharing the prefixes they branched from.

    Args:
        prompt_ids: token ids of the question.
    """

    def __init__(self, prompt_ids: Sequence[int]):
        self.prompt_ids = list(prompt_ids)
        self.steps: list[Step] = [Step(parent=-1, token_ids=[], logprobs=[], end=0)]
        self.leaves: list[int] = []  # step index of each rollout's last step so far
        self.branch_steps: list[int] = []  # step index each rollout was opened after

    def open(self, after: int) -> int:
        """Start a rollout, still without tokens, that continues the prefix of step `after`; returns its leaf index."""
        self.leaves.append(after)
        self.branch_steps.append(after)
        return len(self.leaves) - 1

    def extend(self, leaf: int, token_ids: Sequence[int], logprobs: Sequence[float], step_ends: Sequence[int]) -> None:
        """Hang further steps at the end of a rollout.

        Args:
            leaf: which rollout.
            token_ids: sampled continuation, at least one token.
            logprobs: sampling log-probability of each token, same length.
            step_ends: exclusive ends of its steps; the last is `len(token_ids)`.
        """
        if not token_ids or len(logprobs) != len(token_ids) or not step_ends or step_ends[-1] != len(token_ids):
            raise ValueError(
                f"A rollout needs at least one token, one log-probability a token and steps that cover it; got "
                f"{len(token_ids)} tokens, {len(logprobs)} log-probabilities and step ends {list(step_ends)}."
            )
        parent, start = self.leaves[leaf], 0
        for end in step_ends:
            step = Step(
                parent=parent,
                token_ids=list(token_ids[start:end]),
                logprobs=list(logprobs[start:end]),
                end=self.steps[parent].end + end - start,
            )
            self.steps.append(step)
            self.steps[parent].children.append(len(self.steps) - 1)
            parent, start = len(self.steps) - 1, end
        self.leaves[leaf] = parent

    def graft(self, after: int, token_ids: Sequence[int], logprobs: Sequence[float], step_ends: Sequence[int]) -> int:
        """Open a rollout after step `after` and extend it by all its steps at once; returns its leaf index."""
        leaf = self.open(after)
        self.extend(leaf, token_ids, logprobs, step_ends)
        return leaf

    def path(self, step: int) -> list[int]:
        """Step indices from the first step of the completion to `step`, the root left out."""
        path = []
        while step > 0:
            path.append(step)
            step = self.steps[step].parent
        return path[::-1]

    def prefix(self, step: int) -> list[int]:
        """Completion token ids from the question to the end of `step`."""
        return [token_id for index in self.path(step) for token_id in self.steps[index].token_ids]

    def trajectory(self, leaf: int) -> tuple[list[int], list[float]]:
        """Completion token ids and sampling log-probabilities of trajectory `leaf`; both `(T,)`."""
        path = self.path(self.leaves[leaf])
        token_ids = [token_id for index in path for token_id in self.steps[index].token_ids]
        return token_ids, [logprob for index in path for logprob in self.steps[index].logprobs]

    def parents(self) -> np.ndarray:
        """Parent index of every step, `(N,)`; -1 for the root."""
        return np.array([step.parent for step in self.steps])

    def leaf_mean(self, values_L: Sequence[float] | np.ndarray) -> np.ndarray:
        """Mean of a leaf value over the leaves under every step; `(L,)` to `(N,)`.

        A NaN leaf (unscorable, or not scored yet) is left out of every mean; a step with no other leaf gets NaN.
        """
        values_L = np.asarray(values_L, dtype=np.float64)
        known_L = ~np.isnan(values_L)
        totals = self._sum_over_leaves(np.where(known_L, values_L, 0.0))
        counts = self._sum_over_leaves(known_L.astype(np.float64))
        return np.divide(totals, counts, out=np.full(len(self.steps), np.nan), where=counts > 0)

    def leaf_count(self) -> np.ndarray:
        """Number of leaves under every step, itself included; `(N,)`."""
        return self._sum_over_leaves(np.ones(len(self.leaves)))

    def _sum_over_leaves(self, values_L: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(self.steps))
        np.add.at(sums, self.leaves, values_L)
        for index in range(len(self.steps) - 1, 0, -1):
            sums[self.steps[index].parent] += sums[index]
        return sums

    @property
    def generated_tokens(self) -> int:
        """Newly sampled tokens, every shared prefix counted once."""
        return sum(len(step.token_ids) for step in self.steps)

    @property
    def trajectory_tokens(self) -> int:
        """Tokens of all trajectories, a shared prefix counted once per trajectory."""
        return sum(self.steps[leaf].end for leaf in self.leaves)
