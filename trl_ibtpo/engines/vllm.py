"""Rollouts with vLLM inside this process: trees grow in its continuous batch.

`submit` adds requests and `poll` is one engine step, so trees at different rounds share every batch. Prefixes are
token ids, so vLLM's prefix cache (on by default) finds the blocks that earlier rollouts left behind.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

from .base import LIKELIEST, Rollout, RolloutRequest, refuse_latents, truncated_entropy


class VLLMEngine:
    """An engine inside this process.

    Args:
        llm: vLLM's `LLM`.
        sampling: arguments of vLLM's `SamplingParams`, such as `temperature`; the budget comes with each request.
        request_seeds: sample each request from its own seed, so that a rollout depends on its prefix and seed alone,
            not on what else is in the batch.
        lora_request: vLLM's `LoRARequest` of the adapter to sample with, if any.
        latents: a `latents.source.Steering` of the softmax arm; without it, requests with latents are refused.

    A request that asks for entropies gets those among the `LIKELIEST` tokens: vLLM gives no others. Exact ones come
    from `TeacherForcedEntropies`.
    """

    clock = "tokens"
    _numbers = itertools.count()  # makes request ids unique in an engine that outlives this object

    def __init__(
        self,
        llm: Any,
        sampling: dict[str, Any],
        request_seeds: bool = True,
        lora_request: Any = None,
        latents: Any = None,
    ):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._llm_engine = llm.llm_engine
        self.max_length = _longest_request(self._llm_engine.vllm_config)
        self._sampling_params = SamplingParams
        self._sampling = {
            **sampling,
            "n": 1,
            "logprobs": 0,  # the sampled token's
            "flat_logprobs": True,  # lists of numbers, where vLLM otherwise makes two objects a token
            "output_kind": RequestOutputKind.FINAL_ONLY,
            "detokenize": bool(sampling.get("stop")),
        }
        self._request_seeds = request_seeds
        self._lora_request = lora_request
        self._latents = latents
        if latents is not None:
            latents.install(llm)
        self._in_flight: dict[str, Hashable] = {}  # what vLLM was given as the id of a request, to ours
        self._internal: dict[Hashable, str] = {}  # ours to the id that vLLM makes of what it is given
        self.cached_tokens = 0  # prefix tokens that were not computed again
        self.prefix_tokens = 0

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        if self._latents is None:
            refuse_latents(requests, "vLLM has no place for it in its layers")
        extra = [None] * len(requests) if self._latents is None else self._latents.vllm_arguments(requests)
        for request, extra_args in zip(requests, extra, strict=True):
            seed = request.seed if self._request_seeds else None
            arguments = {**self._sampling, "max_tokens": request.max_tokens, "seed": seed}
            if request.entropies:
                arguments["logprobs"] = LIKELIEST
            parameters = self._sampling_params(**arguments)
            if extra_args is not None:
                parameters.extra_args = {**(parameters.extra_args or {}), **extra_args}
            number = f"tree-{next(self._numbers)}"
            internal = self._llm_engine.add_request(
                number, {"prompt_token_ids": request.prefix_ids}, parameters, lora_request=self._lora_request
            )
            self._in_flight[number] = request.request_id
            self._internal[request.request_id] = internal

    def poll(self) -> list[Rollout]:
        rollouts = []
        for output in self._llm_engine.step():
            if not output.finished or output.request_id not in self._in_flight:
                continue
            request_id = self._in_flight.pop(output.request_id)
            del self._internal[request_id]
            self.cached_tokens += output.num_cached_tokens or 0
            self.prefix_tokens += len(output.prompt_token_ids)
            completion = output.outputs[0]
            found = completion.logprobs
            rollouts.append(
                Rollout(request_id, list(completion.token_ids), _sampled(found), entropies=_entropies(found))
            )
        return rollouts

    def generated(self, request_id: Hashable) -> int:
        internal = self._internal.get(request_id)
        return 0 if internal is None else self._state(internal).detokenizer.num_output_tokens()

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float]]:
        state = self._state(self._internal[request_id])
        logprobs = state.logprobs_processor.logprobs[start:stop]
        return list(state.detokenizer.output_token_ids[start:stop]), _sampled(logprobs)

    def _state(self, internal: str) -> Any:
        """What vLLM keeps of a request in flight."""
        return self._llm_engine.output_processor.request_states[internal]

    def abort(self) -> None:
        if self._in_flight:
            self._llm_engine.abort_request(list(self._in_flight))
            self._in_flight.clear()
            self._internal.clear()


def _sampled(logprobs: Any) -> list[float]:
    """Of vLLM's `FlatLogprobs`, those of the sampled tokens, which come first at each place."""
    if len(logprobs.logprobs) == len(logprobs):
        return logprobs.logprobs
    return [logprobs.logprobs[start] for start in logprobs.start_indices]


def _entropies(logprobs: Any) -> list[float] | None:
    """Of vLLM's `FlatLogprobs`, the entropies among the likeliest tokens; None where they were not asked for."""
    if len(logprobs.logprobs) == len(logprobs):
        return None
    places = zip(logprobs.start_indices, logprobs.end_indices, strict=True)
    return [truncated_entropy(logprobs.logprobs[start + 1 : end]) for start, end in places]


def _longest_request(vllm_config: Any) -> int:
    """Tokens of prefix and continuation together that the engine can take."""
    scheduler = vllm_config.scheduler_config
    longest = vllm_config.model_config.max_model_len
    return longest if scheduler.enable_chunked_prefill else min(longest, scheduler.max_num_batched_tokens)
