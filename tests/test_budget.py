"""A budget that goes where it teaches: leaves per question vary, rows per batch do not; statistics are the groups'."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_growth
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.budget import LeafBudget, all_right, contrast, gain
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive, leaf_budget
from trl_ibtpo.training.group_statistics import group_advantages
from trl_ibtpo.tree_grower import TreeGrower

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


def test_what_cannot_be_scored_lacks_no_outcome():
    """Its answers would not be scored either, however many there are."""
    unscored, wrong = [NAN] * 4, [0.0] * 4
    assert share_out([Question(unscored), Question(wrong), Question(wrong, done=False)], 36) == ([1], [4, 8, 12])
    assert share_out([Question(unscored), Question(wrong)], 24) == ([1], [4, 20])
    assert share_out([Question(unscored), Question([NAN] * 8)], 24) == ([0, 1], [12, 12])  # nobody else needs them


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


def test_leaves_go_from_the_question_that_has_both_outcomes_to_the_hard_one():
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
        assert sizes(growers) == [20, 12, 4]  # the solved one keeps its share


# ----- statistics ----------------------------------------------------------------------------------------------------


def by_definition(rewards_BF, sizes, weights_F, scale_rewards="group", aggregation="sum_then_normalize"):
    """GRPO's advantages and whether the deviation is zero, row by row, in float64."""

    def deviation(values):
        known = [value for value in values if not math.isnan(value)]
        return float(np.std(known, ddof=1)) if len(known) > 1 else NAN

    def mean(values):
        return float(np.mean([value for value in values if not math.isnan(value)] or [NAN]))

    def total(row, rewards):
        if all(math.isnan(reward) for reward in rewards):
            return NAN
        return sum(weight * value for weight, value in zip(weights_F, row, strict=True) if not math.isnan(value))

    ends = np.cumsum(sizes)
    groups = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    rewards = [total(row, row) for row in rewards_BF]
    advantages, deviations = [], []
    for rows in groups:
        if aggregation == "sum_then_normalize":
            group = [rewards[row] for row in rows]
            std = deviation(rewards if scale_rewards == "batch" else group)
            divisor = 1 if scale_rewards == "none" else std + 1e-4
            advantages += [(reward - mean(group)) / divisor for reward in group]
            deviations += [std] * len(group)
        else:
            columns = [[rewards_BF[row][k] for row in rows] for k in range(len(weights_F))]
            scaled = [[(value - mean(column)) / (deviation(column) + 1e-4) for value in column] for column in columns]
            advantages += [total(values, rewards_BF[row]) for row, *values in zip(rows, *scaled, strict=True)]
    if aggregation == "normalize_then_sum":
        std = deviation(advantages)
        advantages, deviations = [(each - mean(advantages)) / (std + 1e-4) for each in advantages], [std] * ends[-1]
    return np.nan_to_num(advantages), np.isclose(deviations, 0, atol=1e-8)


WAYS = [
    ("group", "sum_then_normalize"),
    ("batch", "sum_then_normalize"),
    ("none", "sum_then_normalize"),
    ("group", "normalize_then_sum"),
]


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_uneven_groups_against_the_definition(way):
    rng = np.random.default_rng(0)
    sizes = [2, 7, 3, 1, 12, 4]
    rewards = rng.integers(0, 3, (sum(sizes), 2)) / 2.0
    rewards[rng.random(rewards.shape) < 0.2] = NAN
    rewards[9:12] = 1.0  # a group without variance
    rewards[13:15] = NAN  # unscorable rows
    scale, aggregation = way
    options = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
    weights = torch.tensor([1.0, 0.5])
    advantages, is_zero = group_advantages(torch.tensor(rewards), sizes, weights, **options)
    expected, expected_zero = by_definition(rewards.tolist(), sizes, weights.tolist(), *way)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-6)
    assert is_zero.tolist() == expected_zero.tolist() and is_zero.any() == (way in (WAYS[0], WAYS[2]))


def odd_or_nothing(completions, **kwargs):
    lengths = [len(tiny.text_of(completion)) for completion in completions]
    return [None if length % 3 == 0 else float(length % 2) for length in lengths]


def test_equal_groups_give_trls_own_numbers(model_path, config):
    class Compared(IBTPOTrainer):
        def _set_step_advantages(self, output):
            rewards = self._all_rewards
            options = {
                "scale_rewards": self.scale_rewards,
                "multi_objective_aggregation": self.multi_objective_aggregation,
            }
            found, is_zero = group_advantages(rewards, [6] * 4, self.reward_weights, **options)
            assert torch.equal(found, output["advantages"]) and found.any()
            assert self._metrics["train"]["frac_reward_zero_std"][-1] == is_zero.float().mean().item()
            compared.append(torch.isnan(rewards).all(1).any().item())
            super()._set_step_advantages(output)

    args = config(tree_levels=1, tree_initial_rollouts=6, per_device_train_batch_size=24, reward_weights=[1.0, 0.5])
    trainer = Compared(model_path, [odd_or_nothing, tiny.has_letter], args, tiny.questions())
    trainer.model.train()
    rows = [dict(row) for row in tiny.questions(4) for _ in range(6)]
    compared = []
    for trainer.scale_rewards, trainer.multi_objective_aggregation in WAYS:
        trainer._generate_and_score_completions(rows)
    assert len(compared) == 4 and any(compared)  # unscorable completions among them


