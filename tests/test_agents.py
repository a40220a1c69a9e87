"""A model that calls tools, trained in both engines: observations have no gradient, prefixes are shared."""

import os
import socket

os.environ["VLLM_CPU_CI_ENV"] = "1"  # a quick start rather than fast steps
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB

import agents
import pytest
import torch
from peft import LoraConfig

from trl_ibtpo import IBTPOTrainer


def add(by: int) -> str:
    """
    Add to the number.

    Args:
        by: How much.
    """
    return f"It is {by} now."


class Game(agents.WithSnapshots):
    """One action; after three, the game answers at length."""

    alive: list[agents.Counter] = []  # noqa: RUF012
    multiply = None

    def add(self, by: int) -> str:
        """
        Add to the number.

        Args:
            by: How much.
        """
        return super().add(by) + " more" * (len(self.history) // 4)


def bold(completions, **kwargs):
    return [float(len(completion) % 4 == 0) for completion in completions]


@pytest.fixture(scope="module", autouse=True)
def own_port():
    """vLLM joins a process group; each test process needs a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ["MASTER_ADDR"] = "127.0.0.1"


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> str:
    return agents.save_caller(tmp_path_factory.mktemp("caller"))


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
WORLDS = {
    "tool": {"tools": [add], "reward_funcs": bold},
    "environment": {"environment_factory": Game},
}


@pytest.mark.parametrize(
    ("world", "engine", "peft_config"),
    [
        ("tool", "transformers", None),
        ("environment", "vllm", LORA),
    ],
    ids=["tool", "environment, LoRA, vLLM"],
)
def test_three_steps(config, caller, world, engine, peft_config):
    args = config(
        max_steps=3,
        learning_rate=1e-4,  # the model shall go on calling
        max_completion_length=160,
        step_delimiter="\n\n",
        use_vllm=engine == "vllm",
        vllm_max_model_length=400 if engine == "vllm" else None,
        vllm_gpu_memory_utilization=0.3,
        branch_lookahead=3 if engine == "vllm" else 0,
        branching="random",
        max_tool_calling_iterations=3,
    )
    trainer = IBTPOTrainer(
        caller,
        args=args,
        train_dataset=agents.rows(),
        processing_class=agents.tokenizer(),
        peft_config=peft_config,
        **WORLDS[world],
    )
    batches, compute = [], trainer._generate_and_score_completions

    def record(inputs):
        batches.append(compute(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = record
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and sum(entry["tools/call_frequency"] for entry in logged) > 1
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    if world == "environment":
        assert sum(entry["tree/restored"] for entry in logged) > 0
        assert not Game.alive
    batch = batches[-1]
    assert (batch["tool_mask"] == 0).any()
    if engine == "vllm":
        sampled = batch["completion_mask"] * batch["tool_mask"] == 1
        known = batch.get("sampling_per_token_logps")
        assert known is not None and not known[~sampled].any()
        assert (batch["importance_sampling_ratio"] - 1).abs().max() < 0.5
    check_observations_have_no_gradient(trainer, batch)
    check_forward_is_trl_s(trainer, batch)


def check_observations_have_no_gradient(trainer, batch):
    trainer.model.train()
    observed = batch["completion_mask"] * (1 - batch["tool_mask"])
    gradients = []
    for noise in (0.0, 3.0):
        changed = {**batch, "advantages": batch["advantages"] + noise * observed}
        for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
            if changed.get(name) is not None:
                changed[name] = changed[name] + noise * observed
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, changed)
        loss.backward()
        gradients.append([loss.detach(), *(each.grad for each in trainer.model.parameters() if each.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert gradients[0][1].abs().max() > 0


def check_forward_is_trl_s(trainer, batch):
    assert trainer._packed_forward
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    found = []
    for trainer._packed_forward in (False, True):
        with torch.no_grad():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True
            )
        found.append(logps[batch["completion_mask"] == 1])
    assert torch.allclose(*found, atol=1e-4)
