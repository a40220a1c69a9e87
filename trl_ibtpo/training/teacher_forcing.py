"""What the policy says of tokens that are there already, in one forward pass over all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.utils import pad

Pair = tuple[list[int], list[int]]  # token ids of a prefix and of what follows it


@torch.no_grad()
def teacher_forced(
    trainer: Any, model: torch.nn.Module, pairs: Sequence[Pair], entropies: bool = False, batch_size: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Log-probabilities of the second sequence of each pair after the first, and entropies where it was sampled.

    By the trainer's own forward pass: at its temperature, of the whole vocabulary.

    Args:
        trainer: a `GRPOTrainer`.
        model: its policy.
        pairs: of token ids, each of the two at least one.
        entropies: whether they are wanted.
        batch_size: pairs that go through the model together, at most; default: as many as in training.

    Returns:
        Both `(T,)` for each pair, in nats.
    """
    size, device = batch_size or trainer.args.per_device_train_batch_size, trainer.accelerator.device
    found = []
    for start in range(0, len(pairs), size):
        ids, masks = [], []
        for part, side in zip(zip(*pairs[start : start + size], strict=True), ("left", "right"), strict=True):
            rows = [torch.tensor(each) for each in part]
            ids.append(pad(rows, padding_value=trainer._tokenizer.pad_token_id, padding_side=side))
            masks.append(pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side=side))
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat(ids, dim=1).to(device),
            torch.cat(masks, dim=1).to(device),
            logits_to_keep=ids[1].shape[1],
            compute_entropy=entropies,
        )
        for row, (_, tokens) in enumerate(pairs[start : start + size]):
            own = slice(0, len(tokens))
            found.append((logps[row, own].float().cpu(), entropy[row, own].float().cpu() if entropies else None))
    return found
