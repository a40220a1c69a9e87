"""Whether latents do to the model at hand what they should, and how large its own numbers are.

A configuration does not say whether a model's layers hand on what attention needs, which norm comes before attention,
or how keys are laid out. So before latents are used, a small batch goes through the model with and without them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from ..prefix_sharing.attention import TRIE_ATTENTION
from .attention import LayerSteering, attention_layers, normalized
from .injection import LayerScales

SHORT, LONG, NEW = 6, 9, 5  # tokens of two prefixes, and tokens generated after them
ROUNDINGS = 8  # times the rounding that was measured are tolerated
LEAST = {torch.float32: 1e-4, torch.float64: 1e-6}  # tolerance of log-probabilities in nats; others: 2e-2


def why_no_layers(model: PreTrainedModel) -> str | None:
    """Why pseudo self-attention cannot work, as far as the configuration tells; None where it may."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"the model has layers of other kinds than full attention ({', '.join(sorted(kinds))})"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"the model attends to a sliding window (of {config.sliding_window} tokens)"
    if not model._can_set_attn_implementation():
        return "the model computes its attention in a way of its own"
    if config._attn_implementation not in ("sdpa", TRIE_ATTENTION):
        return f"`attn_implementation` is '{config._attn_implementation}', which takes no bias per key; use 'sdpa'"
    found = len(attention_layers(model))
    if found != config.num_hidden_layers:
        return (
            f"{found} of the model's {config.num_hidden_layers} layers have an `input_layernorm` in front of "
            "`self_attn`"
        )
    for layer in attention_layers(model):
        norm = layer.input_layernorm
        if getattr(norm, "weight", None) is None or not (hasattr(norm, "variance_epsilon") or hasattr(norm, "eps")):
            return f"`input_layernorm` is a {type(norm).__name__} without a weight that could be shifted"
    return None


def _tokens(model: PreTrainedModel) -> list[list[int]]:
    """Two prefixes; of the middle half of the vocabulary, since special tokens are at its ends."""
    vocabulary = model.config.get_text_config().vocab_size
    low, high = vocabulary // 4, max(vocabulary // 4 + 1, 3 * vocabulary // 4)
    rng = np.random.default_rng(0)  # leaves torch's generators alone
    return [rng.integers(low, high, count).tolist() for count in (SHORT, LONG)]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, gradients or gradient checkpointing, which goes without a cache."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def measured_scales(model: PreTrainedModel) -> LayerScales:
    """Root mean squares of what random projections are added to or stand beside."""

    def rms(values: torch.Tensor) -> float:
        return float(values.detach().float().pow(2).mean().sqrt())

    ids = torch.tensor(_tokens(model)[1:], device=model.device)
    with _evaluating(model):
        layers = model.get_decoder()(input_ids=ids, use_cache=True).past_key_values.layers
    norms = [layer.input_layernorm.weight for layer in attention_layers(model)]
    return LayerScales(
        norm_weight=[rms(weight) for weight in norms],
        key=[rms(layer.keys) for layer in layers],
        value=[rms(layer.values) for layer in layers],
        hidden=norms[0].shape[0],
        key_heads=layers[0].keys.shape[1],
        key_width=layers[0].keys.shape[3],
        value_width=layers[0].values.shape[3],
    )


def measured_spread(model: PreTrainedModel) -> float:
    """Standard deviation of the logits of one token, over the vocabulary."""
    ids = torch.tensor(_tokens(model)[1:], device=model.device)
    with _evaluating(model):
        return float(model(input_ids=ids).logits.float().std(-1).mean())


