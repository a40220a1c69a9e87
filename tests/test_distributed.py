"""Two real processes (gloo, CPU) against one that holds the trees of both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_run
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from test_budget import by_definition
from transformers import Qwen3ForCausalLM
from trl.distributed import DistributedBackend

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training import generation_checks
from trl_ibtpo.training.checkpoints import defect

SCENARIOS = (
    "twenty",
    "token_mean",
    "slow",
    "straight",
    "resumed",
    *(f"grpo_{name}" for name in distributed_run.LOSS_TYPES),
)
SHARDED = {"fsdp2_sharded": "FSDPQwen3ForCausalLM", "fsdp2_full": "FSDPQwen3ForCausalLM"}
ZERO = {"zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}
TOLERANCE = 1e-5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(model_path: str, out: Path, *names: str) -> subprocess.Popen:
    """Two processes that run these scenarios; their output goes to `OUT/log`."""
    root = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), str(root / "distributed_run.py"), model_path, str(out), *names]
    paths = os.pathsep.join([str(root.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with open(out / "log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory):
    """What every scenario gave in one process and in two: `runs[name]` is `(one, [first of two, second of two])`.

    The first two processes end with `killed`; other two go on from what they left.
    """
    out = tmp_path_factory.mktemp("two")
    both = [*SCENARIOS, "uneven", "refused", *SHARDED]
    processes = start(model_path, out, *both, "killed")
    try:
        made = distributed_run.scenarios(model_path, tmp_path_factory.mktemp("one"))
        one = {name: made[name]() for name in SCENARIOS}
        assert processes.wait(timeout=600) == 1, (out / "log").read_text()[-5000:]
        left = {path.name: defect(path) for path in (out / "output-killed").glob("checkpoint-*")}
        after = ["continued", *ZERO]
        processes = start(model_path, out, *after)
        assert processes.wait(timeout=600) == 0, (out / "log").read_text()[-5000:]
    finally:
        processes.kill()
    results = {"left": left}
    for name in both + after:
        two = [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        two[0]["weights"] = torch.load(out / f"{name}.pt", weights_only=True)
        results[name] = (one.get(name, one["straight"]), two)
    return results


def differences(one: dict, two: list[dict]) -> tuple[float, float]:
    """The largest difference in losses and in weights."""
    losses = [[entry["loss"] for entry in outcome["log"]] for outcome in (one, two[0])]
    assert len(losses[0]) == len(losses[1]) > 0
    assert one["weights"].keys() == two[0]["weights"].keys()
    weights = max(float((value - two[0]["weights"][name]).abs().max()) for name, value in one["weights"].items())
    return float(np.abs(np.subtract(*losses)).max()), weights


@pytest.mark.parametrize("name, steps", [("twenty", 20), ("token_mean", 5), ("slow", 3)])
def test_two_processes_equal_one(runs, model_path, name, steps):
    """The same trees, losses and weights; `slow` has a slow reward on one rank and equal rewards on the other."""
    one, two = runs[name]
    assert len(one["log"]) == steps
    assert one["trees"] == [first + second for first, second in zip(two[0]["trees"], two[1]["trees"], strict=True)]
    loss, weight = differences(one, two)
    print(f"{name}, {steps} steps: largest difference in loss {loss:.1e}, in weights {weight:.1e}")
    assert loss < TOLERANCE and weight < TOLERANCE
    before = Qwen3ForCausalLM.from_pretrained(model_path).state_dict()
    assert max(float((value - before[name]).abs().max()) for name, value in one["weights"].items()) > 100 * TOLERANCE


@pytest.mark.parametrize("name, wrapper", [*SHARDED.items(), *ZERO.items()])
def test_sharded_processes_equal_one(runs, name, wrapper):
    """Two steps, a checkpoint, and two steps of new trainers that resume, with weights or optimizer in shards."""
    one, two = runs[name]
    assert [outcome["wrapper"] for outcome in two] == [wrapper] * 2
    assert all((outcome["sharded"] > 0) == (name != "zero2") for outcome in two)
    assert len(one["trees"]) == 4
    assert one["trees"] == [first + second for first, second in zip(two[0]["trees"], two[1]["trees"], strict=True)]
    assert max(differences(one, two)) < TOLERANCE


def test_killed_while_a_sharded_checkpoint_is_written(runs):
    """The one that was not written to the end is left out, and the run ends as if it had not been killed."""
    assert runs["left"].keys() == {"checkpoint-2", "checkpoint-4"}
    assert runs["left"]["checkpoint-2"] is None and "trainer_state.json" in runs["left"]["checkpoint-4"]
    one, two = runs["continued"]
    assert len(two[0]["trees"]) == 2 and len(two[0]["log"]) == 4
    assert max(differences(one, two)) < TOLERANCE


def test_processes_that_cannot_resume_say_so_alike(runs):
    """A process that raised alone would leave the others waiting for it."""
    _, (first, second) = runs["refused"]
    assert first["told"] == second["told"]
    missing, different = first["told"]
    assert missing.startswith("Process 1 of 2 cannot resume, so none does. `resume_from_checkpoint` is True, but")
    assert "-elsewhere) holds no whole checkpoint" in missing
    assert "checkpoint-4, process 1: none, it starts anew). Give the path of one" in different


def test_tree_metrics_cover_both_processes(runs):
    """Against the trees themselves, and all of them against one process."""
    one, two = runs["slow"]
    for step, entry in enumerate(two[0]["log"]):
        trees = [tree for outcome in two for tree in outcome["trees"][step]]
        assert trees[0]["success"] == [1.0] * distributed_run.LEAVES  # the first process has nothing to learn from
        assert entry["tree/generated_tokens"] == np.mean([tree["generated"] for tree in trees])
        assert entry["tree/average_success"] == np.mean([tree["success"] for tree in trees])
        assert entry["tree/effective_rate"] == np.mean([len(set(tree["success"])) > 1 for tree in trees])
        logged = {name: value for name, value in entry.items() if name.startswith(("tree/", "ib/", "advantages/"))}
        assert len(logged) == 14  # not `tree/fresh_minus_fresh`, which needs siblings
        assert logged == pytest.approx({name: one["log"][step][name] for name in logged}, abs=1e-4)
    assert len({entry["tree/generated_tokens"] for entry in two[0]["log"]}) > 1


def test_uneven_trees_fill_each_process_and_have_their_own_statistics(runs):
    """Trees of a process share its rows out among themselves; the deviation of the batch is that of both."""
    _, two = runs["uneven"]
    for step in range(2):
        seen = [outcome["trees"][step] for outcome in two]
        assert [sum(each["sizes"]) for each in seen] == [3 * distributed_run.LEAVES] * 2
        sizes, rewards, advantages = ([row for each in seen for row in each[key]] for key in seen[0])
        expected, is_zero = by_definition(rewards, sizes, [1.0], "batch")
        np.testing.assert_allclose(advantages, expected, atol=1e-5)
        assert two[0]["log"][step]["frac_reward_zero_std"] == is_zero.mean() == 0
        assert two[0]["log"][step]["tree/leaves_std"] == pytest.approx(np.std(sizes), rel=1e-5)
    assert any(len(set(each["sizes"])) > 1 for outcome in two for each in outcome["trees"])


def test_resumed_processes_continue_exactly(runs):
    (one, two), (_, straight) = runs["resumed"], runs["straight"]
    assert [entry["loss"] for entry in two[0]["log"]] == [entry["loss"] for entry in straight[0]["log"]]
    for name, value in straight[0]["weights"].items():
        assert torch.equal(two[0]["weights"][name], value), name
    assert max(differences(one, two)) < TOLERANCE


def test_slow_rank_was_slow_and_only_one(runs):
    one, two = runs["slow"]
    assert two[1]["sleeps"] > 0 and two[0]["sleeps"] == one["sleeps"] == 0


def test_where_trl_itself_depends_on_the_number_of_processes(runs):
    """The control, on given completions: `bnpo` alone averages over the tokens of each process first."""
    equal = {name: max(differences(*runs[f"grpo_{name}"])) < TOLERANCE for name in distributed_run.LOSS_TYPES}
    assert equal == {**dict.fromkeys(distributed_run.LOSS_TYPES, True), "bnpo": False}


@pytest.mark.parametrize(
    "field, processes_here, message",
    [
        ({}, "4", "`vllm_server_host` is '0.0.0.0', which means itself on each machine .*8 processes, 4 of them"),
        ({"vllm_server_host": "localhost"}, "4", r"`vllm_server_base_url='http://10\.0\.0\.5:8000'`"),
        ({"vllm_server_base_url": "http://127.0.0.1:8000"}, "4", "`vllm_server_base_url` is 'http://127"),
        ({"vllm_server_base_url": "http://trainer-0:8000"}, "4", None),
        ({"vllm_server_host": "10.0.0.5"}, "4", None),
        ({}, "8", None),
        ({}, None, None),
        ({"vllm_mode": "colocate"}, "4", None),
    ],
)
def test_server_address_that_means_another_machine_on_each(config, monkeypatch, field, processes_here, message):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    args = config(**{"use_vllm": True, "vllm_mode": "server", **field})
    monkeypatch.setattr(type(args), "world_size", 8)
    if processes_here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes_here)
    if message is None:
        generation_checks.check_server_address(args)
    else:
        with pytest.raises(ValueError, match=message):
            IBTPOTrainer("absent", tiny.even_length, args, tiny.questions())


@pytest.mark.parametrize(
    "backend_changes, field, message",
    [
        ({"fsdp_version": 1}, {}, "fsdp_version: 2"),
        ({"zero_stage": 3}, {"ds3_gather_for_generation": False}, "`ds3_gather_for_generation` is False"),
        ({"fsdp_version": 2}, {}, None),
        ({"zero_stage": 3}, {}, None),
        ({"zero_stage": 2}, {"ds3_gather_for_generation": False}, None),
        ({"fsdp_version": 1}, {"use_vllm": True}, None),
    ],
)
def test_sharding_that_would_wait_for_ever_is_refused(config, backend_changes, field, message):
    backend = DistributedBackend(Accelerator(cpu=True))
    for name, value in backend_changes.items():
        setattr(backend, name, value)
    if message is None:
        generation_checks.refuse_sharded_growth(backend, config(**field))
    else:
        with pytest.raises(ValueError, match=message):
            generation_checks.refuse_sharded_growth(backend, config(**field))


@pytest.mark.parametrize(
    "backend_changes, model, refused",
    [
        ({"zero_stage": 3}, True, True),
        ({"zero_stage": 3}, False, False),
        ({"zero_stage": 2}, True, False),
        ({"fsdp_version": 2}, True, False),  # TRL leaves it whole
        ({}, True, False),
    ],
)
@pytest.mark.parametrize("use_vllm", [False, True])
def test_a_sharded_reward_model_is_refused(config, backend_changes, model, refused, use_vllm):
    backend = DistributedBackend(Accelerator(cpu=True))
    for name, value in backend_changes.items():
        setattr(backend, name, value)
    rewards = [tiny.even_length, torch.nn.Linear(1, 1)] if model else [tiny.even_length]
    if not refused:
        generation_checks.refuse_sharded_growth(backend, config(use_vllm=use_vllm), rewards)
        return
    with pytest.raises(
        ValueError, match=r"`reward_funcs` holds a model, which ZeRO-3 shards: .* Use ZeRO-2, or serve"
    ):
        generation_checks.refuse_sharded_growth(backend, config(use_vllm=use_vllm), rewards)
