"""IBTPOTrainer against TRL itself: equal where it must be, trained in every mode a user is likely to choose."""

import math

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.engines.base import Rollout

FLAT = {"tree_levels": 1, "ib_coef": 0.0, "tree_initial_rollouts": 4, "per_device_train_batch_size": 8}


def completions_for(tokenizer, count: int) -> list[list[int]]:
    """Reproducible completions of several steps and lengths, some cut before the stop token."""
    texts = ["3 and 4.\n\nThat gives 7.", "So", "The answer is 4.\n\nDone.\n\n- item", "First add 3\n\nx = 2."]
    rng = np.random.default_rng(0)
    completions = []
    for index in range(count):
        ids = tokenizer.encode(texts[index % len(texts)] + "." * int(rng.integers(0, 5)))
        completions.append(ids + [tokenizer.eos_token_id] * int(rng.integers(0, 2)))
    return completions


class Replay:
    """The same completions for both trainers, in the order of the rows."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def next(self, count: int) -> list[list[int]]:
        self.calls += 1
        return completions_for(self.tokenizer, count * self.calls)[-count:]


class ReplayGRPOTrainer(GRPOTrainer):
    """TRL's trainer on given completions."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        return self.replay.next(len(prompt_ids)), None


class ReplayEngine:
    """An engine that returns the given completions for the flat tree's requests."""

    name, max_length, clock = "replay", None, "polls"

    def __init__(self, replay: Replay):
        self.replay, self.queue = replay, []

    def submit(self, requests):
        self.queue += requests

    def poll(self):
        completions = self.replay.next(len(self.queue))
        finished = [
            Rollout(request.request_id, ids, [-0.5] * len(ids))
            for request, ids in zip(self.queue, completions, strict=True)
        ]
        self.queue = []
        return finished

    def generated(self, request_id):
        return 0

    def abort(self):
        self.queue = []


class ReplayIBTPOTrainer(IBTPOTrainer):
    """This package's trainer on the same completions."""

    def _engine(self):
        import contextlib

        return contextlib.nullcontext(ReplayEngine(self.replay))


def build(trainer_class, args, path, rewards, **kwargs):
    trainer = trainer_class(path, rewards, args, tiny.questions(), **kwargs)
    trainer.replay = Replay(trainer.processing_class)
    trainer.seen_advantages = []
    compute = trainer._generate_and_score_completions

    def record(inputs):
        output = compute(inputs)
        trainer.seen_advantages.append((output["advantages"], output["completion_mask"]))
        return output

    trainer._generate_and_score_completions = record
    return trainer


def never_scores(completions, **kwargs):
    """None for every third completion, and no opinion at all on some rows when it is the only function."""
    return [None if index % 3 == 0 else index / 7 for index in range(len(completions))]


def some_success(completions, **kwargs):
    return [None if len(text) < 3 else float("7" in text) for text in map(tiny.text_of, completions)]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_flat_tree_equals_grpo(config, model_path, scale_rewards, aggregation):
    """`tree_levels=1, ib_coef=0`: advantages, losses and weights are TRL's, with two weighted rewards and None.

    To the last bit with TRL's forward; that of `packed_forward` differs by rounding (see test_prefix_sharing.py).
    """
    args = config(
        **FLAT,
        scale_rewards=scale_rewards,
        reward_weights=[1.0, 0.3],
        multi_objective_aggregation=aggregation,
        packed_forward=False,
    )
    rewards = [some_success, tiny.has_letter]
    ours = build(ReplayIBTPOTrainer, args, model_path, list(rewards))
    theirs = build(ReplayGRPOTrainer, tiny.grpo_arguments(args), model_path, list(rewards))
    for trainer in (ours, theirs):
        torch.manual_seed(0)  # TRL shuffles the rows of a batch with the global generator
        trainer.train()

    assert len(ours.seen_advantages) == len(theirs.seen_advantages) == 3
    for (per_token, mask), (per_trajectory, _) in zip(ours.seen_advantages, theirs.seen_advantages, strict=True):
        assert per_token.shape == mask.shape and per_trajectory.dim() == 1
        expected = per_trajectory[:, None] * mask
        assert torch.equal(per_token * mask, expected)
        assert expected.abs().max() > 0
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for (name, mine), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other), name
    table = [list(trainer._logs["advantages"]) for trainer in (ours, theirs)]
    assert table[0] == pytest.approx(table[1], abs=1e-6) and len(table[0]) == len(table[1])
    rewards_logged = [{name: list(values) for name, values in t._logs["rewards"].items()} for t in (ours, theirs)]
    assert str(rewards_logged[0]) == str(rewards_logged[1])  # as text, so that nan equals nan


