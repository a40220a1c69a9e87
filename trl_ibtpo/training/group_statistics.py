"""GRPO's advantages where groups differ in size (`adaptive_budget`).

TRL takes every G rows for a group. Here a group is as long as its question has leaves; everything else is TRL's
definition: means and standard deviations (with Bessel's correction) that leave NaN out, `1e-4` added to the latter.

    sum_then_normalize    r = sum_f w_f r_f;  A = (r - mean_group(r)) / (std(r) + 1e-4)
                          std of the group or of the batch; no division with scale_rewards "none"
    normalize_then_sum    r = sum_f w_f (r_f - mean_group(r_f)) / (std_group(r_f) + 1e-4)
                          A = (r - mean_batch(r)) / (std_batch(r) + 1e-4)
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import nanstd


def group_advantages(
    rewards_BF: torch.Tensor,
    sizes: Sequence[int],
    weights_F: torch.Tensor,
    *,
    scale_rewards: str,
    multi_objective_aggregation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of each row, and whether the standard deviation that it is judged by is zero; both `(B,)`.

    Args:
        rewards_BF: rewards of all processes, a column a function; NaN where there is none.
        sizes: rows of each group, in order; their sum is B.
        weights_F: `reward_weights`.
        scale_rewards, multi_objective_aggregation: as in `GRPOConfig`.
    """
    sizes = list(sizes)
    repeats = torch.tensor(sizes, device=rewards_BF.device)

    def in_groups(values: torch.Tensor, statistic: Callable) -> torch.Tensor:
        # Rows that fill up shorter groups are NaN, and so left out.
        padded = pad_sequence(values.split(sizes), batch_first=True, padding_value=torch.nan)
        return statistic(padded, dim=1).repeat_interleave(repeats, dim=0)

    def weighted(values_BF: torch.Tensor) -> torch.Tensor:
        total_B = (values_BF * weights_F.to(values_BF.device)).nansum(dim=1)
        total_B[torch.isnan(rewards_BF).all(dim=1)] = torch.nan  # no function had a reward: not the same as 0
        return total_B

    if multi_objective_aggregation == "sum_then_normalize":
        rewards_B = weighted(rewards_BF)
        in_batch = scale_rewards == "batch"
        std_B = nanstd(rewards_B).expand_as(rewards_B) if in_batch else in_groups(rewards_B, nanstd)
        advantages_B = rewards_B - in_groups(rewards_B, torch.nanmean)
        if scale_rewards != "none":
            advantages_B = advantages_B / (std_B + 1e-4)
    else:
        mean_BF, std_BF = in_groups(rewards_BF, torch.nanmean), in_groups(rewards_BF, nanstd)
        rewards_B = weighted((rewards_BF - mean_BF) / (std_BF + 1e-4))
        std_B = nanstd(rewards_B).expand_as(rewards_B)
        advantages_B = (rewards_B - torch.nanmean(rewards_B)) / (std_B + 1e-4)
    return torch.nan_to_num(advantages_B, nan=0.0), torch.isclose(std_B, torch.zeros_like(std_B))
