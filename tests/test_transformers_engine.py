"""Rollouts with transformers: their log-probabilities are those of a plain forward pass on each rollout alone."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from trl_ibtpo.engines.base import RolloutRequest
from trl_ibtpo.engines.transformers import TransformersEngine

TOKENIZER = tiny.byte_level_tokenizer()
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
PREFIXES = [[5], [70, 71, 72, 73, 74, 75, 76, 77], [100, 200, 300], list(range(40, 60)), [EOS, 9, PAD, 9]]


@pytest.fixture(scope="module")
def model():
    model = tiny.tiny_qwen3(TOKENIZER).eval()
    with torch.no_grad():  # far from uniform, so that wrong positions, masks or truncations show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)
    return model


def generation_config(**changes) -> GenerationConfig:
    """As TRL makes it in `GRPOTrainer.__init__`, with its default sampling parameters."""
    generation_kwargs = {
        "max_new_tokens": 24,
        "do_sample": True,
        "pad_token_id": PAD,
        "bos_token_id": TOKENIZER.bos_token_id,
        "eos_token_id": [EOS],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "cache_implementation": None,
    }
    return GenerationConfig(**{**generation_kwargs, **changes}, disable_compile=True)


def requests_of(prefixes, max_tokens) -> list[RolloutRequest]:
    budgets = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prefixes)
    return [
        RolloutRequest(f"request {number}", prefix, budget, seed=number)
        for number, (prefix, budget) in enumerate(zip(prefixes, budgets, strict=True))
    ]


def rollouts_of(model, config, prefixes, max_tokens, seed=0, request_seeds=False):
    torch.manual_seed(seed)
    engine = TransformersEngine(model, config, PAD, request_seeds=request_seeds)
    requests = requests_of(prefixes, max_tokens)
    engine.submit(requests[:2])
    engine.submit(requests[2:])
    rollouts = engine.poll()
    assert [rollout.request_id for rollout in rollouts] == [request.request_id for request in requests]
    assert engine.poll() == []
    return rollouts


def expected_logprobs(model, prefix, token_ids, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """Log-probabilities from one unpadded forward pass, with the truncations written out."""
    with torch.no_grad():
        logits = model(torch.tensor([prefix + token_ids])).logits[0, len(prefix) - 1 : -1].double()
    logprobs = []
    for row, token_id in zip(logits / temperature, token_ids, strict=True):
        probabilities, order = row.softmax(-1).sort(descending=True)
        kept = len(row)
        if top_k:
            kept = min(kept, top_k)
            probabilities = probabilities[:kept] / probabilities[:kept].sum()
        if top_p < 1:  # as many of the most likely tokens as it takes to reach top_p
            kept = min(kept, int((probabilities.cumsum(-1) < top_p).sum()) + 1)
            probabilities = probabilities[:kept] / probabilities[:kept].sum()
        kept = min(kept, int((probabilities >= min_p * probabilities[0]).sum()))
        probabilities = probabilities[:kept] / probabilities[:kept].sum()
        position = order.tolist().index(token_id)
        logprobs.append(probabilities[position].log().item() if position < kept else -math.inf)
    return logprobs


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95},  # the paper's
        {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_logprobs_are_those_of_the_sampled_distribution(model, sampling):
    rollouts = rollouts_of(model, generation_config(**sampling), PREFIXES, [24, 3, 17, 1, 9])
    for prefix, budget, rollout in zip(PREFIXES, [24, 3, 17, 1, 9], rollouts, strict=True):
        assert 1 <= len(rollout.token_ids) <= budget and len(rollout.token_ids) == len(rollout.logprobs)
        assert all(type(value) is int for value in rollout.token_ids)
        assert rollout.logprobs == pytest.approx(
            expected_logprobs(model, prefix, rollout.token_ids, **sampling), abs=1e-4
        )
    assert min(min(rollout.logprobs) for rollout in rollouts) < -0.1  # something was at stake


def test_each_request_ends_at_its_own_budget(model):
    budgets = [24, 3, 17, 1, 9]
    config = generation_config(eos_token_id=[len(TOKENIZER) - 1])
    for seed in range(3):
        for budget, rollout in zip(budgets, rollouts_of(model, config, PREFIXES, budgets, seed), strict=True):
            assert len(rollout.token_ids) <= budget
            assert len(rollout.token_ids) == budget or rollout.token_ids[-1] == len(TOKENIZER) - 1


@pytest.mark.parametrize("stop_ids", [list(range(40)), 7, [EOS, PAD, *range(100, 140)]])
def test_every_stop_token_ends_a_rollout_and_belongs_to_it(model, stop_ids):
    """Among the cases: one id without a list, and padding that is itself a stop token."""
    stops = {stop_ids} if isinstance(stop_ids, int) else set(stop_ids)
    prefixes = PREFIXES * 4
    budgets = [24, 3, 17, 1, 9] * 4
    config = generation_config(eos_token_id=stop_ids, temperature=2.0)
    ended_with = set()
    for seed in range(3):
        for budget, rollout in zip(budgets, rollouts_of(model, config, prefixes, budgets, seed), strict=True):
            assert not stops & set(rollout.token_ids[:-1])
            if len(rollout.token_ids) < budget:
                assert rollout.token_ids[-1] in stops
                ended_with.add(rollout.token_ids[-1])
    if not isinstance(stop_ids, int):
        assert len(ended_with) > 3
    for prefix, rollout in zip(prefixes, rollouts_of(model, config, prefixes, budgets), strict=True):
        assert rollout.logprobs == pytest.approx(
            expected_logprobs(model, prefix, rollout.token_ids, temperature=2.0), abs=1e-4
        )


def test_most_likely_continuation_is_that_of_a_single_unpadded_prompt(model):
    """Left padding, other requests and budgets change nothing: top_k = 1 gives what `generate` gives alone."""
    budgets = [24, 5, 17, 1, 9]
    rollouts = rollouts_of(model, generation_config(top_k=1), PREFIXES, budgets)
    for prefix, budget, rollout in zip(PREFIXES, budgets, rollouts, strict=True):
        prompt = torch.tensor([prefix])
        alone = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=generation_config(do_sample=False, max_new_tokens=budget, temperature=None, top_p=None),
        )
        assert rollout.token_ids == alone[0, len(prefix) :].tolist()
        assert rollout.logprobs == [0.0] * len(rollout.token_ids)  # one token to choose from


def test_lora_model(model):
    torch.manual_seed(1)
    lora = get_peft_model(
        tiny.tiny_qwen3(TOKENIZER).eval(),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    rollouts = rollouts_of(lora, generation_config(temperature=0.7), PREFIXES, 12)
    with lora.disable_adapter():
        base = [
            expected_logprobs(lora, prefix, rollout.token_ids, temperature=0.7)
            for prefix, rollout in zip(PREFIXES, rollouts, strict=True)
        ]
    for prefix, rollout, without in zip(PREFIXES, rollouts, base, strict=True):
        expected = expected_logprobs(lora, prefix, rollout.token_ids, temperature=0.7)
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
        assert rollout.logprobs != pytest.approx(without, abs=1e-3)  # the adapter was on


@pytest.mark.parametrize(
    "checkpoint", [{"temperature": 0.1, "top_k": 3, "top_p": 0.1}, {"min_p": 0.9}, {"eos_token_id": list(range(300))}]
)
def test_defaults_of_the_checkpoint_do_not_change_the_distribution(model, monkeypatch, checkpoint):
    """`generate` fills what a config leaves open with the checkpoint's own generation config."""
    config = generation_config(temperature=1.5)
    expected = rollouts_of(model, config, PREFIXES, 12)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**checkpoint))
    assert rollouts_of(model, config, PREFIXES, 12) == expected


