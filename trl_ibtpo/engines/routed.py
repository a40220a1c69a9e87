"""Two engines as one: requests with a latent go to the engine that can steer, all others to the fast one."""

from collections.abc import Hashable, Sequence

from .base import Clock, Rollout, RolloutEngine, RolloutRequest


class RoutedEngine:
    """Requests without a latent are answered by `plain`, those with one by `steered`.

    The steered engine runs when the plain one has nothing left to do, so that what it is given by then is one batch.

    Args:
        plain: vLLM, for example.
        steered: an engine that answers all its requests in one poll, such as a `TransformersEngine` with latents.
    """

    def __init__(self, plain: RolloutEngine, steered: RolloutEngine):
        self._plain = plain
        self._steered = steered
        self._in_plain: set[Hashable] = set()
        self.clock: Clock = plain.clock  # a steered request says that it has 0 tokens until it is answered
        limits = [engine.max_length for engine in (plain, steered) if engine.max_length is not None]
        self.max_length: int | None = min(limits, default=None)

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        plain = [request for request in requests if request.latent is None]
        self._plain.submit(plain)
        self._in_plain.update(request.request_id for request in plain)
        self._steered.submit([request for request in requests if request.latent is not None])

    def poll(self) -> list[Rollout]:
        if not self._in_plain:
            return self._steered.poll()
        rollouts = self._plain.poll()
        self._in_plain.difference_update(rollout.request_id for rollout in rollouts)
        return rollouts

    def generated(self, request_id: Hashable) -> int:
        return self._plain.generated(request_id)

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float | None]]:
        return self._plain.partial(request_id, start, stop)

    def abort(self) -> None:
        self._in_plain.clear()
        self._plain.abort()
        self._steered.abort()