def train(args, path, rewards=None, **kwargs) -> IBTPOTrainer:
    trainer = IBTPOTrainer(
        path, rewards or [tiny.even_length, tiny.has_letter], args, kwargs.pop("dataset", tiny.questions()), **kwargs
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == args.max_steps and all(math.isfinite(loss) for loss in losses)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert any(not torch.equal(before[name], trainer.model.get_parameter(name)) for name in trained)
    return trainer


LOGGED = (
    "tree/effective_rate",
    "tree/average_success",
    "tree/generated_tokens",
    "tree/trajectory_tokens",
    "tree/depth",
    "tree/branch_position",
    "tree/selected_minus_fresh",
    "tree/fresh_minus_fresh",
    "ib/score",
    "ib/covariance",
    "ib/confidence",
    "advantages/global_std",
    "advantages/local_std",
)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type(config, model_path, loss_type):
    trainer = train(config(loss_type=loss_type), model_path)
    entry = trainer.state.log_history[0]
    assert set(LOGGED) <= set(entry)
    assert entry["tree/generated_tokens"] < entry["tree/trajectory_tokens"]  # prefixes were shared


@pytest.mark.parametrize("beta", [0.0, 0.02])
def test_kl_off_and_on(config, model_path, beta):
    trainer = train(config(beta=beta), model_path)
    assert ("kl" in trainer.state.log_history[-2]) == (beta > 0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 18},  # trees straddle micro-batches
        {"num_iterations": 2},
        {"steps_per_generation": 4, "per_device_train_batch_size": 6},
        {"shared_token_weight": "once"},
        {"shared_token_weight": "sampled", "branching": "confidence", "gradient_accumulation_steps": 2},
        {"step_confidence": "joint"},
        {"branching": "independent"},
        {"branching": "random", "allow_root_branching": True, "allow_repeated_branching": False},
        {"branching": "confidence", "advantage": "grpo"},
        {"advantage": "treepo", "mask_truncated_completions": True},
        {"advantage": "sibling", "value_estimate": "backup", "selection_correction": True, "scale_rewards": "none"},
        {"tree_initial_rollouts": 2, "tree_levels": 3, "tree_nodes_per_level": 2, "tree_branches_per_node": 2},
        {"scale_rewards": "batch", "mask_truncated_completions": True},
        {"gradient_checkpointing": True, "top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.5, "importance_sampling_level": "sequence"},
    ],
    ids=str,
)
def test_training_options(config, model_path, overrides):
    trainer = train(config(**overrides), model_path)
    assert trainer._grown == [] and trainer._scorer is None  # nothing is kept between batches


