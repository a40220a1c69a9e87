"""Grow one tree per question, without barriers between trees.

A tree depends only on itself, so each is a state machine (`TreeGrower`): `B0` rollouts from the question, then `L - 1`
rounds, each choosing `K` steps and continuing each of them with `B` rollouts. As soon as a round is complete
(sampled and scored) its own tree submits the next; `drive` drives all trees over one engine.

A tree depends on its seeds and rewards alone, whatever order the engine finishes rollouts in. Its own clock sees to
that: time is counted in tokens, as if every rollout gained one token a tick from the moment it was decided on. A
decision sees the rollouts that have ended by then on that clock, and of those still running the steps they have
completed by then. A busy engine that delays some of them delays the tree's decisions, and does not change them.

Engine-agnostic and free of torch and TRL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """One rollout of a tree, from its submission until it ends on the tree's clock."""

    number: int  # in the order of submission; its leaf in the tree
    after: int  # step it continues
    prefix: list[int]  # completion tokens before it
    start: int  # on the tree's clock
    grafted: int = 0  # tokens that are in the tree, in whole steps
    rollout: Rollout | None = None
    success: float | None = None  # NaN: unknown for good; None: not scored yet

    @property
    def complete(self) -> bool:
        return self.rollout is not None and self.success is not None


class Running(Protocol):
    """What a tree may ask about its rollouts that the engine is still working on, named by their numbers."""

    def generated(self, number: int) -> int:
        """Tokens sampled so far, or fewer."""

    def partial(self, number: int, start: int, stop: int) -> tuple[list[int], list[float]]:
        """Sampled tokens `start` to `stop` and their log-probabilities; asked for only where that many are known."""


class TreeGrower:
    """The state machine of one tree.

    Ask `next_requests` for the rollouts to submit now, hand back what finishes to `add_rollout` and its success to
    `add_success`, until `done`.

    `branch_lookahead = d` lets a round start while up to `d` earlier rollouts are under way, and `d` more branches
    with it. They are chosen among the steps that are complete by then, also those of running rollouts: where no
    answer is known, the score is its confidence term alone, which needs none. So the first rounds go to several steps
    before their answers are known, the later ones to those that the answers speak for. `d = 0` is the paper exactly.

    Args:
        prompt_ids: token ids of the question.
        settings: shape and strategy.
        splitter: cuts token ids into steps.
        seed: numbers that identify this tree, from which every rollout's seed is derived.
        batched: the engine ends all rollouts of a poll together, so that each takes one tick of the tree's clock.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GrowthSettings,
        splitter: StepSplitter,
        seed: Sequence[int] = (0,),
        batched: bool = False,
    ):
        self.tree = RolloutTree(prompt_ids)
        self.success: list[float] = []  # of each leaf, NaN where unknown or not known yet
        self.settings = settings
        self._splitter = splitter
        self._seed = list(seed)
        # Without lookahead a round waits for all of the last one, so it does not matter who ended first.
        self._batched = batched or settings.branch_lookahead == 0
        self._rng = np.random.default_rng([*self._seed, 0])
        self._clock = 0
        self._branches: list[_Branch] = []  # every rollout submitted so far
        self._pending: list[_Branch] = []  # those that have not ended on the tree's clock
        self._branched: set[int] = set()

    @property
    def done(self) -> bool:
        return len(self._branches) == self.settings.leaves and not self._pending

    @property
    def can_advance(self) -> bool:
        """Whether enough rollouts are complete that a round might start, or the tree be done."""
        complete = sum(branch.complete for branch in self._pending)
        running = len(self._pending) - complete
        more = len(self._branches) < self.settings.leaves
        return complete > 0 and running <= (self.settings.branch_lookahead if more else 0)

    def scores(self) -> TreeScores:
        """Scores of the tree as grown so far."""
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

    def next_requests(self, running: Running | None = None) -> list[RolloutRequest]:
        """Move the tree's clock as far as is known and return the rollouts to submit now; empty while it has to wait.

        Args:
            running: rollouts that the engine is working on; without it nothing is known of them.
        """
        if not self._branches:
            independent = STRATEGIES[self.settings.branching] is None
            count = self.settings.leaves if independent else self.settings.initial_rollouts
            return [self._submit(0) for _ in range(count)]
        requests: list[RolloutRequest] = []
        while self.can_advance and self._end_next(running):
            # One rollout ends at a time, so that a decision knows what had ended by then and no more.
            if len(self._branches) < self.settings.leaves and len(self._pending) <= self.settings.branch_lookahead:
                requests += self._start_rounds(running)
        return requests

    def _start_rounds(self, running: Running | None) -> list[RolloutRequest]:
        """A round, and as many more as make `branch_lookahead` more branches, all chosen with what is in the tree."""
        for branch in self._pending:
            self._graft_complete_steps(branch, running)
        scores, requests = self.scores(), []
        while len(self._branches) < self.settings.leaves and len(requests) <= self.settings.branch_lookahead:
            steps = self._choose_steps(scores)
            requests += [self._submit(step) for step in steps for _ in range(self.settings.branches_per_node)]
        return requests

    def _choose_steps(self, scores: TreeScores) -> list[int]:
        """The steps of one round."""
        strategy = STRATEGIES[self.settings.branching]
        eligible = self._eligible()
        # With a single scored child rho = 1, so the score of a step says nothing of the answer until a second one is
        # scored. While that branch is under way, look elsewhere first.
        last = np.zeros_like(eligible)
        last[[branch.after for branch in self._pending]] = True
        last &= scores.scored_children < 2
        steps = select_steps(strategy(scores, self._rng), eligible, self.settings.nodes_per_level, last)
        self._branched.update(steps)
        return steps

    def _eligible(self) -> np.ndarray:
        """Steps that may be branched, boolean `(N,)`; the root where nothing else may be."""
        # A step with children has token budget left: its children used some.
        eligible = np.array([bool(step.children) for step in self.tree.steps])
        eligible[0] = self.settings.allow_root_branching
        if not self.settings.allow_repeated_branching:
            eligible[list(self._branched)] = False
        if not eligible.any():
            eligible[0] = True
        return eligible

    def _submit(self, after: int) -> RolloutRequest:
        number, prefix = self.tree.open(after), self.tree.prefix(after)
        self.success.append(np.nan)
        self._branches.append(_Branch(number, after, prefix, start=self._clock))
        self._pending.append(self._branches[-1])
        return RolloutRequest(
            request_id=str(number),
            prefix_ids=self.tree.prompt_ids + prefix,
            max_tokens=self.settings.max_completion_length - len(prefix),
            seed=int(np.random.SeedSequence([*self._seed, 1, number]).generate_state(1)[0]),
        )

    def _end(self, branch: _Branch, running: Running | None) -> int:
        """When a rollout ends on the tree's clock; the earliest it can where it is still running."""
        if branch.rollout is not None:
            return branch.start + (1 if self._batched else len(branch.rollout.token_ids))
        return branch.start + 1 + (0 if self._batched or running is None else running.generated(branch.number))

    def _end_next(self, running: Running | None) -> bool:
        """Let the rollout end that does so first on the tree's clock; false where it is not complete or not known."""
        if not self._pending:
            return False
        # Of two that may end together the one not known comes first: what it has sampled by then is not known either.
        branch = min(self._pending, key=lambda each: (self._end(each, running), each.complete, each.number))
        if not branch.complete:
            return False
        self._clock = self._end(branch, running)
        token_ids, logprobs = branch.rollout.token_ids[branch.grafted :], branch.rollout.logprobs[branch.grafted :]
        self.tree.extend(branch.number, token_ids, logprobs, self._splitter.ends(token_ids))
        self.success[branch.number] = branch.success
        self._pending.remove(branch)
        branch.rollout = None  # the tree owns it now
        return True

    def _graft_complete_steps(self, branch: _Branch, running: Running | None) -> None:
        """Put the steps into the tree that a rollout has completed by the tree's clock; later ones do not count."""
        start, stop = branch.grafted, self._clock - branch.start
        if self._batched or stop <= start:
            return
        if branch.rollout is not None:
            token_ids, logprobs = branch.rollout.token_ids[start:stop], branch.rollout.logprobs[start:stop]
        else:
            token_ids, logprobs = running.partial(branch.number, start, stop)
        ends = self._splitter.ends(token_ids)[:-1]  # the last is not complete, as far as one knows
        if ends:
            self.tree.extend(branch.number, token_ids[: ends[-1]], logprobs[: ends[-1]], ends)
            branch.grafted += ends[-1]


