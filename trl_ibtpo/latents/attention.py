"""Pseudo self-attention: every layer gets one more key and value for the latent, and a shift of the norm before them.

    h~ = (w + gamma(n) W_s z) * h / RMS(h)        K' = [W_k z ; K]        V' = [W_v z ; V]

The extra key has no position. It comes in front of the keys after rotary embedding and after the cache, so that cache
and positions stay as they are. For the query `n` places after the fork it has the bias `log gamma(n)`; queries before
the fork do not see it. A strength of 0 therefore gives the model back; a latent of zeros does not, since its key takes
attention all the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .injection import LayerInjection
from .strength import NEVER, Strength

LATENT_ATTENTION = "ibtpo_latent"  # sdpa, with one more key where a forward comes with latents


@dataclass
class _Forward:
    """What the layers need to know in one forward pass of `Q` tokens a row."""

    gates: torch.Tensor  # gamma(n), (B, Q)
    keys: torch.Tensor  # W_k z, (N, B, heads, 1, width), for N layers
    values: torch.Tensor
    columns: int  # of the cache and of this pass, in all
    all_steered: bool  # every gate is above 0
    bias: torch.Tensor | None = None  # mask with the extra column, made by the first layer for all of them
    layers_seen: int = 0

    def masked(self, mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
        """The mask of attention with the extra column in front, additive, `(B, 1, Q, 1 + K)`."""
        if self.bias is None:
            lowest = torch.finfo(query.dtype).min  # not -inf: a row of padding attends to nothing
            rows, width = self.gates.shape
            if mask is None:
                mask = torch.ones(width, self.columns, dtype=torch.bool, device=query.device)
                mask = mask.tril(self.columns - width)[None, None].expand(rows, 1, -1, -1)
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, lowest)
            extra = self.gates.log().to(query.dtype).masked_fill(self.gates == 0, lowest)[:, None, :, None]
            self.bias = torch.cat([extra, mask.expand(rows, 1, -1, -1)], dim=-1)
        return self.bias


def _latent_attention(module, query, key, value, attention_mask, latent_forward: _Forward | None = None, **kwargs):
    """Scaled dot-product attention; queries that are not steered are computed as if there were no latents."""
    if latent_forward is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if key.shape[2] != latent_forward.columns:
        raise RuntimeError(
            f"Attention sees {key.shape[2]} columns of keys where {latent_forward.columns} tokens were given: latents "
            "need a cache that grows with the tokens. Leave `cache_implementation` open."
        )
    latent_forward.layers_seen += 1
    number = module.layer_idx
    steered = sdpa_attention_forward(
        module,
        query,
        torch.cat([latent_forward.keys[number], key], dim=2),
        torch.cat([latent_forward.values[number], value], dim=2),
        latent_forward.masked(attention_mask, query),
        **kwargs,
    )[0]
    if latent_forward.all_steered:
        return steered, None
    plain = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    return torch.where((latent_forward.gates > 0)[:, :, None, None], steered, plain), None


AttentionInterface.register(LATENT_ATTENTION, _latent_attention)
AttentionMaskInterface.register(LATENT_ATTENTION, sdpa_mask)


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that have a norm in front of their attention, in order."""
    layers = [
        module
        for module in model.get_decoder().modules()
        if hasattr(module, "self_attn") and hasattr(module, "input_layernorm")
    ]
    return sorted(layers, key=lambda layer: getattr(layer.self_attn, "layer_idx", 0))


def normalized(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """`h / RMS(h)`, as the norm computes it before it multiplies by its weight."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)


class LayerSteering:
    """Steers the rows of a batch by pseudo self-attention.

    Args:
        model: a transformers model that `proof.why_not_steered` has nothing against.
        injection: its projections.
        strength: how strongly latents act, and how fast that decays.
    """

    def __init__(self, model: PreTrainedModel, injection: LayerInjection, strength: Strength):
        self.model = model
        self.injection = injection
        self.strength = strength

    @contextmanager
    def steered(self, latents: torch.Tensor, forks: Sequence[int | None]) -> Iterator[list[Any]]:
        """Steer row `b` of every forward pass with `latents[b]`, `(B, Z)`, from column `forks[b]` on.

        Args:
            latents: one a row.
            forks: columns of the padded batch; None for a row that is not steered.

        Yields:
            An empty list: the logits stay as the steered layers make them.
        """
        shifts, keys, values = (each.to(self.model.dtype) for each in self.injection(latents))
        heads = self.model.config.get_text_config().num_key_value_heads
        keys, values = (each.unflatten(-1, (heads, 1, -1)) for each in (keys, values))
        decoder = self.model.get_decoder()
        device = self.model.device
        places = [NEVER if fork is None else fork for fork in forks]
        starts = torch.tensor(places, device=device)
        precision = torch.promote_types(self.model.dtype, torch.float32)
        off = self.strength.initial == 0
        current: list[_Forward | None] = [None]

        def before_decoder(_, args, kwargs):
            tokens = kwargs.get("inputs_embeds")
            if tokens is None:
                tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            cache = kwargs.get("past_key_values")
            begin = 0 if cache is None else int(cache.get_seq_length())
            end = begin + tokens.shape[1]
            current[0] = None
            if off or end <= min(places):  # nothing is steered: the plain kernels run, so the numbers are theirs
                return args, kwargs
            columns = torch.arange(begin, end, device=device)
            gates = self.strength.gates(columns[None] - starts[:, None], precision)
            current[0] = _Forward(gates, keys, values, end, all_steered=begin >= max(places))
            return args, {**kwargs, "latent_forward": current[0]}

        def after_norm(number):
            def add_shift(norm, args, output):
                if current[0] is None:
                    return output
                gates = current[0].gates.to(output.dtype)[:, :, None]
                return output + (gates * shifts[number][:, None] * normalized(norm, args[0])).to(output.dtype)

            return add_shift

        before = self.model.config.get_text_config()._attn_implementation
        with ExitStack() as stack:
            stack.callback(self.model.set_attn_implementation, before)
            self.model.set_attn_implementation(LATENT_ATTENTION)
            handle = decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
            stack.callback(handle.remove)
            for number, layer in enumerate(attention_layers(self.model)):
                stack.callback(layer.input_layernorm.register_forward_hook(after_norm(number)).remove)
            yield []
