"""Entropies for engines that know none: a pass of the policy over what they have sampled."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from .base import Clock, Rollout, RolloutEngine, RolloutRequest

Measure = Callable[[list[tuple[list[int], list[int]]]], list[list[float]]]


class TeacherForcedEntropies:
    """An engine whose rollouts get the entropies that their requests ask for.

    Such rollouts are held back until a batch of them is sampled, or all of them, and go through the policy together.
    Others are handed on as they come.

    Args:
        engine: samples, and gives no entropies.
        measure: from prefixes and their continuations to the entropy at each token of the continuations.
        batch_size: rollouts that go through the policy together, at most.
    """

    def __init__(self, engine: RolloutEngine, measure: Measure, batch_size: int):
        self._engine, self._measure, self._batch_size = engine, measure, batch_size
        self._prefixes: dict[Hashable, list[int]] = {}  # of the requests that ask for entropies
        self._held: list[Rollout] = []

    @property
    def clock(self) -> Clock:
        return self._engine.clock

    @property
    def max_length(self) -> int | None:
        return self._engine.max_length

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        self._prefixes |= {each.request_id: each.prefix_ids for each in requests if each.entropies}
        self._engine.submit([replace(request, entropies=False) for request in requests])

    def poll(self) -> list[Rollout]:
        finished = []
        for rollout in self._engine.poll():
            (self._held if rollout.request_id in self._prefixes else finished).append(rollout)
        while self._held and (len(self._held) >= self._batch_size or len(self._held) == len(self._prefixes)):
            batch, self._held = self._held[: self._batch_size], self._held[self._batch_size :]
            pairs = [(self._prefixes.pop(rollout.request_id), rollout.token_ids) for rollout in batch]
            for rollout, entropies in zip(batch, self._measure(pairs), strict=True):
                finished.append(replace(rollout, entropies=entropies))
        return finished

    def generated(self, request_id: Hashable) -> int:
        held = self._find(request_id)
        return self._engine.generated(request_id) if held is None else len(held.token_ids)

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float | None]]:
        held = self._find(request_id)
        if held is None:
            return self._engine.partial(request_id, start, stop)
        return held.token_ids[start:stop], held.logprobs[start:stop]

    def abort(self) -> None:
        self._prefixes.clear()
        self._held.clear()
        self._engine.abort()

    def _find(self, request_id: Hashable) -> Rollout | None:
        return next((rollout for rollout in self._held if rollout.request_id == request_id), None)
