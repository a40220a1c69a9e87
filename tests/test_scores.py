"""Reward densities, IB-Scores and branching, against trees worked out by hand.

All trees of the table use beta = 5, so that 1 + 1/beta = 1.2 and (1 + beta)/n = 6/n, unless they say otherwise.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ibtpo.branching import confidence, ib, random, select_steps
from trl_ibtpo.scores import gain_ratio, score_tree, step_confidence
from trl_ibtpo.tree import RolloutTree

NAN = float("nan")


def graft(tree: RolloutTree, after: int, token_ids: list, logprobs: list, step_ends: list, round: int = 0) -> int:
    """Open a rollout and extend it by all its steps at once."""
    leaf = tree.open(after, round)
    tree.extend(leaf, token_ids, logprobs, step_ends)
    return leaf


def rewarded(tree: RolloutTree, rewards: list[float]) -> RolloutTree:
    """The tree, with a reward for each leaf."""
    for leaf, reward in enumerate(rewards):
        tree.add_reward(leaf, reward)
    return tree


def build(rollouts: list[tuple[int, list[float | tuple[float, ...]]]], rewards: list[float] = ()) -> RolloutTree:
    """A tree from `(step to continue, its new steps)`; a step is its token probabilities, or one for one token."""
    tree = RolloutTree([101, 102])
    for after, steps in rollouts:
        probabilities = [step if isinstance(step, tuple) else (step,) for step in steps]
        logprobs = [math.log(value) for step in probabilities for value in step]
        ends = np.cumsum([len(step) for step in probabilities]).tolist()
        graft(tree, after, list(range(len(logprobs))), logprobs, ends)
    return rewarded(tree, rewards)


@dataclass(frozen=True)
class Worked:
    """A tree and everything that follows from it; per-step dictionaries leave out what is undefined (NaN)."""

    rollouts: list
    success: list[float]
    density: dict[int, float]
    rho: dict[int, float]
    eta1: dict[int, float]
    eta2: dict[int, float]
    score: dict[int, float]
    covariance: dict[int, float]
    a_gl: dict[int, float]  # with TRL's (R - mean) / (std + 1e-4)
    a_ib: dict[int, float]
    total: dict[int, float]  # lambda = 0.1
    beta: float = 5.0
    confidence_kind: str = "geometric_mean"

    @property
    def tree(self) -> RolloutTree:
        return build(self.rollouts, self.success)


TREES = {
    # 0 +- 1 (.8) +- 2 (.5) right
    #   |         +- 5 (.4) wrong, branched
    #   +- 3 (.6) -- 4 (.9) wrong
    # std of (1, 0, 0) = sqrt(1/3) = 0.57735, so A_GL = (p - 1/3) / 0.57745.
    "mixed, branched once": Worked(
        rollouts=[(0, [0.8, 0.5]), (0, [0.6, 0.9]), (1, [0.4])],
        success=[1, 0, 0],
        density={0: 1 / 3, 1: 1 / 2, 2: 1, 3: 0, 4: 0, 5: 0},
        rho={1: 1.5, 2: 2, 3: 0, 4: 1, 5: 0},  # step 4: its parent has density 0
        eta1={1: 0.3, 2: 0.8, 3: -1.2, 4: -0.2, 5: -1.2},
        eta2={1: 0.8, 2: 0.5, 3: 0.6, 4: 0.9, 5: 0.4},
        # root: 3 (.3 * .8 - 1.2 * .6);  1: 3 (.8 * .5 - 1.2 * .4);  3: 6 (-.2 * .9)
        score={0: -1.44, 1: -0.24, 3: -1.08},
        # root: -.24 - (-.45)(.7);  1: -.04 - (-.2)(.45)
        covariance={0: 0.075, 1: 0.05, 3: 0},
        a_gl={1: 0.28862, 2: 1.15450, 3: -0.57725, 4: -0.57725, 5: -0.57725},
        a_ib={1: 0.24, 2: 0.40, 3: -0.72, 4: -0.18, 5: -0.48},
        total={1: 0.31262, 2: 1.19450, 3: -0.64925, 4: -0.59525, 5: -0.62525},
    ),
    # 0 +- 1 (.5) -- 2 (.8)
    #   +- 3 (.9) +- 4 (.6)
    #             +- 5 (.4)     p = 0 everywhere: rho := 1, eta1 = -.2, and the score is confidence alone.
    "all wrong": Worked(
        rollouts=[(0, [0.5, 0.8]), (0, [0.9, 0.6]), (3, [0.4])],
        success=[0, 0, 0],
        density=dict.fromkeys(range(6), 0),
        rho=dict.fromkeys(range(1, 6), 1),
        eta1=dict.fromkeys(range(1, 6), -0.2),
        eta2={1: 0.5, 2: 0.8, 3: 0.9, 4: 0.6, 5: 0.4},
        score={0: -0.84, 1: -0.96, 3: -0.60},  # 3 * -.2 * 1.4;  6 * -.2 * .8;  3 * -.2 * 1.0
        covariance={0: 0, 1: 0, 3: 0},
        a_gl=dict.fromkeys(range(1, 6), 0),
        a_ib={1: -0.10, 2: -0.16, 3: -0.18, 4: -0.12, 5: -0.08},
        total={1: -0.010, 2: -0.016, 3: -0.018, 4: -0.012, 5: -0.008},
    ),
    # The same tree, all right: p = 1 everywhere, rho = 1 again, so everything else is as above.
    "all right": Worked(
        rollouts=[(0, [0.5, 0.8]), (0, [0.9, 0.6]), (3, [0.4])],
        success=[1, 1, 1],
        density=dict.fromkeys(range(6), 1),
        rho=dict.fromkeys(range(1, 6), 1),
        eta1=dict.fromkeys(range(1, 6), -0.2),
        eta2={1: 0.5, 2: 0.8, 3: 0.9, 4: 0.6, 5: 0.4},
        score={0: -0.84, 1: -0.96, 3: -0.60},
        covariance={0: 0, 1: 0, 3: 0},
        a_gl=dict.fromkeys(range(1, 6), 0),
        a_ib={1: -0.10, 2: -0.16, 3: -0.18, 4: -0.12, 5: -0.08},
        total={1: -0.010, 2: -0.016, 3: -0.018, 4: -0.012, 5: -0.008},
    ),
    # 0 +- 1 (.5) right, +- 2 (.25) wrong, +- 3 (.75) right; std of (1, 0, 1) = sqrt(1/3).
    "a single step per rollout": Worked(
        rollouts=[(0, [0.5]), (0, [0.25]), (0, [0.75])],
        success=[1, 0, 1],
        density={0: 2 / 3, 1: 1, 2: 0, 3: 1},
        rho={1: 1.5, 2: 0, 3: 1.5},
        eta1={1: 0.3, 2: -1.2, 3: 0.3},
        eta2={1: 0.5, 2: 0.25, 3: 0.75},
        score={0: 0.15},  # 2 (.15 - .30 + .225)
        covariance={0: 0.125},  # .025 - (-.2)(.5)
        a_gl={1: 0.57725, 2: -1.15450, 3: 0.57725},
        a_ib={1: 0.150, 2: -0.300, 3: 0.225},
        total={1: 0.59225, 2: -1.18450, 3: 0.59975},
    ),
    # 0 +- 1 (.8) +- 2 (.5) right
    #   |         +- 5 (.4) wrong, branched
    #   +- 3 (.6) -- 4 (.9) unscorable: left out of every mean, no advantage of its own
    #   +- 6 (.7) wrong
    # mean and std of the three scored leaves (1, 0, 0): 1/3 and sqrt(1/3).
    "an unscorable leaf": Worked(
        rollouts=[(0, [0.8, 0.5]), (0, [0.6, 0.9]), (1, [0.4]), (0, [0.7])],
        success=[1, NAN, 0, 0],
        density={0: 1 / 3, 1: 1 / 2, 2: 1, 5: 0, 6: 0},
        rho={1: 1.5, 2: 2, 5: 0, 6: 0},
        eta1={1: 0.3, 2: 0.8, 5: -1.2, 6: -1.2},
        eta2={1: 0.8, 2: 0.5, 3: 0.6, 4: 0.9, 5: 0.4, 6: 0.7},
        # root: step 3 is not counted, 3 (.3 * .8 - 1.2 * .7);  3: no scored child, rho := 1, 6 (-.2 * .9)
        score={0: -1.80, 1: -0.24, 3: -1.08},
        # root: -.3 - (-.45)(.75)
        covariance={0: 0.0375, 1: 0.05, 3: 0},
        a_gl={1: 0.28862, 2: 1.15450, 3: 0, 4: 0, 5: -0.57725, 6: -0.57725},
        a_ib={1: 0.24, 2: 0.40, 3: 0, 4: 0, 5: -0.48, 6: -0.84},
        total={1: 0.31262, 2: 1.19450, 3: 0, 4: 0, 5: -0.62525, 6: -0.66125},
    ),
    # 0 +- 1 (.8) +- 2 (.5) right
    #   |         +- 4 (.25) right, branched
    #   |         +- 5 (.75) -- 6 (.9) wrong, branched
    #   +- 3 (.5) wrong
    # std of (1, 0, 1, 0) = sqrt(4 * .25 / 3) = 0.57735.
    "branched twice": Worked(
        rollouts=[(0, [0.8, 0.5]), (0, [0.5]), (1, [0.25]), (1, [0.75, 0.9])],
        success=[1, 0, 1, 0],
        density={0: 1 / 2, 1: 2 / 3, 2: 1, 3: 0, 4: 1, 5: 0, 6: 0},
        rho={1: 4 / 3, 2: 1.5, 3: 0, 4: 1.5, 5: 0, 6: 1},
        eta1={1: 2 / 15, 2: 0.3, 3: -1.2, 4: 0.3, 5: -1.2, 6: -0.2},
        eta2={1: 0.8, 2: 0.5, 3: 0.5, 4: 0.25, 5: 0.75, 6: 0.9},
        # root: 3 (.8 * 2/15 - .6);  1: 2 (.15 + .075 - .9);  5: 6 (-.2 * .9)
        score={0: -1.48, 1: -1.35, 5: -1.08},
        # root: -.74/3 - (-16/30)(.65);  1: -.225 - (-.2)(.5)
        covariance={0: 0.1, 1: -0.125, 5: 0},
        a_gl={1: 0.28862, 2: 0.86588, 3: -0.86588, 4: 0.86588, 5: -0.86588, 6: -0.86588},
        a_ib={1: 0.10667, 2: 0.150, 3: -0.600, 4: 0.075, 5: -0.900, 6: -0.180},
        total={1: 0.29929, 2: 0.88088, 3: -0.92588, 4: 0.87338, 5: -0.95588, 6: -0.88388},
    ),
    # 0 +- 1 (.5, .5) success .75
    #   +- 2 (.4)     success .25        beta = 1: 1 + 1/beta = 2, (1 + beta)/2 = 1
    # std of (.75, .25) = sqrt(.125) = 0.35355.
    "fractional success, geometric mean": Worked(
        rollouts=[(0, [(0.5, 0.5)]), (0, [0.4])],
        success=[0.75, 0.25],
        density={0: 0.5, 1: 0.75, 2: 0.25},
        rho={1: 1.5, 2: 0.5},
        eta1={1: -0.5, 2: -1.5},
        eta2={1: 0.5, 2: 0.4},
        score={0: -0.85},  # -.25 - .60
        covariance={0: 0.025},  # -.425 - (-1)(.45)
        a_gl={1: 0.70691, 2: -0.70691},
        a_ib={1: -0.25, 2: -0.60},
        total={1: 0.68191, 2: -0.76691},
        beta=1.0,
    ),
    # The same tree with the probability of the whole step: .25 instead of .5, and the covariance changes its sign.
    "fractional success, joint": Worked(
        rollouts=[(0, [(0.5, 0.5)]), (0, [0.4])],
        success=[0.75, 0.25],
        density={0: 0.5, 1: 0.75, 2: 0.25},
        rho={1: 1.5, 2: 0.5},
        eta1={1: -0.5, 2: -1.5},
        eta2={1: 0.25, 2: 0.4},
        score={0: -0.725},  # -.125 - .60
        covariance={0: -0.0375},  # -.3625 - (-1)(.325)
        a_gl={1: 0.70691, 2: -0.70691},
        a_ib={1: -0.125, 2: -0.60},
        total={1: 0.69441, 2: -0.76691},
        beta=1.0,
        confidence_kind="joint",
    ),
}


def as_array(values: dict[int, float], steps: int) -> np.ndarray:
    return np.array([values.get(step, NAN) for step in range(steps)], dtype=float)


@pytest.mark.parametrize("name", TREES)
def test_hand_worked_scores(name):
    worked = TREES[name]
    tree = worked.tree
    scores = score_tree(tree, beta=worked.beta, confidence_kind=worked.confidence_kind)
    for found, expected in (
        (scores.density, worked.density),
        (scores.gain_ratio, worked.rho),
        (scores.eta1, worked.eta1),
        (scores.confidence, worked.eta2),
        (scores.ib_score, worked.score),
        (scores.covariance, worked.covariance),
    ):
        np.testing.assert_allclose(found, as_array(expected, len(tree.steps)), rtol=0, atol=1e-9)


def test_mean_confidence_counts_unscorable_children_too():
    worked = TREES["an unscorable leaf"]
    scores = score_tree(worked.tree, beta=5)
    # root: (.8 + .6 + .7) / 3;  1: (.5 + .4) / 2;  3: .9
    expected = as_array({0: 0.7, 1: 0.45, 3: 0.9}, 7)
    np.testing.assert_allclose(scores.mean_confidence, expected, atol=1e-12)


def test_step_confidence_of_unequal_tokens():
    tree = build([(0, [(0.25, 1.0), (0.5, 0.5, 0.5)])])
    np.testing.assert_allclose(step_confidence(tree), [NAN, 0.5, 0.5], atol=1e-12)  # sqrt(.25 * 1)
    np.testing.assert_allclose(step_confidence(tree, "joint"), [NAN, 0.25, 0.125], atol=1e-12)


def test_step_confidence_leaves_out_unknown_logprobs():
    tree = build([(0, [(0.25, NAN, 0.25), (NAN, 0.5)])])
    np.testing.assert_allclose(step_confidence(tree), [NAN, 0.25, 0.5], atol=1e-12)
    np.testing.assert_allclose(step_confidence(tree, "joint"), [NAN, 0.0625, 0.5], atol=1e-12)


def test_gain_ratio_where_the_parent_has_no_success():
    # Step 1 has density 0, so rho := 1 for its scored child 2 and its unscored child 3 stays unknown.
    rho = gain_ratio(np.array([0.5, 0.0, 0.0, NAN]), np.array([-1, 0, 1, 1]))
    np.testing.assert_array_equal(rho, [NAN, 0.0, 1.0, NAN])


# ----- any tree ------------------------------------------------------------------------------------------------------


RIGHT_WRONG_UNKNOWN = st.sampled_from([0.0, 1.0, NAN])


@st.composite
def trees(draw, success=RIGHT_WRONG_UNKNOWN):
    """A tree whose later rollouts continue any earlier step with children, and the success of its leaves."""
    tree = RolloutTree([1])
    for _ in range(draw(st.integers(1, 6))):
        after = draw(st.sampled_from([index for index, step in enumerate(tree.steps) if step.children] or [0]))
        lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        logprobs = draw(st.lists(st.floats(-3, 0), min_size=sum(lengths), max_size=sum(lengths)))
        graft(tree, after, [7] * sum(lengths), logprobs, np.cumsum(lengths).tolist())
    rewards = draw(st.lists(success, min_size=len(tree.leaves), max_size=len(tree.leaves)))
    return rewarded(tree, rewards), rewards


def leaves_under(tree: RolloutTree, step: int) -> list[int]:
    return [number for number, leaf in enumerate(tree.leaves) if step in [0, *tree.path(leaf)]]


@settings(max_examples=150, deadline=None, database=None)
@given(trees(), st.sampled_from([0.5, 1.0, 5.0]))
def test_scores_follow_their_definitions(drawn, beta):
    """A recursive reading of the definitions, and score = (1 + beta) (Cov + E[eta1] E[eta2])."""
    tree, success = drawn
    scores = score_tree(tree, beta=beta)
    np.testing.assert_array_equal(tree.leaf_count(), [len(leaves_under(tree, i)) for i in range(len(tree.steps))])

    def density(step):
        known = [success[leaf] for leaf in leaves_under(tree, step) if not math.isnan(success[leaf])]
        return sum(known) / len(known) if known else NAN

    for index, step in enumerate(tree.steps):
        assert scores.density[index] == pytest.approx(density(index), nan_ok=True)
        if not step.children:
            assert math.isnan(scores.ib_score[index]) and math.isnan(scores.covariance[index])
            continue
        scored = [child for child in step.children if not math.isnan(density(child))]
        eta1, eta2 = [], []
        for child in scored or step.children:
            rho = density(child) / density(index) if scored and density(index) > 0 else 1.0
            eta1.append(rho - (1 + 1 / beta))
            eta2.append(math.exp(sum(tree.steps[child].logprobs) / len(tree.steps[child].logprobs)))
        n = len(eta1)
        expected = (1 + beta) / n * sum(first * second for first, second in zip(eta1, eta2, strict=True))
        assert scores.ib_score[index] == pytest.approx(expected)
        decomposed = (1 + beta) * (scores.covariance[index] + sum(eta1) / n * sum(eta2) / n)
        assert scores.ib_score[index] == pytest.approx(decomposed)


@settings(max_examples=100, deadline=None, database=None)
@given(trees(success=st.just(NAN)))
def test_confidence_ranks_as_ib_when_no_reward_is_known(drawn):
    tree, _ = drawn
    scores = score_tree(tree, beta=5)
    rng = np.random.default_rng(0)
    # (1 + beta)/beta = 1.2
    np.testing.assert_allclose(ib(tree, scores, rng), 1.2 * confidence(tree, scores, rng), atol=1e-12)


# ----- choosing steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "eligible", "count", "expected"),
    [
        ([0.1, 0.3, 0.2], [1, 1, 1], 1, [1]),
        ([0.1, 0.3, 0.2], [1, 1, 1], 2, [1, 2]),
        ([0.1, 0.3, 0.2], [1, 0, 1], 2, [2, 0]),  # the best one is not eligible
        ([0.2, 0.3, 0.3, 0.3], [1, 1, 1, 1], 2, [1, 2]),  # ties: the earlier one first
        ([-1.0, -1.0, -1.0], [0, 1, 1], 3, [1, 2, 1]),  # fewer eligible than asked for: again, in the same order
        ([0.5, 0.4], [0, 1], 3, [1, 1, 1]),
        ([0.1, NAN, 0.2], [1, 1, 1], 3, [2, 0, 1]),  # what has no score comes last
        ([NAN, NAN], [1, 1], 1, [0]),
    ],
)
def test_select_steps(priority, eligible, count, expected):
    assert select_steps(np.array(priority), np.array(eligible, dtype=bool), count) == expected


def test_strategies_prefer_what_they_say():
    worked = TREES["branched twice"]
    scores = score_tree(worked.tree, beta=5)
    rng = np.random.default_rng(0)
    inner = np.array([False, True, False, False, False, True, False])  # the steps with children, without the root
    assert select_steps(ib(worked.tree, scores, rng), inner, 1) == [5]  # -1.08 > -1.35
    assert select_steps(confidence(worked.tree, scores, rng), inner, 1) == [1]  # mean confidence .5 < .9
    drawn = {select_steps(random(worked.tree, scores, rng), inner, 1)[0] for _ in range(50)}
    assert drawn == {1, 5}


# ----- success from any reward ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "success"),
    [
        ([1.0, 0.0, 0.25], [1.0, 0.0, 0.25]),  # in [0, 1]: as they are
        ([0.25, 0.75, NAN], [0.25, 0.75, NAN]),
        ([-1.0, 1.5, 0.25], [0.0, 1.0, 0.5]),  # (r + 1) / 2.5
        ([0.5, 1.0, 3.0], [0.0, 0.2, 1.0]),  # (r - .5) / 2.5, also for the two that came before it
        ([2.0, NAN, 4.0], [0.0, NAN, 1.0]),
        ([7.0, 7.0, NAN], [0.5, 0.5, NAN]),  # all equal: no information
        ([-3.0], [0.5]),
    ],
)
def test_success_of_any_reward(rewards, success):
    tree = build([(0, [0.5])] * len(rewards), rewards)
    np.testing.assert_allclose(tree.success, success, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(tree.rewards, rewards)
    known = [value for value in success if not math.isnan(value)]
    assert tree.density()[0] == pytest.approx(sum(known) / len(known))


def test_rewards_outside_the_range_by_hand():
    """The shape of "mixed, branched once" with rewards (1.5, -1, -1), which are success (1, 0, 0): the same scores."""
    worked = TREES["mixed, branched once"]
    scores = score_tree(build(worked.rollouts, [1.5, -1.0, -1.0]), beta=5)
    np.testing.assert_allclose(scores.ib_score, as_array(worked.score, 6), rtol=0, atol=1e-9)
    np.testing.assert_allclose(scores.eta1, as_array(worked.eta1, 6), rtol=0, atol=1e-9)


def test_equal_rewards_outside_the_range_say_nothing():
    """rho = 1 everywhere, as where all are right."""
    worked = TREES["all right"]
    scores = score_tree(build(worked.rollouts, [-2.0, -2.0, -2.0]), beta=5)
    np.testing.assert_allclose(scores.gain_ratio, as_array(worked.rho, 6))
    np.testing.assert_allclose(scores.ib_score, as_array(worked.score, 6), rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None, database=None)
@given(trees(success=st.sampled_from([-0.1, 0.3, 0.7, 1.1, 2.5, NAN])))
def test_success_kept_per_step_is_that_of_its_leaves(drawn):
    """Whatever rescaling happened on the way, densities are those of the success that the tree ends with."""
    tree, rewards = drawn
    np.testing.assert_allclose(tree.density(), tree.leaf_mean(tree.success), rtol=0, atol=1e-12)
    known = np.array([reward for reward in rewards if not math.isnan(reward)])
    inside = ((known >= 0) & (known <= 1)).all()
    low, high = (0.0, 1.0) if inside or not len(known) else (known.min(), known.max())
    expected = (known - low) / (high - low) if high > low else np.full(len(known), 0.5)
    np.testing.assert_allclose([value for value in tree.success if not math.isnan(value)], expected, atol=1e-12)
