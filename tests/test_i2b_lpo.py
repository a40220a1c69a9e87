"""I2B-LPO as a whole: branches with latents, what the loss is told of how they were sampled, and three steps of it."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.i2b_lpo import I2B_LPO
from trl_ibtpo.training.generation import TreeGeneration

SHAPE = {
    "tree_initial_rollouts": 2,
    "tree_branches_per_node": 2,
    "paths_kept": 1,
    "max_completion_length": 16,
    "learning_rate": 0.05,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "reproducible_rollouts": True,
    "temperature": 0.9,
    "top_p": 1.0,  # so that the policy's log-probabilities are those of sampling
}
SHARED = ("completion_ids", "completion_mask", "sampling_per_token_logps", "importance_sampling_ratio")


class Watched(IBTPOTrainer):
    """Keeps what was grown, what the loss got, and the policy's log-probabilities as the loss saw them."""

    grown = batch = None
    losses = 0

    def _grow(self, *args):
        found = super()._grow(*args)
        self.grown = found[0]
        return found

    def _generate_and_score_completions(self, inputs):
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch

    def _compute_loss(self, model, inputs):
        self.losses += 1
        self.in_loss = True
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.in_loss = False

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if getattr(self, "in_loss", False):
            self.seen = args[1].clone(), args[2].clone(), args[3], found[0].detach().clone()
        return found


def make(model_path, config, peft_config=None, kind=Watched, **fields):
    args = config(**{**I2B_LPO, **SHAPE, **fields})
    return kind(model_path, tiny.even_length, args, tiny.questions(), peft_config=peft_config)


def plain_logps(model_path, trainer, ids, mask, kept):
    """Log-probabilities of an untouched copy of the trainer's policy, of the last `kept` tokens of each row."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    model.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logps = torch.log_softmax(logits.float() / trainer.temperature, -1)[:, :-1]
    return logps.gather(2, ids[:, 1:, None])[:, -kept:, 0]


@pytest.mark.parametrize("mode", ["psa", "softmax"])
def test_only_branches_are_steered_and_the_loss_knows_it(model_path, config, mode):
    trainer = make(model_path, config, latent_mode=mode, max_steps=1, learning_rate=0.0)
    assert not trainer.args.use_vllm
    trainer.train()
    batch, mask = trainer.batch, trainer.batch["completion_mask"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    expected = plain_logps(model_path, trainer, ids, torch.cat([batch["prompt_mask"], mask], 1), mask.shape[1])
    found = batch["sampling_per_token_logps"]
    (tree,) = [grown.tree for grown in trainer.grown]
    own = torch.zeros_like(mask, dtype=torch.bool)  # what was sampled with a latent
    for row in range(4):
        if tree.rounds[row]:
            own[row, tree.ends()[tree.branch_steps[row]] : len(tree.trajectory(row)[0])] = True
    plain = (mask > 0) & ~own
    assert own.any() and plain.any()
    torch.testing.assert_close(found[plain], expected[plain], atol=1e-4, rtol=1e-4)
    assert (found[own] - expected[own]).abs().max() > 0.01
    # TRL's correction, truncated at its upper end.
    ratio = torch.exp(expected - found).clamp(max=trainer.vllm_importance_sampling_clip_max)
    torch.testing.assert_close(batch["importance_sampling_ratio"][mask > 0], ratio[mask > 0], atol=1e-3, rtol=1e-3)
    log = trainer.state.log_history[0]
    assert log["sampling/sampling_logp_difference/max"] > 0.01 and log["sampling/importance_sampling_ratio/max"] > 1
    assert not trainer.use_vllm  # outside of training it says what it said


def test_the_training_forward_has_no_latent(model_path, config):
    """Its log-probabilities are those of an untouched copy of the model, in the loss of every micro-batch."""
    trainer = make(model_path, config, max_steps=1, learning_rate=0.0)
    trainer.train()
    ids, mask, kept, logps = trainer.seen
    rows = mask[:, -kept:] > 0
    torch.testing.assert_close(logps[rows], plain_logps(model_path, trainer, ids, mask, kept)[rows], atol=1e-4, rtol=0)


def test_the_ratio_is_in_the_loss(model_path, config):
    """With the same trees, twice the ratio at every token is twice the gradient."""

    class Doubled(Watched):
        factor = 2.0

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["importance_sampling_ratio"] = output["importance_sampling_ratio"] * self.factor
            return output

    def step(kind):
        fields = {"ib_regularization_coef": 0.0, "max_grad_norm": 0.0, "path_filter": None, "paths_kept": None}
        trainer = make(model_path, config, kind=kind, max_steps=1, **fields)
        before = {name: each.detach().clone() for name, each in trainer.model.named_parameters()}
        trainer.train()
        return {name: each - before[name] for name, each in trainer.model.named_parameters()}

    once, twice = step(Watched), step(Doubled)
    assert any(each.abs().max() > 1e-5 for each in once.values())
    for name, each in once.items():
        torch.testing.assert_close(2 * each, twice[name], atol=1e-5, rtol=1e-3)


def test_strength_0_is_the_policy(model_path, config):
    trainer = make(model_path, config, latent_strength=0.0, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-4


RUNS = {
    "psa": {"per_device_train_batch_size": 4},
    "psa, lora, accumulation": {"lora": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "softmax, pmi": {"latent_mode": "softmax", "path_filter": "pmi", "answer_column": "letter"},
    "softmax, lora": {"latent_mode": "softmax", "lora": True},
    "none": {"latent_mode": "none", "gradient_accumulation_steps": 2},
}


def weights_after(model_path, config, fields, **more):
    fields = {**fields, **more}
    lora = LoraConfig(r=4, target_modules="all-linear") if fields.pop("lora", False) else None
    trainer = make(model_path, config, lora, max_steps=3, **fields)
    start = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    trainer.train()
    end = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert trainer.state.global_step == 3
    for log in trainer.state.log_history[:3]:
        assert log["tree/filtered"] == 2  # of 2 (1 + 2) leaves, 2 (1 + 1) are trained
        steered = "sampling/sampling_logp_difference/max" in log
        assert steered == (trainer.args.latent_mode != "none")
        assert np.isfinite(log["loss"]) and np.isfinite(log["grad_norm"])
    return end


@pytest.mark.parametrize("run", RUNS)
def test_three_steps_with_either_forward(model_path, config, run):
    """With the prefix-shared forward the weights are those of TRL's forward."""
    shared = weights_after(model_path, config, RUNS[run], packed_forward=True)
    plain = weights_after(model_path, config, RUNS[run], packed_forward=False)
    for name, each in shared.items():
        torch.testing.assert_close(each, plain[name], atol=1e-5, rtol=0)


