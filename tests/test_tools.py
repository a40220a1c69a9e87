"""Training with tools and environments over several turns: equal to TRL where no tree is grown."""

import asyncio
import subprocess
import sys
import threading
import time

import agents
import pytest
import tiny
import torch
from trl import GRPOTrainer

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training import time_limit
from trl_ibtpo.training.rewards import RewardFunctionError
from trl_ibtpo.training.time_limit import LimitedCalls, LimitReached, TooManyStuckCalls

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
        '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>',
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
        # Then this package counts anew which completions were cut, and how long the others are.
        (one_call, {"generation_kwargs": {"eos_token_id": [agents.tokenizer().eos_token_id]}}),
    ],
    ids=["one call", "many turns", "one iteration", "budget", "truncated masked", "own stop"],
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


@pytest.mark.parametrize(
    ("rewards", "limit"), [(None, 30.0), (final_value, None)], ids=["own reward, limit", "reward function"]
)
def test_a_flat_tree_with_an_environment_equals_grpo(path, config, rewards, limit):
    compare(
        path,
        config,
        moves,
        rewards,
        {"tool_timeout": limit, "success_reward": None},
        environment_factory=agents.Counter,
    )


def build_tree(path, config, tools, script, fields=None, rewards=lengths):
    """A trainer of trees, whose log holds what its host has counted."""
    args = config(
        **{
            "tree_initial_rollouts": 3,
            "tree_levels": 4,
            "branching": "random",
            "max_steps": 1,
            "max_completion_length": 300,
            **(fields or {}),
        }
    )
    return agents.build(agents.ScriptedIBTPOTrainer, path, args, script, rewards, tools=tools)


def hang(a: int) -> str:
    """
    Take for ever, in one of two ways.

    Args:
        a: Which.
    """
    while a < 5:
        time.sleep(0.01)
    return "never" if threading.Event().wait(1) else "late"


async def hang_async(a: int) -> str:
    """
    Take for ever.

    Args:
        a: Not used.
    """
    await asyncio.sleep(1000)


def test_a_tool_that_hangs_has_failed(path, config):
    def script(rng, turns):
        called = agents.call(rng.choice(["hang", "hang_async"]), a=rng.randint(0, 9))
        return f"{rng.random()}" + (called if turns == 0 else "")

    trainer = build_tree(path, config, [hang, hang_async], script, {"tool_timeout": 0.1, "tree_initial_rollouts": 6})
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["tools/failure_frequency"] == 1 and entry["tools/timeouts"] >= 3
    said = [message["content"] for completion in trainer._logs["completion"] for message in completion]
    assert "{'error': 'hang did not answer within 0.1 seconds.'}" in said
    assert "{'error': 'hang_async did not answer within 0.1 seconds.'}" in said
    assert nothing_runs(trainer)


