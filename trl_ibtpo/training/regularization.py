"""IBRO (arXiv 2507.18391): entropy where it helped, certainty where it did not.

    loss = policy loss - alpha * mean over tokens of (A_t + eta) * H_t

`H_t` is the entropy of the policy over the whole vocabulary at the training temperature. Only it has a gradient:
that of `-A H` with respect to logit k is `A p_k (log p_k + H)`. The term has neither ratio nor clip.
"""

from functools import wraps
from typing import Any

import torch
from trl import GRPOTrainer


def weighted_entropy(
    entropies: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, shift: float
) -> torch.Tensor:
    """`mean over tokens of (A_t + eta) * H_t`, with the mask and the mean of TRL's entropy bonus.

    Args:
        entropies: `(B, T)`.
        advantages: `(B, T)`, or `(B,)` for one value per trajectory.
        mask: `(B, T)`, 1 at the tokens that count.
        shift: the paper's eta.
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return ((advantages + shift) * entropies * mask).sum() / mask.sum().clamp(min=1.0)


class IBRegularization:
    """For a `GRPOTrainer` with the fields `ib_regularization_coef` (alpha) and `ib_regularization_shift` (eta)."""

    _keep_entropies = False  # while TRL computes its loss
    _entropies: torch.Tensor | None = None

    @wraps(GRPOTrainer._get_per_token_logps_and_entropies)
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._keep_entropies:
            self._entropies = found[1]
        return found

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        coef = self.args.ib_regularization_coef
        if coef == 0:
            return super()._compute_loss(model, inputs)
        self._keep_entropies = True
        try:
            loss, entropies = super()._compute_loss(model, inputs), self._entropies
        finally:
            self._keep_entropies, self._entropies = False, None
        if loss.requires_grad and not entropies.requires_grad:
            raise RuntimeError(
                "TRL returned entropies without a gradient, so `ib_regularization_coef` would do nothing. This TRL "
                "release is not supported; trl_ibtpo was tested with TRL 1.16."
            )
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if self.top_entropy_quantile < 1.0:
            mask = mask * self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
        # Weights of shared tokens are the policy loss's alone; what entropy is worth does not depend on them.
        advantages = inputs.get("unweighted_advantages", inputs["advantages"])
        term = weighted_entropy(entropies, advantages, mask, self.args.ib_regularization_shift)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["ib/regularization"].append(self.accelerator.gather(term.detach()).nanmean().item())
        return loss - coef * term / (self.current_gradient_accumulation_steps if mode == "train" else 1.0)
