"""The rules of every strategy, worked out by hand, and strategies in training: a function of one's own, and one that
learns, whose knowledge is saved with checkpoints."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_growth import Splitter
from test_scores import NAN, build, trees

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.branching import contrast, make_strategy, marked, segments, shrunken_density, turn_entropy
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.pivot import Pivot
from trl_ibtpo.scores import score_tree
from trl_ibtpo.segments import SegmentGrower
from trl_ibtpo.training import checkpoints, checks
from trl_ibtpo.tree import RolloutTree
from trl_ibtpo.tree_grower import TreeGrower

SMALL = {"tree_initial_rollouts": 2, "tree_levels": 3, "reproducible_rollouts": True}


# ----- forks inside a step -------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, database=None)
@given(trees(), st.data())
def test_a_tree_with_a_split_step_is_the_tree_cut_there_from_the_start(drawn, data):
    tree, _ = drawn
    places = [(index, tokens) for index, step in enumerate(tree.steps) for tokens in range(1, len(step.token_ids))]
    if not places:
        return
    step, tokens = data.draw(st.sampled_from(places))
    middle = tree.steps[tree.steps[step].parent].end + tokens
    cut = RolloutTree(tree.prompt_ids)
    for leaf, after in enumerate(tree.branch_steps):
        start, path = tree.steps[after].end, tree.path(tree.leaves[leaf])
        ends = {tree.steps[each].end for each in path} | ({middle} if step in path else set())
        ids, logprobs = tree.trajectory(leaf)
        cut.open(after + (after >= step), tree.rounds[leaf])
        cut.extend(leaf, ids[start:], logprobs[start:], sorted(end - start for end in ends if end > start))
        cut.add_reward(leaf, tree.rewards[leaf])
    assert tree.split(step, tokens) == step
    assert tree.steps == cut.steps
    assert (tree.leaves, tree.branch_steps) == (cut.leaves, cut.branch_steps)
    for name in ("density", "mean_logprobs", "leaf_count", "child_counts", "token_steps", "token_logprobs"):
        np.testing.assert_allclose(getattr(tree, name)(), getattr(cut, name)(), atol=1e-12)
    trajectories = [[each.trajectory(leaf) for leaf in range(len(each.leaves))] for each in (tree, cut)]
    assert trajectories[0] == trajectories[1] and tree.generated_tokens == cut.generated_tokens


def test_a_step_is_split_between_its_sampled_tokens_only():
    tree = RolloutTree([1])
    tree.open(0)
    tree.extend(0, [1, 2, 3, 4], [-1.0, -1.0, -1.0, None], [4])  # the last is an observation
    for tokens in (0, 3, 4):
        with pytest.raises(ValueError, match=rf"Step 1 has 3 sampled tokens; .* 1 to 2, not {tokens}"):
            tree.split(1, tokens)
    tree.split(1, 2)
    assert [(step.token_ids, step.observed) for step in tree.steps] == [([], 0), ([1, 2], 0), ([3, 4], 1)]


# ----- surprisal -----------------------------------------------------------------------------------------------------


def sampled(grower, leaf, ids, logprobs):
    grower.add_rollout(leaf, Rollout((0, leaf), ids, logprobs))


def test_surprisal_by_hand():
    """EPTree with M = 1, L = 2, N = 2, T = 1: five leaves, two rounds of the two most surprising tokens."""
    growth = GrowthSettings(1, 3, 2, 1, branching="surprisal", max_completion_length=20)
    assert growth.leaves == 1 * (1 + 2 * 2 * 1)
    grower = TreeGrower([9], growth, Splitter())
    grower.next_requests()
    # Steps "1 2 3 4" and "5 6 7". The first token, which the question is followed by, is no fork however surprising.
    sampled(grower, 0, [1, 2, 3, 4, 5, 6, 7], [-9.0, -1.0, -5.0, -1.0, -0.5, -2.0, -4.0])
    first, second = grower.next_requests()  # nobody asks for a reward
    assert first.prefix_ids == [9, 1, 2]  # before token "3", which is sampled again
    assert second.prefix_ids == [9, 1, 2, 3, 4, 5, 6]  # before token "7"
    assert [step.token_ids for step in grower.tree.steps] == [[], [1, 2], [3, 4], [5, 6], [7]]
    sampled(grower, 1, [8, 8], [-9.0, -3.0])
    assert grower.next_requests() == []  # the round is not complete
    sampled(grower, 2, [12], [-9.0])
    # Neither the first tokens of the branches (-9) nor "3" and "7" again: "8" (-3) of the branch, then "6" (-2).
    third, fourth = grower.next_requests()
    assert third.prefix_ids == [9, 1, 2, 8] and fourth.prefix_ids == [9, 1, 2, 3, 4, 5]
    sampled(grower, 3, [1], [-1.0])
    sampled(grower, 4, [1], [-1.0])
    assert grower.next_requests() == [] and not grower.done
    for leaf in range(5):
        grower.add_reward(leaf, 1.0)
    assert grower.done and grower.tree.rounds == [0, 1, 1, 2, 2]
    # Forks inside a step divide it there and nowhere else.
    assert sorted(step.token_ids for step in grower.tree.steps) == sorted(
        [[], [1, 2], [3, 4], [5], [6], [7], [8], [8], [12], [1], [1]]
    )
    # What was chosen, by the numbers that the steps have now, and the surprisal of the tokens that follow.
    tree = grower.tree
    choices = grower.grown().choices
    assert [[tree.prefix(step) for step in choice.steps] for choice in choices] == [
        [[1, 2], [1, 2, 3, 4, 5, 6]],
        [[1, 2, 8], [1, 2, 3, 4, 5]],
    ]
    assert [choice.priorities for choice in choices] == [[5.0, 4.0], [3.0, 2.0]]


def test_surprisal_forks_each_initial_rollout_as_soon_as_it_is_sampled():
    growth = GrowthSettings(2, 2, 1, 1, branching="surprisal", max_completion_length=20)
    grower = TreeGrower([9], growth, Splitter())

    class Ahead:  # the other rollout is known to go on for longer
        generated = staticmethod(lambda request_id: 9)

    grower.next_requests()
    sampled(grower, 1, [1, 2, 3], [-1.0, -1.0, -2.0])
    assert [request.prefix_ids for request in grower.next_requests(Ahead)] == [[9, 1, 2]]
    sampled(grower, 0, [5] * 11, [-1.0] * 5 + [-3.0] + [-1.0] * 5)
    sampled(grower, 2, [1], [-1.0])
    assert [request.prefix_ids for request in grower.next_requests(Ahead)] == [[9, 5, 5, 5, 5, 5]]


class MarkedSplitter(Splitter):
    """The answer begins after token 40."""

    def first(self, token_ids, texts):
        return token_ids.index(40) + 1 if 40 in token_ids else None


@pytest.mark.parametrize(("marker", "prefix"), [(None, [1, 4, 1, 40]), (["answer"], [1])])
def test_nothing_is_branched_after_the_answer_begins(marker, prefix):
    growth = GrowthSettings(
        1, 2, 1, 1, branching="surprisal", allow_root_branching=True, answer_marker=marker, max_completion_length=20
    )
    grower = TreeGrower([9], growth, MarkedSplitter())
    grower.next_requests()
    sampled(grower, 0, [1, 4, 1, 40, 1, 1], [-1.0, -2.0, -1.0, -1.0, -5.0, -1.0])
    assert grower.next_requests()[0].prefix_ids == [9, *prefix]
    steps = TreeGrower([9], GrowthSettings(1, 2, 1, 1, branching="confidence", answer_marker=marker), MarkedSplitter())
    steps.next_requests()
    sampled(steps, 0, [1, 4, 1, 40, 1, 1], [-1.0, -1.0, -1.0, -1.0, -5.0, -5.0])
    assert steps.next_requests()[0].prefix_ids == [9, *([1, 4, 1, 40] if marker is None else [1, 4])]


class Running:
    """An engine in which another rollout is on its way."""

    def __init__(self, token_ids):
        self.token_ids = token_ids

    def generated(self, request_id):
        return len(self.token_ids)

    def partial(self, request_id, start, stop):
        return self.token_ids[start:stop], [-1.0] * (stop - start)


@pytest.mark.parametrize(("marker", "prefix"), [(None, [1, 40, 2, 4, 1, 4]), (["answer"], [7, 8])])
def test_nor_while_its_rollout_is_still_running(marker, prefix):
    growth = GrowthSettings(2, 2, 1, 1, answer_marker=marker, branch_lookahead=1, max_completion_length=20)

    @marked(uses_rewards=False)
    def last(tree, scores, rng):
        return tree.ends()

    grower = TreeGrower([9], growth, MarkedSplitter(), strategy=last)
    grower.next_requests()
    sampled(grower, 1, [7, 8, *[5] * 8], [-1.0] * 10)
    (request,) = grower.next_requests(Running([1, 40, 2, 4, 1, 4, 1, 8, 1, 1, 1]))
    assert request.prefix_ids == [9, *prefix]


def test_what_a_tool_says_is_no_answer():
    growth = GrowthSettings(
        1,
        2,
        1,
        1,
        branching="surprisal",
        allow_root_branching=True,
        answer_marker=["answer"],
        max_completion_length=20,
    )
    grower = TreeGrower([9], growth, MarkedSplitter())
    grower.next_requests()
    sampled(grower, 0, [1, 4, 40, 4, 1, 40], [-1.0, -2.0, None, None, -5.0, -1.0])  # the tool says 40, then the model
    assert grower.next_requests()[0].prefix_ids == [9, 1, 4, 40, 4]


@pytest.mark.parametrize("answered", [False, True])
def test_entropies_are_known_of_what_joins_the_tree_early(answered):
    """A strategy sees the tokens of a running rollout with their entropies, or not at all yet."""
    seen = []

    @marked(uses_rewards=False, uses_entropies=True)
    def look(tree, scores, rng):
        seen.append(tree.token_entropies().tolist())
        return tree.ends()

    growth = GrowthSettings(2, 2, 1, 1, branch_lookahead=1, max_completion_length=20)
    grower = TreeGrower([9], growth, Splitter(), strategy=look)
    grower.next_requests()

    def add(leaf, ids):
        grower.add_rollout(leaf, Rollout((0, leaf), ids, [-1.0] * len(ids), entropies=[0.5] * len(ids)))

    other = [1, 4, 1, 4, 1, 4, 1]
    if answered:  # further by the tree's clock than the first one's end
        add(1, other)
    add(0, [7, 8, 5])
    grower.next_requests(Running(other))
    assert seen == [[0.5] * (5 if answered else 3)]


# ----- segments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("active", "finished", "just_finished", "paths"),
    [
        (2, 0, 0, 4),  # w a
        (4, 0, 0, 8),
        (8, 0, 0, 8),  # W
        (3, 1, 1, 7),  # min(8 - 1, 2 * 1 + 2 * 3): the finished one makes room
        (3, 4, 1, 4),  # W - f
        (0, 3, 1, 2),  # all have ended: two more would be started if there were a path
        (5, 9, 0, 5),  # never fewer than are active
    ],
)
def test_the_budget_of_segments_by_hand(active, finished, just_finished, paths):
    """max(a, min(max(W - f, 0), w f_now + w a)) with W = 8, w = 2"""
    assert segments(active, finished, just_finished, width=8, divergence=2) == paths


def test_segments_by_hand():
    """Five leaves from one rollout (B0 = 1, L = 5): after the first step two paths, then as many as fit."""
    growth = GrowthSettings(1, 5, 1, 1, branching="segments", max_completion_length=40)
    grower = SegmentGrower([9], growth, Splitter(), clock="polls")
    assert len(grower.next_requests()) == 1
    sampled(grower, 0, [4, 8, 12, 1], [-1.0] * 4)  # three steps and the last
    # After step one: a = 1, f = 0: min(5, 2) paths, one new.
    (request,) = grower.next_requests()
    assert request.prefix_ids == [9, 4] and len(grower.tree) == 2  # later steps are not in the tree yet
    sampled(grower, 1, [1], [-1.0])
    # After step two the new path has ended: a = 1, f = f_now = 1: min(5 - 1, 2 * 1 + 2 * 1) = 4 paths, three new.
    assert [request.prefix_ids for request in grower.next_requests()] == [[9, 4, 8]] * 3
    for leaf in (2, 3, 4):
        sampled(grower, leaf, [1], [-1.0])
    assert grower.next_requests() == [] and not grower.done
    for leaf in range(5):
        grower.add_reward(leaf, 0.0)
    assert grower.done and grower.tree.branch_steps == [0, 0 + 1, 2, 2, 2] and grower.tree.rounds == [0, 1, 2, 2, 2]


def test_segments_cut_finished_paths_where_no_other_is_left():
    growth = GrowthSettings(2, 3, 1, 1, branching="segments", max_completion_length=40)
    grower = SegmentGrower([9], growth, Splitter(), clock="polls")
    grower.next_requests()
    sampled(grower, 0, [1], [-1.0])
    sampled(grower, 1, [1, 2], [-1.0] * 2)  # both end with their first step: nothing but the question can be continued
    assert [request.prefix_ids for request in grower.next_requests()] == [[9], [9]]
    grower = SegmentGrower([9], growth, Splitter(), clock="polls")
    grower.next_requests()
    sampled(grower, 0, [4, 1], [-1.0] * 2)
    sampled(grower, 1, [8, 1], [-1.0] * 2)
    # After step one: a = 2: min(4, 4) paths, so each is continued once more.
    assert sorted(request.prefix_ids for request in grower.next_requests()) == [[9, 4], [9, 8]]


def test_segments_are_split_while_they_are_sampled():
    growth = GrowthSettings(1, 2, 1, 1, branching="segments", max_completion_length=40)
    grower = SegmentGrower([9], growth, Splitter())
    grower.next_requests()

    class Running:
        tokens = (1, 4)

        def generated(self, request_id):
            return len(self.tokens)

        def partial(self, request_id, start, stop):
            return list(self.tokens[start:stop]), [-1.0] * (stop - start)

    engine = Running()
    assert grower.next_requests(engine) == []  # the step may be the last
    assert grower.ticks_to_wait(engine) > 0
    engine.tokens = (1, 4, 1)
    assert [request.prefix_ids for request in grower.next_requests(engine)] == [[9, 1, 4]]


# ----- pivot ---------------------------------------------------------------------------------------------------------


def fork():
    # 0 +- 1 -- 2 -- 3 -- 4      leaf 0: wrong
    #   |    +- 8                leaf 3: right
    #   +- 5 -- 6                leaf 1: right
    #   +- 7                     leaf 2: wrong
    tree = build([(0, [0.5] * 4), (0, [0.5] * 2), (0, [0.5]), (1, [0.5])], [0.0, 1.0, 0.0, 1.0])
    tree.rounds[3] = 1
    return tree, score_tree(tree, beta=5.0)


def test_pivot_draws_from_failed_initial_rollouts_by_its_formula():
    tree, scores = fork()
    pivot = Pivot()
    pivot.slope, pivot.intercept = 2.0, -1.0
    rng = np.random.default_rng(0)
    drawn = np.array([pivot(tree, scores, rng) for _ in range(4000)])
    assert np.isnan(drawn[:, [0, 5, 6, 8]]).all()  # the question, a right rollout, a branch
    candidates = [1, 2, 3]  # those that have children: u = 1/4, 2/4, 3/4
    places = np.array([1, 2, 3]) / 4
    weights = places**0.1 / (1 + np.exp(-(2 * places - 1)))
    counts = np.bincount(drawn[:, candidates].argmax(1), minlength=3) / 4000
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.025)  # about three standard errors


def test_pivot_where_no_rollout_failed():
    tree = build([(0, [0.5] * 3), (0, [0.5] * 2)], [1.0, 1.0])
    priority = Pivot()(tree, score_tree(tree, beta=5.0), np.random.default_rng(0))
    assert np.isfinite(priority[1:]).all()


def test_pivot_learns_from_its_branches_alone():
    tree, scores = fork()
    pivot = Pivot()
    assert pivot.evidence(tree, scores) == [[1 / 4, 1.0]]  # leaf 3, from the first of four steps
    tree.success[3] = NAN
    assert pivot.evidence(tree, scores) == []
    pivot.learn([[0.5, 1.0]] * 10)
    assert (pivot.slope, pivot.intercept) == (0.0, 0.0)  # ten of one kind
    rng = np.random.default_rng(1)
    places = rng.random(500)
    pivot.learn([[place, float(rng.random() < place)] for place in places])
    # At the optimum of the penalised likelihood its gradient is zero.
    u, success = np.array(pivot.seen).T
    error = 1 / (1 + np.exp(-(pivot.slope * u + pivot.intercept))) - success
    assert abs((error * u).sum() + pivot.slope) < 1e-8 and abs(error.sum()) < 1e-8
    assert pivot.slope > 1
    again = make_strategy("pivot")
    again.load_state_dict(json.loads(json.dumps(pivot.state_dict())))
    assert (again.slope, again.intercept) == (pivot.slope, pivot.intercept)
    pivot.learn([[0.5, 1.0]] * 20_000)
    assert len(pivot.seen) == Pivot.window
    assert make_strategy("pivot").seen == []  # each trainer has one of its own


# ----- turn_entropy --------------------------------------------------------------------------------------------------


def test_turn_entropy_by_hand():
    # 0 +- 1 o +- 2        o: a tool result
    #   |      +- 5 -- 6
    #   +- 3 o -- 4
    def grow(observation):
        tree = RolloutTree([9])
        for after, logprobs, ends in (
            (0, [-1.0, -3.0, observation, -0.5, -1.5], [3, 5]),
            (0, [-2.0, observation, observation, *[-3.0] * 20, -1000.0], [3, 24]),
            (1, [-3.0, -9.0], [1, 2]),
        ):
            tree.extend(tree.open(after), [7] * len(logprobs), logprobs, ends)
        return turn_entropy(tree, score_tree(tree, beta=5.0), np.random.default_rng(0))

    # H(question) = (1 + 3 + 2) / 3 = 2;   H(1) = (.5 + 1.5 + 3) / 3 = 5/3;   H(3) = 3, the 21st token does not count
    np.testing.assert_allclose(grow(None), [NAN, -1 / 3, NAN, 1.0, NAN, NAN, NAN])
    # No tool results: every step with children counts, and the three tokens of -6 are tokens like all others.
    # H(question) = (1 + 3 + 6 + 2 + 6 + 6) / 6 = 4
    np.testing.assert_allclose(grow(-6.0), [0.0, 5 / 3 - 4, NAN, -1.0, NAN, 9.0 - 4, NAN])


# ----- contrast ------------------------------------------------------------------------------------------------------


def test_contrast_by_hand():
    # 0 +- 1 +- 2 -- 3     leaf 0: right       steps of one token; confidence .5, that of step 4 and 6 .8
    #   |    +- 6          leaf 2: wrong
    #   +- 4 -- 5          leaf 1: wrong
    tree = build([(0, [0.5, 0.5, 0.5]), (0, [0.8, 0.5]), (1, [0.8])], [1.0, 0.0, 0.0])
    # V, prior of 4:  0: (1 + 1) / (3 + 2) = .4;     1: (1 + 4 * .4) / (2 + 4) = 13/30;  4: (0 + 4 * .4) / 5 = .32
    #   2: (1 + 4 * 13/30) / 5 = 41/75;  6: (0 + 4 * 13/30) / 5;  5: (0 + 4 * .32) / 5
    value = [2 / 5, 13 / 30, 41 / 75, 239 / 375, 0.32, 0.256, 26 / 75]
    np.testing.assert_allclose(shrunken_density(tree), value)
    #   0: leaf 0 owns it, 1 - V = .6; children .5 and .8, mean .65; leaves end after 3, 2 and 2 tokens
    #   1: leaf 0, 1 - V = 17/30; .65; (2 + 1) / 2 more tokens   2: leaf 0, 1 - V = 34/75; .5; 1   4: leaf 1, V; .5; 1
    expected = [0.6 * 0.35 / (7 / 3), 17 / 30 * 0.35 / 1.5, 34 / 75 * 0.5, NAN, 0.32 * 0.5, NAN, NAN]
    scores = score_tree(tree, beta=5.0)
    np.testing.assert_allclose(contrast(tree, scores, np.random.default_rng(0)), expected)
    # What is still running does not look like a rollout that is soon over.
    tree.open(1)
    np.testing.assert_allclose(contrast(tree, scores, np.random.default_rng(0)), expected)
    # Nothing known: V is 1/2 everywhere, and so is the chance of another outcome.
    tree = build([(0, [0.5, 0.5, 0.5])])
    found = contrast(tree, score_tree(tree, beta=5.0), np.random.default_rng(0))
    np.testing.assert_allclose(found, [0.5 * 0.5 / 3, 0.5 * 0.5 / 2, 0.5 * 0.5, NAN])


# ----- in training ---------------------------------------------------------------------------------------------------


class Learner:
    """Branches at random, and counts what it has seen."""

    uses_rewards = False

    def __init__(self):
        self.seen = 0

    def __call__(self, tree, scores, rng):
        return rng.random(len(tree))

    def evidence(self, tree, scores):
        return [float(success) for success in tree.success]

    def learn(self, evidence):
        self.seen += len(evidence)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_function_given_to_the_trainer_chooses_the_steps(model_path, config):
    asked = []

    def last_step(tree, scores, rng):
        asked.append(len(tree))
        return np.arange(len(tree))

    trainer = IBTPOTrainer(
        model_path, tiny.even_length, config(max_steps=2, **SMALL), tiny.questions(), branching=last_step
    )
    grown = trainer.grow_trees(list(tiny.questions())[:2])
    assert len(asked) == 2 * 2
    for each in grown:
        assert each.settings.branching == "last_step"
        # The last step that has a child is the parent of the last leaf that was there.
        ends = [each.tree.steps[leaf].parent for leaf in each.tree.leaves[:2]]
        assert each.tree.branch_steps[2] == max(ends)
    trainer.train()
    assert len(asked) == 4 + 2 * 2
    assert "branching 'last_step'" in trainer._describe()


@pytest.mark.parametrize(
    ("branching", "fields", "error", "message"),
    [
        ("confidence", {}, TypeError, "`branching` of the trainer is 'confidence'; give a function"),
        (Learner, {}, TypeError, "give a function"),
        (Learner(), {"branching": "independent"}, ValueError, "'Learner', but `branching` of the configuration is"),
        *[
            (Learner(), {"branching": name}, ValueError, f"is '{name}', which shapes trees .* Leave the field out")
            for name in ("surprisal", "entropy_fork", "segments")
        ],
        (
            lambda tree, scores, rng: scores.density,
            {"shared_token_weight": "sampled"},
            ValueError,
            "the function '<lambda>' does not say that it leaves them alone",
        ),
    ],
)
def test_what_cannot_be_a_strategy_is_refused(model_path, config, branching, fields, error, message):
    with pytest.raises(error, match=message):
        IBTPOTrainer(model_path, tiny.even_length, config(**fields), tiny.questions(), branching=branching)


def test_a_function_without_rewards_goes_with_sampled_weights(config):
    """The configuration alone does not know of it."""
    checks.check_strategy(marked(uses_rewards=False)(lambda *arguments: None), config(shared_token_weight="sampled"))


def test_a_function_must_not_go_by_the_name_of_a_strategy(model_path, config):
    def random(tree, scores, rng):
        return rng.random(len(tree))

    with pytest.raises(ValueError, match="function named 'random', as a strategy of the package is"):
        IBTPOTrainer(model_path, tiny.even_length, config(), tiny.questions(), branching=random)


def test_what_a_strategy_has_learned_is_saved_and_read_again(model_path, config):
    def run(steps, learner, **arguments):
        args = config(max_steps=steps, save_strategy="steps", save_steps=1, **SMALL)
        trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(), branching=learner)
        trainer.train(**arguments)
        return trainer.args.output_dir

    output_dir = run(2, learner := Learner())
    assert learner.seen == 2 * 4  # trajectories of two steps, a tree each
    state = Path(output_dir, "checkpoint-2", checkpoints.STRATEGY).read_text()
    assert json.loads(state) == {"seen": 8}
    run(3, learner := Learner(), resume_from_checkpoint=True)
    assert learner.seen == 3 * 4


# ----- the settings of their authors, as docs/methods.md has them ----------------------------------------------------

RECIPES = re.findall(
    r"^\| ([\w-]+) \| `(\{.*?\})`", (Path(__file__).parent.parent / "docs/methods.md").read_text(), flags=re.MULTILINE
)


@pytest.mark.parametrize("method, fields", RECIPES, ids=dict(RECIPES))
def test_a_recipe_is_a_configuration(config, method, fields):
    assert len(RECIPES) >= 6
    args = config(**json.loads(fields))
    assert args.num_generations == {"TreeRL": 30, "ARPO": 16, "TreePO": 16, "DEEP-GRPO": 16, "GRPO": 8, "IBRO": 8}.get(
        method, 12
    )
