"""A budget that goes where it teaches: leaves per question vary, rows per batch do not; statistics are the groups'."""

import math
import random
from dataclasses import replace

import pytest
import test_growth
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ibtpo.budget import LeafBudget, all_right, contrast, gain
from trl_ibtpo.growth import GrowthSettings, TreeGrower, drive, leaf_budget

NAN = math.nan

# ----- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("success", "expected"),
    [
        ([], 0),
        ([NAN, 1.0], 0),
        ([1.0, 1.0, 1.0], 0),
        ([0.0, 1.0, 1.0, 1.0], 1),
        ([0.0, 1.0, NAN, 1.0, 0.0, 1.0], 2),  # two wrong ones; the unknown one says nothing
        ([0.2, 0.3, 0.4, 0.5], 2),  # 0.4 and 0.5 are better than 0.2 and 0.3
        ([0.5, 0.5, 0.5, 0.9], 1),
    ],
)
def test_contrast(success, expected):
    assert contrast(success) == expected


def test_gain_by_hand():
    # (contrast + 1) / (n + 2) * (n - right + 1) / (n + 2)
    assert gain([0.0] * 4, 4) == pytest.approx(1 / 6 * 5 / 6)
    assert gain([0.0] * 12, 12) == pytest.approx(1 / 14 * 13 / 14)  # the longer it is all wrong, the less
    assert gain([1.0] * 4, 4) == pytest.approx(1 / 6 * 1 / 6)  # all right: little left to learn
    assert gain([1.0, 0.0, 0.0, 0.0], 4) == pytest.approx(2 / 6 * 4 / 6)
    assert gain([0.0] * 4, 8) == pytest.approx(1 / 10 * 5 / 6)  # four more on their way
    assert gain([0.0, NAN], 2) == pytest.approx(1 / 4 * 3 / 4)  # unknown is not right
    assert all_right([1.0, NAN]) and not all_right([NAN]) and not all_right([1.0, 0.5]) and not all_right([])


class Question:
    """What the budget sees of a tree."""

    def __init__(self, success, share=12, done=True):
        self.success, self.done, self.limit, self.must = success, done, len(success) if done else share, False

    def grant(self, leaves, to_the_last=False):
        self.limit, self.must = self.limit + leaves, to_the_last


def share_out(questions, total, wanted=1, **options):
    budget = LeafBudget(total, wanted, portion=4, **options)
    return budget.share_out(questions), [question.limit for question in questions]


def test_who_gets_what_was_given_back():
    right, wrong, both = [1.0] * 4, [0.0] * 12, [0.0, 1.0, 0.0, 0.0]
    # While another grows, a portion for each that lacks a right answer, the likelier first; solved ones wait.
    questions = [Question(right), Question(wrong), Question(wrong[:8]), Question(both), Question(wrong, done=False)]
    assert share_out(questions, 60) == ([2, 1], [4, 16, 12, 4, 12])
    assert share_out(questions, 48) == ([], [4, 16, 12, 4, 12])  # nothing left
    # Where the order must not matter, only once nobody grows.
    assert share_out(questions, 60, in_order=True) == ([], [4, 16, 12, 4, 12])
    # When nobody grows, all of it, leaf by leaf: 1/6 / (n + 2) of the solved one is above 13/14 / (n + 2) of the other
    # with 4 leaves against 32, and with 5 against 37.
    questions = [Question(right), Question(wrong), Question(both)]
    assert share_out(questions, 50) == ([0, 1], [6, 40, 4])
    # Nobody lacks anything: evenly, and whether they need it or not.
    questions = [Question(both), Question([0.0, 1.0] * 4), Question(both)]
    assert share_out(questions, 36, unit=2) == ([0, 1, 2], [12, 12, 12])
    assert all(question.must for question in questions)


# ----- growth --------------------------------------------------------------------------------------------------------


