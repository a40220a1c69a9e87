"""The path filter (I2B-LPO): what a branch scores, which are kept, and that a batch knows nothing of the others."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_growth import ANY, PROMPTS, Engine, Scorer, Splitter, make_grower

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.grown_tree import GrownTree, GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.paths import advantage_scores, best_paths, keep_paths, pmi_score
from trl_ibtpo.scores import score_tree
from trl_ibtpo.tree import RolloutTree


def two_rollouts() -> RolloutTree:
    """Leaves 0 and 1 from the question; 2, 3 and 5 branch from 0 after one token, 4 from 1 after two."""
    tree = RolloutTree([9])
    for group in (0, 1):
        tree.open(0, 0, group)
        tree.extend(group, [1, 2, 3], [-1.0] * 3, [3], [0.5, 2.0, 0.1])
    second = tree.split(2, 2)
    first = tree.split(1, 1)
    for leaf, (after, group, entropies) in enumerate(
        [(first, 0, [1.0, 3.0]), (first, 0, [0.5]), (second + 1, 1, [1.0]), (first, 0, [2.0, 2.0])], start=2
    ):
        tree.open(after, 1, group)
        tree.extend(leaf, [7] * len(entropies), [-1.0] * len(entropies), [len(entropies)], entropies)
    return tree


def test_advantage_scores_by_hand():
    """Mean of A_t H_t over the tokens after the fork; a token without an entropy does not count."""
    tree = two_rollouts()
    lengths = [3, 3, 3, 2, 3, 3]
    values = [np.full(length, 9.0) for length in lengths]
    values[2] = np.array([9.0, 2.0, -1.0])  # (2 * 1 - 1 * 3) / 2
    values[3] = np.array([9.0, -4.0])  # -4 * 0.5
    values[4] = np.array([9.0, 9.0, 3.0])  # 3 * 1
    values[5] = np.full(3, np.nan)  # unscorable
    expected = [np.nan, np.nan, -0.5, -2.0, 3.0, np.nan]
    np.testing.assert_allclose(advantage_scores(tree, values), expected)
    tree.open(0, 1, 1)
    tree.extend(6, [7, 8, 8], [-1.0, None, None], [3], [2.0, math.nan, math.nan])  # two tokens of an observation
    assert advantage_scores(tree, [*values, np.array([0.5, 0.0, 0.0])])[6] == 1.0


def test_pmi_score_by_hand():
    """5 [log p(a|q,r) - log p(a|q)] / 2 - [log p(r|q) - log p(r)] / 4 = 5 (-1 + 3) / 2 - (-6 + 10) / 4."""
    arguments = {"answer_after_path": -1.0, "answer": -3.0, "answer_tokens": 2}
    assert pmi_score(5.0, **arguments, path_after_question=-6.0, path=-10.0, path_tokens=4) == 4.0
    assert math.isnan(pmi_score(5.0, **arguments, path_after_question=0.0, path=0.0, path_tokens=0))


def test_the_best_of_each_rollout_by_hand():
    tree = two_rollouts()
    scores = np.array([9.0, 9.0, -0.5, -2.0, -7.0, np.nan])  # those of initial rollouts do not matter
    assert best_paths(tree, scores, 1) == [0, 1, 2, 4]  # the best of one rollout, the only one of the other
    assert best_paths(tree, scores, 2) == [0, 1, 2, 3, 4]
    assert best_paths(tree, scores, 3) == [0, 1, 2, 3, 4, 5]
    assert best_paths(tree, np.array([np.nan] * 6), 1) == [0, 1, 2, 4]  # the earliest


SHAPES = st.builds(
    GrowthSettings,
    tree_initial_rollouts=st.integers(1, 4),
    tree_levels=st.integers(2, 3),
    tree_nodes_per_level=st.integers(1, 2),
    tree_branches_per_node=st.integers(2, 4),
    branching=st.just("entropy_fork"),
    fork_keeps_token=st.booleans(),
    max_completion_length=st.sampled_from([1, 2, 7, 40]),
    path_filter=st.just("advantage"),
)


@settings(max_examples=80, **ANY)
@given(SHAPES, st.integers(0, 1000), st.integers(1, 3))
def test_rules_of_every_filtered_tree(growth, seed, count):
    """M (1 + N) leaves, the same tokens as before, and everything that is counted is counted without the others."""
    growers = [make_grower(prompt, growth, Splitter(), (seed, i)) for i, prompt in enumerate(PROMPTS)]
    engine = Engine(seed)
    drive(growers, engine, Scorer(engine, seed))
    rng = np.random.default_rng(seed)
    for grower in growers:
        whole = grower.grown()
        tree, branches = whole.tree, (growth.tree_levels - 1) * growth.branches_per_round
        assert [tree.groups.count(group) for group in range(growth.tree_initial_rollouts)] == [
            1 + branches
        ] * growth.tree_initial_rollouts
        scores = rng.choice([0.0, 1.0, 2.0, np.nan], len(tree.leaves))
        kept = best_paths(tree, scores, count)
        assert len(kept) == growth.tree_initial_rollouts * (1 + min(count, branches))
        for left_out in set(range(len(tree.leaves))) - set(kept):  # nothing better was left out
            rivals = [leaf for leaf in kept if tree.groups[leaf] == tree.groups[left_out] and tree.rounds[leaf]]
            assert all(not scores[left_out] > scores[leaf] for leaf in rivals)
        left = keep_paths(whole, kept, scores, np.zeros((len(tree.leaves), 1)))
        assert left.filtered.whole is whole and left.filtered.kept == kept
        assert tree.leaves == grower.tree.leaves and len(left.tree.leaves) == len(kept)
        for new, leaf in enumerate(kept):
            assert left.tree.trajectory(new) == tree.trajectory(leaf)
            assert repr(left.tree.success[new]) == repr(tree.success[leaf])
            assert (left.tree.rounds[new], left.tree.groups[new]) == (tree.rounds[leaf], tree.groups[leaf])
            np.testing.assert_array_equal(left.tree.trajectory_entropies(new), tree.trajectory_entropies(leaf))
            assert left.tree.ends()[left.tree.branch_steps[new]] == tree.ends()[tree.branch_steps[leaf]]
            # Steps are those of the whole tree, and a step is shared by those of its leaves that are left.
            assert left.tree.ends()[left.tree.path(left.tree.leaves[new])].tolist() == (
                tree.ends()[tree.path(tree.leaves[leaf])].tolist()
            )
        for step in range(len(left.tree)):
            below = {new for new, leaf in enumerate(left.tree.leaves) if step in [0, *left.tree.path(leaf)]}
            known = [tree.success[kept[new]] for new in below if tree.success[kept[new]] == tree.success[kept[new]]]
            assert left.tree.leaf_count()[step] == len(below)
            assert left.scores.density[step] == pytest.approx(np.mean(known) if known else np.nan, nan_ok=True)
        for choice, before in zip(left.choices, whole.choices, strict=True):
            assert [left.tree.prefix(step) for step in choice.steps] == [tree.prefix(step) for step in before.steps]


def test_scales_of_rewards_are_those_of_the_leaves_that_are_left():
    """A range that is not known is that of the rewards that a batch holds."""
    tree = two_rollouts()
    for leaf, reward in enumerate([0.0, 4.0, 2.0, 1.0, 4.0, 8.0]):
        tree.add_reward(leaf, reward)
    assert tree.success == [0.0, 0.5, 0.25, 0.125, 0.5, 1.0]
    settings_ = GrowthSettings(2, 2, 1, 3, branching="entropy_fork")
    whole = replace(make_grower([9], settings_, Splitter()).grown(), tree=tree, scores=score_tree(tree, beta=5.0))
    left = keep_paths(whole, [0, 1, 2, 3, 4], np.zeros(6), np.zeros((6, 1)))
    assert left.tree.success == [0.0, 1.0, 0.5, 0.25, 1.0]


# ----- with a trainer ------------------------------------------------------------------------------------------------

FILTERED = {
    "branching": "entropy_fork",
    "tree_initial_rollouts": 2,
    "tree_levels": 2,
    "tree_branches_per_node": 3,
    "paths_kept": 1,
    "advantage": "grpo",
    "max_completion_length": 16,
}


class Watched(IBTPOTrainer):
    """Keeps what the filter did and what came out."""

    def _grow(self, *args):
        found = super()._grow(*args)
        self.last_grown = found[0]
        return found

    def _generate_and_score_completions(self, inputs):
        self.last = super()._generate_and_score_completions(inputs)
        return self.last


def by_length(completion_ids, **kwargs):
    return [float(len(ids) % 5) for ids in completion_ids]


def make(model_path, config, path_filter="advantage", **fields):
    rows = tiny.questions().map(lambda row: {"solution": str(len(row["prompt"]))})
    args = config(**{**FILTERED, "path_filter": path_filter, "log_trees": 1, **fields})
    return Watched(model_path, [by_length, tiny.even_length], args, rows)


@pytest.mark.parametrize("path_filter", ["advantage", "pmi"])
def test_scored_then_filtered_then_grouped(model_path, config, path_filter, tmp_path):
    """8 leaves are sampled and rewarded; 4 rows are trained, and their statistics are of these 4 alone."""
    trainer = make(model_path, config, path_filter, max_steps=1, per_device_train_batch_size=8, scale_rewards="none")
    assert trainer.args.num_generations == 4 and trainer.args.growth_settings.leaves == 8
    trainer.train()
    assert len(trainer.last_grown) == 2
    advantages = trainer.last["advantages"]
    for number, grown in enumerate(trainer.last_grown):
        whole, kept = grown.filtered.whole, grown.filtered.kept
        assert len(whole.tree.leaves) == 8 == len(grown.filtered.rewards_LF) and len(kept) == 4
        assert not np.isnan(whole.tree.rewards).any()  # known of those that were left out, too
        assert kept == best_paths(whole.tree, grown.filtered.scores_L, 1)
        totals = grown.filtered.rewards_LF.sum(axis=1)[kept]
        for row, (leaf, expected) in enumerate(zip(kept, totals - totals.mean(), strict=True)):
            ids = whole.tree.trajectory(leaf)[0]
            place = 4 * number + row
            assert trainer.last["completion_ids"][place, : len(ids)].tolist() == ids
            np.testing.assert_allclose(advantages[place, : len(ids)], expected, atol=1e-5)
    (log, *_) = trainer.state.log_history
    assert log["tree/filtered"] == 4
    assert log["tree/generated_tokens"] == np.mean(
        [each.filtered.whole.tree.generated_tokens for each in trainer.last_grown]
    )
    # The viewer's records show what was left out.
    records = [json.loads(line) for line in (tmp_path / "out/trees/step-000001.jsonl").read_text().splitlines()]
    for record, grown in zip(records, trainer.last_grown, strict=True):
        assert [leaf["filtered_out"] for leaf in record["leaves"]] == [
            leaf not in grown.filtered.kept for leaf in range(8)
        ]
        for leaf, rewards in zip(record["leaves"], grown.filtered.rewards_LF, strict=True):
            assert list(leaf["rewards"].values()) == rewards.tolist()
            assert (leaf["advantage"] is None) == leaf["filtered_out"]
            assert (leaf["path_score"] is None) == (leaf["round"] == 0)
        assert record["generated_tokens"] == grown.filtered.whole.tree.generated_tokens


def test_scores_by_advantage_are_of_the_whole_group(model_path, config):
    """GRPO's advantages of all 8 leaves, times the entropies of the policy, by a pass of its own."""
    trainer = make(model_path, config)
    filtered = trainer.grow_trees([tiny.questions()[0]])[0].filtered
    whole, rewards = filtered.whole, torch.from_numpy(filtered.rewards_LF).sum(dim=1)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert np.isnan(trainer._scores_by_advantage(whole, filtered.rewards_LF * np.nan)).all()  # no reward, no score
    found = trainer._scores_by_advantage(whole, filtered.rewards_LF)
    np.testing.assert_array_equal(found, filtered.scores_L)
    for leaf in range(8):
        ids, start = whole.tree.trajectory(leaf)[0], whole.tree.ends()[whole.tree.branch_steps[leaf]]
        if not whole.tree.rounds[leaf]:
            assert np.isnan(found[leaf])
            continue
        with torch.no_grad():
            logits = trainer.model(torch.tensor([whole.tree.prompt_ids + ids])).logits[0].float()
        entropies = torch.distributions.Categorical(logits=logits / trainer.temperature).entropy()
        own = entropies[len(whole.tree.prompt_ids) - 1 :][start : len(ids)]
        assert found[leaf] == pytest.approx((advantages[leaf] * own.mean()).item(), abs=1e-4)


