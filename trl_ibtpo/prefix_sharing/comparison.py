"""Whether the prefix-shared forward is exact for the model at hand: both forwards compute one small batch.

What a model's configuration says of its attention is not enough: layers may drop arguments on their way to attention,
look at neighbouring tokens, or come with code of their own. Wrong attention changes numbers by whole nats or, in a
model with small weights, by much more than rounding does; how much rounding does is measured on the same model.
"""

from collections.abc import Callable

import numpy as np
import torch

Batch = tuple[torch.Tensor, torch.Tensor, int]  # `input_ids` (B, T), `attention_mask` (B, T), completion columns
ROUNDINGS = 4  # times the rounding that was measured are tolerated
LIMITS = {"full": (1e-5, 1e-2), "reduced": (2e-3, 1.0)}  # least and largest tolerance of each precision, in nats


def comparison_batch(vocabulary: int, device: torch.device | str = "cpu", padding: int = 0) -> Batch:
    """Two questions of different lengths; completions that fork early, late and again, and one that is repeated.

    Args:
        vocabulary: number of token ids; those of its middle half are used, since special tokens are at its ends.
        device: of the tensors.
        padding: columns of padding on the left of the longest prompt.
    """
    rng = np.random.default_rng(0)  # leaves torch's generators alone

    def tokens(count: int) -> list[int]:
        return rng.integers(vocabulary // 4, max(vocabulary // 4 + 1, 3 * vocabulary // 4), count).tolist()

    prompt, trunk = tokens(9), tokens(12)
    fork = trunk[:6] + tokens(8)
    completions = [trunk, fork, fork[:9] + tokens(6), trunk[:1] + tokens(10), trunk[:6], trunk]
    other, stem = tokens(5), tokens(7)
    rows = [(prompt, each) for each in completions] + [(other, stem), (other, stem[:2] + tokens(9))]
    width, kept = padding + len(prompt), max(len(completion) for _, completion in rows)
    ids = torch.zeros(len(rows), width + kept, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (start, completion) in enumerate(rows):
        columns = slice(width - len(start), width + len(completion))
        ids[row, columns] = torch.tensor(start + completion)
        mask[row, columns] = 1
    return ids.to(device), mask.to(device), kept


def why_not_exact(
    padded: Callable[..., torch.Tensor],
    shared: Callable[..., torch.Tensor],
    prepare: Callable[[], None],
    vocabulary: int,
    device: torch.device | str,
    precision: str,
) -> str | None:
    """Why the prefix-shared forward may not replace the padded one; None where both agree.

    Args:
        padded: the forward that would be replaced; takes a `Batch`, returns log-probabilities `(B, C)`.
        shared: the forward that would replace it.
        prepare: readies the model for `shared`; `padded` has to stay as it is.
        vocabulary, device: see `comparison_batch`.
        precision: a key of `LIMITS`; `"full"` where everything is computed with 24 bits at least.

    Rounding is what changes when more padding moves every token to another position. In models that look at absolute
    positions that is more than rounding, so the tolerance has an upper limit as well.
    """
    batch = comparison_batch(vocabulary, device)
    try:
        expected = padded(*batch)
        rounding = _difference(expected, padded(*comparison_batch(vocabulary, device, padding=3)))
        least, largest = LIMITS[precision]
        tolerance = min(max(ROUNDINGS * rounding, least), largest)
        prepare()
        found = max(_difference(expected, forward(*batch)) for forward in (padded, shared))
    except Exception as error:  # whatever it is, TRL's forward has to decide what becomes of it
        message = " ".join(str(error).split())[:300]
        return f"the model's prefix-shared forward ends in {type(error).__name__}: {message}"
    if not found <= tolerance:
        return (
            f"the model's log-probabilities would differ from those of TRL's forward by up to {found:.2g} nats, where "
            f"rounding explains {tolerance:.2g}"
        )
    return None


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference; infinite where a value is not a number."""
    difference = (first.detach().float() - second.detach().float().to(first.device)).abs()
    return float(difference.nan_to_num(nan=torch.inf).max())
