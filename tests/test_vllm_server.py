"""Trees through a real vLLM server on this machine, with TRL's client.

Not run here: a trainer in server mode. TRL pushes weights to a server over NCCL, which needs a CUDA device, and does
not start without one; the last test says so in TRL's words.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import closing

import pytest
import tiny
import torch
from test_vllm import EvenTokens
from transformers import AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient

from trl_ibtpo.engines.base import RolloutRequest
from trl_ibtpo.engines.vllm_server import VLLMServerEngine
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.steps import StepSplitter
from trl_ibtpo.tree_grower import TreeGrower

SAMPLING = {
    "repetition_penalty": 1.0,
    "temperature": 0.8,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "skip_special_tokens": False,  # as a user's `generation_kwargs` would be passed on
}


@pytest.fixture(scope="module")
def client(model_path, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # The module rather than `vllm serve`, whose command looks for a distribution called vllm; the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
    command += ["--host", "127.0.0.1", "--port", str(port), "--logprobs-mode", "processed_logprobs"]
    command += ["--gpu-memory-utilization", "0.1", "--max-num-seqs", "16"]
    quick = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    quick["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # one thread, as everything here
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **quick})
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                client = VLLMClient(base_url=f"http://127.0.0.1:{port}")
                break
            except OSError:  # what requests raises while nobody listens
                time.sleep(1)
        yield client
    finally:
        server.terminate()
        server.wait(30)


def grow(client, tokenizer, lookahead=0, scorer=None):
    settings = GrowthSettings(max_completion_length=40, branch_lookahead=lookahead)
    splitter = StepSplitter(tokenizer, "e")
    growers = [
        TreeGrower(tokenizer.encode(row["prompt"]), settings, splitter, seed=(7, index))
        for index, row in enumerate(list(tiny.questions())[:3])
    ]
    max_length = client.get_server_info()["model_config"]["max_model_len"]
    with closing(VLLMServerEngine(client, SAMPLING, max_length)) as engine:
        assert engine.max_length == 256
        drive(growers, engine, scorer or EvenTokens())
        assert not engine._in_flight
    assert engine._executor._shutdown
    return growers


def test_trees_repeat_with_their_seeds(client):
    tokenizer = tiny.byte_level_tokenizer()
    first, second = (grow(client, tokenizer) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert [one.tree.trajectory(leaf)[0] for leaf in range(12)] == [
            other.tree.trajectory(leaf)[0] for leaf in range(12)
        ]


def test_lookahead_and_log_probabilities(client, model_path):
    """The log-probs are those of the model at the sampling temperature, on whole trajectories."""
    tokenizer = tiny.byte_level_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(model_path)
    for grower in grow(client, tokenizer, lookahead=4):
        for leaf in range(12):
            token_ids, logprobs = grower.tree.trajectory(leaf)
            assert 0 < len(token_ids) <= 40
            ids = grower.tree.prompt_ids + token_ids
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1].float() / SAMPLING["temperature"]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[-len(token_ids) :, 0]
            assert (expected - torch.tensor(logprobs)).abs().mean() < 0.05


def test_entropies_among_the_likeliest_tokens(client, model_path):
    prompt = tiny.byte_level_tokenizer().encode("What is 3 + 4?")
    with closing(VLLMServerEngine(client, SAMPLING, max_length=256)) as engine:
        engine.submit([RolloutRequest("asks", prompt, 9, seed=1, entropies=True), RolloutRequest("not", prompt, 9, 1)])
        found = {}
        while engine._in_flight:
            found |= {rollout.request_id: rollout for rollout in engine.poll()}
    rollout = found["asks"]
    assert found["not"].entropies is None and found["not"].token_ids == rollout.token_ids
    assert found["not"].logprobs == pytest.approx(rollout.logprobs, abs=1e-3)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(model_path)
        logits = model(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1].float()
    logits = (logits / SAMPLING["temperature"]).topk(20).values
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert (expected - torch.tensor(rollout.entropies)).abs().max() < 0.02


def test_failure_comes_through_and_nothing_hangs(client):
    class Broken(EvenTokens):
        def submit(self, leaves):
            raise RuntimeError("grader is down")

    with pytest.raises(RuntimeError, match="grader is down"):
        grow(client, tiny.byte_level_tokenizer(), scorer=Broken())


def test_weights_need_a_gpu(client):
    """Why no trainer runs in server mode in these tests."""
    with pytest.raises((RuntimeError, NotImplementedError), match=r"weight-transfer engine|needs a CUDA device"):
        client.init_communicator("cpu")
