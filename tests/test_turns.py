"""Completions of several turns with observations between them: how they are cut, grown and sampled."""

import math
import random
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import test_growth
from hypothesis import given
from hypothesis import strategies as st

from trl_ibtpo.engines.base import RolloutRequest
from trl_ibtpo.engines.turns import TurnEngine
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.steps import turn_ends
from trl_ibtpo.tree import RolloutTree
from trl_ibtpo.tree_grower import TreeGrower

OBSERVED = (90, 91, 92)  # 92 would end a step if it had been sampled


def steps_of(token_ids):
    return test_growth.Splitter().ends(token_ids)


def over_turns(prefix_ids, max_tokens, seed):
    """The continuation of `test_growth`, in which now and then an observation follows a token."""
    token_ids, logprobs = test_growth.sample(prefix_ids, max_tokens, seed)
    rng = random.Random(seed)
    for at in range(len(token_ids) - 4, 0, -1):
        if rng.random() < 0.2 and logprobs[at] is not None:
            token_ids[at : at + 3], logprobs[at : at + 3] = OBSERVED, [None] * 3
    return token_ids, logprobs


@pytest.mark.parametrize(
    ("token_ids", "observed", "expected"),
    [
        ([1, 4, 1, 1], "....", [2, 4]),  # no observation: as in one turn
        ([1, 1, 9, 9, 1], "..oo.", [4, 5]),  # the end of a turn ends a step, and owns the observation
        ([1, 4, 9, 9, 1, 4], "..oo..", [4, 6]),  # the turn's last token ends a step by itself
        ([1, 4, 1, 92, 92], "...oo", [2, 5]),  # nothing in an observation ends a step; it may come last
        ([4, 92, 4, 92, 4], ".o.o.", [2, 4, 5]),
    ],
)
def test_the_end_of_a_turn_ends_a_step(token_ids, observed, expected):
    logprobs = [None if mark == "o" else -1.0 for mark in observed]
    assert turn_ends(steps_of, token_ids, logprobs) == expected


def test_a_tree_keeps_observations_apart():
    tree = RolloutTree([1])
    leaf = tree.open(0)
    tree.extend(leaf, [5, 6, 7, 8, 9], [-1.0, -3.0, None, None, -2.0], [1, 4, 5])
    assert tree.observed().tolist() == [0, 0, 2, 0] and tree.steps[2].observed == 2
    assert tree.sampled(leaf).tolist() == [True, True, False, False, True]
    assert tree.generated_tokens == 3 and tree.trajectory_tokens == 5
    assert tree.mean_logprobs().tolist() == [0, -1, -3, -2]
    token_ids, logprobs = tree.trajectory(leaf)
    assert token_ids == [5, 6, 7, 8, 9] and [math.isnan(value) for value in logprobs] == [False] * 2 + [True] * 2 + [
        False
    ]


@pytest.mark.parametrize(("logprobs", "ends"), [([-1.0, None, -1.0], [3]), ([None, -1.0], [1, 2]), ([None], [1])])
def test_an_observation_comes_last_in_its_step(logprobs, ends):
    tree = RolloutTree([1])
    with pytest.raises(ValueError, match="An observation must be the last tokens of a step"):
        tree.extend(tree.open(0), [5] * len(logprobs), logprobs, ends)


@given(st.integers(0, 10**6), st.integers(0, 3), st.sampled_from(["ib", "confidence", "random"]))
def test_trees_grow_over_turns(seed, lookahead, branching):
    """No branch starts inside an observation or at its head, budgets count observations, generated tokens do not."""
    settings = GrowthSettings(
        tree_initial_rollouts=3,
        tree_levels=6,
        max_completion_length=40,
        branch_lookahead=lookahead,
        branching=branching,
    )
    growers = [TreeGrower(prompt, settings, test_growth.Splitter(), (seed, i)) for i, prompt in enumerate([[1], [2]])]
    engine = test_growth.Engine(seed, over_turns)
    drive(growers, engine, test_growth.Scorer(engine, seed))
    sampled = {rollout.request_id: rollout for rollout in engine.rollouts}
    for grower in growers:
        tree = grower.tree
        for leaf in range(settings.leaves):
            token_ids, _ = tree.trajectory(leaf)
            mask = tree.sampled(leaf)
            observed = [token_id in OBSERVED for token_id in token_ids]
            assert observed == (~mask).tolist() and len(token_ids) <= 40
            after = int(tree.ends()[tree.branch_steps[leaf]])
            assert after == len(token_ids) or mask[after]
            for end in tree.ends()[tree.path(tree.leaves[leaf])][:-1]:
                assert mask[end]  # a step begins with a sampled token
        own = [sampled[(grower.name, leaf)] for leaf in range(settings.leaves)]
        assert tree.generated_tokens == sum(len(each.token_ids) - each.logprobs.count(None) for each in own)
        assert not np.isnan(grower.scores().confidence[1:]).any()


