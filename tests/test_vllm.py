"""Trees inside the real vLLM engine, colocated, on a CPU."""

import asyncio
import os
import random
import socket
from collections import Counter

os.environ["VLLM_CPU_CI_ENV"] = "1"  # a quick start rather than fast steps
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from test_pairs import STEPS, Switch

from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.branching import STRATEGIES, make_strategy
from trl_ibtpo.engines.base import RolloutRequest
from trl_ibtpo.engines.vllm import VLLMEngine
from trl_ibtpo.engines.vllm_cpu import CPUVLLMGeneration
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.latents.noise import latent_noise
from trl_ibtpo.latents.source import LatentSource
from trl_ibtpo.latents.strength import Strength
from trl_ibtpo.steps import StepSplitter
from trl_ibtpo.training.generation import check_room
from trl_ibtpo.training.rewards import RewardFunctionError
from trl_ibtpo.tree_grower import TreeGrower


@pytest.fixture(scope="module", autouse=True)
def own_port():
    """vLLM joins a process group; each test process needs a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ["MASTER_ADDR"] = "127.0.0.1"


VLLM = {**tiny.FAST, "use_vllm": True, "learning_rate": 1e-2, "reproducible_rollouts": True}


def vllm_arguments(output_dir, **overrides) -> IBTPOConfig:
    return IBTPOConfig(str(output_dir), **{**VLLM, **overrides})


def sampled_difference(trainer) -> float:
    """Mean |log-prob of vLLM - log-prob of the model| on tokens that vLLM samples now."""
    engine = trainer._vllm_engine()
    prompts = [trainer.processing_class.encode(row["prompt"]) for row in list(tiny.questions())[:4]]
    engine.submit([RolloutRequest(f"probe{i}", ids, 24, seed=i) for i, ids in enumerate(prompts)])
    differences = []
    while engine._in_flight:
        for rollout in engine.poll():
            ids = prompts[int(rollout.request_id.removeprefix("probe"))] + rollout.token_ids
            with torch.no_grad():
                logits = trainer.accelerator.unwrap_model(trainer.model)(torch.tensor([ids])).logits[0].float()
            expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            differences += (expected[-len(rollout.token_ids) :] - torch.tensor(rollout.logprobs)).abs().tolist()
    return float(np.mean(differences))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A trainer after 3 steps with full weights and untied embeddings, shared by the tests below."""
    folder = tmp_path_factory.mktemp("untied")
    path = tiny.save_tiny(folder / "model", tiny.byte_level_tokenizer())
    trainer = IBTPOTrainer(
        path, tiny.even_length, vllm_arguments(folder / "out", per_device_train_batch_size=24), tiny.questions()
    )
    trainer.trees_at_start = grow(trainer, lambda engine: engine)
    return train_and_check_sync(trainer)


def train_and_check_sync(trainer) -> IBTPOTrainer:
    """Train 3 steps; before every generation vLLM's log-probs must be those of the changed model."""
    assert isinstance(trainer.vllm_generation, CPUVLLMGeneration)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert all(not torch.equal(before[name], trainer.model.get_parameter(name)) for name in trained)
    logged = [entry for entry in trainer.state.log_history if "sampling/sampling_logp_difference/mean" in entry]
    assert len(logged) == 3
    for entry in logged:  # TRL's own measure, on the tokens of the trees
        assert entry["sampling/sampling_logp_difference/mean"] < 0.05
    stale = sampled_difference(trainer)
    trainer._sync_vllm()
    fresh = sampled_difference(trainer)
    assert fresh < 0.05, f"vLLM is {fresh} from the model after a sync"
    assert stale > 2 * fresh, "the last optimizer step changed nothing that vLLM could show"
    return trainer


def test_full_weights_untied(untied):
    assert not untied.model.config.tie_word_embeddings
    assert untied.state.log_history[0]["tree/generated_tokens"] < untied.state.log_history[0]["tree/trajectory_tokens"]


class Shuffled:
    """Passes a random part of what is submitted to vLLM now and the rest later, as other trees' work would."""

    def __init__(self, engine, seed):
        self.engine, self.random, self.waiting = engine, random.Random(seed), []
        self.max_length = engine.max_length

    def generated(self, request_id):
        return self.engine.generated(request_id)

    def partial(self, request_id, start, stop):
        return self.engine.partial(request_id, start, stop)

    def submit(self, requests):
        self.waiting += requests

    def poll(self):
        self.random.shuffle(self.waiting)
        count = self.random.randint(0, len(self.waiting)) if self.engine._in_flight else len(self.waiting)
        self.engine.submit(self.waiting[:count])
        self.waiting = self.waiting[count:]
        return self.engine.poll()

    def abort(self):
        self.waiting = []
        self.engine.abort()


