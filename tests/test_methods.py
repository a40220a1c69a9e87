"""Values, baselines and the advantage of every method, worked out by hand beside their formulas.

Rewards are given as GRPO's advantages with `scale_rewards="none"` and a mean of 0, so that a value is the papers' own
up to a constant. Trees are drawn as `step number: rollouts in the order of their leaves`.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages import by_step, graded
from test_scores import NAN, build, trees

from benchmarks import credit
from trl_ibtpo.advantages import ADVANTAGES, GradedTree, StepAdvantages, token_advantages, whiten
from trl_ibtpo.values import backup, leaf_mean, selection_bias, selection_differences, sibling_baseline

INF = math.inf


def fork():
    # 0 +- 1 +- 2            leaf 0:  3
    #   |    +- 4            leaf 2: -1
    #   |    +- 5 +- 6       leaf 3:  1
    #   |         +- 7       leaf 4: -3
    #   +- 3                 leaf 1:  0
    rollouts = [(0, [0.5, 0.5]), (0, [0.5]), (1, [0.5]), (1, [0.5, 0.5]), (5, [0.5])]
    return build(rollouts), np.array([3.0, 0.0, -1.0, 1.0, -3.0])


def methods(advantage: str, tree, advantage_L, **fields) -> tuple[list, list]:
    terms = ADVANTAGES[advantage](graded(tree, advantage_L, advantage=advantage, **fields))
    return terms.global_terms, terms.local_terms


def test_values_by_hand():
    tree, values = fork()
    #   step 5: (1 - 3) / 2;  step 1: of four leaves, or of three children (3, -1, -1);  0: of five, or of (1/3, 0)
    np.testing.assert_allclose(leaf_mean(tree, values), [0, 0, 3, 0, -1, -1, 1, -3])
    np.testing.assert_allclose(backup(tree, values), [1 / 6, 1 / 3, 3, 0, -1, -1, 1, -3])
    # Leaf 2 unscorable: step 4 has no value, and step 1 has the children 3 and -1.
    values[2] = NAN
    np.testing.assert_allclose(leaf_mean(tree, values), [1 / 4, 1 / 3, 3, 0, NAN, -1, 1, -3])
    np.testing.assert_allclose(backup(tree, values), [1 / 2, 1, 3, 0, NAN, -1, 1, -3])


def test_sibling_baseline_by_hand():
    tree, values = fork()
    # Leaves under the parent and not under the step, and those under the question:
    #   1, 3: those of the other (0; and 3, -1, 1, -3, mean 0)
    #   2: -1, 1, -3 (mean -1, m = 3);                    0, -1, 1, -3 (mean -3/4)
    #   4:  3, 1, -3 (mean 1/3, m = 3);                   3, 0, 1, -3 (mean 1/4)
    #   5:  3, -1 (mean 1, m = 2);                        3, 0, -1 (mean 2/3)
    #   6: -3 (m = 1); 3, -1, -3 (mean -1/3, m = 3);      3, 0, -1, -3 (mean -1/4)
    #   7:  1 (m = 1); 3, -1, 1 (mean 1, m = 3);          3, 0, -1, 1 (mean 3/4)
    nearest = [NAN, 0, -1, 0, 1 / 3, 1, -3, 1]
    question = [NAN, 0, -3 / 4, 0, 1 / 4, 2 / 3, -1 / 4, 3 / 4]
    np.testing.assert_allclose(sibling_baseline(tree, values, 0), nearest)
    np.testing.assert_allclose(sibling_baseline(tree, values, INF), question)
    # kappa = 1:  2: (3 * -1 - 3/4) / 4;  4: (3 * 1/3 + 1/4) / 4;  5: (2 * 1 + 2/3) / 3
    #   6: at step 1 (3 * -1/3 - 1/4) / 4 = -5/16, at step 5 (-3 - 5/16) / 2
    #   7: at step 1 (3 * 1 + 3/4) / 4 = 15/16, at step 5 (1 + 15/16) / 2
    one = [NAN, 0, -15 / 16, 0, 5 / 16, 8 / 9, -53 / 32, 31 / 32]
    np.testing.assert_allclose(sibling_baseline(tree, values, 1), one)
    # A single leaf has nothing to be compared with; nor has one whose only other leaf is unscorable.
    assert np.isnan(sibling_baseline(build([(0, [0.5, 0.5])]), np.array([1.0]), 1)).all()
    flat = build([(0, [0.5]), (0, [0.5, 0.5])])
    np.testing.assert_array_equal(sibling_baseline(flat, np.array([1.0, NAN]), 0), [NAN, NAN, 1, 1])


def test_treerl_by_hand():
    tree, values = fork()
    # |L|: 4, 1, 1, 1, 2, 1, 1; V - V(root) and V - V(parent), each over the square root of |L|
    terms = [by_step(tree, each) for each in methods("treerl", tree, values)]
    np.testing.assert_allclose(terms[0][1:], [0, 3, 0, -1, -1 / 2**0.5, 1, -3])
    np.testing.assert_allclose(terms[1][1:], [0, 3, 0, -1, -1 / 2**0.5, 2, -2])
    # With backed-up values V(root) = 1/6: step 1 gains 1/6 over it in both senses, over the root of 4 leaves.
    terms = [by_step(tree, each) for each in methods("treerl", tree, values, value_estimate="backup")]
    assert terms[0][1] == pytest.approx(1 / 12) and terms[1][1] == pytest.approx(1 / 12)


def test_treepo_by_hand():
    tree, values = fork()
    # Groups of each leaf, their sizes and means: all (5, 0), step 1 (4, 0), step 5 (2, -1); those of one are left out.
    #   leaf 0: 3 - (0 + 0) / 2;  1: 0;  2: -1;  3: 1 - (0 + 0 - 1) / 3;  4: -3 - (0 + 0 - 1) / 3
    plain = [3, 0, -1, 4 / 3, -8 / 3]
    #   by size: 3: 1 - (5 * 0 + 4 * 0 + 2 * -1) / 11;  4: -3 + 2/11
    by_size = [3, 0, -1, 13 / 11, -31 / 11]
    for advantage, expected in (("treepo", plain), ("treepo_size_weighted", by_size)):
        terms, _ = methods(advantage, tree, values)
        for found, value, leaf in zip(terms, expected, tree.leaves, strict=True):
            np.testing.assert_allclose(found, [value] * len(tree.path(leaf)))
    # Leaf 3 unscorable: step 5 is a group of one, and the others' mean is -1/4 for all four, -1/3 under step 1.
    values[3] = NAN
    terms, _ = methods("treepo", tree, values)
    np.testing.assert_allclose([each[0] for each in terms], [3 + 7 / 24, 1 / 4, -1 + 7 / 24, 0, -3 + 7 / 24])


def test_whitening_by_hand():
    # Tokens 1, 1 and -2, 0: mean 0, variance (1 + 1 + 4 + 0) / 4; the last column is not trained.
    values, mask = np.array([[1.0, 1.0, 9.0], [-2.0, 0.0, 9.0]]), np.array([[1, 1, 0], [1, 1, 0]]) > 0
    scale = 1.5**0.5 + 1e-4
    np.testing.assert_allclose(whiten(values, mask), [[1 / scale, 1 / scale, 0], [-2 / scale, 0, 0]])
    # Two processes that hold a row each get the same.
    parts = [np.array([row[:2].size, row[:2].sum(), (row[:2] ** 2).sum()]) for row in values]
    for row in range(2):
        found = whiten(values[[row]], mask[[row]], lambda sums: sum(parts))
        np.testing.assert_allclose(found, whiten(values, mask)[[row]])
    assert not whiten(np.full((2, 3), 0.7), mask).any()  # all alike
    assert not whiten(values, mask & False).any()  # nothing is trained


def test_tree_grpo_by_hand():
    tree, values = fork()
    # The own tree of leaves 0, 2, 3, 4 is under step 1: mean 0, std (9 + 1 + 1 + 9) / 3. Leaf 1 is alone in its tree.
    std = (20 / 3) ** 0.5 + 1e-4
    terms = methods("tree_grpo", tree, values)
    assert [list(each) for each in terms[0]] == [
        [value] * len(tree.path(leaf)) for value, leaf in zip(values, tree.leaves, strict=True)
    ]
    np.testing.assert_allclose([each[-1] for each in terms[1]], [3 / std, 0, -1 / std, 1 / std, -3 / std])
    values[[0, 3, 4]] = NAN  # leaf 2 is the only scorable one of its tree
    assert [each[0] for each in methods("tree_grpo", tree, values)[1]] == [0, 0, 0, 0, 0]


def test_segment_value_by_hand():
    tree, values = fork()
    # V(child) - V(parent) with backed-up values; an only child would gain nothing.
    found = by_step(tree, methods("segment_value", tree, values, value_estimate="backup")[0])
    np.testing.assert_allclose(found[1:], [1 / 6, 8 / 3, -1 / 6, -4 / 3, -4 / 3, 2, -2])
    chain = build([(0, [0.5, 0.5, 0.5]), (0, [0.5])])
    assert [list(each) for each in methods("segment_value", chain, [1.0, -1.0])[0]] == [[1, 0, 0], [-1]]


def test_sibling_by_hand():
    tree, values = fork()
    found = by_step(tree, methods("sibling", tree, values, sibling_kappa=1.0)[0])
    # V - b with the baselines above
    np.testing.assert_allclose(found[1:], [0, 63 / 16, 0, -21 / 16, -17 / 9, 85 / 32, -127 / 32])


def test_a_fork_inside_a_step_is_two_steps():
    """Where a rollout is continued from within a step, the shared part and the rest have advantages of their own."""
    # 0 +- 1 (a step's first part, two tokens) +- 2 (its rest) -- 3     leaf 0: 1
    #   |                                      +- 5                    leaf 2: -1, branched inside the step
    #   +- 4                                                           leaf 1: 0
    tree = build([(0, [(0.5, 0.5), 0.5, 0.5]), (0, [0.5]), (1, [(0.5, 0.5)])])
    found = token_advantages(graded(tree, [1.0, 0.0, -1.0], advantage="sibling", sibling_kappa=0.0))
    # Steps 2 and 3 are compared with leaf 2, step 1 with leaf 1 and leaf 1 with the two under step 1.
    assert [list(each) for each in found.advantages] == [[0, 0, 2, 2], [0], [0, 0, -2, -2]]


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_single_leaf_and_equal_rewards_get_nothing(advantage):
    """Nothing to compare with, nothing to learn."""
    single, (tree, _) = build([(0, [0.5, 0.5])], [1]), fork()
    for each, advantage_L in ((single, [0.0]), (single, [NAN]), (tree, np.zeros(5)), (tree, np.full(5, NAN))):
        for estimate in ("leaf_mean", "backup"):
            one = graded(each, advantage_L, advantage=advantage, ib_coef=0.0, value_estimate=estimate)
            assert all(not values.any() for values in token_advantages(one).values)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 16.0, INF])
def test_infinite_kappa_is_leave_one_out(kappa):
    """RLOO: `R_i - mean of the others`. For independent completions at any kappa, in trees at infinite kappa."""
    rewards = np.array([3.0, -2.0, 0.5, -1.5])
    flat = build([(0, [0.5, 0.5]), (0, [0.5]), (0, [0.5]), (0, [0.5, 0.5, 0.5])])
    expected = [reward - np.delete(rewards, leaf).mean() for leaf, reward in enumerate(rewards)]
    found, _ = methods("sibling", flat, rewards, sibling_kappa=kappa)
    np.testing.assert_allclose([each[-1] for each in found], expected, atol=1e-12)
    tree, rewards = fork()
    expected = [reward - np.delete(rewards, leaf).mean() for leaf, reward in enumerate(rewards)]
    found, _ = methods("sibling", tree, rewards, sibling_kappa=kappa)
    equal = np.allclose([each[-1] for each in found], expected, atol=1e-12)
    assert equal == (kappa == INF)


@settings(max_examples=60, deadline=None, database=None)
@given(trees(), st.sampled_from([0.0, 1.0, 7.0, INF]))
def test_the_baseline_on_any_tree(drawn, kappa):
    """Against the definition, with sets of leaves; and what is under a step has no part in its baseline."""
    tree, success = drawn
    values = np.array(success, dtype=float)
    under = [
        {leaf for leaf, end in enumerate(tree.leaves) if step == 0 or step in tree.path(end)}
        for step in range(len(tree))
    ]
    found = sibling_baseline(tree, values, kappa)

    def baseline(step: int) -> float:
        sets, ancestor = [], step
        while ancestor:
            ancestor = tree.steps[ancestor].parent
            others = {leaf for leaf in under[ancestor] - under[step] if not math.isnan(values[leaf])}
            if others and others not in sets:
                sets.append(others)
        means = [np.mean([values[leaf] for leaf in others]) for others in sets]
        result = means.pop() if sets else NAN  # of the question's
        for others, mean in list(zip(sets, means, strict=False))[::-1]:
            result = result if kappa == INF else (len(others) * mean + kappa * result) / (len(others) + kappa)
        return result

    for step in range(1, len(tree)):
        assert found[step] == pytest.approx(baseline(step), nan_ok=True)
        changed = values.copy()
        changed[list(under[step])] += 5
        assert sibling_baseline(tree, changed, kappa)[step] == pytest.approx(found[step], nan_ok=True)


def choice(round, steps, candidates, priorities):
    return SimpleNamespace(round=round, steps=steps, candidates=candidates, priorities=priorities)


def test_selection_correction_by_hand():
    # 0 +- 1 +- 2        leaf 0: 1
    #   |    +- 7        leaf 3: 0, branched in round 1
    #   +- 3 -- 4        leaf 1: 0
    #   +- 5 -- 6        leaf 2: -1
    tree = build([(0, [0.5, 0.5]), (0, [0.5, 0.5]), (0, [0.5, 0.5]), (1, [0.5])])
    tree.rounds[3] = 1
    values = np.array([1.0, 0.0, -1.0, 0.0])
    # Candidates 1, 3, 5 with scores 4, 1, 1 (mean 2) and values 1, 0, -1 then:
    # Cov = (2 * 1 - 1 * 0 - 1 * -1) / 3 = 1;  Var = (4 + 1 + 1) / 3 = 2;  luck of step 1: 1/2 * (4 - 2) = 1.
    # Half of what is under step 1 was there when it was chosen.
    chosen = [choice(1, [1], [1, 3, 5], [4.0, 1.0, 1.0])]
    for kind in ("leaf_mean", "backup"):
        np.testing.assert_allclose(selection_bias(tree, values, kind, chosen), [0, 0.5, 0, 0, 0, 0, 0, 0])
    corrected = graded(tree, values, advantage="segment_value", selection_correction=True, choices=chosen)
    assert corrected.value_N[1] == pytest.approx(0.5 - 0.5) and corrected.value_N[2] == 1
    # Nothing is learned from one candidate, from equal scores, or from a score that says nothing.
    for candidates, priorities in (([1], [4.0]), ([1, 3, 5], [1.0, 1.0, 1.0]), ([1, 3, 5], [NAN, 1.0, 1.0])):
        assert not selection_bias(tree, values, "leaf_mean", [choice(1, [1], candidates, priorities)]).any()


@pytest.mark.parametrize("advantage", ["segment_value", "treerl"])
def test_an_only_child_gets_nothing_from_the_correction(advantage):
    # 0 +- 1 -- 2 +- 3     leaf 0: 1
    #   |         +- 7     leaf 2: 0, branched in round 1
    #   +- 4 -- 5 -- 6     leaf 1: 0
    tree = build([(0, [0.5, 0.5, 0.5]), (0, [0.5, 0.5, 0.5]), (2, [0.5])])
    tree.rounds[2] = 1
    values = np.array([2 / 3, -1 / 3, -1 / 3])
    chosen = [choice(1, [2], [2, 1, 5, 4], [1.0, 0.9, 0.2, 0.1])]
    bias = selection_bias(tree, values, "leaf_mean", chosen)
    assert bias[2] == bias[1] > 0 and not bias[[0, 3, 4, 5, 6, 7]].any()
    settings = {"advantage": advantage, "selection_correction": True, "choices": chosen}
    assert graded(tree, values, **settings).gain_over_parent_N[2] == 0
    # An unscorable leaf beside it changes no value.
    longer = build([(0, [0.5, 0.5, 0.5]), (0, [0.5, 0.5, 0.5]), (2, [0.5]), (1, [0.5])])
    longer.rounds[2:] = [1, 2]
    assert graded(longer, [*values, NAN], **settings).gain_over_parent_N[2] == 0
    # The same below one rollout, where the question has those leaves too.
    tree = build([(0, [0.5, 0.5]), (1, [0.5])])
    tree.rounds[1] = 1
    chosen = [choice(1, [1], [1, 2], [1.0, 0.5])]
    corrected = graded(tree, np.array([0.5, -0.5]), **{**settings, "choices": chosen})
    assert corrected.gain_N[1] == corrected.gain_over_parent_N[1] == 0


def test_selection_differences_by_hand():
    # 0 +- 1 +- 2          leaf 0: 1
    #   |    +- 5          leaf 2: 0, round 1
    #   |    +- 6 +- 7     leaf 3: 1, round 1
    #   |         +- 8     leaf 4: unknown, round 2
    #   |         +- 9     leaf 5: 0, round 2
    #   +- 3 -- 4          leaf 1: 0
    #   +- 10              leaf 6: 1, round 3, at the question
    rollouts = [(0, [0.5, 0.5]), (0, [0.5, 0.5]), (1, [0.5]), (1, [0.5, 0.5]), (6, [0.5]), (6, [0.5]), (0, [0.5])]
    tree = build(rollouts, [1, 0, 0, 1, NAN, 0, 1])
    tree.rounds[:] = [0, 0, 1, 1, 2, 2, 3]
    # Round 1 chose step 1 with leaf 0: 1 - mean(0, 1), and 0 - 1 between the two.
    # Round 2 chose step 6 with leaf 3: 1 - 0.
    assert selection_differences(tree) == ([0.5, 1.0], [-1.0])
    assert selection_differences(build([(0, [0.5]), (0, [0.5])], [1, 0])) == ([], [])


# ----- against a known gradient --------------------------------------------------------------------------------------


def test_what_is_unbiased_on_a_policy_with_a_known_gradient():
    """Where nothing sampled after a step decides whether it is branched, and the more uncertain steps are.

    With `sampled` weights, rewards alone and every sibling baseline on backed-up values give the policy gradient
    within two standard errors, in length and in direction; with the other weights, the same rewards point elsewhere.
    """
    policy = credit.Policy(depth=4, choices=2)
    exact = [
        credit.Method("grpo", "sampled", baseline=False),
        *(credit.Method("sibling", "sampled", "backup", kappa) for kappa in (0.0, 1.0, 16.0, INF)),
    ]
    biased = [credit.Method("grpo", weight, baseline=False) for weight in ("per_trajectory", "once")]
    blocks = credit.measure(policy, "level", [*exact, *biased], trees=600, progress=False)
    for number in range(len(exact)):
        found = credit.summarize(policy.gradient(), blocks, number)
        assert abs(found["scale"] - 1) < 2 * found["scale_se"], (exact[number], found)
        assert abs(found["astray"]) < 2 * found["astray_se"], (exact[number], found)
    for number in range(len(exact), len(exact) + len(biased)):
        found = credit.summarize(policy.gradient(), blocks, number)
        assert found["astray"] > 5 * found["astray_se"] and found["astray"] > 0.3, (biased, found)


# ----- a function of one's own -------------------------------------------------------------------------------------


def test_a_function_of_ones_own():
    tree, values = fork()
    by_trajectory = token_advantages(graded(tree, values), lambda graded: graded.advantage_L * 2)
    assert [each[0] for each in by_trajectory.advantages] == [6, 0, -2, 2, -6]
    by_step_ = token_advantages(
        graded(tree, values, shared_token_weight="once"), lambda graded: np.arange(len(graded.tree))
    )
    assert [list(each) for each in by_step_.values] == [
        [1 / 4, 2],
        [3],
        [1 / 4, 4],
        [1 / 4, 5 / 2, 6],
        [1 / 4, 5 / 2, 7],
    ]

    def two_terms(graded: GradedTree) -> StepAdvantages:
        return StepAdvantages.of(graded.tree, graded.gain_N, graded.gain_over_parent_N)

    assert token_advantages(graded(tree, values), two_terms).advantages[3][-1] == 1 + 2


@pytest.mark.parametrize(
    "function, message",
    [
        (
            lambda graded: np.zeros(3),
            r"'<lambda>' returned ndarray of shape \(3,\) for a tree of 8 steps.*\(8,\).*\(5,\)",
        ),
        (lambda graded: None, r"returned NoneType of shape \(\)"),
        (lambda graded: ["a"] * 5, "returned list of shape"),
        (lambda graded: graded.value_N * NAN, "a number that is not finite.*np.nan_to_num"),
        (
            lambda graded: StepAdvantages([np.zeros(2)] * 5, [np.zeros(3)] * 5),
            r"returned `global_terms` of shapes \[\(2,\), .*5 trajectories of this tree have \[\(2,\), \(1,\)",
        ),
    ],
)
def test_what_a_function_must_return(function, message):
    with pytest.raises(ValueError, match=message):
        token_advantages(graded(*fork()), function)