def test_a_branch_that_cannot_go_back_starts_at_the_question():
    settings = GrowthSettings(tree_initial_rollouts=2, tree_levels=4, max_completion_length=40, branching="random")
    grower = TreeGrower([1], settings, test_growth.Splitter())

    class Restarting(test_growth.Engine):
        def poll(self):
            return [
                test_growth.Rollout(rollout.request_id, [1, 4, 5], [-1.0] * 3, restarted=True)
                if rollout.request_id[1] >= 2
                else rollout
                for rollout in super().poll()
            ]

    engine = Restarting(0)
    drive([grower], engine, test_growth.Scorer(engine))
    assert any(len(request.prefix_ids) > 1 for request in engine.requests)
    assert grower.tree.branch_steps == [0] * 5
    assert [grower.tree.trajectory(leaf)[0] for leaf in (2, 3, 4)] == [[1, 4, 5]] * 3


def test_a_tool_does_not_hold_up_a_tree_that_gets_its_rewards():
    """The second tree's tool answers only when the first tree, whose rewards come a little later, has gone on."""
    went_on, asked = threading.Event(), Future()

    class Host:
        def begin(self, request):
            return None

        def respond(self, request_id, token_ids):
            return asked if request_id == (1, 0) else None

        def abort(self):
            went_on.set()

    class Watched(test_growth.Engine):
        max_length, clock = None, "tokens"

        def submit(self, requests):
            super().submit(requests)
            if any(request.request_id[0] == 0 and request.request_id[1] > 0 for request in requests):
                went_on.set()

        def choose(self):
            return sorted(self.in_flight)

    class Later(test_growth.Scorer):
        known = time.monotonic() + 0.2

        def collect(self, wait):
            return super().collect(wait) if wait or time.monotonic() > self.known else []

    def answer():
        went_on.wait(10)
        asked.set_result(None)

    settings = GrowthSettings(tree_initial_rollouts=1, tree_levels=2, max_completion_length=40)
    growers = [TreeGrower(prompt, settings, test_growth.Splitter(), (0, i)) for i, prompt in enumerate([[1], [2]])]
    inner = Watched(0)
    thread, start = threading.Thread(target=answer), time.monotonic()
    thread.start()
    drive(growers, TurnEngine(inner, Host()), Later(inner))
    thread.join()
    assert time.monotonic() - start < 5


def test_batches_do_not_depend_on_which_tool_is_quicker():
    """An engine that samples batch by batch waits for all tools."""

    class Batches(test_growth.Engine):
        max_length = None

        def __init__(self):
            super().__init__(0, lambda prefix_ids, most, seed: test_growth.sample(prefix_ids, min(most, 8), seed))
            self.clock, self.batches = "polls", []

        def choose(self):
            self.batches.append(sorted(self.in_flight))
            return self.batches[-1]

    class Host:
        def __init__(self, quick):
            self.quick, self.asked, self.threads = quick, set(), []

        def begin(self, request):
            return None

        def respond(self, request_id, token_ids):
            if request_id in self.asked:
                return None
            self.asked.add(request_id)
            future = Future()
            delay = 0.0 if request_id[1] in self.quick else 0.15  # longer than a poll waits
            self.threads.append(threading.Timer(delay, future.set_result, [[*OBSERVED]]))
            self.threads[-1].start()
            return future

        def abort(self):
            pass

    def batches(quick):
        settings = GrowthSettings(tree_initial_rollouts=4, tree_levels=2, branching="random", max_completion_length=40)
        inner, host = Batches(), Host(quick)
        grower = TreeGrower([1], settings, test_growth.Splitter(), (0, 0))
        drive([grower], TurnEngine(inner, host), test_growth.Scorer(inner))
        return inner.batches

    assert batches(quick={0, 1}) == batches(quick={2, 3})


def test_what_a_tool_raises_does_not_wait_for_the_others():
    class Host:
        def __init__(self):
            self.futures = [Future(), Future()]

        def begin(self, request):
            return self.futures[request.request_id]

    class Inner:
        max_length, clock = None, "polls"

    host = Host()
    engine = TurnEngine(Inner(), host)
    engine.submit([RolloutRequest(number, [1], 8, 0) for number in range(2)])
    assert engine.poll() == []  # neither has answered
    host.futures[1].set_exception(OSError("no such server"))
    with pytest.raises(OSError, match="no such server"):
        engine.poll()
