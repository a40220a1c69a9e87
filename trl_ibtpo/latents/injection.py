"""The projections of a latent: into the layers of a model (pseudo self-attention) or onto its logits."""

from dataclasses import dataclass

import torch
from torch import nn

from .noise import LATENT

SHIFT = 0.05  # of what it is added to: the shift of the norm's weight (in the paper 1 to 10%), and that of the logits


@dataclass(frozen=True)
class LayerScales:
    """What random projections are measured against: root mean squares of a model, one entry a layer."""

    norm_weight: list[float]  # weight of the norm before attention
    key: list[float]  # keys, as attention sees them
    value: list[float]
    hidden: int  # width of the norm
    key_heads: int  # heads of keys and values
    key_width: int  # of one head
    value_width: int


class LayerInjection(nn.Module):
    """`W_s`, `W_k`, `W_v` of every layer.

    A latent of N(0, I) shifts the norm's weight by 5% of it, and makes an extra key and value as large as those that
    the layer makes of tokens.
    """

    mode = "psa"

    def __init__(self, layers: int, hidden: int, key: int, value: int, latent: int = LATENT):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(layers, hidden, latent))  # W_s
        self.key = nn.Parameter(torch.zeros(layers, key, latent))  # W_k, all heads
        self.value = nn.Parameter(torch.zeros(layers, value, latent))  # W_v

    @classmethod
    def random(cls, scales: LayerScales, seed: int, latent: int = LATENT) -> "LayerInjection":
        """Fixed by `seed` and by the scales."""
        heads = scales.key_heads
        made = cls(
            len(scales.key), scales.hidden, heads * scales.key_width, heads * scales.value_width, latent
        ).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        shift = [SHIFT * weight for weight in scales.norm_weight]
        for weight, rms_L in ((made.norm, shift), (made.key, scales.key), (made.value, scales.value)):
            rms_L = torch.tensor(rms_L)[:, None, None]
            weight.copy_(torch.randn(weight.shape, generator=generator) * rms_L / latent**0.5)
        return made

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of latents `(B, Z)`: `W_s z` `(N, B, D)`, `W_k z` and `W_v z` `(N, B, H)`, for `N` layers."""
        return tuple(torch.einsum("ndz,bz->nbd", weight, latents) for weight in (self.norm, self.key, self.value))


class LogitInjection(nn.Module):
    """`W_o`: a latent of N(0, I) adds to the logits 5% of their own spread over the vocabulary."""

    mode = "softmax"

    def __init__(self, vocabulary: int, latent: int = LATENT):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocabulary, latent))

    @classmethod
    def random(cls, vocabulary: int, spread: float, seed: int, latent: int = LATENT) -> "LogitInjection":
        """Fixed by `seed` and by `spread`, the standard deviation of the logits of one token."""
        made = cls(vocabulary, latent).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        made.logits.copy_(torch.randn(made.logits.shape, generator=generator) * SHIFT * spread / latent**0.5)
        return made

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """`W_o z`, `(B, V)`."""
        return latents @ self.logits.T
