"""Forks at uncertain tokens (I2B-LPO): where they are, and how uncertain the engines say that the policy was."""

import math
from collections import Counter

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_growth import ANY, Engine, Scorer, Splitter, make_grower

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.branching import top_share
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.engines.entropies import TeacherForcedEntropies
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.tree import RolloutTree
from trl_ibtpo.tree_grower import TreeGrower


def growth(rollouts=1, branches=1, **changes) -> GrowthSettings:
    changes = {"max_completion_length": 400, **changes}
    return GrowthSettings(rollouts, 2, 1, branches, branching="entropy_fork", **changes)


def fork_of(entropies, seed=0, ids=None, logprobs=None, **changes) -> list[list[int]]:
    """Completion tokens that each branch of one rollout shares."""
    grower = TreeGrower([9], growth(**changes), changes.pop("splitter", Splitter()), (seed,))
    (request,) = grower.next_requests()
    assert request.entropies
    ids = ids or list(range(1, len(entropies) + 1))
    logprobs = logprobs or [-1.0] * len(ids)
    grower.add_rollout(0, Rollout((0, 0), ids, logprobs, entropies=list(entropies)))
    requests = grower.next_requests()
    assert not any(request.entropies for request in requests)  # nobody looks at those of branches
    return [request.prefix_ids[1:] for request in requests]


def test_top_share_by_hand():
    priority = np.array([np.nan, 5.0, 1.0, 4.0, 4.0, 9.0])
    eligible = np.array([False, True, True, True, True, False])
    assert np.flatnonzero(top_share(priority, eligible, 0.05)).tolist() == [1]  # at least one
    assert np.flatnonzero(top_share(priority, eligible, 0.5)).tolist() == [1, 3]  # the earlier of equal ones
    assert np.flatnonzero(top_share(priority, eligible, 0.51)).tolist() == [1, 3, 4]  # rounded up
    assert np.flatnonzero(top_share(priority, eligible, 1.0)).tolist() == [1, 2, 3, 4]
    assert math.ceil(0.05 * 20) == 1 == top_share(np.arange(20.0), np.ones(20, bool), 0.05).sum()


def test_forks_are_uniform_in_the_top_5_percent():
    """81 tokens, of which the first is none: 4 of 80 are the top 5%, and each is forked as often as the others."""
    rng = np.random.default_rng(0)
    entropies = rng.permutation(81) / 81
    entropies[0] = 7.0  # the most uncertain of all
    top = {int(place) for place in 1 + np.argsort(-entropies[1:])[:4]}
    counts = Counter(len(fork_of(entropies, seed)[0]) for seed in range(600))
    assert set(counts) == top  # a branch shares what comes before the token, which is sampled again
    statistic = sum((counts[place] - 150) ** 2 / 150 for place in top)
    assert statistic < 16.27  # chi-square with 3 degrees of freedom, 99.9%
    # Another rollout of the tree has a top 5% of its own, and all K branches of one share its fork.
    for seed in range(20):
        grower = TreeGrower([9], growth(2, 3), Splitter(), (seed,), clock="polls")
        grower.next_requests()
        for leaf, values in enumerate((entropies, entropies / 100)):
            grower.add_rollout(leaf, Rollout((0, leaf), list(range(1, 82)), [-1.0] * 81, entropies=values.tolist()))
        forks = [len(request.prefix_ids) - 1 for request in grower.next_requests()]
        assert len(forks) == 6 and set(forks) <= top and forks[0] == forks[2] and forks[3] == forks[5]


def test_the_uncertain_token_is_sampled_again_or_kept():
    entropies = [9.0, 0.1, 0.2, 3.0, 0.1, 0.1]  # token "4" of 1 to 6, which ends a step
    assert fork_of(entropies) == [[1, 2, 3]]
    assert fork_of(entropies, fork_keeps_token=True) == [[1, 2, 3, 4]]
    assert fork_of([9.0, 0.1, 3.0, 0.2, 0.1, 0.1], fork_keeps_token=True) == [[1, 2, 3]]
    # Nothing comes after the last token, so it cannot be kept; the first is no fork in either case.
    assert fork_of([9.0, 0.1, 1.0, 0.2, 0.1, 5.0], fork_keeps_token=True) == [[1, 2, 3]]
    assert fork_of([9.0, 0.1, 1.0, 0.2, 0.1, 5.0]) == [[1, 2, 3, 4, 5]]
    assert fork_of([9.0], branches=2) == [[], []]  # nothing to fork: branches start at the question
    assert fork_of([9.0, 1.0], fork_keeps_token=True) == [[]]


def test_branches_are_not_forked_and_no_place_twice():
    """Two rounds of one rollout, each of one token, and a branch that is more uncertain than any of it."""
    grower = TreeGrower([9], GrowthSettings(1, 3, 1, 1, branching="entropy_fork"), Splitter())
    grower.next_requests()
    grower.add_rollout(0, Rollout((0, 0), [1, 2, 3, 5], [-1.0] * 4, entropies=[0.0, 1.0, 3.0, 2.0]))
    (request,) = grower.next_requests()
    assert request.prefix_ids == [9, 1, 2]
    grower.add_rollout(1, Rollout((0, 1), [6, 6], [-1.0] * 2, entropies=[8.0, 9.0]))
    assert [request.prefix_ids for request in grower.next_requests()] == [[9, 1, 2, 3]]
    (first, second) = grower.grown().choices
    assert first.priorities == [3.0] and second.priorities == [2.0]
    assert grower.tree.trajectory_entropies(1).tolist() == [0.0, 1.0, 8.0, 9.0]


