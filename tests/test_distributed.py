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
from transformers import Qwen3ForCausalLM
from trl.distributed import DistributedBackend

from trl_ibtpo.training import checks

SCENARIOS = (
    "twenty",
    "token_mean",
    "slow",
    "straight",
    "resumed",
    *(f"grpo_{name}" for name in distributed_run.LOSS_TYPES),
)
TOLERANCE = 1e-5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory):
    """What every scenario gave in one process and in two: `runs[name]` is `(one, [first of two, second of two])`."""
    out = tmp_path_factory.mktemp("two")
    root = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), str(root / "distributed_run.py"), model_path, str(out)]
    paths = os.pathsep.join([str(root.parent), os.environ.get("PYTHONPATH", "")])
    with open(out / "log", "w") as log:
        processes = subprocess.Popen(
            [*command, *SCENARIOS, "fsdp2"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
    try:
        made = distributed_run.scenarios(model_path, tmp_path_factory.mktemp("one"))
        one = {name: made[name]() for name in SCENARIOS}
        assert processes.wait(timeout=240) == 0, (out / "log").read_text()[-5000:]
    finally:
        processes.kill()
    both = {name: [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in made}
    for name, (first, _) in both.items():
        first["weights"] = torch.load(out / f"{name}.pt", weights_only=True)
    return {name: (one["twenty" if name == "fsdp2" else name], both[name]) for name in made}


def differences(one: dict, two: list[dict]) -> tuple[float, float]:
    """The largest difference in losses and in weights."""
    losses = [[entry["loss"] for entry in outcome["log"]] for outcome in (one, two[0])]
    assert len(losses[0]) == len(losses[1]) > 0
    assert one["weights"].keys() == two[0]["weights"].keys()
    weights = max(float((value - two[0]["weights"][name]).abs().max()) for name, value in one["weights"].items())
    return float(np.abs(np.subtract(*losses)).max()), weights


@pytest.mark.parametrize("name, steps", [("twenty", 20), ("token_mean", 5), ("fsdp2", 20), ("slow", 3)])
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
        assert len(logged) == 11
        assert logged == pytest.approx({name: one["log"][step][name] for name in logged}, abs=1e-4)
    assert len({entry["tree/generated_tokens"] for entry in two[0]["log"]}) > 1


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
        checks.refuse_sharded_growth(backend, config(**field))
    else:
        with pytest.raises(ValueError, match=message):
            checks.refuse_sharded_growth(backend, config(**field))


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
        checks.refuse_sharded_growth(backend, config(use_vllm=use_vllm), rewards)
        return
    with pytest.raises(
        ValueError, match=r"`reward_funcs` holds a model, which ZeRO-3 shards: .* Use ZeRO-2, or serve"
    ):
        checks.refuse_sharded_growth(backend, config(use_vllm=use_vllm), rewards)
