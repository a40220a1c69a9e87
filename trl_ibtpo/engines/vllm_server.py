"""Rollouts with a `vllm serve` on another machine."""

import math
from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from .base import LIKELIEST, Rollout, RolloutRequest, refuse_latents, truncated_entropy


class VLLMServerEngine:
    """A `vllm serve` on another machine, through TRL's client; every rollout is a request of its own.

    The server batches what arrives, so trees need not wait for each other here either. A poll returns as soon as one
    rollout is finished. With `branch_lookahead` above 0, and with strategies that fork tokens, rollouts join a
    tree in the order in which their answers arrive, so that trees then depend on timing.

    Args:
        client: TRL's `VLLMClient`.
        sampling: arguments of `client.generate`; others are passed on to the server.
        max_length: of the server's model, question and completion together.
        request_seeds: see `VLLMEngine`.
    """

    clock = "arrival"

    def __init__(self, client: Any, sampling: dict[str, Any], max_length: int, request_seeds: bool = True):
        self.max_length = max_length
        self._request_seeds = request_seeds
        self._client = client
        self._sampling = sampling
        self._executor = ThreadPoolExecutor(max_workers=256)  # open connections at a time
        self._in_flight: dict[Future, Hashable] = {}

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        refuse_latents(requests, "a vLLM server takes none")
        for request in requests:
            self._in_flight[self._executor.submit(self._generate, request)] = request.request_id

    def poll(self) -> list[Rollout]:
        finished, _ = wait(self._in_flight, return_when=FIRST_COMPLETED)
        for future in finished:
            del self._in_flight[future]
        return [future.result() for future in finished]

    def generated(self, request_id: Hashable) -> int:
        return 0  # the server does not say

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float]]:
        return [], []  # nor what it has sampled

    def abort(self) -> None:
        # What the server is working on ends by its own budget; it is waited for, so that nothing is left behind.
        running = [future for future in self._in_flight if not future.cancel()]
        wait(running)
        self._in_flight.clear()

    def close(self) -> None:
        """End the threads; whoever makes an engine closes it."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _generate(self, request: RolloutRequest) -> Rollout:
        known = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p")
        others = {key: value for key, value in self._sampling.items() if key not in known}
        output = self._client.generate(
            prompts=[request.prefix_ids],
            max_tokens=request.max_tokens,
            logprobs=LIKELIEST if request.entropies else 0,  # 0: the sampled token's
            generation_kwargs={**others, "seed": request.seed} if self._request_seeds else others,
            **{key: self._sampling[key] for key in known},
        )
        token_ids, logprobs = output["completion_ids"][0], output["logprobs"][0]
        if not request.entropies:
            return Rollout(request.request_id, token_ids, [_number(values[0]) for values in logprobs])
        return Rollout(
            request.request_id,
            token_ids,
            [
                _number(values[found.index(token_id)])
                for token_id, found, values in zip(token_ids, output["logprob_token_ids"][0], logprobs, strict=True)
            ],
            # Of 21 tokens where the one that was sampled is not among the 20 likeliest.
            entropies=[truncated_entropy([_number(value) for value in values[:LIKELIEST]]) for values in logprobs],
        )


def _number(logprob: float | None) -> float:
    """The server has None for what JSON cannot say."""
    return math.nan if logprob is None else logprob