def grow(growth: GrowthSettings, success_of, questions=5, order=0, in_order=False) -> list[TreeGrower]:
    growers = [TreeGrower([900 + i], growth, test_growth.Splitter(), (0, i), clock="tokens") for i in range(questions)]
    engine = test_growth.Engine(order)
    scorer = test_growth.Scorer(engine, order + 1, success_of)
    drive(growers, engine, scorer, budget=leaf_budget(growth, questions, in_order))
    assert all(grower.done for grower in growers) and not engine.in_flight and not scorer.pending
    return growers


def sizes(growers) -> list[int]:
    return [len(grower.tree.leaves) for grower in growers]


SHAPES = st.builds(
    GrowthSettings,
    tree_initial_rollouts=st.integers(2, 4),
    tree_levels=st.integers(2, 4),
    tree_nodes_per_level=st.integers(1, 2),
    tree_branches_per_node=st.integers(1, 2),
    branching=st.sampled_from(["ib", "confidence", "random", "independent"]),
    branch_lookahead=st.sampled_from([0, 0, 2]),
    max_completion_length=st.just(30),
    adaptive_budget=st.integers(1, 3),
)


@given(SHAPES, st.integers(1, 6), st.lists(st.sampled_from([0.0, 0.2, 1.0, NAN]), min_size=1), st.booleans())
@settings(deadline=None, max_examples=60)
def test_rows_are_exactly_filled_whatever_the_outcomes(growth, questions, outcomes, in_order):
    def success_of(completion_ids):
        return random.Random(repr(completion_ids)).choice(outcomes)

    growers = grow(growth, success_of, questions, in_order=in_order)
    assert sum(sizes(growers)) == questions * growth.leaves
    for grower in growers:
        beyond = len(grower.tree.leaves) - growth.tree_initial_rollouts
        assert beyond >= 0
        assert beyond % growth.branches_per_round == 0 or growth.branching == "independent"
        assert len(grower.tree.rewards) == len(grower.tree.leaves)
    if in_order:  # then nothing depends on who was first
        other = grow(growth, success_of, questions, order=7, in_order=True)
        assert [grower.tree.steps for grower in other] == [grower.tree.steps for grower in growers]


@pytest.mark.parametrize("branching", ["ib", "independent"])
@pytest.mark.parametrize("pattern", ["right", "wrong", "both", "late"])
@pytest.mark.parametrize("in_order", [True, False])
def test_equally_hard_questions_change_nothing_but_the_order(branching, pattern, in_order):
    """The same outcomes for every question: every tree is the one that it is with a fixed budget."""
    fixed = GrowthSettings(branching=branching, max_completion_length=40)

    class SameForAll(test_growth.Scorer):
        def submit(self, leaves):
            of_leaf = {"right": lambda leaf: 1.0, "wrong": lambda leaf: 0.0, "both": lambda leaf: float(leaf % 2)}
            success = of_leaf.get(pattern, lambda leaf: float(leaf == 9))
            self.pending += [(tree, leaf, success(leaf)) for tree, leaf, _ in leaves]

    grown = []
    for growth in (fixed, replace(fixed, adaptive_budget=1)):
        growers = [TreeGrower([900 + i], growth, test_growth.Splitter(), (0, i)) for i in range(5)]
        engine = test_growth.Engine(3)
        drive(growers, engine, SameForAll(engine, 1), budget=leaf_budget(growth, 5, in_order))
        grown.append([grower.tree.steps for grower in growers])
    assert grown[0] == grown[1]


def test_leaves_go_from_the_solved_question_to_the_hard_one():
    hard, solved, mixed = range(3)
    for branching in ("ib", "independent"):
        growth = GrowthSettings(branching=branching, max_completion_length=40, adaptive_budget=2)
        growers = [TreeGrower([900 + i], growth, test_growth.Splitter(), (0, i)) for i in range(3)]
        engine = test_growth.Engine(0)

        class ByQuestion(test_growth.Scorer):
            def submit(self, leaves):
                found = {hard: lambda leaf: 0.0, solved: lambda leaf: 1.0, mixed: lambda leaf: float(leaf < 2)}
                self.pending += [(tree, leaf, found[tree](leaf)) for tree, leaf, _ in leaves]

        drive(growers, engine, ByQuestion(engine), budget=leaf_budget(growth, 3))
        assert sizes(growers) == [28, 4, 4]
