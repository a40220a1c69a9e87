"""Grow one tree per question over one engine, without barriers between trees.

A tree depends only on itself, so each is a state machine (`TreeGrower`). As soon as one of its rounds is complete, it
submits the next, and `drive` hands requests, rollouts and rewards to and fro.

Engine-agnostic and free of torch and TRL.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

from .budget import LeafBudget
from .engines.base import RolloutEngine
from .grown_tree import GrowthSettings
from .tree_grower import TreeGrower


def leaf_budget(settings: GrowthSettings, trees: int, in_order: bool = False) -> LeafBudget | None:
    """What `drive` needs to share out the leaves of so many trees; none where every tree has the same number.

    Args:
        settings: of all trees.
        trees: how many.
        in_order: see `LeafBudget`.
    """
    if settings.adaptive_budget is None:
        return None
    return LeafBudget(
        trees * settings.leaves,
        settings.adaptive_budget,
        portion=settings.tree_initial_rollouts,
        unit=1 if settings.branching == "independent" else settings.branches_per_round,
        in_order=in_order,
    )


class LeafScorer(Protocol):
    """Rewards finished leaves while trees grow. A leaf is named by its tree's name and its number in the tree."""

    def submit(self, leaves: Sequence[tuple[int, int, list[int]]]) -> None:
        """Start rewarding `(tree, leaf, completion_ids)`."""

    def collect(self, wait: bool) -> list[tuple[int, int, float]]:
        """Rewards that became known, as `(tree, leaf, reward)`; with `wait`, at least one of those pending.

        The reward is that of the function that names success, NaN where it gave none (`RolloutTree.add_reward`).
        """

    def cancel(self) -> None:
        """Drop what is pending."""


def drive(
    growers: Sequence[TreeGrower],
    engine: RolloutEngine,
    scorer: LeafScorer,
    on_rollout: Callable[[], None] = lambda: None,
    budget: LeafBudget | None = None,
) -> None:
    """Drive all trees to the end over one engine, in turns of five stages.

    1. Ask the trees that may have something to do for their next rollouts, and submit these.
    2. Poll the engine once.
    3. Hand finished rollouts to their trees and to the scorer.
    4. Collect the rewards that are known, waiting for one only where neither the engine nor a tree has work to do.
    5. Note which trees to ask next: those that got what they wait for, a rollout or its reward, and after as many
       polls as they need those that wait for running rollouts to get further.

    If anything raises, the engine forgets every request in flight before the exception goes on.

    Args:
        growers: one per question.
        engine: where rollouts are sampled.
        scorer: where leaves get their rewards.
        on_rollout: called after every finished rollout, for progress bars.
        budget: where trees get the leaves that others gave back, with `adaptive_budget`.
    """
    ready = set(range(len(growers)))
    asked_after: defaultdict[int, set[int]] = defaultdict(set)  # trees that wait, by the poll they wait for
    in_flight = polls = 0
    for tree, grower in enumerate(growers):
        grower.name = tree

    try:
        while True:
            requests, asked = [], sorted(ready)
            while asked:
                for tree in asked:
                    requests += growers[tree].next_requests(engine)
                    ticks = growers[tree].ticks_to_wait(engine)
                    if ticks is not None:
                        asked_after[polls + ticks].add(tree)  # a poll gives a rollout one token at most
                asked = [] if budget is None else budget.share_out(growers)
            if requests:
                engine.submit(requests)
                in_flight += len(requests)
            elif not in_flight and all(grower.done for grower in growers):
                return

            finished, rewarded = [], []
            while in_flight:  # most polls end no rollout and no tree's wait
                finished, polls = engine.poll(), polls + 1
                if finished or polls in asked_after or (rewarded := scorer.collect(False)):
                    break
            else:
                polls += 1
            in_flight -= len(finished)

            ready = asked_after.pop(polls, set())
            leaves = []
            for rollout in finished:
                tree, leaf = rollout.request_id
                growers[tree].add_rollout(leaf, rollout)
                if not growers[tree].waits_for_rewards:
                    ready.add(tree)
                leaves.append((tree, leaf, growers[tree].completion(leaf)))
                on_rollout()
            if leaves:
                scorer.submit(leaves)

            wait = not in_flight and not ready
            rewarded = rewarded or scorer.collect(wait)
            if wait and not (requests or finished or rewarded):
                raise RuntimeError("Trees wait for rewards, but the scorer has none pending.")
            for tree, leaf, reward in rewarded:
                growers[tree].add_reward(leaf, reward)
                ready.add(tree)
    except BaseException:
        try:
            engine.abort()
        finally:
            scorer.cancel()
        raise