def nothing_runs(trainer) -> bool:
    """Whether all that tools have started ends within a few seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        threads = [each.name for each in threading.enumerate() if each.name.startswith(("limited-", "tools"))]
        tasks = asyncio.run_coroutine_threadsafe(count_tasks(), trainer.async_loop).result()
        if not threads and not tasks:
            return True
        time.sleep(0.05)
    return False


async def count_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


def test_tools_end_with_the_batch_when_a_reward_function_fails(path, config):
    def script(rng, turns):
        return f"{rng.random()}" + (agents.call("hang_async", a=1) if turns == 0 and rng.random() < 0.5 else "")

    def fail(**kwargs):
        raise ValueError("no")

    # This strategy asks for rewards at once.
    trainer = build_tree(path, config, [hang_async], script, {"branching": "ib"}, rewards=fail)
    with pytest.raises(RewardFunctionError):
        trainer.train()
    assert nothing_runs(trainer)


def test_tools_of_one_trajectory_do_not_hold_up_another(path, config):
    """Tools of different trajectories run at the same time, and never more of them than `tool_concurrency`."""
    running, most, lock = 0, [], threading.Lock()

    def work(a: int) -> str:
        """
        Work for a while.

        Args:
            a: Not used.
        """
        nonlocal running
        with lock:
            running += 1
            most.append(running)
        deadline = time.monotonic() + 10  # a busy machine takes a while to get as far as the last of them
        while max(most) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        with lock:
            running -= 1
        return "done"

    def script(rng, turns):
        return f"{rng.random()}" + (agents.call("work", a=1) if turns == 0 else "")

    trainer = build_tree(path, config, [work], script, {"tree_initial_rollouts": 6})
    for trainer.args.tool_concurrency in (2, 32):
        most.clear()
        wanted = min(trainer.args.tool_concurrency, 6)
        trainer.grow_trees(list(agents.rows(1)))
        assert max(most) == wanted


def test_an_image_from_a_tool_is_refused(path, config):
    def look(a: int) -> list:
        """
        Look.

        Args:
            a: Not used.
        """
        return [{"type": "image", "image": None}]

    trainer = build_tree(path, config, [look], lambda rng, turns: f"{rng.random()}" + agents.call("look", a=1))
    with pytest.raises(ValueError, match=r"A tool returned an image, which is not supported: .* Return text"):
        trainer.train()


def test_calls_that_cannot_be_interrupted_do_not_collect():
    """One more than the limit is an error that says which; interrupted calls do not count."""
    calls = LimitedCalls(0.02, most_stuck=2)
    held = threading.Event()
    for _ in range(5):
        with pytest.raises(LimitReached):
            calls.call("loops", lambda: hang(0))
    deadline = time.monotonic() + 10
    while calls.interrupt_stuck():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(2):
        with pytest.raises(LimitReached):
            calls.call("waits", held.wait)
    with pytest.raises(
        TooManyStuckCalls, match=r"3 calls still run after their limit of 0.02 seconds: waits\. .* timeout"
    ):
        calls.call("waits", held.wait)
    held.set()
    with pytest.raises(ZeroDivisionError):
        calls.call("divides", lambda: 1 // 0)
    assert calls.call("adds", lambda: 2) == 2


def test_what_is_stuck_is_counted_over_all_batches(path, config):
    """Of 64 that may be stuck, a batch here leaves 16."""
    held = threading.Event()

    def wait(a: int) -> str:
        """
        Wait for something that is not Python code.

        Args:
            a: Not used.
        """
        held.wait()

    def script(rng, turns):
        return f"{rng.random()}" + (agents.call("wait", a=1) if turns == 0 else "")

    fields = {"tool_timeout": 0.02, "tree_initial_rollouts": 16, "tree_levels": 1}
    trainer = build_tree(path, config, [wait], script, fields)
    try:
        with pytest.raises(RuntimeError, match=r"65 calls still run after their limit of 0\.02 seconds: wait\."):
            for _ in range(6):
                trainer.grow_trees(list(agents.rows(1)))
    finally:
        held.set()


def test_no_call_begins_after_the_batch_has_ended(path, config):
    """Of two calls in a turn, the second; a reward function failed while the first one ran."""
    calls, ended = [], threading.Event()

    def act(a: int) -> str:
        """
        Act.

        Args:
            a: When.
        """
        calls.append(a)
        ended.wait(10)
        return "done"

    def script(rng, turns):
        return f"{rng.random()}" + (agents.call("act", a=1) + agents.call("act", a=2) if rng.random() < 0.5 else "")

    def fail(**kwargs):
        raise ValueError("no")

    trainer = build_tree(path, config, [act], script, {"branching": "ib", "tree_initial_rollouts": 6}, rewards=fail)
    with pytest.raises(RewardFunctionError):
        trainer.train()
    ended.set()
    deadline = time.monotonic() + 10
    while any(each.name.startswith("tools") for each in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert calls and set(calls) == {1}


def test_a_call_that_never_returns_keeps_no_process_from_ending():
    code = """
import runpy, sys, time
threads = runpy.run_path(sys.argv[1])["DaemonThreads"](1, "tools")
futures = [threads.submit(divmod, 7, 2), threads.submit(divmod, 1, 0)]
futures += [threads.submit(time.sleep, 1000), threads.submit(print, "never")]
assert futures[0].result() == (3, 1) and isinstance(futures[1].exception(), ZeroDivisionError)
time.sleep(0.1)
threads.close()
assert futures[2].running() and futures[3].cancelled()
"""
    run = subprocess.run([sys.executable, "-c", code, time_limit.__file__], timeout=30, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_evaluation_is_trl_s(path, config):
    fields = {**FLAT, "max_completion_length": 300, "max_steps": 1, "num_generations_eval": 2}
    logged = []
    for base, timeout in ((GRPOTrainer, None), (IBTPOTrainer, None), (IBTPOTrainer, 60)):

        class Evaluated(agents.ScriptedTurns, base):
            pass

        args = config(**fields, reward_timeout=timeout)
        trainer = agents.build(
            Evaluated,
            path,
            tiny.grpo_arguments(args) if base is GRPOTrainer else args,
            moves,
            final_value,
            environment_factory=agents.Counter,
            eval_dataset=agents.rows(4),
        )
        found = trainer.evaluate()
        if base is IBTPOTrainer:
            alive = set(agents.Counter.alive)
            trainer.predict(trainer.eval_dataset)
            assert set(agents.Counter.alive) == alive  # those of TRL's trainer, which closes none
        logged.append({name: value for name, value in found.items() if "runtime" not in name and "second" not in name})
    limited = {name: value for name, value in logged[2].items() if not name.endswith("/timeouts")}
    assert logged[1] == pytest.approx(logged[0]) and limited == pytest.approx(logged[0])
    assert logged[0]["eval_reward"] and logged[0]["eval_tools/call_frequency"]