def test_a_resumed_run_is_the_same(model_path, config, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "optim": "adamw_torch"}
    whole = make(model_path, config, **fields)
    whole.train()
    (tmp_path / "out/checkpoint-3").rename(tmp_path / "later")
    torch.manual_seed(5)
    resumed = make(model_path, config, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert resumed.losses < whole.losses
    for (name, each), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(each, other), name


def test_the_constructor_sets_what_it_says(tmp_path):
    args = IBTPOConfig.i2b_lpo(str(tmp_path), use_cpu=True, bf16=False)
    assert {name: getattr(args, name) for name in I2B_LPO} == I2B_LPO
    assert args.num_generations == 4 * (1 + 2) and args.growth_settings.leaves == 4 * (1 + 3)
    changed = IBTPOConfig.i2b_lpo(
        str(tmp_path), use_cpu=True, bf16=False, paths_kept=1, latent_mode="none", temperature=1.0
    )
    assert (changed.num_generations, changed.latent_mode, changed.temperature, changed.top_p) == (8, "none", 1.0, 0.9)
    whole = IBTPOConfig.i2b_lpo(str(tmp_path), use_cpu=True, bf16=False, path_filter=None)
    assert (whole.num_generations, whole.paths_kept) == (16, None)


def test_a_prior_has_the_policy_while_trees_grow():
    """It reads hidden states, with vLLM too, of weights that may be sharded."""
    entered = []

    @contextmanager
    def policy():
        entered.append(True)
        yield

    trainer = SimpleNamespace(
        args=SimpleNamespace(use_vllm=True, fork_entropy="exact", latent_mode="softmax", latent_prior="a/folder"),
        vllm_mode="colocate",
        vllm_generation=SimpleNamespace(enable_sleep_mode=False),
        _strategy=None,
        _sync_vllm=lambda: None,
        _vllm_engine=lambda: "the engine",
        _policy=policy,
    )
    with TreeGeneration._engine(trainer) as engine:
        assert engine == "the engine" and entered


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (
            {"latent_mode": "add"},
            ValueError,
            r"`latent_mode` is 'add'; it must be one of \['none', 'psa', 'softmax'\]",
        ),
        (
            {"latent_mode": "none", "latent_decay": 9.0},
            ValueError,
            "`latent_decay` is 9.0, but `latent_mode` is 'none'",
        ),
        ({"latent_decay": 0.0}, ValueError, "`latent_decay` is 0.0; it must be a positive number of tokens"),
        ({"latent_strength": -1.0}, ValueError, "`latent_strength` is -1.0; it must be a number of at least 0"),
        ({"latent_prior": "nowhere"}, FileNotFoundError, "`latent_prior` names 'nowhere', which is no folder"),
        (
            {"branching": "independent", "path_filter": None, "paths_kept": None},
            ValueError,
            "'psa', but no rollout continues another one",
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "latent_mode": "softmax"},
            ValueError,
            "`latent_mode` is 'softmax' and `vllm_mode` is 'server', but a vLLM server takes no latents",
        ),
        (
            {"use_vllm": True, "generation_kwargs": {"stop": ["x"]}},
            ValueError,
            "vLLM samples initial rollouts and transformers their branches, but `generation_kwargs`",
        ),
    ],
)
def test_what_does_not_go_with_latents(config, fields, error, words):
    with pytest.raises(error, match=words):
        config(**{**I2B_LPO, **fields})


def test_a_generate_of_its_own_is_refused(model_path, config):
    """The proof that latents reach the layers is made with forward passes, which such a model may not make."""

    class Quick(Qwen3ForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    arguments = {"reward_funcs": tiny.even_length, "train_dataset": tiny.questions()}
    arguments["processing_class"] = AutoTokenizer.from_pretrained(model_path)
    with pytest.raises(ValueError, match="'psa', but Quick has a `generate` of its own"):
        IBTPOTrainer(Quick.from_pretrained(model_path), args=config(**I2B_LPO), **arguments)
    IBTPOTrainer(Quick.from_pretrained(model_path), args=config(**{**I2B_LPO, "latent_mode": "softmax"}), **arguments)


@pytest.mark.parametrize(
    ("name", "fields"), [("path_filter", {}), ("latent_mode", {"path_filter": None, "paths_kept": None})]
)
def test_tools_are_refused(model_path, config, name, fields):
    def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: one.
            b: other.
        """
        return a + b

    args = config(**{**I2B_LPO, **fields})
    with pytest.raises(ValueError, match=f"`{name}` is .* cannot be combined with `tools`"):
        IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(conversational=True), tools=[add])