class EvenTokens:
    """Scores a leaf by its number of tokens."""

    def __init__(self):
        self.scored = []

    def submit(self, leaves):
        self.scored += [(tree, number, float(len(ids) % 2 == 0)) for tree, number, ids in leaves]

    def collect(self, wait):
        scored, self.scored = self.scored, []
        return scored

    def cancel(self):
        self.scored = []


def grow(trainer, wrap, lookahead=0, questions=6) -> list:
    settings = GrowthSettings(max_completion_length=40, branch_lookahead=lookahead)
    splitter = StepSplitter(trainer.processing_class, "e")
    growers = [
        TreeGrower(trainer.processing_class.encode(row["prompt"]), settings, splitter, seed=(7, index))
        for index, row in enumerate(list(tiny.questions())[:questions])
    ]
    engine = trainer._vllm_engine()
    drive(growers, wrap(engine), EvenTokens())
    return [[grower.tree.trajectory(leaf)[0] for leaf in range(12)] for grower in growers]


@pytest.mark.parametrize("lookahead", [0, 3])
def test_trees_do_not_depend_on_interleaving(untied, lookahead):
    expected = grow(untied, lambda engine: engine, lookahead)
    for seed in range(2):
        assert grow(untied, lambda engine, seed=seed: Shuffled(engine, seed), lookahead) == expected


def test_seeds_per_request_are_a_choice(untied):
    """They cost throughput, so by default the engine's own generator samples."""
    assert IBTPOConfig.__dataclass_fields__["reproducible_rollouts"].default is False

    def sample(request_seeds):
        engine = VLLMEngine(untied.vllm_generation.llm, {"temperature": 1.0}, request_seeds)
        engine.submit([RolloutRequest(str(index), [5, 6, 7], 20, seed=3) for index in range(2)])
        rollouts = []
        while engine._in_flight:
            rollouts += engine.poll()
        return [rollout.token_ids for rollout in rollouts]

    first, second = sample(request_seeds=True)
    assert first == second
    first, second = sample(request_seeds=False)
    assert first != second


def in_engine(trainer) -> bool:
    return trainer.vllm_generation.llm.llm_engine.has_unfinished_requests()