@pytest.mark.parametrize("path_filter", ["advantage", "pmi"])
def test_what_no_function_scored_comes_last(model_path, config, path_filter):
    trainer = make(model_path, config, path_filter)
    row = trainer.train_dataset[0]
    filtered = trainer.grow_trees([row])[0].filtered
    best = [leaf for leaf in filtered.kept if filtered.whole.tree.rounds[leaf]]
    rewards_LF = filtered.rewards_LF.copy()
    rewards_LF[best] = np.nan  # the best branches of all, had they a reward
    (again,), _ = trainer._filter_paths([filtered.whole], rewards_LF, [row] * 8)
    assert not set(best) & set(again.filtered.kept) and np.isnan(again.filtered.scores_L[best]).all()


def test_scores_by_answer_are_those_of_the_model(model_path, config):
    """Each of the four log-probabilities by a pass of its own over the model; the answer comes before the end."""
    trainer = make(model_path, config, "pmi", ib_beta=3.0)
    eos, prompt = trainer._tokenizer.eos_token_id, trainer._tokenizer.encode("What is 5 + 7?")
    answer = trainer._tokenizer.encode("12")
    tree = RolloutTree(prompt)
    for leaf, ids in enumerate([[70, 71, 72], [80, 81, eos], [eos], [90, 91, 92, 93]]):
        tree.open(0, int(leaf > 0), 0)
        tree.extend(leaf, ids, [-1.0] * len(ids), [len(ids)])
    (found,) = trainer._scores_by_answer([GrownTree(tree, score_tree(tree, beta=3.0), GrowthSettings())], ["12"])

    def logp(prefix, ids):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prefix + ids])).logits[0].float() / trainer.temperature
        logps = torch.log_softmax(logits, -1)[len(prefix) - 1 : -1]
        return logps.gather(1, torch.tensor(ids)[:, None]).sum().item()

    assert np.isnan(found).tolist() == [True, False, True, False]  # an initial rollout, and a path of no tokens
    for leaf, path in {1: [80, 81], 3: [90, 91, 92, 93]}.items():
        about_answer = logp(prompt + path, answer) - logp(prompt, answer)
        about_question = logp(prompt, path) - logp([eos], path)
        expected = 3.0 * about_answer / len(answer) - about_question / len(path)
        assert found[leaf] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"paths_kept": None}, "`paths_kept` is None; .* whole number from 1 to 2: "),
        ({"paths_kept": 3}, "`paths_kept` is 3; .* from 1 to 2"),
        ({"paths_kept": 0}, "`paths_kept` is 0; .* from 1 to 2"),
        ({"path_filter": None}, "`paths_kept` is 1, but `path_filter` is None"),
        ({"path_filter": "best"}, r"`path_filter` is 'best'; it must be one of \['advantage', 'pmi', None\]"),
        ({"branching": "surprisal"}, "`path_filter` is 'advantage', but `branching` is 'surprisal'"),
        ({"branch_lookahead": 2}, "`branch_lookahead` is 2, but `path_filter` compares branches that are whole"),
        ({"num_generations": 8}, r"`num_generations` is 8, .* 2 \* \(1 \+ 1\) = 4, of 8 that are sampled"),
        ({"adaptive_budget": 1}, "which has no rounds of the whole tree"),
        ({"shared_token_weight": "sampled"}, "'sampled', .* but `path_filter` is 'advantage': it keeps the branches"),
    ],
)
def test_what_does_not_go_with_a_filter(config, fields, words):
    with pytest.raises(ValueError, match=words):
        config(**{**FILTERED, "path_filter": "advantage", **fields})


def test_a_dataset_without_answers_is_refused(model_path, config):
    args = config(**FILTERED, path_filter="pmi")
    with pytest.raises(ValueError, match=r"no column 'solution' \(it has: prompt, letter\), but `path_filter='pmi'`"):
        IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    trainer = make(model_path, config, "pmi")
    with pytest.raises(ValueError, match="The column 'solution' of `train_dataset` holds None"):
        trainer.grow_trees([{**tiny.questions()[0], "solution": None}])
    with pytest.raises(ValueError, match="The column 'solution' of `train_dataset` holds None"):
        trainer.grow_trees([tiny.questions()[0]])  # a stream's rows are seen here first
