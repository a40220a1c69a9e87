"""Rollouts of several turns: what stands between two turns is made beside generation.

`TurnEngine` looks like any engine to growth. It has each turn sampled by the engine inside it, asks a `TurnHost` what
follows the turn (the result of a tool call), appends that as an observation and has the next turn sampled, until the
host says that the rollout is over. The host works in threads of its own: while it does, the engine samples whatever
else there is, unless it samples batch by batch, when every batch waits for the host.
"""

import math
from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from .base import Rollout, RolloutEngine, RolloutRequest

PATIENCE = 0.05  # seconds that a poll waits for the host: another tree may meanwhile get its rewards, and go on


class TurnHost(Protocol):
    """What turns are taken against: tools and environments. A future that raises ends the generation of all trees."""

    def begin(self, request: RolloutRequest) -> Future[RolloutRequest] | None:
        """Bring about what the request's prefix brought about; None where there is nothing to do.

        The result is the request; where that cannot be done, one that starts at the question instead.
        """

    def respond(self, request_id: Hashable, token_ids: list[int]) -> Future[list[int] | None] | None:
        """The observation that follows the turn `token_ids`; None, or a future of None, where the rollout is over."""

    def abort(self) -> None:
        """Stop what is under way and wait for nothing."""


@dataclass
class _Run:
    """A request in flight."""

    request: RolloutRequest
    token_ids: list[int] = field(default_factory=list)  # of all turns so far
    logprobs: list[float | None] = field(default_factory=list)  # None for observations
    entropies: list[float] = field(default_factory=list)  # NaN for observations; empty where nobody asked
    turns: int = 0
    restarted: bool = False

    def next_turn(self) -> RolloutRequest:
        """The request for one more turn, with a seed of its own."""
        seed = self.request.seed
        if self.turns:
            seed = int(np.random.SeedSequence([seed, self.turns]).generate_state(1)[0])
        return replace(
            self.request,
            prefix_ids=self.request.prefix_ids + self.token_ids,
            max_tokens=self.request.max_tokens - len(self.token_ids),
            seed=seed,
        )


class TurnEngine:
    """An engine whose rollouts go on after an observation.

    Args:
        inner: samples single turns.
        host: answers them.
    """

    def __init__(self, inner: RolloutEngine, host: TurnHost):
        self.max_length, self.clock = inner.max_length, inner.clock
        self._inner = inner
        self._host = host
        self._runs: dict[Hashable, _Run] = {}
        self._sampling: set[Hashable] = set()  # those that the inner engine works on
        self._waiting: dict[Future, Hashable] = {}  # those that the host works on

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        ready = []
        for request in requests:
            self._runs[request.request_id] = _Run(request)
            future = self._host.begin(request)
            if future is None:
                ready.append(request)
            else:
                self._waiting[future] = request.request_id
        self._sample(ready)

    def poll(self) -> list[Rollout]:
        # Where a poll samples a batch, what is in it, and so what is sampled, must not depend on which tool was first;
        # and one batch of all costs less than many small ones.
        if self.clock == "polls" and self._waiting:
            answered, not_done = wait(self._waiting, PATIENCE, return_when=FIRST_EXCEPTION)
            if not_done:
                for future in answered:
                    future.result()  # raises what the host raised: nobody need wait for the others then
                return []
        finished = self._continue()
        if self._sampling:
            finished += self._end_turns(self._inner.poll())
        elif not finished and self._waiting:
            wait(self._waiting, PATIENCE, return_when=FIRST_COMPLETED)
            finished += self._continue()
        return finished

    def generated(self, request_id: Hashable) -> int:
        run = self._runs.get(request_id)
        if run is None or run.restarted:  # it is not where its tree believes it to be
            return 0
        return len(run.token_ids) + (self._inner.generated(request_id) if request_id in self._sampling else 0)

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float | None]]:
        run = self._runs[request_id]
        token_ids, logprobs, known = run.token_ids[start:stop], run.logprobs[start:stop], len(run.token_ids)
        if stop > known:
            more_ids, more_logprobs = self._inner.partial(request_id, max(0, start - known), stop - known)
            return token_ids + more_ids, logprobs + more_logprobs
        return token_ids, logprobs

    def abort(self) -> None:
        try:
            self._inner.abort()
        finally:
            self._host.abort()
            self._runs.clear()
            self._sampling.clear()
            self._waiting.clear()

    def _sample(self, requests: list[RolloutRequest]) -> None:
        if requests:
            self._sampling.update(request.request_id for request in requests)
            self._inner.submit(requests)

    def _end_turns(self, turns: list[Rollout]) -> list[Rollout]:
        """Ask the host what follows each of the turns; the rollouts that are over."""
        finished = []
        for turn in turns:
            self._sampling.remove(turn.request_id)
            run = self._runs[turn.request_id]
            run.token_ids += turn.token_ids
            run.logprobs += turn.logprobs
            run.entropies += turn.entropies or []
            run.turns += 1
            future = self._host.respond(turn.request_id, turn.token_ids)
            if future is None:
                finished.append(self._finish(run))
            else:
                self._waiting[future] = turn.request_id
        return finished

    def _continue(self) -> list[Rollout]:
        """Go on with what the host has done; the rollouts that are over."""
        finished, ready = [], []
        for future in [future for future in self._waiting if future.done()]:
            run = self._runs[self._waiting.pop(future)]
            result = future.result()
            if isinstance(result, RolloutRequest):
                run.restarted = len(result.prefix_ids) < len(run.request.prefix_ids)
                run.request = result
            elif result is not None:
                run.token_ids += result
                run.logprobs += [None] * len(result)
                run.entropies += [math.nan] * len(result)
            if result is None or len(run.token_ids) >= run.request.max_tokens:
                finished.append(self._finish(run))
            else:
                ready.append(run.next_turn())
        self._sample(ready)
        return finished

    def _finish(self, run: _Run) -> Rollout:
        del self._runs[run.request.request_id]
        entropies = run.entropies if run.request.entropies else None
        return Rollout(run.request.request_id, run.token_ids, run.logprobs, run.restarted, entropies)