@pytest.mark.parametrize("request_seeds", [False, True])
def test_samples_follow_the_distribution(model, request_seeds):
    """The first token of many rollouts, against its probability: 400 draws, so the error is about .025."""
    config = generation_config(temperature=2.0, top_k=4)
    rollouts = rollouts_of(model, config, [[70, 71, 72]] * 400, 1, request_seeds=request_seeds)
    first = [rollout.token_ids[0] for rollout in rollouts]
    assert len(set(first)) == 4
    for token_id in set(first):
        probability = math.exp(expected_logprobs(model, [70, 71, 72], [token_id], temperature=2.0, top_k=4)[0])
        assert first.count(token_id) / 400 == pytest.approx(probability, abs=0.1)


def test_rollouts_repeat_with_the_global_seed_and_leave_the_config_alone(model):
    config = generation_config(temperature=0.7, top_k=20, top_p=0.95)
    before = config.to_dict()
    first = rollouts_of(model, config, PREFIXES, 12)
    assert first == rollouts_of(model, config, PREFIXES, 12)
    assert first != rollouts_of(model, config, PREFIXES, 12, seed=1)
    assert config.to_dict() == before


def test_seeded_rollouts_depend_on_prefix_and_seed_alone(model):
    """The same rollouts in one batch, alone, and whatever state torch's own generator is in."""
    config = generation_config(temperature=0.7, top_k=20, top_p=0.95)
    together = rollouts_of(model, config, PREFIXES, 12, request_seeds=True)
    engine = TransformersEngine(model, config, PAD, request_seeds=True)
    for request, rollout in zip(requests_of(PREFIXES, 12), together, strict=True):
        torch.manual_seed(1)
        engine.submit([request])
        (alone,) = engine.poll()
        assert alone.token_ids == rollout.token_ids
        assert alone.logprobs == pytest.approx(rollout.logprobs, abs=1e-4)
    engine.submit([replace(request, seed=99) for request in requests_of(PREFIXES, 12)])
    assert [rollout.token_ids for rollout in engine.poll()] != [rollout.token_ids for rollout in together]