# ----- training ------------------------------------------------------------------------------------------------------


def test_one_question_a_process_has_nobody_to_give_to(model_path, config):
    with pytest.raises(
        ValueError, match=r"`adaptive_budget` is 1, but each process generates for one .* 40 completio"
    ):
        IBTPOTrainer(model_path, tiny.even_length, config(**SMALL, per_device_train_batch_size=5), tiny.questions())


SMALL = {"tree_initial_rollouts": 2, "tree_levels": 4, "adaptive_budget": 1, "reproducible_rollouts": True}


def solved_or_hopeless(completions, letter, **kwargs):
    """Every question with an "a" is solved, with an "e" hopeless; the others are in between."""
    known = {"a": 1.0, "e": 0.0}
    even = tiny.even_length(completions)
    return [known.get(vowel, value) for vowel, value in zip(letter, even, strict=True)]


class Recorded(IBTPOTrainer):
    def _set_step_advantages(self, output):
        rewards = self._all_rewards.tolist()
        expected, is_zero = by_definition(rewards, self._sizes, self.reward_weights.tolist())
        np.testing.assert_allclose(output["advantages"].numpy(), expected, atol=1e-5)
        assert self._metrics["train"]["frac_reward_zero_std"][-1] == pytest.approx(is_zero.mean())
        success = [value for grown in self._grown for value in grown.tree.success]
        assert success == [row[0] for row in rewards]  # every row has the reward of its own leaf
        self.seen.append((self._sizes, [grown.tree.leaves for grown in self._grown]))
        super()._set_step_advantages(output)


def train(model_path, args, **options):
    trainer = Recorded(model_path, solved_or_hopeless, args, tiny.questions(), **options)
    trainer.seen = []
    trainer.train()
    return trainer


@pytest.mark.parametrize("branching, forwards", [("ib", [True]), ("independent", [True, False])])
def test_trains_with_trees_of_any_size(model_path, config, branching, forwards, capsys):
    """Two micro-batches a generation batch, which trees may span; the prefix-shared forward trains as TRL's does."""
    runs = []
    for packed in forwards:
        args = config(
            **SMALL,
            branching=branching,
            per_device_train_batch_size=10,
            gradient_accumulation_steps=2,
            packed_forward=packed,
            log_completions=True,
            num_completions_to_print=1,
            log_trees=1,
        )
        runs.append(train(model_path, args))
    assert "from 2 on, a question stops when it has 1 right and 1 wrong answers" in capsys.readouterr().out
    shared, *others = runs
    assert len(shared.seen) == 3
    for sizes_of_batch, _ in shared.seen:
        assert sum(sizes_of_batch) == 20 and min(sizes_of_batch) >= 2
    assert any(max(found) > 5 > min(found) for found, _ in shared.seen)
    for step, (sizes_of_batch, _) in enumerate(shared.seen, 1):
        lines = Path(shared.args.output_dir, "trees", f"step-{step:06d}.jsonl").read_text().splitlines()
        recorded = [json.loads(line) for line in lines]
        assert [len(record["leaves"]) for record in recorded] == sizes_of_batch
        for record in recorded:
            assert all(leaf["rewards"] == {"solved_or_hopeless": leaf["success"]} for leaf in record["leaves"])
    for separate in others:
        assert shared.seen == separate.seen
        for one, other in zip(shared.model.parameters(), separate.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    logged = [entry for entry in shared.state.log_history if "tree/leaves_std" in entry]
    assert len(logged) == 3
    assert logged[0]["tree/leaves_std"] == pytest.approx(np.std(shared.seen[0][0]), rel=1e-5)


def test_resumes_where_it_stopped(model_path, config):
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = train(model_path, config(**SMALL, per_device_train_batch_size=20, max_steps=3))
    first = config(**SMALL, per_device_train_batch_size=20, **{**saving, "max_steps": 2})
    train(model_path, first)
    args = config(**SMALL, per_device_train_batch_size=20, **{**saving, "max_steps": 3})
    again = Recorded(model_path, solved_or_hopeless, args, tiny.questions())
    again.seen = []
    again.train(resume_from_checkpoint=True)
    assert again.seen == whole.seen[2:]
