"""The state machine of one tree: which rollouts it submits next, and when.

`B0` rollouts from the question come first, then `L - 1` rounds, each of which chooses `K` steps and continues each of
them with `B` rollouts. As soon as a round is complete (sampled and rewarded), the next one is submitted.

A tree depends on its seeds and rewards alone, whatever order the engine finishes rollouts in. Its own clock sees to
that: time is counted in tokens, as if every rollout gained one token a tick from the moment it was decided on. A
decision sees the rollouts that have ended by then on that clock, and of those still running the steps they have
completed by then. A busy engine that delays some of them delays the tree's decisions, and does not change them.

Engine-agnostic and free of torch and TRL.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .branching import Strategy, make_strategy, select_steps, top_share, uses_entropies, uses_rewards
from .budget import contrast
from .engines.base import Clock, Rollout, RolloutEngine, RolloutRequest
from .forks import TokenForks
from .grown_tree import Choice, GrownTree, GrowthSettings
from .scores import TreeScores, score_tree
from .steps import StepSplitter, turn_ends
from .tree import RolloutTree, moved_by_split


@dataclass(slots=True)
class _Branch:
    """One rollout of a tree, from its submission until it ends on the tree's clock."""

    leaf: int  # in the order of submission
    after: int  # step it continues
    prefix: list[int]  # completion tokens before it
    start: int  # on the tree's clock
    group: int  # 0, or the initial rollout that it belongs to where each has rounds of its own
    grafted: int = 0  # tokens that are in the tree, in whole steps
    rollout: Rollout | None = None
    reward: float | None = None  # NaN: unknown for good; None: not known yet
    complete: bool = False  # all is known that its tree waits for


