"""Step advantages against the trees worked out in `test_scores`, and the properties training relies on."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scores import NAN, TREES, build, leaves_under, trees

from trl_ibtpo.advantages import CreditSettings, GradedTree, grpo, ibtpo, per_token, token_advantages
from trl_ibtpo.grown_tree import GrownTree, GrowthSettings
from trl_ibtpo.scores import score_tree
from trl_ibtpo.training.metrics import TreeMetrics
from trl_ibtpo.weights import step_weights


def trl_advantages(rewards: list[float]) -> np.ndarray:
    """What TRL gives each trajectory: `(R - mean) / (std + 1e-4)`, unscorable ones left out."""
    rewards = np.array(rewards, dtype=float)
    known = rewards[~np.isnan(rewards)]
    return (rewards - known.mean()) / (known.std(ddof=1) + 1e-4)


def graded(tree, advantage_L, *, scores=None, choices=(), **settings) -> GradedTree:
    """A tree with its scores (beta 5) and the advantages of its trajectories; settings as fields of the config."""
    scores = scores or score_tree(tree, beta=5)
    return GradedTree(tree, scores, np.asarray(advantage_L, dtype=float), CreditSettings(**settings), choices)


def test_metrics_of_a_tree_by_hand():
    """Those of "mixed, branched once", whose last leaf was sampled in a round."""
    worked = TREES["mixed, branched once"]
    tree = worked.tree
    tree.rounds[2] = 1
    found = token_advantages(graded(tree, trl_advantages(worked.success), ib_coef=0.1))
    metrics = TreeMetrics()
    metrics.add_tree(GrownTree(tree, score_tree(tree, beta=5), GrowthSettings()), found)
    logged = metrics.reduce(SimpleNamespace(reduce=lambda sums, reduction: sums, device="cpu"))
    global_terms = [0.28862, 1.15450, -0.57725, -0.57725, 0.28862, -0.57725]  # steps 1, 2; 3, 4; 1, 5
    expected = {
        "tree/effective_rate": 1,
        "tree/average_success": 1 / 3,
        "tree/initial_success": 1 / 2,
        "tree/generated_tokens": 5,
        "tree/trajectory_tokens": 6,
        "tree/depth": 2,
        "tree/branch_position": 1 / 2,  # one token of two
        "tree/selected_minus_fresh": 1,  # leaf 0 was right when step 1 was chosen, leaf 2 is wrong
        "tree/fresh_minus_fresh": NAN,
        "ib/score": (-1.44 - 0.24 - 1.08) / 3,
        "ib/covariance": (0.075 + 0.05) / 2,  # of the steps with two children
        "ib/confidence": (0.8 + 0.5 + 0.6 + 0.9 + 0.4) / 5,
        "advantages/global_std": np.std(global_terms),
        "advantages/local_std": 0.1 * np.std([0.24, 0.40, -0.72, -0.18, 0.24, -0.48]),
    }
    assert logged == pytest.approx(expected, abs=1e-5, nan_ok=True)


def by_step(tree, terms_L: list[np.ndarray]) -> np.ndarray:
    """One value per step from one array per trajectory; every trajectory through a step must agree on it."""
    values = np.full(len(tree.steps), NAN)
    for leaf, terms in zip(tree.leaves, terms_L, strict=True):
        for step, value in zip(tree.path(leaf), terms, strict=True):
            assert math.isnan(values[step]) or values[step] == value
            values[step] = value
    return values


@pytest.mark.parametrize("name", TREES)
def test_hand_worked_advantages(name):
    worked = TREES[name]
    tree = worked.tree
    scores = score_tree(tree, beta=worked.beta, confidence_kind=worked.confidence_kind)
    terms = ibtpo(graded(tree, trl_advantages(worked.success), scores=scores))
    global_N, local_N = by_step(tree, terms.global_terms), by_step(tree, terms.local_terms)
    for step in range(1, len(tree.steps)):
        assert global_N[step] == pytest.approx(worked.a_gl[step], abs=2e-5)
        assert local_N[step] == pytest.approx(0.1 * worked.a_ib[step], abs=2e-6)
        assert global_N[step] + local_N[step] == pytest.approx(worked.total[step], abs=2e-5)


def test_unscorable_trajectory_keeps_the_advantage_of_what_it_shares():
    # 0 -- 1 (.8) +- 2 (.5) right, +- 3 (.4) unscorable, branched;  0 -- 4 (.6) wrong
    tree = build([(0, [0.8, 0.5]), (1, [0.4]), (0, [0.6])], [1, NAN, 0])
    terms = ibtpo(graded(tree, [1.0, NAN, -1.0], ib_coef=0.0))
    # Step 1 has one scored leaf, of advantage 1; the unscorable trajectory passes through it and then through step 3.
    assert [list(values) for values in terms.global_terms] == [[1, 1], [1, 0], [-1]]


def test_global_and_local_terms_know_their_own_rewards():
    """A leaf may have an advantage (other reward functions spoke) and no known success, and the reverse."""
    tree = build([(0, [0.5]), (0, [0.5]), (0, [0.5])], [1, 0, NAN])
    terms = ibtpo(graded(tree, [NAN, -0.5, 0.25], ib_coef=1.0))
    # p(root) = 1/2: rho = 2 and 0, eta1 = .8 and -1.2, times .5
    assert [value[0] for value in terms.global_terms] == [0, -0.5, 0.25]
    np.testing.assert_allclose([value[0] for value in terms.local_terms], [0.4, -0.6, 0], atol=1e-12)


def test_ib_coef_scales_the_local_term_only():
    worked = TREES["branched twice"]
    tree, advantage_L = worked.tree, trl_advantages(worked.success)
    one, three = (ibtpo(graded(tree, advantage_L, ib_coef=ib_coef)) for ib_coef in (1.0, 3.0))
    for leaf in range(4):
        np.testing.assert_array_equal(one.global_terms[leaf], three.global_terms[leaf])
        np.testing.assert_allclose(3 * one.local_terms[leaf], three.local_terms[leaf])


def test_grpo_gives_every_step_the_advantage_of_its_trajectory():
    worked = TREES["an unscorable leaf"]
    terms = grpo(graded(worked.tree, [2.0, NAN, -1.0, 0.5]))
    # Steps a trajectory: 2, 2, 2 (one of them inherited) and 1.
    assert [list(values) for values in terms.global_terms] == [[2, 2], [0, 0], [-1, -1], [0.5]]
    assert [list(values) for values in terms.local_terms] == [[0, 0], [0, 0], [0, 0], [0]]


def test_one_step_trees_without_local_term_are_grpo():
    """With one level and `ib_coef = 0` every trajectory keeps its own advantage, whatever its number of steps."""
    tree = build([(0, [0.5, 0.9, 0.3]), (0, [0.25]), (0, [0.75, 0.5])], [1, 0, 0])
    one = graded(tree, [1.25, -0.75, -0.5], ib_coef=0.0)
    found, expected = ibtpo(one), grpo(one)
    for leaf in range(3):
        np.testing.assert_array_equal(found.global_terms[leaf], expected.global_terms[leaf])
        np.testing.assert_array_equal(found.local_terms[leaf], np.zeros(len(tree.path(tree.leaves[leaf]))))


def test_per_token_repeats_a_step_over_its_tokens():
    tree = build([(0, [(0.5, 0.5), (0.9, 0.9, 0.9)]), (1, [0.5, (0.25, 0.25)])])
    assert per_token(tree, 0, np.array([1.0, 2.0])).tolist() == [1, 1, 2, 2, 2]
    # The second trajectory inherits step 1 with its two tokens.
    assert per_token(tree, 1, np.array([1.0, 3.0, 4.0])).tolist() == [1, 1, 3, 4, 4]


# ----- weights of shared tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A tree, what the steps of each trajectory weigh, and what each step weighs in all (`sampled`)."""

    rollouts: list
    once: list[list[float]]
    sampled: list[float]  # the same at every step of a trajectory
    sampled_in_all: list[float]


