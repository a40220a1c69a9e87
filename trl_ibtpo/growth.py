"""Grow one tree per question, without barriers between trees.

A tree depends only on itself, so each is a state machine (`TreeGrower`): `B0` rollouts from the question, then `L - 1`
rounds, each choosing `K` steps and continuing each of them with `B` rollouts. As soon as a round is complete
(sampled and scored) its own tree submits the next; `grow_trees` drives all trees over one engine.

Rollouts of a tree are numbered in the order of their submission and join the tree in that order, whatever order the
engine finishes them in, so a tree depends on its seeds and rewards alone.

Engine-agnostic and free of torch and TRL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .branching import STRATEGIES, select_steps
from .engines.base import Rollout, RolloutEngine, RolloutRequest
from .scores import StepConfidence, TreeScores, score_tree
from .steps import StepSplitter
from .tree import RolloutTree


@dataclass(frozen=True)
class GrowthSettings:
    """What decides the growth of a tree. Paper symbols: `B0`, `L`, `K`, `B`, `beta`."""

    initial_rollouts: int = 4  # B0
    levels: int = 9  # L
    nodes_per_level: int = 1  # K
    branches_per_node: int = 1  # B
    branching: str = "ib"
    allow_root_branching: bool = False
    allow_repeated_branching: bool = True
    ib_beta: float = 5.0
    step_confidence: StepConfidence = "geometric_mean"
    max_completion_length: int = 2048
    branch_lookahead: int = 0

    @property
    def leaves(self) -> int:
        """`G = B0 + (L - 1) K B`."""
        return self.initial_rollouts + (self.levels - 1) * self.nodes_per_level * self.branches_per_node

    @property
    def branches_per_round(self) -> int:
        return self.nodes_per_level * self.branches_per_node


@dataclass(slots=True)
class _Branch:
    """One rollout of a tree, from its submission until it is grafted."""

    after: int  # step it continues
    prefix: list[int]  # completion tokens before it
    rollout: Rollout | None = None
    success: float | None = None  # NaN: unknown for good; None: not scored yet


class TreeGrower:
    """The state machine of one tree.

    Ask `next_requests` for the rollouts to submit now, hand back what finishes to `add_rollout` and its success to
    `add_success`, until `done`.

    `branch_lookahead = d` lets a round start when all but the last `d` rollouts submitted before it are complete; it
    is chosen with the scores of those alone, even if more have finished meanwhile, so that the tree does not depend
    on timing. `d = 0` is the paper exactly.

    Args:
        prompt_ids: token ids of the question.
        settings: shape and strategy.
        splitter: cuts token ids into steps.
        seed: numbers that identify this tree, from which every rollout's seed is derived.
    """

    def __init__(
        self, prompt_ids: Sequence[int], settings: GrowthSettings, splitter: StepSplitter, seed: Sequence[int] = (0,)
    ):
        self.tree = RolloutTree(prompt_ids)
        self.success: list[float] = []  # of each grafted leaf, NaN where unknown
        self.settings = settings
        self._splitter = splitter
        self._seed = list(seed)
        self._rng = np.random.default_rng([*self._seed, 0])
        self._branches: list[_Branch] = []  # every rollout submitted so far
        self._branched: set[int] = set()

    @property
    def done(self) -> bool:
        return len(self.tree.leaves) == self.settings.leaves

    def scores(self) -> TreeScores:
        """Scores of the tree as grafted so far."""
        return score_tree(
            self.tree, self.success, beta=self.settings.ib_beta, confidence_kind=self.settings.step_confidence
        )

    def completion(self, number: int) -> list[int]:
        """Completion token ids of a finished rollout, its prefix included."""
        branch = self._branches[number]
        return branch.prefix + branch.rollout.token_ids

    def add_rollout(self, number: int, rollout: Rollout) -> None:
        branch = self._branches[number]
        allowed = self.settings.max_completion_length - len(branch.prefix)
        if not 0 < len(rollout.token_ids) <= allowed:
            raise RuntimeError(
                f"The engine returned {len(rollout.token_ids)} tokens for a rollout that asked for 1 to {allowed}."
            )
        branch.rollout = rollout

    def add_success(self, number: int, success: float) -> None:
        self._branches[number].success = success

    def next_requests(self) -> list[RolloutRequest]:
        """Graft what is complete and return the rollouts to submit now; empty while the tree has to wait."""
        if not self._branches:
            independent = STRATEGIES[self.settings.branching] is None
            count = self.settings.leaves if independent else self.settings.initial_rollouts
            return [self._submit(0) for _ in range(count)]
        requests: list[RolloutRequest] = []
        while len(self._branches) < self.settings.leaves:
            known = max(1, len(self._branches) - self.settings.branch_lookahead)
            if not self._graft_up_to(known):
                return requests
            requests += [
                self._submit(step) for step in self._choose_steps() for _ in range(self.settings.branches_per_node)
            ]
        self._graft_up_to(self.settings.leaves)
        return requests

    def _choose_steps(self) -> list[int]:
        """The steps of this round, chosen with what has been grafted."""
        strategy = STRATEGIES[self.settings.branching]
        pending = {branch.after for branch in self._branches[len(self.tree.leaves) :]}
        eligible = self._eligible()
        # The score of a step with a branch under way is about to change: look elsewhere first.
        fresh = eligible.copy()
        fresh[list(pending)] = False
        steps = select_steps(
            strategy(self.scores(), self._rng), fresh if fresh.any() else eligible, self.settings.nodes_per_level
        )
        self._branched.update(steps)
        return steps

    def _eligible(self) -> np.ndarray:
        """Steps that may be branched, boolean `(N,)`; the root where nothing else may be."""
        budget = self.settings.max_completion_length
        eligible = np.array([bool(step.children) and step.end < budget for step in self.tree.steps])
        eligible[0] = self.settings.allow_root_branching
        if not self.settings.allow_repeated_branching:
            eligible[list(self._branched)] = False
        if not eligible.any():
            eligible[0] = True
        return eligible

    def _submit(self, after: int) -> RolloutRequest:
        prefix = self.tree.prefix(after)
        number = len(self._branches)
        self._branches.append(_Branch(after=after, prefix=prefix))
        return RolloutRequest(
            request_id=str(number),
            prefix_ids=self.tree.prompt_ids + prefix,
            max_tokens=self.settings.max_completion_length - len(prefix),
            seed=int(np.random.SeedSequence([*self._seed, 1, number]).generate_state(1)[0]),
        )

    def _graft_up_to(self, count: int) -> bool:
        """Graft rollouts in order of their numbers; false where one of the first `count` is not complete."""
        while len(self.tree.leaves) < count:
            branch = self._branches[len(self.tree.leaves)]
            if branch.rollout is None or branch.success is None:
                return False
            token_ids = branch.rollout.token_ids
            self.tree.graft(branch.after, token_ids, branch.rollout.logprobs, self._splitter.ends(token_ids))
            self.success.append(branch.success)
            branch.rollout = None  # the tree owns it now
        return True


class LeafScorer(Protocol):
    """Scores finished leaves while trees grow. A leaf is named by the index of its tree and its rollout number."""

    def submit(self, leaves: Sequence[tuple[int, int, list[int]]]) -> None:
        """Start scoring `(tree, number, completion_ids)` leaves."""

    def collect(self, wait: bool) -> list[tuple[int, int, float]]:
        """Successes that became known, as `(tree, number, success)`; with `wait`, at least one of those pending."""

    def cancel(self) -> None:
        """Drop what is pending."""


def grow_trees(
    growers: Sequence[TreeGrower],
    engine: RolloutEngine,
    scorer: LeafScorer,
    on_rollout: Callable[[], None] = lambda: None,
) -> None:
    """Drive all trees to the end over one engine.

    If anything raises, the engine forgets every request in flight before the exception goes on.

    Args:
        growers: one per question.
        engine: where rollouts are sampled.
        scorer: where leaves get their success.
        on_rollout: called after every finished rollout, for progress bars.
    """
    in_flight: dict[str, tuple[int, int]] = {}
    ready = list(range(len(growers)))
    try:
        while True:
            requests = []
            for tree in ready:
                for request in growers[tree].next_requests():
                    request_id = f"{tree}-{request.request_id}"
                    in_flight[request_id] = (tree, int(request.request_id))
                    requests.append(RolloutRequest(request_id, request.prefix_ids, request.max_tokens, request.seed))
            if requests:
                engine.submit(requests)
            elif not in_flight and all(grower.done for grower in growers):
                return
            finished = engine.poll() if in_flight else []
            leaves = []
            for rollout in finished:
                tree, number = in_flight.pop(rollout.request_id)
                growers[tree].add_rollout(number, rollout)
                leaves.append((tree, number, growers[tree].completion(number)))
                on_rollout()
            if leaves:
                scorer.submit(leaves)
            scored = scorer.collect(wait=not in_flight)
            for tree, number, success in scored:
                growers[tree].add_success(number, success)
            ready = sorted({tree for tree, _, _ in scored})
    except BaseException:
        engine.abort()
        scorer.cancel()
        raise
