"""How strongly a latent acts on a token."""

from dataclasses import dataclass

import torch

NEVER = 2**62  # the fork of a row that is not steered


@dataclass(frozen=True)
class Strength:
    """`gamma(n) = gamma0 exp(-n / tau)` for the token `n` places after the fork, and 0 before the fork.

    The paper lets the strength decay and does not say how; this form is a decision of ours.
    """

    initial: float = 1.0  # gamma0
    decay: float = 128.0  # tau, in tokens

    def gates(self, since_fork: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`gamma(n)` of every entry; negative entries are before the fork."""
        gamma = self.initial * torch.exp(-since_fork.clamp(min=0).to(dtype) / self.decay)
        return torch.where(since_fork >= 0, gamma, 0.0)