WEIGHTS = {
    # 0 +- 1 +- 2          leaf 0: G = 4, two children at the question, three at step 1: 4 / (2 * 3)
    #   |    +- 4          leaf 2
    #   |    +- 5 -- 6     leaf 3
    #   +- 3               leaf 1: 4 / 2
    "a step branched twice": Weights(
        [(0, [0.5, 0.5]), (0, [0.5]), (1, [0.5]), (1, [0.5, 0.5])],
        once=[[1 / 3, 1], [1], [1 / 3, 1], [1 / 3, 1, 1]],
        sampled=[2 / 3, 2, 2 / 3, 2 / 3],
        sampled_in_all=[4, 2, 2 / 3, 2, 2 / 3, 2 / 3, 2 / 3],  # the initial rollouts weigh 2 each
    ),
    # 0 +- 1 +- 2          leaf 0: 5 / (2 * 2)
    #   |    +- 4 +- 5     leaf 2: 5 / (2 * 2 * 2)
    #   |         +- 6     leaf 3, a branch of a branch
    #   +- 3 -- 7          leaf 1: 5 / 2; step 3 is continued by its own rollout alone
    #   (no branch there)
    "a branch of a branch": Weights(
        [(0, [0.5, 0.5]), (1, [0.5, 0.5]), (3, [0.5]), (0, [0.5, 0.5])],
        once=[[1 / 3, 1], [1 / 3, 1 / 2, 1], [1 / 3, 1 / 2, 1], [1, 1]],
        sampled=[1, 1 / 2, 1 / 2, 2],
        sampled_in_all=[4, 2, 1, 1, 1 / 2, 1 / 2, 2, 2],
    ),
    # 0 +- 1, +- 2, +- 3   a branch from the question is one more initial rollout
    "branches at the question": Weights(
        [(0, [0.5]), (0, [0.5]), (0, [0.5])],
        once=[[1], [1], [1]],
        sampled=[1, 1, 1],
        sampled_in_all=[3, 1, 1, 1],
    ),
    # 0 -- 1 -- 2
    "a single leaf": Weights([(0, [0.5, 0.5])], once=[[1, 1]], sampled=[1], sampled_in_all=[1, 1, 1]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_hand_worked_weights(name):
    worked = WEIGHTS[name]
    tree = build(worked.rollouts)
    paths = [tree.path(leaf) for leaf in tree.leaves]
    assert [list(weights) for weights in step_weights(tree, "per_trajectory")] == [[1.0] * len(path) for path in paths]
    for found, expected in zip(step_weights(tree, "once"), worked.once, strict=True):
        np.testing.assert_allclose(found, expected)
    sampled = step_weights(tree, "sampled")
    for found, expected, path in zip(sampled, worked.sampled, paths, strict=True):
        np.testing.assert_allclose(found, [expected] * len(path))
    np.testing.assert_allclose(in_all(tree, sampled), worked.sampled_in_all)


def test_weights_where_the_loss_leaves_a_trajectory_out():
    """TRL masks truncated ones: what they share is trained once by the others."""
    # 0 +- 1 +- 2          leaf 0, masked
    #   |    +- 3 +- 4     leaf 1, a branch
    #   |         +- 6     leaf 3, a branch of a branch
    #   +- 5               leaf 2, masked
    tree = build([(0, [0.5, 0.5]), (1, [0.5, 0.5]), (0, [0.5]), (3, [0.5])])
    trained = np.array([False, True, False, True])
    in_loss = [
        [weights * kept for weights, kept in zip(step_weights(tree, kind, trained), trained, strict=True)]
        for kind in ("once", "first")
    ]
    for weights in in_loss:
        np.testing.assert_allclose(in_all(tree, weights)[1:], [1, 0, 1, 1, 0, 1])
    np.testing.assert_allclose(in_loss[0][1], [1 / 2, 1 / 2, 1])
    assert [list(each) for each in in_loss[1]] == [[0, 0], [1, 1, 1], [0], [0, 0, 1]]


def in_all(tree, weights: list[np.ndarray]) -> np.ndarray:
    """What each step weighs over all trajectories through it; all trajectories pass through the question."""
    total = np.zeros(len(tree))
    for leaf, values in zip(tree.leaves, weights, strict=True):
        total[tree.path(leaf)] += values
        total[0] += values[0]
    return total


@settings(max_examples=100, deadline=None, database=None)
@given(trees())
def test_sampled_weights_pass_from_a_step_to_its_children(drawn):
    """The definition, on any tree: a step weighs its parent's weight over the number of children, the question G."""
    tree, _ = drawn
    total = in_all(tree, step_weights(tree, "sampled"))
    assert total[0] == pytest.approx(len(tree.leaves))
    for step, each in enumerate(tree.steps):
        for child in each.children:
            assert total[child] == pytest.approx(total[step] / len(each.children))
    np.testing.assert_allclose(in_all(tree, step_weights(tree, "once"))[1:], 1)


def test_weights_multiply_what_the_loss_gets_and_nothing_that_is_logged():
    # 0 +- 1 (two tokens) +- 2 right
    #   |                 +- 4 (two tokens) wrong, branched
    #   +- 3 wrong
    tree = build([(0, [(0.5, 0.5), 0.5]), (0, [0.5]), (1, [(0.5, 0.5)])], [1, 0, 0])
    found = {
        kind: token_advantages(graded(tree, [2.0, -1.0, -1.0], ib_coef=0.0, shared_token_weight=kind))
        for kind in ("per_trajectory", "once", "sampled", "first")
    }
    # A_GL of step 1: (2 - 1) / 2. Sampled: G = 3, two children at the question and at step 1.
    weighted = {
        "per_trajectory": [[0.5, 0.5, 2], [-1], [0.5, 0.5, -1, -1]],
        "once": [[0.25, 0.25, 2], [-1], [0.25, 0.25, -1, -1]],
        "first": [[0.5, 0.5, 2], [-1], [0, 0, -1, -1]],  # the branch trains what it sampled itself
        "sampled": [[0.375, 0.375, 1.5], [-1.5], [0.375, 0.375, -0.75, -0.75]],
    }
    for kind, each in found.items():
        assert [list(values) for values in each.values] == weighted[kind]
    for terms in zip(*(each.global_terms for each in found.values()), strict=True):
        assert all(np.array_equal(terms[0], other) for other in terms)


# ----- properties ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, database=None)
@given(trees(success=st.sampled_from([0.0, 1.0])))
def test_global_term_is_the_gain_in_density(drawn):
    """A_GL(s) = (p(s) - p(root)) / std(R), with TRL's 1e-4 on the standard deviation."""
    tree, rewards = drawn
    if len(rewards) < 2:
        return  # GRPO compares at least two completions
    scores = score_tree(tree, beta=5)
    global_N = by_step(tree, ibtpo(graded(tree, trl_advantages(rewards))).global_terms)
    expected = (scores.density - scores.density[0]) / (np.std(rewards, ddof=1) + 1e-4)
    np.testing.assert_allclose(global_N[1:], expected[1:], atol=1e-9)


@settings(max_examples=100, deadline=None, database=None)
@given(trees(), st.sampled_from([0.0, 0.1, 1.0]))
def test_advantages_are_finite_and_cover_every_token(drawn, ib_coef):
    tree, success = drawn
    advantage_L = np.array(success) * 2 - 1
    terms = ibtpo(graded(tree, advantage_L, ib_coef=ib_coef))
    for leaf, values in enumerate(zip(terms.global_terms, terms.local_terms, strict=True)):
        values_T = per_token(tree, leaf, sum(values))
        assert np.isfinite(values_T).all() and len(values_T) == len(tree.trajectory(leaf)[0])
    total_N = by_step(tree, [sum(pair) for pair in zip(terms.global_terms, terms.local_terms, strict=True)])
    for step in range(1, len(tree.steps)):
        if all(math.isnan(success[leaf]) for leaf in leaves_under(tree, step)):
            assert total_N[step] == 0