def test_failing_reward_leaves_the_engine_empty(untied):
    calls = 0

    def fails_later(completions, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ValueError("grader is down")
        return [0.0] * len(completions)

    working = untied.reward_funcs
    untied.reward_funcs = [fails_later]
    try:
        with pytest.raises(RewardFunctionError, match="grader is down"):
            untied.grow_trees(list(tiny.questions())[:3])
    finally:
        untied.reward_funcs = working
    assert not in_engine(untied)
    assert len(untied.grow_trees(list(tiny.questions())[:1])[0].tree.leaves) == 12


def test_trees_grow_on_while_an_async_function_scores_another(untied, event_loop):
    """One prompt's first call is held back until another prompt's tree is complete: a barrier would never end."""
    held, scored, complete = [], Counter(), asyncio.Event()

    async def judge(prompts, completions, **kwargs):
        if not held and len(set(prompts)) == 1:
            held.append(prompts[0])
            await asyncio.wait_for(complete.wait(), 60)
        scored.update(prompts)
        if any(count == 12 for prompt, count in scored.items() if prompt not in held):
            complete.set()
        return tiny.even_length(completions)

    working = untied.reward_funcs
    untied.reward_funcs, untied.async_loop = [judge], event_loop
    try:
        rows = [{"prompt": "What is 3 + 4?"}, {"prompt": "What is 5 + 1?"}]
        grown = untied.grow_trees(rows)
    finally:
        untied.reward_funcs, untied.async_loop = working, None
    assert len(held) == 1 and complete.is_set()
    assert [len(each.tree.leaves) for each in grown] == [12, 12] and set(scored.values()) == {12}


def test_interrupt_leaves_the_engine_empty(untied):
    class Interrupted(EvenTokens):
        def submit(self, leaves):
            raise KeyboardInterrupt

    growers = [TreeGrower([5, 6, 7], GrowthSettings(max_completion_length=20), StepSplitter(untied.processing_class))]
    with pytest.raises(KeyboardInterrupt):
        drive(growers, VLLMEngine(untied.vllm_generation.llm, {}), Interrupted())
    assert not in_engine(untied)


def test_prefix_cache_is_used(untied):
    """Long enough prefixes come from the cache in whole blocks (128 tokens on a CPU)."""
    engine = untied._vllm_engine()
    prompt = [5 + index % 200 for index in range(200)]
    for name in ("first", "second"):
        engine.submit([RolloutRequest(name, prompt, 2, seed=0)])
        while engine._in_flight:
            engine.poll()
    assert engine.cached_tokens >= 128 and engine.prefix_tokens == 400


def test_latents_steer_the_requests_that_carry_one(untied):
    """Log-probabilities are those of the shifted logits, alone and beside plain requests; most forks lie before it."""
    model = untied.accelerator.unwrap_model(untied.model)
    steering = LatentSource(Strength(1.0, 6.0), seed=3).attach(model, "softmax")
    weight = steering.acting.injection.logits
    weight.normal_(0, 3 / 128**0.5, generator=torch.Generator().manual_seed(0))  # 3 nats: a wrong place would show
    llm = untied.vllm_generation.llm
    engine = VLLMEngine(llm, {"temperature": 0.8}, latents=steering)
    prompts = [[5 + (7 * row + place) % 200 for place in range(9 + row)] for row in range(6)]
    plain = VLLMEngine(llm, {"temperature": 0.8})
    requests = [
        RolloutRequest(row, ids, 12 + 3 * row, seed=row, latent=None if row == 2 else latent_noise([row]), fork=9)
        for row, ids in enumerate(prompts)
    ]
    untied._sync_vllm()
    engine.submit(requests)
    rollouts = {}
    while engine._in_flight:
        rollouts |= {rollout.request_id: rollout for rollout in engine.poll()}
    for request in requests:
        rollout, ids = rollouts[request.request_id], request.prefix_ids + rollouts[request.request_id].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            steered = logits.clone()
            if request.latent is not None:
                since = torch.arange(1, len(ids)) - request.fork
                gates = torch.where(since >= 0, torch.exp(-since / 6.0), 0.0)
                steered += gates[:, None] * steering.acting.injection(torch.tensor(request.latent))
        found = torch.tensor(rollout.logprobs)
        expected, without = (
            torch.log_softmax(each / 0.8, -1).gather(1, torch.tensor(ids[1:])[:, None])[-len(found) :, 0]
            for each in (steered, logits)
        )
        assert (found - expected).abs().mean() < 0.05, request.request_id
        assert request.latent is None or (found - without).abs().max() > 0.5
    plain.submit([requests[2]])
    alone = []
    while plain._in_flight:
        alone += plain.poll()
    assert alone[0].token_ids == rollouts[2].token_ids and alone[0].logprobs == pytest.approx(rollouts[2].logprobs)
    with pytest.raises(ValueError, match=r"request 0 has a latent, but vLLM has no place"):
        plain.submit(requests[:1])
    with pytest.raises(ValueError, match=r"`latent_mode` is 'psa', which vLLM has no place for"):
        VLLMEngine(llm, {}, latents=LatentSource(Strength()).attach(model, "psa"))


def test_more_prompt_tokens_than_fit_into_one_step(untied):
    """The engine computes 4096 prompt tokens a step; seeded requests beyond that wait for the next one."""
    prompts = [[5 + (index * 7 + place) % 300 for place in range(180)] for index in range(24)]

    def sample(prompts):
        engine, found = untied._vllm_engine(), {}
        engine.submit([RolloutRequest(str(prompt[0]), prompt, 3, seed=prompt[0]) for prompt in prompts])
        while engine._in_flight:
            found |= {rollout.request_id: rollout.token_ids for rollout in engine.poll()}
        return found

    untied.vllm_generation.llm.reset_prefix_cache()
    together = sample(prompts)
    assert together == {key: ids for prompt in prompts for key, ids in sample([prompt]).items()}


def test_every_branching_trains_three_steps(untied):
    pairs = [(branching, "ibtpo") for branching in STRATEGIES]
    switch = Switch(pairs, levels=9, levels_of_rollouts=3)  # twelve leaves: 4 + 8 rounds of one, or 4 (1 + 2 of one)
    before, untied.args.max_steps = untied.args.max_steps, STEPS * len(pairs)
    untied.add_callback(switch)
    try:
        switch.start(untied)
        untied.train()
    finally:
        untied.remove_callback(switch)
        untied.args.max_steps, untied.args.branching, untied.args.tree_levels = before, "ib", 9
        untied._strategy, untied._branching = make_strategy("ib"), "ib"
    logs = [entry for entry in untied.state.log_history if "tree/generated_tokens" in entry]
    assert len(switch.weights) == len(pairs) and len(logs) == STEPS * len(pairs)
    for number, ((branching, _), weights) in enumerate(zip(pairs, switch.weights, strict=True)):
        assert any(not torch.equal(each, switch.initial[name]) for name, each in weights.items()), branching
        for log in logs[STEPS * number : STEPS * (number + 1)]:
            assert log["sampling/sampling_logp_difference/mean"] < 0.05, branching
            assert (log["tree/generated_tokens"] < log["tree/trajectory_tokens"]) == (branching != "independent")


@pytest.mark.parametrize("source", ["exact", "truncated"])
def test_entropies_that_forks_are_chosen_by(untied, monkeypatch, source):
    """A pass of the policy gives those of the whole vocabulary, vLLM those among its 20 likeliest tokens."""
    monkeypatch.setattr(untied.args, "fork_entropy", source)
    for name, value in (("branching", "entropy_fork"), ("tree_levels", 3)):
        monkeypatch.setattr(untied.args, name, value)
    monkeypatch.setattr(untied, "_branching", "entropy_fork")
    monkeypatch.setattr(untied, "_strategy", make_strategy("entropy_fork"))
    tree = untied.grow_trees([tiny.questions()[0]])[0].tree
    assert not in_engine(untied) and len(tree.leaves) == 12
    for leaf in range(12):
        ids, found = tree.trajectory(leaf)[0], tree.trajectory_entropies(leaf)
        if tree.rounds[leaf]:
            assert np.isnan(found[tree.ends()[tree.branch_steps[leaf]] :]).all()
            continue
        with torch.no_grad():
            logits = untied.model(torch.tensor([tree.prompt_ids + ids])).logits[0, len(tree.prompt_ids) - 1 : -1]
        logits = logits.float() / untied.args.temperature
        if source == "truncated":
            logits = logits.topk(20).values
        expected = torch.distributions.Categorical(logits=logits).entropy().numpy()
        np.testing.assert_allclose(found, expected, atol=0.02)


def test_branches_that_vllm_cannot_steer(untied, monkeypatch):
    """Pseudo self-attention: vLLM samples the initial rollouts, and transformers the branches, with latents."""
    for name, value in {"branching": "entropy_fork", "tree_levels": 3, "latent_mode": "psa"}.items():
        monkeypatch.setattr(untied.args, name, value)
    for name, value in {"_branching": "entropy_fork", "_strategy": make_strategy("entropy_fork")}.items():
        monkeypatch.setattr(untied, name, value)
    for name in ("_latent_source", "_steering"):
        monkeypatch.setattr(untied, name, None)
    untied._attach_latents()
    tree = untied.grow_trees([tiny.questions()[0]])[0].tree
    assert not in_engine(untied) and len(tree.leaves) == 12
    differences = {True: [], False: []}
    for leaf in range(12):
        ids, logprobs = tree.trajectory(leaf)
        with torch.no_grad():
            logits = untied.model(torch.tensor([tree.prompt_ids + ids])).logits[0, len(tree.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(logits.float() / untied.args.temperature, -1).gather(
            1, torch.tensor(ids)[:, None]
        )
        start = tree.ends()[tree.branch_steps[leaf]]
        found = (expected[:, 0] - torch.tensor(logprobs)).abs().tolist()
        differences[tree.rounds[leaf] > 0] += found[start:]
    # Without a latent transformers would give what the model gives here.
    assert np.mean(differences[False]) < 0.05 and np.max(differences[True]) > 0.02


def test_prompt_that_leaves_no_room_is_named(untied):
    row = {"prompt": "What is 3 + 4? " * 60, "letter": "a"}
    with pytest.raises(ValueError, match=r"A prompt has \d+ tokens, but vLLM's context holds 256 .*`vllm_max_model"):
        untied.grow_trees([row])
    assert not in_engine(untied)


def test_room():
    assert check_room(10, 32, 256) == 32
    assert check_room(250, 32, 256) == 6
    with pytest.raises(ValueError, match="Set `vllm_max_model_length` to at least 288"):
        check_room(256, 32, 256)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=8, target_modules="all-linear")], ids=["full", "lora"])
def test_tied_embeddings(tmp_path, peft_config):
    """Last in this file: an engine that ends takes vLLM's process group with it, the shared engine's too."""
    path = tiny.save_tiny(tmp_path / "model", tiny.byte_level_tokenizer(), tie_word_embeddings=True)
    arguments = vllm_arguments(tmp_path / "out", learning_rate=1e-2 if peft_config is None else 0.1)
    train_and_check_sync(IBTPOTrainer(path, tiny.even_length, arguments, tiny.questions(), peft_config=peft_config))


def test_trees_do_not_depend_on_max_num_seqs(tmp_path, untied):
    """The same untrained model in an engine that runs half as many sequences at a time; at the end, as above."""
    arguments = vllm_arguments(tmp_path, per_device_train_batch_size=12)
    trainer = IBTPOTrainer(untied.model.name_or_path, tiny.even_length, arguments, tiny.questions())
    limits = [each.vllm_generation.llm.llm_engine.vllm_config.scheduler_config for each in (untied, trainer)]
    assert [limit.max_num_seqs for limit in limits] == [24, 12]
    assert grow(trainer, lambda engine: engine) == untied.trees_at_start
