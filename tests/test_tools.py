"""Training with tools and environments over several turns: equal to TRL where no tree is grown."""

import agents
import pytest
import tiny
import torch

FLAT = {"tree_levels": 1, "ib_coef": 0.0, "tree_initial_rollouts": 4, "per_device_train_batch_size": 8}


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> str:
    return tiny.save_tiny(tmp_path_factory.mktemp("agent"), agents.tokenizer())


def one_call(rng, turns):
    if turns == 0:
        return f"Let me see {rng.random()}.\n\n" + agents.call("add", a=rng.randint(0, 9), b=1)
    return f"It is {rng.randint(0, 9)}."


def many_turns(rng, turns):
    """Several calls in a turn and several turns, of tools that work, are not there, fail, or get wrong arguments."""
    calls = [
        agents.call("add", a=rng.randint(0, 9), b=1),
        agents.call("double", a=rng.randint(0, 9)),
        agents.call("explode", what="luck"),
        agents.call("missing", a=1),
        agents.call("add", a=1),
        agents.call("double", b=1),
        "<tool_call>{not json</tool_call>",
    ]
    if turns and rng.random() < 0.4:
        return f"It is {rng.randint(0, 9)}."
    return f"Now {rng.random()}." + "\n".join(rng.choices(calls, k=rng.randint(1, 3)))


def too_much(rng, turns):
    """Observations that fill the budget, or would not fit."""
    if rng.random() < 0.2:
        return f"Done {rng.random()}."
    return f"{rng.random()}" + agents.call("much", a=rng.choice([1, 20, 60, 120]))


def lengths(completions, completion_ids, prompts, seed, **kwargs):
    assert all(isinstance(completion, list) and completion[0]["role"] == "assistant" for completion in completions)
    return [
        len(ids) / 100 + len(str(completion)) / 1000 + len(str(prompt)) / 50 + number
        for completion, ids, prompt, number in zip(completions, completion_ids, prompts, seed, strict=True)
    ]


def compare(path, config, script, rewards, fields=None, **kwargs):
    """Train both trainers on the same turns and return them."""
    fields = {**FLAT, "max_completion_length": 300, "max_steps": 2, "packed_forward": False, **(fields or {})}
    args = config(**fields)
    trl = agents.build(agents.ScriptedGRPOTrainer, path, tiny.grpo_arguments(args), script, rewards, **kwargs)
    own = agents.build(agents.ScriptedIBTPOTrainer, path, args, script, rewards, **kwargs)
    for trainer in (trl, own):
        torch.manual_seed(0)
        trainer.train()
    for expected, found in zip(trl.batches, own.batches, strict=True):
        for name in ("prompt_ids", "completion_ids", "completion_mask", "tool_mask"):
            assert torch.equal(expected[name], found[name]), name
        weight = expected["completion_mask"] * expected["tool_mask"]
        advantages = expected["advantages"][:, None].expand_as(weight)
        assert torch.allclose(advantages * weight, found["advantages"] * weight, atol=1e-6)
        observed = expected["completion_mask"] * (1 - expected["tool_mask"])
        assert not (found["advantages"] * observed).any()
    logged = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (trl, own)]
    for expected, found in zip(*logged, strict=True):
        for name in expected:
            if name not in ("step_time", "epoch") and "time" not in name:
                assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    for one, other in zip(trl.model.parameters(), own.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert list(trl._logs["completion"]) == list(own._logs["completion"])
    return trl, own


TOOLS = [agents.add, agents.double, agents.explode, agents.much]


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        (one_call, {}),
        (many_turns, {}),
        (many_turns, {"max_tool_calling_iterations": 1}),
        (too_much, {"max_completion_length": 150}),
        (too_much, {"max_completion_length": 150, "mask_truncated_completions": True}),
    ],
    ids=["one call", "many turns", "one iteration", "budget", "truncated masked"],
)
def test_a_flat_tree_with_tools_equals_grpo(path, config, script, fields):
    _, own = compare(path, config, script, lengths, fields, tools=TOOLS)
    assert any(batch["tool_mask"].min() == 0 for batch in own.batches)


def moves(rng, turns):
    if turns and rng.random() < 0.3:
        return f"Enough {rng.random()}."
    calls = [
        agents.call("add", by=rng.randint(1, 5)),
        agents.call("multiply", by=rng.randint(2, 3)),
        agents.call("add", to=3),
    ]
    return f"Move {rng.random()}.\n\n" + "".join(rng.choices(calls, k=rng.randint(1, 2)))


def final_value(environments, prompts, **kwargs):
    assert all("The number is" in str(prompt) for prompt in prompts)
    return [environment.value / 7 for environment in environments]


@pytest.mark.parametrize("rewards", [None, final_value], ids=["own reward", "reward function"])
@pytest.mark.parametrize("limit", [None, 30.0], ids=["no limit", "limit"])
def test_a_flat_tree_with_an_environment_equals_grpo(path, config, rewards, limit):
    compare(
        path,
        config,
        moves,
        rewards,
        {"tool_timeout": limit, "success_reward": None},
        environment_factory=agents.Counter,
    )