def why_not_steered(model: PreTrainedModel, steering: LayerSteering) -> str | None:
    """Why latents would not act on this model as they should; None where they do.

    Checked: the hook on each norm equals an edited weight; without a latent, and before the fork, nothing changes; the
    extra key reaches every layer and matters; log-probabilities while generating are those of a forward pass over the
    whole sequence, with padding and forks that differ between rows.
    """
    try:
        with _evaluating(model):
            return _why_not(model, steering)
    except Exception as error:  # whatever it is, latents must not be used
        return f"a forward pass with latents ends in {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _why_not(model: PreTrainedModel, steering: LayerSteering) -> str | None:
    dimension = steering.injection.norm.shape[-1]
    latents = torch.randn(2, dimension, generator=torch.Generator().manual_seed(0)).to(model.device)
    shifts = steering.injection(latents)[0]
    for number, layer in enumerate(attention_layers(model)):
        norm = layer.input_layernorm
        hidden = torch.randn(3, norm.weight.shape[0], generator=torch.Generator().manual_seed(number))
        hidden = hidden.to(norm.weight.device, norm.weight.dtype)
        edited = copy.deepcopy(norm)
        edited.weight.add_(shifts[number, 0].to(norm.weight.dtype))
        found = norm(hidden) + (shifts[number, 0] * normalized(norm, hidden)).to(hidden.dtype)
        rounding = 4 * torch.finfo(hidden.dtype).eps * max(1.0, float(edited(hidden).abs().max()))
        if not _difference(edited(hidden), found) <= rounding:
            return (
                f"`input_layernorm` is a {type(norm).__name__}, whose weight does not multiply the input divided by "
                "its root mean square"
            )

    prefixes = _tokens(model)
    ids = torch.tensor([[prefixes[0][0]] * (LONG - SHORT) + prefixes[0], prefixes[1]], device=model.device)
    mask = torch.ones_like(ids)
    mask[0, : LONG - SHORT] = 0
    forks = [LONG - 1, LONG]  # the first row keeps the token at its fork
    plain = _logits(model, ids, mask)
    with steering.steered(latents, [None, None]):
        idle = _logits(model, ids, mask)
    least = LEAST.get(model.dtype, 2e-2)
    if not _difference(plain, idle) <= least:
        return f"without a latent, log-probabilities would change by {_difference(plain, idle):.2g} nats"

    generated, own = _generate(model, ids, mask)
    rounding = _difference(own, _teacher_forced(model, generated, mask))
    tolerance = min(max(ROUNDINGS * rounding, least), 1.0)
    with steering.steered(latents, forks):
        generated, sampled = _generate(model, ids, mask)
        forced = _teacher_forced(model, generated, mask)
        begun = _logits(model, generated, _extended(mask, generated))
    if not _difference(sampled, forced) <= tolerance:
        return (
            f"log-probabilities while generating differ by {_difference(sampled, forced):.2g} nats from those of a "
            f"forward pass over the whole sequence, where rounding explains {tolerance:.2g}"
        )
    whole = _logits(model, generated, _extended(mask, generated))
    if not _difference(whole[:, SHORT : forks[0]], begun[:, SHORT : forks[0]]) <= tolerance:
        return "a latent changes tokens before its fork"
    missing = _layers_without_key(model, steering, latents, generated, _extended(mask, generated))
    if missing:
        return f"{missing} of its layers do not hand on to attention what latents need"
    return None


def _layers_without_key(model, steering, latents, ids, mask) -> int:
    """In how many layers the extra key and value are not seen."""
    seen = []
    handle = model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["latent_forward"].layers_seen), with_kwargs=True
    )
    try:
        with steering.steered(latents, [0, 0]):
            _logits(model, ids, mask)
    finally:
        handle.remove()
    return model.config.get_text_config().num_hidden_layers - seen[0]


def _logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all next tokens, `(B, T, V)`; positions count from the first token that is no padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return torch.log_softmax(logits.float(), -1)


def _extended(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


def _generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens, and the log-probabilities of all next tokens that they were chosen by, `(B, NEW, V)`."""
    config = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, disable_compile=True
    )
    config.update(return_dict_in_generate=True, output_logits=True)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
    )
    return output.sequences, torch.log_softmax(torch.stack(output.logits, dim=1).float(), -1)


def _teacher_forced(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _logits(model, ids, _extended(mask, ids))[:, -NEW - 1 : -1]


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference; infinite where a value is not a number."""
    return float((first.detach().float() - second.detach().float()).abs().nan_to_num(nan=torch.inf).max())