def test_an_engine_without_entropies_is_told():
    grower = TreeGrower([9], growth(), Splitter())
    grower.next_requests()
    with pytest.raises(RuntimeError, match="0 entropies for the 2 tokens of a rollout that asked"):
        grower.add_rollout(0, Rollout((0, 0), [1, 2], [-1.0, -1.0]))


def test_entropies_in_a_tree():
    tree = RolloutTree([9])
    tree.open(0)
    tree.extend(0, [1, 2, 3], [-1.0] * 3, [3], [0.1, 0.2, 0.3])
    tree.split(1, 1)
    tree.open(1)
    tree.extend(1, [7], [-1.0], [1])
    assert tree.token_entropies()[:3].tolist() == [0.1, 0.2, 0.3] and np.isnan(tree.token_entropies()[3])
    assert tree.trajectory_entropies(0).tolist() == [0.1, 0.2, 0.3]
    assert np.isnan(tree.trajectory_entropies(1)).tolist() == [False, True]


# ----- entropies of an engine that has none --------------------------------------------------------------------------


class Blind(Engine):
    """An engine that knows no entropies."""

    clock, max_length = "tokens", None

    def submit(self, requests):
        assert not any(request.entropies for request in requests)
        super().submit(requests)


@settings(max_examples=40, **ANY)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 100))
def test_teacher_forced_entropies_reach_the_trees(rollouts, batch_size, order):
    calls = []

    def measure(pairs):
        calls.append(len(pairs))
        return [[len(prefix) + place / 100 for place in range(len(ids))] for prefix, ids in pairs]

    engine = TeacherForcedEntropies(Blind(order), measure, batch_size)
    growers = [make_grower([9] * length, growth(rollouts, 2), Splitter(), (length,)) for length in (1, 2, 3)]
    drive(growers, engine, Scorer(engine._engine, order))
    assert sum(calls) == 3 * rollouts and max(calls) <= max(batch_size, 1)
    for length, grower in enumerate(growers, 1):
        for leaf, round in enumerate(grower.tree.rounds):
            found = grower.tree.trajectory_entropies(leaf)
            own = len(found) - grower.tree.ends()[grower.tree.branch_steps[leaf]]
            if round == 0:
                assert np.allclose(found, [length + place / 100 for place in range(len(found))])
            else:
                assert np.isnan(found[len(found) - own :]).all()


def test_rollouts_that_are_held_back_go_on_being_known():
    engine = TeacherForcedEntropies(Blind(), lambda pairs: [[0.5] * len(ids) for _, ids in pairs], 8)
    grower = make_grower([9], growth(2), Splitter())
    requests = grower.next_requests()
    engine.submit(requests)
    engine._engine.choose = iter([[(0, 1)], [(0, 0)]]).__next__
    assert engine.poll() == []  # the other still runs, and a pass of one row would be a waste
    assert engine.generated((0, 1)) == len(engine._held[0].token_ids) and engine.generated((0, 5)) == 0
    assert engine.partial((0, 1), 0, 1)[0] == engine._held[0].token_ids[:1]
    done = engine.poll()
    assert sorted(rollout.request_id for rollout in done) == [(0, 0), (0, 1)]
    assert all(rollout.entropies == [0.5] * len(rollout.token_ids) for rollout in done)
    engine.submit([request for request in requests[:1]])
    engine.abort()
    assert not engine._held and not engine._engine.in_flight


# ----- with a trainer ------------------------------------------------------------------------------------------------


def test_a_pass_of_the_policy_measures_what_generation_would(model_path, config):
    """Of rows of different lengths, and of more rows than go through the model together."""
    args = config(branching="entropy_fork", tree_initial_rollouts=2, tree_levels=2, temperature=0.7, top_k=5)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    assert args.num_generations == 4 and trainer.args.per_device_train_batch_size == 4
    (grown,) = trainer.grow_trees([tiny.questions()[0]])
    tree = grown.tree
    first = tree.trajectory(0)[0]
    pairs = [(tree.prompt_ids, tree.trajectory(leaf)[0]) for leaf in (0, 1)]
    pairs += [(tree.prompt_ids + first[:cut], first[cut:]) for cut in (1, 2, len(first) - 1)]
    found = trainer._token_entropies(trainer.model, pairs)
    assert [len(each) for each in found] == [len(tokens) for _, tokens in pairs]
    for leaf in (0, 1):  # transformers measured them while it sampled
        np.testing.assert_allclose(found[leaf], tree.trajectory_entropies(leaf), atol=1e-5)
    for cut, entropies in zip((1, 2, len(first) - 1), found[2:], strict=True):
        np.testing.assert_allclose(entropies, found[0][cut:], atol=1e-5)
    assert max(found[0]) > math.log(5)  # of more than the five tokens that were sampled from


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fork_keeps_token": True}, "`fork_keeps_token` is True, but `branching` is 'ib', which forks no tokens"),
        ({"fork_entropy": "truncated"}, "'truncated', but `branching` is 'ib', which looks at no entropies"),
        ({"branching": "entropy_fork", "fork_entropy": "truncated"}, "transformers has exact entropies"),
    ],
)
def test_fields_that_would_do_nothing(model_path, config, fields, words):
    with pytest.raises(ValueError, match=words):
        IBTPOTrainer(model_path, tiny.even_length, config(**fields), tiny.questions())
