"""What a tree grower asks of a generation engine. An engine knows token ids only: no trees, no text, no rewards."""

import math
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

# How a tree counts the time of its rollouts, so that it does not depend on what else the engine is doing:
# tokens   a rollout gains one token a tick, and `generated` says how far it is
# polls    all rollouts of a poll end together, one tick after they were submitted
# arrival  nobody knows how far a running rollout is: rollouts end in the order in which they are answered
Clock = Literal["tokens", "polls", "arrival"]

LIKELIEST = 20  # tokens at each place that vLLM gives log-probabilities of


def truncated_entropy(logprobs: Sequence[float]) -> float:
    """Entropy of the distribution among these tokens alone, in nats, from their log-probabilities in any scale."""
    known = [logprob for logprob in logprobs if logprob > -math.inf]  # cut off by top-k or top-p
    if not known:
        return math.nan
    largest = max(known)
    total = largest + math.log(sum(math.exp(logprob - largest) for logprob in known))
    return max(0.0, -sum(math.exp(logprob - total) * (logprob - total) for logprob in known))


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A prefix to continue."""

    request_id: Hashable  # unique among the requests in flight; trees use (tree, leaf)
    prefix_ids: list[int]  # question and completion so far
    max_tokens: int  # at least 1
    seed: int  # of this request alone, for engines that sample each request on its own
    latent: tuple[float, ...] | None = None  # noise of N(0, I) that z is made of; engines without latents refuse it
    fork: int = 0  # tokens of the prefix that come before the fork; the latent acts from there on
    entropies: bool = False  # whether the rollout must have them


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled continuation."""

    request_id: Hashable
    token_ids: list[int]  # the stop token included
    # Under the distribution that was sampled from (with the latent, after temperature, top-k, top-p); NaN where the
    # engine cannot say, None for a token that nobody sampled: an observation between two turns.
    logprobs: list[float | None]
    restarted: bool = False  # it continues the question, because its prefix could not be brought about again
    # Of each token where the request asked for them: in nats, of the whole vocabulary at the sampling temperature,
    # before top-k and top-p; NaN for a token that nobody sampled.
    entropies: list[float] | None = None


class RolloutEngine(Protocol):
    """Submit requests at any time; each `poll` does one unit of work and returns what has finished."""

    max_length: int | None  # tokens of prefix and continuation together, None for no limit
    clock: Clock

    def submit(self, requests: Sequence[RolloutRequest]) -> None: ...

    def poll(self) -> list[Rollout]: ...

    def generated(self, request_id: Hashable) -> int:
        """Tokens that a request has been given so far, or fewer; 0 for a request that is not in flight."""

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float | None]]:
        """Tokens `start` to `stop` of a request in flight, with their log-probabilities as in `Rollout`.

        `stop` is at most what `generated` said, which an engine that cannot look inside its requests keeps at 0.
        """

    def abort(self) -> None:
        """Forget every request in flight."""


class LatentSteering(Protocol):
    """How latents change what a model samples; see `trl_ibtpo.latents`."""

    def steer(self, requests: Sequence[RolloutRequest], padding: Sequence[int]) -> AbstractContextManager[list[Any]]:
        """Steer the rows of a batch for as long as the context is open, and leave the model as it was.

        Args:
            requests: one per row; a row whose request has no latent is not steered.
            padding: columns on the left of each row's prefix.

        Returns:
            A context that yields logits processors to run before all others.
        """


def refuse_latents(requests: Sequence[RolloutRequest], engine: str) -> None:
    """Raise where a request has a latent that `engine` would drop."""
    for request in requests:
        if request.latent is not None:
            raise ValueError(
                f"The request {request.request_id!r} has a latent, but {engine}. Without latents, leave `latent_mode` "
                "at 'none'."
            )
