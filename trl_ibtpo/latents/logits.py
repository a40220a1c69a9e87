"""The softmax arm: a latent adds `gamma(n) W_o z` to the logits, and leaves the layers alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from .injection import LogitInjection
from .strength import NEVER, Strength


class LogitSteering:
    """Steers the rows of a batch through their logits: of the token `n` places after the fork by `gamma(n) W_o z`.

    Args:
        model: a transformers model.
        injection: its projection.
        strength: how strongly latents act, and how fast that decays.
    """

    def __init__(self, model: PreTrainedModel, injection: LogitInjection, strength: Strength):
        self.model = model
        self.injection = injection
        self.strength = strength

    @contextmanager
    def steered(self, latents: torch.Tensor, forks: Sequence[int | None]) -> Iterator[list[Any]]:
        """As `LayerSteering.steered`; yields the logits processor."""
        starts = torch.tensor([NEVER if fork is None else fork for fork in forks], device=latents.device)
        yield [LatentLogits(self.injection(latents), starts, self.strength)]


class LatentLogits(LogitsProcessor):
    """Adds `gamma(n) W_o z` to the logits of each row.

    Args:
        shifts: `W_o z`, `(B, V)`.
        forks: column of each row's fork, `(B,)`.
        strength: gamma.
    """

    def __init__(self, shifts: torch.Tensor, forks: torch.Tensor, strength: Strength):
        self._shifts = shifts
        self._forks = forks
        self._strength = strength

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        gates = self._strength.gates(input_ids.shape[1] - self._forks)  # of the token that comes next
        return scores + (gates[:, None] * self._shifts).to(scores.dtype)

    def teacher_forced(self, logits: torch.Tensor) -> torch.Tensor:
        """The same for all places of a forward pass at once, `(B, T, V)`: place `t` predicts token `t + 1`."""
        since = torch.arange(1, logits.shape[1] + 1, device=logits.device)[None] - self._forks[:, None]
        gates = self._strength.gates(since)
        return logits + (gates[:, :, None] * self._shifts[:, None]).to(logits.dtype)