class TreeGrower:
    """The state machine of one tree.

    Ask `next_requests` for the rollouts to submit now, hand back what finishes to `add_rollout` and its reward to
    `add_reward`, until `done`.

    `branch_lookahead = d` lets a round start while up to `d` earlier rollouts are under way, and with it whole rounds
    until more than `d` branches have started (with `K = B = 1`, `d` more). They are chosen among the steps that are
    complete by then, also those of running rollouts: where no answer is known, the score is its confidence term alone,
    which needs none. So the first rounds go to several steps before their answers are known, the later ones to the
    steps whose answers look best. `d = 0` is the paper exactly.

    With `adaptive_budget`, a tree stops before its next round once its answers differ enough (`budget`), gives back
    the leaves that it has not used, and may be granted some that others gave back. Independent rollouts then have
    rounds as well, of as many rollouts as they began with.

    Args:
        prompt_ids: token ids of the question.
        settings: shape and strategy.
        splitter: cuts token ids into steps.
        seed: numbers that identify this tree, from which every rollout's seed is derived.
        clock: the engine's, see `engines.base.Clock`.
        strategy: in place of the one that `settings.branching` names.
        latent: gives a branch what its request carries as its latent, from numbers that name it; None: no latents.
            Initial rollouts have none.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GrowthSettings,
        splitter: StepSplitter,
        seed: Sequence[int] = (0,),
        clock: Clock = "tokens",
        strategy: Strategy | None = None,
        latent: Callable[[Sequence[int]], tuple[float, ...]] | None = None,
    ):
        self.tree = RolloutTree(prompt_ids, settings.success_range)
        self.settings = settings
        self.name = 0  # its place among the trees that grow together, which `drive` knows
        self._strategy = strategy if strategy is not None else make_strategy(settings.branching)
        self.limit = settings.leaves  # that it may have; once it has stopped, that it has
        self._may_stop = settings.adaptive_budget is not None
        # Else the tree gets all rewards when the last is known.
        self.waits_for_rewards = uses_rewards(self._strategy) or settings.adaptive_budget is not None
        self._splitter = splitter
        self._seed = list(seed)
        self._latent = latent
        # Without lookahead a round waits for all of the last one, so it does not matter who ended first.
        self._clock: Clock = clock if settings.branch_lookahead or settings.groups > 1 else "polls"
        self._rng = np.random.default_rng([*self._seed, 0])
        self._now = 0  # ticks of the tree's clock
        self._branches: list[_Branch] = []  # every rollout submitted so far
        self._pending: list[_Branch] = []  # those that have not ended on the tree's clock
        self._branched: set[int] = set()
        self._answers: dict[int, int] = {}  # of a leaf, completion tokens up to where its answer begins
        self._rewarded = 0
        self._choices: list[Choice] = []

    @property
    def done(self) -> bool:
        return self._rewarded == len(self._branches) == self.limit and not self._pending

    @property
    def success(self) -> list[float]:
        """Of every leaf; NaN where unknown."""
        return self.tree.success

    def grant(self, leaves: int, to_the_last: bool = False) -> None:
        """Let a tree that is done have more leaves, until its answers differ enough or, if it must, all of them."""
        self.limit += leaves
        self._may_stop = not to_the_last

    @property
    def can_advance(self) -> bool:
        """Whether enough rollouts are complete that a round might start, or the tree be done."""
        more = len(self._branches) < self.limit
        if more and self.settings.groups > 1:
            return any(self._can_start_rounds(group) for group in range(self.settings.groups))
        complete = sum([branch.complete for branch in self._pending])
        running = len(self._pending) - complete
        return complete > 0 and running <= (self.settings.branch_lookahead if more else 0)

    def _can_start_rounds(self, group: int) -> bool:
        complete = [branch.complete for branch in self._pending if branch.group == group]
        return any(complete) and complete.count(False) <= self.settings.branch_lookahead and self._has_rounds(group)

    def _has_rounds(self, group: int) -> bool:
        """Whether a group has rounds left."""
        if self.settings.groups == 1:
            return len(self._branches) < self.limit
        return sum(branch.group == group for branch in self._branches) < self.settings.leaves // self.settings.groups

    def scores(self) -> TreeScores:
        """Scores of the tree as grown so far."""
        return score_tree(self.tree, beta=self.settings.ib_beta, confidence_kind=self.settings.step_confidence)

    def grown(self) -> GrownTree:
        """The tree with its scores and with what its rounds chose."""
        return GrownTree(self.tree, self.scores(), self.settings, self._choices)

    def completion(self, leaf: int) -> list[int]:
        """Completion token ids of a finished rollout, its prefix included."""
        branch = self._branches[leaf]
        return branch.prefix + branch.rollout.token_ids

    def add_rollout(self, leaf: int, rollout: Rollout) -> None:
        branch = self._branches[leaf]
        if rollout.restarted:
            branch.after, branch.prefix = 0, []
            self.tree.restart(leaf)
        allowed = self.settings.max_completion_length - len(branch.prefix)
        if not 0 < len(rollout.token_ids) <= allowed:
            raise RuntimeError(
                f"The engine returned {len(rollout.token_ids)} tokens for a rollout that asked for 1 to {allowed}."
            )
        found = len(rollout.entropies or ())
        if self._asks_for_entropies(leaf) and found != len(rollout.token_ids):
            raise RuntimeError(
                f"The engine returned {found} entropies for the {len(rollout.token_ids)} tokens of a rollout that "
                "asked for them."
            )
        branch.rollout, branch.complete = rollout, not self.waits_for_rewards

    def add_reward(self, leaf: int, reward: float) -> None:
        branch = self._branches[leaf]
        branch.reward, branch.complete = reward, True
        self._rewarded += 1
        self._reward_leaves()

    def _reward_leaves(self) -> None:
        """All at once where none waits: when the last reward is known and the last rollout is in the tree."""
        if self.done and not self.waits_for_rewards:
            for branch in self._branches:  # in their order: sums do not depend on which was rewarded first
                self.tree.add_reward(branch.leaf, branch.reward)

    def next_requests(self, engine: RolloutEngine | None = None) -> list[RolloutRequest]:
        """Move the tree's clock as far as is known and return the rollouts to submit now; empty while it has to wait.

        Args:
            engine: is asked how far running rollouts are; without it nothing is known of them.
        """
        if not self._branches:
            at_once = self._strategy is None and self.settings.adaptive_budget is None
            count = self.limit if at_once else self.settings.tree_initial_rollouts
            return [self._submit(0, rollout % self.settings.groups) for rollout in range(count)]
        requests: list[RolloutRequest] = []
        if not self._pending and len(self._branches) < self.limit:  # granted after it was done
            requests += self._start_rounds(0, [], engine)
        while self.can_advance and (ended := self._end_next(engine)):
            # One rollout ends at a time, so that a decision knows what had ended by then and no more.
            pending = self._pending
            if self.settings.groups > 1:
                pending = [branch for branch in pending if branch.group == ended.group]
            if len(pending) <= self.settings.branch_lookahead and self._has_rounds(ended.group):
                requests += self._start_rounds(ended.group, pending, engine)
        return requests

    def ticks_to_wait(self, engine: RolloutEngine) -> int | None:
        """Tokens that running rollouts must gain before `next_requests` can do more; None where only a reward can."""
        if not self.can_advance:
            return None
        ends = [(self._end(branch, engine), branch) for branch in self._pending]
        first = min(end for end, branch in ends if branch.complete)
        ahead = [(end, branch.rollout is None) for end, branch in ends if end <= first and not branch.complete]
        if any(not running for _, running in ahead):
            return None  # sampled, but not rewarded
        return max((int(first - end) + 1 for end, _ in ahead), default=1)

    def _start_rounds(
        self, group: int, pending: Sequence[_Branch], engine: RolloutEngine | None
    ) -> list[RolloutRequest]:
        """A round, and as many more as make `branch_lookahead` more branches, all chosen with what is in the tree."""
        if self._may_stop and contrast(self.success) >= self.settings.adaptive_budget:
            self.limit = len(self._branches)
            return []
        if self._strategy is None:
            portion = self.settings.tree_initial_rollouts if self._may_stop else self.limit
            return [self._submit(0) for _ in range(min(portion, self.limit - len(self._branches)))]
        for branch in pending:
            self._graft_complete_steps(branch, engine)
        scores, requests = self.scores(), []
        while self._has_rounds(group) and len(requests) <= self.settings.branch_lookahead:
            if getattr(self._strategy, "forks", "steps") == "tokens":
                steps = self._choose_tokens(scores, group)
                scores = self.scores()  # of the tree with the steps that forks have made
            else:
                steps = self._choose_steps(scores)
            width = self.settings.tree_branches_per_node
            requests += [self._submit(step, group) for step in steps for _ in range(width)]
        return requests

    def _choose_tokens(self, scores: TreeScores, group: int) -> list[int]:
        """The steps that end before the tokens of one round, which are sampled again."""
        settings = self.settings
        forks = TokenForks(self.tree, self._branched, settings.fork_keeps_token, settings.allow_root_branching)
        priority_M = self._strategy(self.tree, scores, self._rng)
        eligible_M = forks.open_M & ~np.isnan(priority_M) & (forks.end_M < self._answer_starts()[forks.step_M])
        if settings.groups > 1:
            group_N = self.tree.leaf_mean(self.tree.groups)
            eligible_M &= group_N[forks.step_M] == group
        eligible = int(eligible_M.sum())
        if not eligible:
            self._choices.append(Choice(self._round(group), [0], [0], [math.nan], [], 0))
            return [0] * settings.tree_nodes_per_level
        rank_M, share = priority_M, getattr(self._strategy, "drawn_from", None)
        if share is not None:
            eligible_M = top_share(priority_M, eligible_M, share)
            rank_M = self._rng.random(len(priority_M))
        tokens = select_steps(rank_M, eligible_M, settings.tree_nodes_per_level)
        # From the last to the first, so that places before a split stay what they are.
        places = {token: forks.place(token) for token in tokens}
        ends: dict[int, int] = {}  # the step that each fork continues
        for token in sorted(places, reverse=True):
            step, offset = places[token]
            if offset:
                ends = {other: moved_by_split(end, step) for other, end in ends.items()}
                step = self._split(step, offset)
            ends[token] = step
        steps = [ends[token] for token in tokens]
        self._branched.update(steps)
        self._choices.append(Choice(self._round(group), steps, steps, priority_M[tokens].tolist(), [], eligible))
        return steps

    def _split(self, step: int, tokens: int) -> int:
        """Split a step of the tree and move up whatever is remembered of later ones."""
        self._choices = [choice.after_split(step) for choice in self._choices]
        self._branched = {moved_by_split(each, step) for each in self._branched}
        for branch in self._pending:
            branch.after = moved_by_split(branch.after, step)
        return self.tree.split(step, tokens)

    def _choose_steps(self, scores: TreeScores) -> list[int]:
        """The steps of one round."""
        # With a single rewarded child rho = 1, so the score of a step says nothing of the answer until a second one is
        # rewarded. While that branch is under way, look elsewhere first. Without rewards, a second child is enough.
        priority, eligible = self._strategy(self.tree, scores, self._rng), self._eligible(scores)
        known = scores.rewarded_children if self.waits_for_rewards else scores.children
        deferred = np.zeros(len(known), dtype=bool)
        deferred[[branch.after for branch in self._pending if known[branch.after] < 2]] = True
        steps = select_steps(priority, eligible, self.settings.tree_nodes_per_level, deferred)
        self._branched.update(steps)
        self._choices.append(Choice.ranked(len(self._choices) + 1, steps, priority, eligible, deferred))
        return steps

    def _eligible(self, scores: TreeScores) -> np.ndarray:
        """Steps that may be branched, boolean `(N,)`; the root where nothing else may be."""
        # A step with children has token budget left: its children used some.
        eligible = (scores.children > 0) & (self.tree.ends() < self._answer_starts())
        eligible[0] = self.settings.allow_root_branching
        if not self.settings.allow_repeated_branching:
            eligible[list(self._branched)] = False
        if not eligible.any():
            eligible[0] = True
        return eligible

    def _answer_starts(self) -> np.ndarray:
        """Completion tokens before the answer, for the steps of trajectories that have one; infinite elsewhere."""
        starts = np.full(len(self.tree), np.inf)
        for leaf, start in self._answers.items():
            starts[self.tree.path(self.tree.leaves[leaf])] = start
        return starts

    def _submit(self, after: int, group: int = 0) -> RolloutRequest:
        leaf = self.tree.open(after, self._round(group), group)
        prefix = self.tree.prefix(after)
        self._branches.append(_Branch(leaf, after, prefix, self._now, group))
        self._pending.append(self._branches[-1])
        steered = self._latent is not None and self.tree.rounds[leaf] > 0
        return RolloutRequest(
            request_id=(self.name, leaf),
            prefix_ids=self.tree.prompt_ids + prefix,
            max_tokens=self.settings.max_completion_length - len(prefix),
            seed=int(np.random.SeedSequence(np.array([*self._seed, 1, leaf], np.uint32)).generate_state(1)[0]),
            latent=self._latent([*self._seed, leaf]) if steered else None,
            fork=len(self.tree.prompt_ids) + len(prefix) if steered else 0,
            entropies=self._asks_for_entropies(leaf),
        )

    def _asks_for_entropies(self, leaf: int) -> bool:
        """Whether forks of this rollout are chosen by them, or whether it is kept or not."""
        initial = self.tree.rounds[leaf] == 0
        return (initial and uses_entropies(self._strategy)) or self.settings.path_filter == "advantage"

    def _round(self, group: int) -> int:
        """Which round of its group the next rollout belongs to; 0 for the initial ones."""
        if self._strategy is None:
            return 0
        earlier = len(self._branches) - self.settings.tree_initial_rollouts  # below 0: an initial one
        if self.settings.groups > 1 and earlier >= 0:
            earlier = sum(branch.group == group for branch in self._branches) - 1
        return max(0, 1 + earlier // self.settings.branches_per_round)

    def _end(self, branch: _Branch, engine: RolloutEngine | None) -> float:
        """When a rollout ends on the tree's clock; the earliest it can where it is still running."""
        if self._clock == "polls":
            return branch.start + 1
        if branch.rollout is not None:
            return branch.start + len(branch.rollout.token_ids)
        if self._clock == "arrival":
            return math.inf  # no tree waits for what nobody can tell
        return branch.start + 1 + (0 if engine is None else engine.generated((self.name, branch.leaf)))

    def _end_next(self, engine: RolloutEngine | None) -> _Branch | None:
        """Let the rollout end that does so first on the tree's clock; none where it is not complete or not known."""
        # Of two that may end together the one not known comes first: what it has sampled by then is not known either.
        branch = min(self._pending, key=lambda each: (self._end(each, engine), each.complete, each.leaf))
        if not branch.complete:
            return None
        self._now = self._end(branch, engine)
        rollout, grafted = branch.rollout, branch.grafted
        token_ids, logprobs = rollout.token_ids[grafted:], rollout.logprobs[grafted:]
        entropies = (rollout.entropies or [])[grafted:]
        ends = turn_ends(self._splitter.ends, token_ids, logprobs)
        self.tree.extend(branch.leaf, token_ids, logprobs, ends, entropies)
        self._look_for_answer(branch)
        if self.waits_for_rewards:
            self.tree.add_reward(branch.leaf, branch.reward)
        self._pending.remove(branch)
        self._reward_leaves()
        branch.rollout = None  # the tree owns it now
        return branch

    def _graft_complete_steps(self, branch: _Branch, engine: RolloutEngine | None) -> None:
        """Put the steps into the tree that a rollout has completed by the tree's clock; later ones do not count."""
        start, stop = branch.grafted, self._now - branch.start
        if self._clock == "polls" or stop <= start:
            return
        entropies = []
        if branch.rollout is not None:
            token_ids, logprobs = branch.rollout.token_ids[start:stop], branch.rollout.logprobs[start:stop]
            entropies = (branch.rollout.entropies or [])[start:stop]
        elif self._clock == "arrival" or self._asks_for_entropies(branch.leaf):  # which come with the whole rollout
            return
        else:
            token_ids, logprobs = engine.partial((self.name, branch.leaf), start, stop)
        # The last is not complete, as far as one knows.
        ends = turn_ends(self._splitter.ends, token_ids, logprobs)[:-1]
        if ends:
            length = ends[-1]
            self.tree.extend(branch.leaf, token_ids[:length], logprobs[:length], ends, entropies[:length])
            branch.grafted += length
            self._look_for_answer(branch)

    def _look_for_answer(self, branch: _Branch) -> None:
        """Note where the answer begins in what the tree has of a rollout."""
        if self.settings.answer_marker and branch.leaf not in self._answers:
            so_far = self.tree.prefix(self.tree.leaves[branch.leaf])
            if any(self.tree.observed()):  # what a tool says is not the model's answer
                sampled_T = self.tree.sampled(branch.leaf)
                so_far = [token if sampled else None for token, sampled in zip(so_far, sampled_T, strict=True)]
            if (answer := self._splitter.first(so_far, self.settings.answer_marker)) is not None:
                self._answers[branch.leaf] = answer
