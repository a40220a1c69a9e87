"""The tree of one question: steps with parent indices, one leaf per rollout, and what is known of the leaves.

Step 0 is the root, the question itself; it owns no completion tokens. Every other step owns the token ids it was
sampled as and their sampling log-probabilities. A step that ends a turn also owns the observation that its action
caused (the result of a tool), as its last tokens: nobody sampled these, and they have no log-probability. A rollout
opened after a step has exactly one leaf, the last of the steps it is extended by. Parents always come before their
children, so one backward sweep over the list visits children first.

Names of shapes here and in the modules above: `_N` steps (the root included), `_L` leaves in the order of their
rollouts, `_T` tokens of a trajectory.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isnan, nan
from typing import NamedTuple

import numpy as np

ROUNDING = 2e-6  # by which a reward may be outside [0, 1] and count as inside


@dataclass(frozen=True, slots=True)
class Step:
    """One node: a piece of a completion, and the position in the tree where it hangs."""

    parent: int  # index of the parent step, -1 for the root
    token_ids: list[int]
    logprobs: list[float]  # log pi_old of each token when it was sampled; NaN for an observation
    end: int  # completion tokens from the question to the end of this step
    children: list[int]
    observed: int = 0  # how many of its last tokens are an observation


class _Piece(NamedTuple):
    """Steps that were hung on together. Tuples of numbers are nothing to the garbage collector, unlike lists."""

    after: int  # step that they continue
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]  # empty where nobody asked for them


class RolloutTree:
    """All rollouts of one question, sharing the prefixes they branched from.

    Kept as columns of numbers and as pieces, not as an object a step, and with sums per step, so that neither growth
    nor scores go through tokens and leaves twice.

    Args:
        prompt_ids: token ids of the question.
        success_range: the rewards that are success 0 and 1, see `add_reward`.
    """

    def __init__(self, prompt_ids: Sequence[int], success_range: tuple[float, float] | None = None):
        self.prompt_ids = list(prompt_ids)
        self.leaves: list[int] = []  # step index of each rollout's last step so far
        self.branch_steps: list[int] = []  # step index each rollout was opened after
        self.rounds: list[int] = []  # round that each rollout belongs to, 0 for the initial ones
        self.groups: list[int] = []  # which initial rollout each belongs to where these have rounds of their own, or 0
        self.rewards: list[float] = []  # of each leaf, from the function that names success; NaN where unknown
        self.success: list[float] = []  # the same in [0, 1], see `add_reward`
        self._range = success_range or (0.0, 1.0)  # the same, or what they are so far
        self._range_is_known = success_range is not None
        self._pieces: list[_Piece] = []
        # Of each step; the root's come first.
        self._parents, self._ends, self._piece_of = array("q", [-1]), array("q", [0]), array("q", [-1])
        self._child_counts = array("q", [0])
        self._observed = array("q", [0])
        self._logprob_sums, self._logprob_counts = array("d", [0.0]), array("d", [0.0])
        self._success_sums, self._success_counts = array("d", [0.0]), array("d", [0.0])
        self._steps: list[Step] | None = None

    def __len__(self) -> int:
        """Number of steps, the root included."""
        return len(self._parents)

    @property
    def steps(self) -> list[Step]:
        """All steps as objects, for those who look at a tree that is done: made when first asked for."""
        if self._steps is None:
            children = [[] for _ in range(len(self))]
            for step in range(1, len(self)):
                children[self._parents[step]].append(step)
            self._steps = [Step(-1, [], [], 0, children[0])]
            for step in range(1, len(self)):
                parent, end, piece = self._parents[step], self._ends[step], self._pieces[self._piece_of[step]]
                own = slice(self._ends[parent] - self._ends[piece.after], end - self._ends[piece.after])
                ids, logprobs = list(piece.token_ids[own]), list(piece.logprobs[own])
                self._steps.append(Step(parent, ids, logprobs, end, children[step], self._observed[step]))
        return self._steps

    def open(self, after: int, round: int = 0, group: int = 0) -> int:
        """Start a rollout, still without tokens, that continues the prefix of step `after`; returns its leaf index."""
        self.leaves.append(after)
        self.branch_steps.append(after)
        self.rounds.append(round)
        self.groups.append(group)
        self.rewards.append(nan)
        self.success.append(nan)
        return len(self.leaves) - 1

    def restart(self, leaf: int) -> None:
        """Hang a rollout that still has no tokens at the question instead of the step that it was opened after."""
        self.leaves[leaf] = self.branch_steps[leaf] = 0

    def extend(
        self,
        leaf: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        step_ends: Sequence[int],
        entropies: Sequence[float] = (),
    ) -> None:
        """Hang further steps at the end of a rollout whose reward is not known yet.

        Args:
            leaf: which rollout.
            token_ids: sampled continuation, at least one token.
            logprobs: sampling log-probability of each token, same length; NaN where the engine could not give it,
                None for the tokens of an observation, which come last in their step.
            step_ends: exclusive ends of its steps; the last is `len(token_ids)`.
            entropies: of the distribution that each token was sampled from, same length; or none.
        """
        if not token_ids or len(logprobs) != len(token_ids) or not step_ends or step_ends[-1] != len(token_ids):
            raise ValueError(
                f"A rollout needs at least one token, one log-probability a token and steps that cover it; got "
                f"{len(token_ids)} tokens, {len(logprobs)} log-probabilities and step ends {list(step_ends)}."
            )
        try:
            totals, observed = _sums(logprobs, step_ends), [0] * len(step_ends)
        except TypeError:  # a None; looking for one would take longer than all sums
            observed, logprobs = _observations(logprobs, step_ends)
            totals = _sums(logprobs, step_ends)
        after, first, count = self.leaves[leaf], len(self), len(step_ends)
        before = self._ends[after]
        self._parents.extend([after, *range(first, first + count - 1)])
        self._ends.extend([before + end for end in step_ends])
        self._piece_of.extend([len(self._pieces)] * count)
        self._pieces.append(_Piece(after, tuple(token_ids), tuple(logprobs), tuple(entropies)))
        self._child_counts[after] += 1
        self._child_counts.extend([1] * (count - 1) + [0])
        self._observed.extend(observed)
        counts = [end - start for start, end in pairwise([0, *step_ends])]
        if isnan(sum(totals)):
            for step, end in enumerate(step_ends):
                numbers = [logprob for logprob in logprobs[end - counts[step] : end] if not isnan(logprob)]
                totals[step], counts[step] = sum(numbers), len(numbers)
        self._logprob_sums.extend(totals)
        self._logprob_counts.extend(counts)
        self._success_sums.extend([0.0] * count)
        self._success_counts.extend([0.0] * count)
        self.leaves[leaf] = first + count - 1
        self._steps = None

    def split(self, step: int, tokens: int) -> int:
        """Make the first tokens of a step a step of their own, so that rollouts can continue from inside it.

        The new step takes the place of the old one, which keeps the other tokens and moves up by one, as all later
        steps do: whoever remembers the index of a step adds 1 to those from `step` on.

        Args:
            step: not the root.
            tokens: how many, at least 1; at least one sampled token must be left.

        Returns:
            The new step, `step`.
        """
        parent, piece = self._parents[step], self._pieces[self._piece_of[step]]
        own = self._ends[step] - self._ends[parent] - self._observed[step]
        if not 0 < tokens < own:
            raise ValueError(f"Step {step} has {own} sampled tokens; its head must have 1 to {own - 1}, not {tokens}.")
        offset, middle = self._ends[piece.after], self._ends[parent] + tokens
        head = piece.logprobs[self._ends[parent] - offset : middle - offset]
        rest = piece.logprobs[middle - offset : self._ends[step] - offset]
        for indices in (self._parents, self.leaves, self.branch_steps):
            for place, index in enumerate(indices):
                indices[place] = moved_by_split(index, step)
        self._pieces = [each._replace(after=moved_by_split(each.after, step)) for each in self._pieces]
        self._parents.insert(step, parent)
        self._parents[step + 1] = step
        self._ends.insert(step, middle)
        self._child_counts.insert(step, 1)
        self._observed.insert(step, 0)
        for column in (self._piece_of, self._success_sums, self._success_counts):
            column.insert(step, column[step])
        for column, values in zip((self._logprob_sums, self._logprob_counts), _known_sum(head), strict=True):
            column.insert(step, values)
        self._logprob_sums[step + 1], self._logprob_counts[step + 1] = _known_sum(rest)
        self._steps = None
        return step

    def add_reward(self, leaf: int, reward: float) -> None:
        """What the reward function that names success gave to a whole trajectory; NaN where it gave nothing.

        Success is a reward in [0, 1] as it is, or `(reward - low) / (high - low)` where the range is known, clipped.
        Where it is not and this tree has a reward outside of [0, 1], success is `(reward - min) / (max - min)` over
        its rewards so far, and 1/2 where all are equal: no information.
        """
        self.rewards[leaf] = reward
        if isnan(reward):
            return
        low, high = self._range
        if self._range_is_known or (low == 0.0 and high == 1.0 and abs(reward - 0.5) <= 0.5 + ROUNDING):
            self._add_success(leaf, min(max((reward - low) / (high - low), 0.0), 1.0))
            return
        known = [other for other in self.rewards if not isnan(other)]
        if self._range != (min(known), max(known)):
            self._range = (min(known), max(known))
            self._success_sums = array("d", [0.0]) * len(self)
            self._success_counts = array("d", [0.0]) * len(self)
            rescaled = [index for index, other in enumerate(self.rewards) if not isnan(other)]
        else:
            rescaled = [leaf]
        low, high = self._range
        for index in rescaled:
            self._add_success(index, (self.rewards[index] - low) / (high - low) if low < high else 0.5)

    def _add_success(self, leaf: int, success: float) -> None:
        self.success[leaf] = success
        step = self.leaves[leaf]
        while step >= 0:
            self._success_sums[step] += success
            self._success_counts[step] += 1
            step = self._parents[step]

    def path(self, step: int) -> list[int]:
        """Step indices from the first step of the completion to `step`, the root left out."""
        path = []
        while step > 0:
            path.append(step)
            step = self._parents[step]
        return path[::-1]

    def prefix(self, step: int) -> list[int]:
        """Completion token ids from the question to the end of `step`."""
        return self._joined(step, "token_ids")

    def trajectory(self, leaf: int) -> tuple[list[int], list[float]]:
        """Completion token ids and sampling log-probabilities of trajectory `leaf`; both `(T,)`."""
        return self._joined(self.leaves[leaf], "token_ids"), self._joined(self.leaves[leaf], "logprobs")

    def _joined(self, step: int, what: str) -> list:
        parts, joined = [], []
        while step > 0:
            piece = self._pieces[self._piece_of[step]]
            parts.append(getattr(piece, what)[: self._ends[step] - self._ends[piece.after]])
            step = piece.after
        for part in reversed(parts):
            joined += part
        return joined

    def parents(self) -> np.ndarray:
        """Parent index of every step, `(N,)`; -1 for the root."""
        return np.array(self._parents)

    def ends(self) -> np.ndarray:
        """Completion tokens from the question to the end of every step, `(N,)`."""
        return np.array(self._ends)

    def observed(self) -> np.ndarray:
        """How many of the last tokens of every step are an observation, `(N,)`."""
        return np.array(self._observed)

    def sampled(self, leaf: int) -> np.ndarray:
        """Which tokens of trajectory `leaf` were sampled, boolean `(T,)`; the others are observations."""
        sampled = np.ones(self._ends[self.leaves[leaf]], dtype=bool)
        for step in self.path(self.leaves[leaf]):
            sampled[self._ends[step] - self._observed[step] : self._ends[step]] = False
        return sampled

    def token_steps(self) -> np.ndarray:
        """Which step every token of the tree belongs to, `(M,)`: in the order of steps, each token once."""
        ends = np.array(self._ends)
        return np.repeat(np.arange(len(self)), ends - np.where(ends > 0, ends[self._parents], 0))

    def token_logprobs(self) -> np.ndarray:
        """Sampling log-probability of every token of the tree, `(M,)`; NaN for observations and where unknown."""
        return self._of_tokens("logprobs")

    def token_entropies(self) -> np.ndarray:
        """Entropy of the policy where every token of the tree was sampled, `(M,)`, in nats; NaN where unknown."""
        return self._of_tokens("entropies")

    def trajectory_entropies(self, leaf: int) -> np.ndarray:
        """The same for the tokens of trajectory `leaf`, `(T,)`."""
        return self.token_entropies()[np.isin(self.token_steps(), self.path(self.leaves[leaf]))]

    def _of_tokens(self, what: str) -> np.ndarray:
        own = [np.empty(0)]
        for step in range(1, len(self)):
            piece = self._pieces[self._piece_of[step]]
            start, stop = self._ends[self._parents[step]], self._ends[step]
            offset = self._ends[piece.after]
            values = getattr(piece, what)[start - offset : stop - offset]
            own.append(values if len(values) else np.full(stop - start, nan))
        return np.concatenate(own)

    def child_counts(self) -> np.ndarray:
        """Number of children of every step, `(N,)`."""
        return np.array(self._child_counts)

    def density(self) -> np.ndarray:
        """`p(s)`: mean success of the leaves under every step, `(N,)`; NaN where none is known."""
        counts = np.array(self._success_counts)
        return np.array(self._success_sums) / np.where(counts > 0, counts, np.nan)

    def known_leaves(self) -> np.ndarray:
        """Number of leaves under every step whose success is known, `(N,)`."""
        return np.array(self._success_counts)

    def mean_logprobs(self) -> np.ndarray:
        """Mean sampling log-probability of the tokens of every step, `(N,)`; 0 where none is known."""
        return self.total_logprobs() / np.maximum(np.array(self._logprob_counts), 1)

    def total_logprobs(self) -> np.ndarray:
        """Sampling log-probability of every step as a whole, `(N,)`."""
        return np.array(self._logprob_sums)

    def leaf_mean(self, values_L: Sequence[float] | np.ndarray) -> np.ndarray:
        """Mean of a leaf value over the leaves under every step; `(L,)` to `(N,)`.

        A NaN leaf (unscorable, or not scored yet) is left out of every mean; a step with no other leaf gets NaN.
        """
        values_L = np.asarray(values_L, dtype=np.float64)
        known_L = ~np.isnan(values_L)
        totals = self.sum_over_leaves(np.where(known_L, values_L, 0.0))
        counts = self.sum_over_leaves(known_L.astype(np.float64))
        return np.divide(totals, counts, out=np.full(len(self), np.nan), where=counts > 0)

    def leaf_count(self) -> np.ndarray:
        """Number of leaves under every step, itself included; `(N,)`."""
        return self.sum_over_leaves(np.ones(len(self.leaves)))

    def sum_over_leaves(self, values_L: np.ndarray) -> np.ndarray:
        """Sum of a leaf value over the leaves under every step; `(L,)` to `(N,)`."""
        sums = np.zeros(len(self))
        np.add.at(sums, self.leaves, values_L)
        sums = sums.tolist()
        for step in range(len(sums) - 1, 0, -1):
            sums[self._parents[step]] += sums[step]
        return np.array(sums)

    @property
    def generated_tokens(self) -> int:
        """Newly sampled tokens, every shared prefix counted once and observations not at all."""
        return sum(len(piece.token_ids) for piece in self._pieces) - sum(self._observed)

    @property
    def trajectory_tokens(self) -> int:
        """Tokens of all trajectories, observations included, a shared prefix counted once per trajectory."""
        return sum(self._ends[leaf] for leaf in self.leaves)


def moved_by_split(index: int, step: int) -> int:
    """What the index of a step becomes when `step` is split (`RolloutTree.split`): where it ended, it still ends."""
    return index + (index >= step)


def _known_sum(logprobs: Sequence[float]) -> tuple[float, int]:
    """Sum of the log-probabilities that are known, and how many these are."""
    total = sum(logprobs)
    if not isnan(total):
        return total, len(logprobs)
    numbers = [logprob for logprob in logprobs if not isnan(logprob)]
    return sum(numbers), len(numbers)


def _sums(logprobs: Sequence[float], step_ends: Sequence[int]) -> list[float]:
    """Sampling log-probability of each step."""
    return [sum(logprobs[start:end]) for start, end in pairwise([0, *step_ends])]


def _observations(logprobs: Sequence[float | None], step_ends: Sequence[int]) -> tuple[list[int], list[float]]:
    """How many of the last tokens of each step nobody sampled, and the log-probabilities with NaN for those."""
    observed = []
    for start, end in pairwise([0, *step_ends]):
        values = logprobs[start:end]
        count = values.count(None)
        if None in values[: len(values) - count] or count == len(values):
            raise ValueError(f"An observation must be the last tokens of a step; got the log-probabilities {values}.")
        observed.append(count)
    return observed, [nan if logprob is None else logprob for logprob in logprobs]
