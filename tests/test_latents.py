"""Latents that steer branches: pseudo self-attention, the softmax arm, and the proof that a model allows them."""

import math
from contextlib import contextmanager

import pytest
import torch
from test_transformers_engine import generation_config, tiny
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen3Config,
    StableLmConfig,
)

from trl_ibtpo.engines.base import RolloutRequest
from trl_ibtpo.engines.transformers import TransformersEngine
from trl_ibtpo.latents.attention import LayerSteering, attention_layers
from trl_ibtpo.latents.injection import SHIFT, LayerInjection, LogitInjection
from trl_ibtpo.latents.noise import latent_noise
from trl_ibtpo.latents.proof import measured_scales, why_no_layers, why_not_steered
from trl_ibtpo.latents.source import LatentSource, Steering
from trl_ibtpo.latents.strength import Strength

TOKENIZER = tiny.byte_level_tokenizer()
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform, so that wrong positions or masks show
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
}
FAMILIES = {"qwen3": Qwen3Config, "llama": LlamaConfig, "gemma": GemmaConfig}


def make(config_class, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {**SIZES, **changes}
    if config_class is StableLmConfig:
        del sizes["head_dim"]
    model = AutoModelForCausalLM.from_config(config_class(**sizes), dtype=dtype).eval()
    with torch.no_grad():
        for layer in attention_layers(model):
            weight = layer.input_layernorm.weight
            weight.add_(0.2 * torch.randn(weight.shape, dtype=torch.float32).to(dtype))
    return model


@pytest.fixture(scope="module")
def models():
    return {name: make(config_class) for name, config_class in FAMILIES.items()}


@pytest.fixture
def model(models):
    return models["qwen3"]


def steering_of(model, initial=1.0, decay=8.0, size=20.0) -> LayerSteering:
    """Random projections, `size` times as large as they would be, so that nothing hides in rounding."""
    injection = LayerInjection.random(measured_scales(model), seed=5).to(model.dtype)
    for weight in injection.parameters():
        weight.mul_(size if weight is injection.norm else 1.0)
    return LayerSteering(model, injection, Strength(initial, decay))


LATENTS = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(100, 300, (3, 14), generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([0, 5, 2])
MASK = (torch.arange(14)[None] >= PADDING[:, None]).long()


@torch.no_grad()
def logits_of(model, ids=IDS, mask=MASK, **kwargs):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_latent_or_strength_the_numbers_are_the_models_bitwise(models, family, dtype):
    model = models[family] if dtype == torch.float32 else make(FAMILIES[family], dtype)
    full = torch.ones_like(MASK)
    plain, unpadded = logits_of(model), logits_of(model, mask=full)
    latents = LATENTS.to(dtype)
    with steering_of(model).steered(latents, [None] * 3):
        assert torch.equal(plain, logits_of(model)) and torch.equal(unpadded, logits_of(model, mask=full))
    with steering_of(model, initial=0.0).steered(latents, [0, 5, 9]):
        assert torch.equal(plain, logits_of(model)) and torch.equal(unpadded, logits_of(model, mask=full))
    with steering_of(model).steered(latents * 0, [0, 5, 9]):  # its key takes attention all the same
        assert (plain - logits_of(model)).abs().max() > 0.01
    assert torch.equal(plain, logits_of(model))


def test_one_layer_by_hand_in_64_bits():
    """Llama, no padding, fork at column 3: the extra key's weight is gamma(n) exp(q k_z / sqrt(d)), of the softmax."""
    model = make(LlamaConfig, torch.float64, num_hidden_layers=1)
    steering = steering_of(model, decay=2.0)
    layer, ids, latent, fork = attention_layers(model)[0], IDS[:1, :7], LATENTS[:1].double(), 3
    seen = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.update(normed=args[0][0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(attended=args[0][0])),
    ]
    with torch.no_grad(), steering.steered(latent, [fork]):
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()

    with torch.no_grad():
        hidden = model.get_input_embeddings()(ids)[0]
        gamma = [0.0] * fork + [math.exp(-n / 2.0) for n in range(7 - fork)]
        shift = steering.injection.norm[0] @ latent[0]
        unit = hidden / (hidden.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        normed = torch.stack(
            [(layer.input_layernorm.weight + g * shift) * row for g, row in zip(gamma, unit, strict=True)]
        )
        assert torch.allclose(seen["normed"], normed, atol=1e-12)

        def heads(projection, count):
            return projection(normed).view(7, count, 8)

        def rotated(states):  # pairs (i, i + 4) turn by position * 10000^(-i / 4)
            angle = torch.arange(7.0)[:, None] * 10000.0 ** -(torch.arange(4.0) / 4)
            cos, sin = angle.cos()[:, None].double(), angle.sin()[:, None].double()
            first, second = states[..., :4], states[..., 4:]
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        query, key = rotated(heads(layer.self_attn.q_proj, 4)), rotated(heads(layer.self_attn.k_proj, 2))
        value = heads(layer.self_attn.v_proj, 2)
        key_z = (steering.injection.key[0] @ latent[0]).view(2, 8)
        value_z = (steering.injection.value[0] @ latent[0]).view(2, 8)
        for column in range(7):
            for head in range(4):
                group = head // 2  # two queries a key
                weights = (key[: column + 1, group] @ query[column, head] / math.sqrt(8)).exp()
                extra = gamma[column] * (key_z[group] @ query[column, head] / math.sqrt(8)).exp()
                expected = weights @ value[: column + 1, group] + extra * value_z[group]
                expected = expected / (weights.sum() + extra)
                found = seen["attended"][column].view(4, 8)[head]
                # The model turns queries and keys by angles of 32 bits.
                assert torch.allclose(found, expected, atol=1e-6), (column, head)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_shift_is_an_edited_weight(models, family):
    model = models[family]
    steering = steering_of(model, decay=1e12)
    layer, seen = attention_layers(model)[0], []
    hook = layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with steering.steered(LATENTS, [0, 5, 2]):
        logits_of(model)
    weight = layer.input_layernorm.weight
    original = weight.detach().clone()
    for row, latent in enumerate(LATENTS):
        with torch.no_grad():
            weight.add_(steering.injection.norm[0] @ latent)
            logits_of(model)
            weight.copy_(original)
        begin = [0, 5, 2][row]
        assert torch.allclose(seen[0][row, begin:], seen[-1][row, begin:], atol=1e-5)
    hook.remove()


def test_random_projections_are_measured_against_the_model(model):
    """The norm moves by 5% (1 to 10% in the paper); key and value are as large as those of tokens."""
    scales = measured_scales(model)
    made = LayerInjection.random(scales, seed=3)
    latents = torch.randn(400, 128)
    for parts, rms in zip(
        made(latents), ([SHIFT * w for w in scales.norm_weight], scales.key, scales.value), strict=True
    ):
        for part, expected in zip(parts, rms, strict=True):
            assert part.pow(2).mean().sqrt().item() == pytest.approx(expected, rel=0.1)
    again, other = LayerInjection.random(scales, seed=3), LayerInjection.random(scales, seed=4)
    assert torch.equal(made.key, again.key) and not torch.equal(made.key, other.key)
    assert 0.01 <= SHIFT <= 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_fork_states_and_cache_are_untouched_bitwise(models, family):
    model, forks = models[family], [4, 9, 13]
    plain = logits_with_states(model)
    with steering_of(model).steered(LATENTS, forks):
        steered = logits_with_states(model)
    for row, fork in enumerate(forks):
        for before, after in zip(plain, steered, strict=True):
            columns = slice(int(PADDING[row]), fork)
            assert torch.equal(before[row, ..., columns, :], after[row, ..., columns, :])
    assert (plain[0] - steered[0]).abs().amax((0, 2))[13] > 1e-3  # and after it they are not


@torch.no_grad()
def logits_with_states(model) -> list[torch.Tensor]:
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=IDS, attention_mask=MASK, position_ids=positions, use_cache=True, output_hidden_states=True
    )
    cache = [each for layer in output.past_key_values.layers for each in (layer.keys, layer.values)]
    return [output.logits, *output.hidden_states, *cache]


REQUESTS = [
    RolloutRequest("at the end", [70, 71, 72, 73, 74, 75, 76, 77], 12, seed=0, latent=latent_noise([0]), fork=8),
    RolloutRequest("a kept token", [100, 200, 300], 12, seed=1, latent=latent_noise([1]), fork=2),
    RolloutRequest("none", list(range(140, 160)), 12, seed=2),
    RolloutRequest("from the start", [150], 12, seed=3, latent=latent_noise([2]), fork=0),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["psa", "softmax"])
def test_sampled_logprobs_are_those_of_a_forward_pass_with_the_latent(models, family, mode):
    """Left padding, forks that differ, a row without a latent, in one batch; each is checked alone and unpadded."""
    model = models[family]
    if mode == "psa":
        acting = steering_of(model, size=5.0)
        steering = Steering(acting, None)
    else:
        steering = LatentSource(Strength(1.0, 8.0)).attach(model, "softmax")
        steering.acting.injection.logits.mul_(20)
    engine = TransformersEngine(model, generation_config(temperature=0.8), TOKENIZER.pad_token_id, latents=steering)
    torch.manual_seed(0)
    engine.submit(REQUESTS)
    differences = []
    for request, rollout in zip(REQUESTS, engine.poll(), strict=True):
        ids = torch.tensor([request.prefix_ids + rollout.token_ids])
        plain = logits_of(model, ids, torch.ones_like(ids))
        expected = plain
        if request.latent is not None:
            latent = torch.tensor([request.latent])
            with alone(steering, latent, request.fork) as shift:
                expected = logits_of(model, ids, torch.ones_like(ids)) + shift(ids.shape[1])
        found = torch.tensor(rollout.logprobs)
        assert torch.allclose(found, chosen(expected, ids, len(found)), atol=2e-5), request.request_id
        differences.append((found - chosen(plain, ids, len(found))).abs().max().item())
    assert differences[2] < 2e-5 and min(differences[:2] + differences[3:]) > 0.01


@contextmanager
def alone(steering, latent, fork):
    """Steers one row without padding; yields what to add to the logits of a forward pass of some length."""
    if isinstance(steering.acting, LayerSteering):
        with steering.acting.steered(latent, [fork]):
            yield lambda length: 0.0
    else:
        push = steering.acting.injection(latent)

        def shift(length):
            since = torch.arange(1, length + 1) - fork  # of the token that each position predicts
            return torch.where(since >= 0, torch.exp(-since / 8.0), 0.0)[:, None] * push

        yield shift


def chosen(logits, ids, count):
    """Log-probabilities at temperature 0.8 of the last `count` tokens."""
    logprobs = torch.log_softmax(logits[0, :-1] / 0.8, -1)
    return logprobs.gather(1, ids[0, 1:, None])[-count:, 0]


def test_rows_do_not_see_one_anothers_latents(model):
    others = LATENTS.clone()
    others[0] = 3.0
    with steering_of(model).steered(LATENTS, [2, 7, 5]):
        first = logits_of(model)
    with steering_of(model).steered(others, [4, 7, 5]):
        second = logits_of(model)
    assert torch.equal(first[1:], second[1:]) and not torch.equal(first[0], second[0])


def test_the_effect_falls_with_the_distance_from_the_fork(model):
    """Over 24 latents, the KL divergence from the plain model far away is less than a fifth of that near the fork."""
    gates = Strength(0.5, 4.0).gates(torch.tensor([-1, 0, 4, 8]))
    assert gates.tolist() == pytest.approx([0.0, 0.5, 0.5 / math.e, 0.5 / math.e**2])
    count, length = 24, 60
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(100, 300, (count, length), generator=generator)
    latents = torch.randn(count, 128, generator=generator)
    mask = torch.ones_like(ids)
    plain = torch.log_softmax(logits_of(model, ids, mask), -1)
    with steering_of(model, decay=4.0, size=4.0).steered(latents, [6] * count):
        steered = torch.log_softmax(logits_of(model, ids, mask), -1)
    divergence = (steered.exp() * (steered - plain)).sum(-1).mean(0)
    near, middle, far = divergence[6:10].mean(), divergence[16:20].mean(), divergence[50:].mean()
    assert near > middle > far and near > 5 * far and near > 1e-3


def test_nothing_is_left_behind_after_an_exception(model):
    plain, before = logits_of(model), hooks_of(model)
    with pytest.raises(ZeroDivisionError), steering_of(model).steered(LATENTS, [0, 5, 2]):
        assert model.config._attn_implementation == "ibtpo_latent" and hooks_of(model) != before
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert hooks_of(model) == before
    assert torch.equal(plain, logits_of(model))


def hooks_of(model) -> list:
    return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]


def test_the_training_forward_has_no_latent(model):
    """After a batch was sampled with latents, log-probabilities with their gradient are the model's bitwise."""

    def log_likelihood():
        model.zero_grad()
        value = torch.log_softmax(model(input_ids=IDS, attention_mask=MASK).logits, -1)[..., 7].sum()
        value.backward()
        return [value.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    before = log_likelihood()
    engine = TransformersEngine(
        model, generation_config(), TOKENIZER.pad_token_id, latents=Steering(steering_of(model), None)
    )
    engine.submit(REQUESTS)
    engine.poll()
    for first, second in zip(before, log_likelihood(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_on_which_latents_prove_themselves(models, family, dtype):
    model = models[family] if dtype == torch.float32 else make(FAMILIES[family], dtype)
    plain = logits_of(model)
    model.gradient_checkpointing_enable()
    model.train()
    steering = LatentSource(Strength(0.3, 50.0), seed=1).attach(model, "psa")
    assert steering.acting.strength == Strength(0.3, 50.0) and model.training
    model.gradient_checkpointing_disable()
    model.eval()
    assert torch.equal(plain, logits_of(model))


REFUSED = {
    "a window": (MistralConfig, {"sliding_window": 8}, r"sliding window \(of 8 tokens\)"),
    "no norm in front": (Olmo2Config, {}, r"0 of the model's 2 layers have an `input_layernorm`"),
    "dropped arguments": (StableLmConfig, {}, r"StableLm.*(divided by its root mean square|do not hand on)"),
    "eager attention": (LlamaConfig, {"attn_implementation": "eager"}, r"is 'eager'.*use 'sdpa'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused(case):
    config_class, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=r"`latent_mode` is 'psa'.*" + message):
        LatentSource(Strength()).attach(make(config_class, **changes), "psa")


class Deaf(torch.nn.Module):
    """Attention that does not get the arguments it does not name."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.layer_idx = attention.layer_idx

    def forward(self, hidden_states, latent_forward=None, **kwargs):
        return self.attention(hidden_states, **kwargs)


def test_the_proof_finds_what_configurations_do_not_say():
    """A layer that drops arguments; a norm that is none; a cache that changes what it is given."""
    deaf = make(LlamaConfig)
    deaf.model.layers[1].self_attn = Deaf(deaf.model.layers[1].self_attn)
    assert "1 of its layers do not hand on" in proved(deaf)
    squared = make(LlamaConfig)
    layer = squared.model.layers[0]
    layer.input_layernorm.forward = lambda hidden: layer.input_layernorm.weight * hidden
    assert "does not multiply the input divided by its root mean square" in proved(squared)
    wrong = make(LlamaConfig)
    steering = steering_of(wrong)
    steering.strength = Late(1.0, 8.0)
    assert "changes tokens before its fork" in (why_not_steered(wrong, steering) or "")


def proved(model) -> str:
    assert why_no_layers(model) is None
    return why_not_steered(model, steering_of(model, size=1.0)) or ""


class Late(Strength):
    """Begins to act before the fork."""

    def gates(self, since_fork, *dtype):
        return super().gates(since_fork + 3, *dtype)


def test_softmax_projection_is_measured_against_the_logits(model):
    made = LogitInjection.random(500, spread=3.0, seed=1)
    assert made(torch.randn(300, 128)).std().item() == pytest.approx(3.0 * SHIFT, rel=0.05)
    steering = LatentSource(Strength(), seed=2).attach(model, "softmax")
    assert steering.acting.injection.logits.shape == (len(TOKENIZER), 128)
