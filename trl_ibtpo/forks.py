"""Forks at tokens: which tokens of a tree may be sampled again, and where a rollout that does so continues.

A fork at token t continues the prefix before it, so that the token itself is sampled again; with `keeps_token` it
continues the prefix that ends with the token. Either prefix ends at the end of a step, or in the middle of one, which
is then split.

Names of shapes: `_M` tokens of a tree in the order of `RolloutTree.token_steps`, `_N` steps.
"""

from collections.abc import Collection

import numpy as np

from .tree import RolloutTree


class TokenForks:
    """The forks that a tree has room for.

    Args:
        tree: as grown so far.
        taken: steps after which it was forked before.
        keeps_token: whether branches share the token that is forked.
        first_token: whether the first token of a completion may be forked.
    """

    def __init__(
        self, tree: RolloutTree, taken: Collection[int] = (), keeps_token: bool = False, first_token: bool = False
    ):
        self.step_M = tree.token_steps()
        parents_N, ends_N = tree.parents(), tree.ends()
        self._parent_M = parents_N[self.step_M]
        place_M = np.arange(len(self.step_M)) - np.searchsorted(self.step_M, self.step_M)
        self._shared_M = place_M + keeps_token  # tokens of its own step that a branch shares
        sampled_N = ends_N - ends_N[parents_N] - tree.observed()
        self._whole_M = self._shared_M == sampled_N[self.step_M]  # the fork is the end of the step
        self.end_M = ends_N[self._parent_M] + place_M  # completion tokens before the token
        taken_N = np.zeros(len(tree), dtype=bool)
        taken_N[list(taken)] = True
        self.open_M = ~np.isnan(tree.token_logprobs())  # observations were not sampled
        self.open_M &= (self._shared_M > 0) | ~taken_N[self._parent_M]
        self.open_M &= ~self._whole_M | (~taken_N & (tree.child_counts() > 0))[self.step_M]
        self.open_M &= (self.end_M > 0) | first_token

    def place(self, token: int) -> tuple[int, int]:
        """The step that holds the fork, and after how many of its tokens it is: 0 where it is that step's end."""
        if self._whole_M[token]:
            return int(self.step_M[token]), 0
        shared = int(self._shared_M[token])
        return (int(self.step_M[token]), shared) if shared else (int(self._parent_M[token]), 0)
