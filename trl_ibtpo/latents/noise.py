"""The randomness of a latent, fixed by numbers that identify its branch; free of torch."""

from collections.abc import Sequence

import numpy as np

LATENT = 128  # dimension of z, from the authors' code


def latent_noise(seed: Sequence[int], dimension: int = LATENT) -> tuple[float, ...]:
    """A draw of N(0, I) for one branch.

    Args:
        seed: numbers of at least 0 that name the branch, such as those of its tree and its leaf.
        dimension: of the latent.
    """
    return tuple(np.random.default_rng([*seed, 0x1A7E47]).standard_normal(dimension).tolist())
