"""What a tree grower asks of a generation engine. An engine knows token ids only: no trees, no text, no rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A prefix to continue."""

    request_id: str  # unique among the requests in flight
    prefix_ids: list[int]  # question and completion so far
    max_tokens: int  # at least 1
    seed: int  # of this request alone, for engines that sample each request on its own


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled continuation."""

    request_id: str
    token_ids: list[int]  # the stop token included
    logprobs: list[float]  # under the distribution that was sampled from (after temperature, top-k, top-p)


class RolloutEngine(Protocol):
    """Submit requests at any time; each `poll` does one unit of work and returns what has finished."""

    max_length: int | None  # tokens of prefix and continuation together, None for no limit
    batched: bool  # whether all rollouts of a poll end together

    def submit(self, requests: Sequence[RolloutRequest]) -> None: ...

    def poll(self) -> list[Rollout]: ...

    def generated(self, request_id: str) -> int:
        """Tokens that a request in flight has been given so far, or fewer."""

    def partial(self, request_id: str, start: int, stop: int) -> tuple[list[int], list[float]]:
        """Sampled tokens `start` to `stop` of a request in flight, with their log-probabilities.

        `stop` is at most what `generated` said, which an engine that cannot look inside its requests keeps at 0.
        """

    def abort(self) -> None:
        """Forget every request in flight."""