def test_a_branch_continues_under_the_logprobs_of_its_first_sampling(model):
    """A rollout cut anywhere and continued has the log-probabilities of the uncut sequence."""
    (whole,) = rollouts_of(model, generation_config(), [PREFIXES[1]], 24)
    assert len(whole.token_ids) > 6
    (rest,) = rollouts_of(model, generation_config(), [PREFIXES[1] + whole.token_ids[:6]], 18)
    expected = expected_logprobs(model, PREFIXES[1], whole.token_ids[:6] + rest.token_ids)
    assert whole.logprobs[:6] + rest.logprobs == pytest.approx(expected, abs=1e-4)


def test_empty_polls_and_abort(model):
    engine = TransformersEngine(model, generation_config(), PAD)
    assert engine.poll() == []
    engine.submit(requests_of(PREFIXES, 4))
    engine.abort()
    assert engine.poll() == []
    engine.submit(requests_of(PREFIXES[:1], 4))  # usable after an abort
    assert [rollout.request_id for rollout in engine.poll()] == ["request 0"]
    assert engine.poll() == []


@pytest.mark.parametrize("request_seeds", [False, True])
def test_entropies_are_of_the_whole_vocabulary_at_the_sampling_temperature(model, request_seeds):
    torch.manual_seed(0)
    engine = TransformersEngine(model, generation_config(temperature=0.7, top_k=3, top_p=0.8), PAD, request_seeds)
    requests = [replace(request, entropies=number != 1) for number, request in enumerate(requests_of(PREFIXES, 12))]
    engine.submit(requests)
    for request, rollout in zip(requests, engine.poll(), strict=True):
        if not request.entropies:
            assert rollout.entropies is None
            continue
        with torch.no_grad():
            ids = torch.tensor([request.prefix_ids + rollout.token_ids])
            logits = model(ids).logits[0, len(request.prefix_ids) - 1 : -1].double() / 0.7
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(torch.tensor(rollout.entropies).double(), expected, atol=1e-4, rtol=1e-4)