class LeafScorer(Protocol):
    """Scores finished leaves while trees grow. A leaf is named by the index of its tree and its rollout number."""

    def submit(self, leaves: Sequence[tuple[int, int, list[int]]]) -> None:
        """Start scoring `(tree, number, completion_ids)` leaves."""

    def collect(self, wait: bool) -> list[tuple[int, int, float]]:
        """Successes that became known, as `(tree, number, success)`; with `wait`, at least one of those pending."""

    def cancel(self) -> None:
        """Drop what is pending."""


@dataclass(frozen=True, slots=True)
class _RunningOnEngine:
    engine: RolloutEngine
    tree: int
    in_flight: dict[str, tuple[int, int]]

    def generated(self, number: int) -> int:
        request_id = f"{self.tree}-{number}"
        # One not in flight yet was only just decided on.
        return self.engine.generated(request_id) if request_id in self.in_flight else 0

    def partial(self, number: int, start: int, stop: int) -> tuple[list[int], list[float]]:
        return self.engine.partial(f"{self.tree}-{number}", start, stop)


def drive(
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
    ready = set(range(len(growers)))  # trees that may have something to do

    try:
        while True:
            requests = []
            for tree in sorted(ready):
                grower = growers[tree]
                for request in grower.next_requests(_RunningOnEngine(engine, tree, in_flight)):
                    request_id = f"{tree}-{request.request_id}"
                    in_flight[request_id] = (tree, int(request.request_id))
                    requests.append(replace(request, request_id=request_id))
            waiting = {tree for tree in ready if growers[tree].can_advance}
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
            if not (requests or finished or scored or in_flight):
                raise RuntimeError("Trees wait for scores, but the scorer has none pending.")
            for tree, number, success in scored:
                growers[tree].add_success(number, success)
            ready = waiting | {tree for tree, _, _ in scored}
    except BaseException:
        try:
            engine.abort()
        finally:
            scorer.cancel()
        raise