def test_lora(config, model_path):
    trainer = train(config(beta=0.02), model_path, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("conversational", [False, True])
def test_evaluation_is_independent_sampling(config, model_path, conversational):
    """Evaluation during training generates `num_generations_eval` ordinary completions."""
    data = tiny.questions(8, conversational)
    seen = []

    def watch(prompts, completions, **kwargs):
        if not trainer.model.training:
            seen.extend(map(str, prompts))
        return tiny.even_length(completions)

    args = config(eval_strategy="steps", eval_steps=2, num_generations_eval=2, max_steps=2, log_completions=False)
    trainer = IBTPOTrainer(model_path, watch, args, data, data.select(range(2)))
    grow = trainer._grow
    trainer._grow = lambda *args: grow(*args) if trainer.model.training else pytest.fail("grows a tree")
    trainer.train()
    assert [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert sorted(seen) == sorted(str(row["prompt"]) for row in data.select(range(2)) for _ in range(2))


@pytest.mark.parametrize("branching", ["ib", "surprisal"])
def test_resume_on_generation_boundary_continues_exactly(config, model_path, tmp_path, branching, monkeypatch):
    """With `surprisal` trees fork inside steps."""
    kept, compute = {}, IBTPOTrainer._set_step_advantages
    monkeypatch.setattr(
        IBTPOTrainer,
        "_set_step_advantages",
        lambda self, output: (kept.update({id(self): [each.tree for each in self._grown]}), compute(self, output))[1],
    )
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    if branching == "surprisal":
        whole_tree = {"tree_initial_rollouts": 2, "tree_levels": 3, "branch_lookahead": 2, "packed_forward": True}
        args |= {"branching": branching, "step_delimiter": "no such text", **whole_tree}
    whole = train(config(**args, output_dir=str(tmp_path / "whole")), model_path)
    resumed = IBTPOTrainer(
        model_path,
        [tiny.even_length, tiny.has_letter],
        config(**args, output_dir=str(tmp_path / "resumed")),
        tiny.questions(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ignored = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    last = [
        {key: value for key, value in trainer.state.log_history[3].items() if key not in ignored}
        for trainer in (whole, resumed)
    ]
    assert last[0] == last[1] and last[0]["step"] == 4
    for mine, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    if branching == "surprisal":  # no text ends a step, so a step that has one after it was split
        trees = [kept[id(trainer)] for trainer in (whole, resumed)]
        assert trees[0] and all(tree.child_counts()[1:].max() >= 2 for tree in trees[0])
        assert [[step.token_ids for step in tree.steps] for tree in trees[0]] == [
            [step.token_ids for step in tree.steps] for tree in trees[1]
        ]


def test_same_seed_same_run(config, model_path):
    first, second = (train(config(), model_path).state.log_history[:3] for _ in range(2))
    assert [entry["loss"] for entry in first] == [entry["loss"] for entry in second]


def test_async_reward_and_logging(config, model_path):
    """Async functions, extra columns and metrics reach TRL's tables in the order of the rows."""

    async def letters(completions, log_extra, log_metric, trainer_state, letter, completion_ids, **kwargs):
        assert trainer_state.global_step >= 0 and len(letter) == len(completions) == len(completion_ids)
        log_extra("length", [len(tiny.text_of(completion)) for completion in completions])
        log_metric("share", 0.25)
        return [len(tiny.text_of(completion)) / 400 for completion in completions]

    trainer = train(config(log_completions=True, max_steps=1), model_path, [tiny.even_length, letters])
    logged = trainer._logs
    assert [len(text) for text in logged["completion"]] == list(logged["extra"]["length"])
    assert list(logged["rewards"]["letters"]) == pytest.approx([len(text) / 400 for text in logged["completion"]])
    assert trainer.state.log_history[0]["share"] == 0.25


@pytest.mark.parametrize("evaluate", [False, True])
def test_columns_of_the_table_are_not_overwritten(config, model_path, evaluate):
    def reward(completions, log_extra, **kwargs):
        log_extra("tree", [7] * len(completions))
        return tiny.even_length(completions)

    args = config(log_completions=True, max_steps=1)
    run = IBTPOTrainer(model_path, reward, args, tiny.questions(), tiny.questions(4))
    with pytest.raises(
        ValueError, match=r"log_extra\('tree', ...\), but the table of completions has a column of that"
    ):
        run.evaluate() if evaluate else run.train()


def test_grow_trees(config, model_path):
    """One tree per row, inspectable, without training; reward functions see its prompt, also after an evaluation."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(prompts)
        return tiny.even_length(completions)

    trainer = IBTPOTrainer(model_path, reward, config(), tiny.questions(), tiny.questions(16).select(range(12, 16)))
    trainer.evaluate()
    seen.clear()
    grown = trainer.grow_trees([tiny.questions()[index] for index in range(2)])
    assert [len(each.tree.leaves) for each in grown] == [12, 12]
    assert sorted(seen) == sorted(12 * tiny.questions()["prompt"][:2])
    assert all(success in (0.0, 1.0) for success in grown[0].tree.success)
    assert np.nanmax(grown[0].scores.density) <= 1


def test_start_line_says_what_runs(config, model_path, capsys):
    train(config(), model_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("IB-TPO:"))
    for words in ("12 trajectories", "B0=4, L=9, K=1, B=1", "'ib'", "transformers", "'even_length'"):
        assert words in line


def test_model_card_cites_the_paper(config, model_path, tmp_path):
    train(config(save_strategy="steps", save_steps=3), model_path)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2605.28109" in card and "Long Live The Balance" in card and "ibtpo" in card
