"""TreePO's growth (arXiv 2508.17445): after every segment the paths of a tree are split to fill a budget.

There are no rounds here and nothing is ranked. After the d-th step of each path the number of paths that go on is
`branching.segments`, spread evenly over those that are active: each of these goes on itself, and the others are new
rollouts from the end of its d-th step. Where all paths have ended with fewer leaves than the tree shall have, random
leaves are cut after a random step and continued from there.

A segment is a step: with `step_min_tokens = step_max_tokens = 512`, the paper's 512 tokens.
"""

import math
from collections.abc import Sequence

from .branching import rounds_of, segments
from .engines.base import Clock, RolloutEngine, RolloutRequest
from .grown_tree import CANDIDATES_KEPT, Choice, GrowthSettings
from .steps import StepSplitter, turn_ends
from .tree_grower import TreeGrower


class SegmentGrower(TreeGrower):
    """The state machine of one tree that grows level by level.

    What it decides after the d-th steps depends on these alone, and on which paths have ended by then. So a level is
    decided as soon as that is known of every path, and does not depend on how far the engine is beyond it.
    """

    patience = 8  # tokens that paths gain before they are cut into steps again

    def __init__(self, *args, clock: Clock = "tokens", **kwargs):
        super().__init__(*args, clock=clock, **kwargs)
        self._shows_progress = clock == "tokens"
        self._level: float = 1  # how many steps of each path come before the next decision
        self._ahead: dict[int, list[int]] = {}  # of each path, where the steps end that are known but not in the tree

    def next_requests(self, engine: RolloutEngine | None = None) -> list[RolloutRequest]:
        if not self._branches:
            return self._continue([0] * min(self.settings.tree_initial_rollouts, self.settings.leaves))
        requests: list[RolloutRequest] = []
        # All of them, so that no path joins the tree before it is known that all can.
        while self._pending and all([self._look_ahead(branch, engine) for branch in self._pending]):
            paths = len(self._pending)
            self._pending = [branch for branch in self._pending if not self._advance(branch, engine)]
            just_finished = paths - len(self._pending)
            if just_finished:
                self._reward_leaves()
            steps = self._choose_paths(just_finished)
            self._level += 1
            requests += self._continue(steps)
        return requests

    def ticks_to_wait(self, engine: RolloutEngine) -> int | None:
        """Tokens that running rollouts may gain before the next look; None where one must end first."""
        known = self._shows_progress and self._level < math.inf and self._pending
        return self.patience if known and any(branch.rollout is None for branch in self._pending) else None

    def _continue(self, steps: Sequence[int]) -> list[RolloutRequest]:
        requests = [self._submit(step) for step in steps]
        if len(self._branches) == self.settings.leaves:
            self._level = math.inf  # nothing is left to decide
        return requests

    def _round(self, group: int) -> int:
        return 0 if not self._branches or self._level == 1 else int(self._level) - 1

    def _missing(self, branch) -> float:
        """Steps of a path that must join the tree before the next decision."""
        return self._level - len(self.tree.path(self.tree.leaves[branch.leaf]))

    def _look_ahead(self, branch, engine: RolloutEngine | None) -> bool:
        """Cut what is known of a path into steps; whether that is enough for the next decision."""
        if branch.rollout is not None:
            rest = slice(branch.grafted, None)
            token_ids, logprobs = branch.rollout.token_ids[rest], branch.rollout.logprobs[rest]
            self._ahead[branch.leaf] = turn_ends(self._splitter.ends, token_ids, logprobs)
            return True
        if not self._shows_progress or engine is None or self._level == math.inf:
            return False
        stop = engine.generated((self.name, branch.leaf))
        if stop <= branch.grafted:
            return False
        token_ids, logprobs = engine.partial((self.name, branch.leaf), branch.grafted, stop)
        # The last is not complete, as far as one knows.
        self._ahead[branch.leaf] = turn_ends(self._splitter.ends, token_ids, logprobs)[:-1]
        return len(self._ahead[branch.leaf]) >= self._missing(branch)

    def _advance(self, branch, engine: RolloutEngine | None) -> bool:
        """Put the steps of a path into the tree that come before the decision; whether it has ended with them."""
        ends = self._ahead.pop(branch.leaf)[: int(min(self._missing(branch), self.settings.max_completion_length))]
        start, stop = branch.grafted, branch.grafted + ends[-1]
        if branch.rollout is not None:
            token_ids, logprobs = branch.rollout.token_ids[start:stop], branch.rollout.logprobs[start:stop]
        else:
            token_ids, logprobs = engine.partial((self.name, branch.leaf), start, stop)
        self.tree.extend(branch.leaf, token_ids, logprobs, ends)
        branch.grafted = stop
        if branch.rollout is None or stop < len(branch.rollout.token_ids):
            return False
        branch.rollout = None  # the tree owns it now
        return True

    def _choose_paths(self, just_finished: int) -> list[int]:
        """The steps that new rollouts continue, once for each rollout."""
        submitted, active = len(self._branches), len(self._pending)
        if submitted == self.settings.leaves:
            return []
        finished = submitted - active
        ends = [self.tree.leaves[branch.leaf] for branch in self._pending]
        if not ends:
            steps = [self._cut_at_random() for _ in range(self.settings.leaves - finished)]
            ends = sorted(set(steps))
        else:
            width, divergence = self.settings.leaves, 1 + self.settings.tree_branches_per_node
            more = segments(active, finished, just_finished, width, divergence) - active
            order = self._rng.permutation(active).tolist()
            steps = sorted(ends[order[index % active]] for index in range(more))
        if steps:
            chosen = sorted(set(steps))
            candidates = (
                chosen + [step for step in ends if step not in chosen][: max(0, CANDIDATES_KEPT - len(chosen))]
            )
            counts = [float(steps.count(step)) for step in candidates]
            self._choices.append(Choice(int(self._level), chosen, candidates, counts, [], len(ends)))
        return steps

    def _cut_at_random(self) -> int:
        """A step of a random leaf that others follow; the question where it has but one."""
        path = self.tree.path(self.tree.leaves[self._rng.integers(len(self.tree.leaves))])
        return path[self._rng.integers(len(path) - 1)] if len(path) > 1 else 0


def make_grower(
    prompt_ids: Sequence[int], settings: GrowthSettings, splitter: StepSplitter, *args, **kwargs
) -> TreeGrower:
    """The state machine that grows a tree as `settings.branching` says; arguments as of `TreeGrower`."""
    grower = SegmentGrower if rounds_of(settings.branching) == "levels" else TreeGrower
    return grower(prompt_ids, settings, splitter, *args, **kwargs)
