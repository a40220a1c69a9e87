"""Rollouts with vLLM: trees grow inside the continuous batch of an engine that TRL made.

`VLLMEngine` drives the colocated engine: `submit` adds requests, `poll` is one engine step, so trees at different
rounds share every batch. `VLLMServerEngine` sends each rollout to a `vllm serve` of its own requests. Prefixes are
token ids, so vLLM's prefix cache (on by default) finds the blocks that earlier rollouts left behind.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging
from trl.generation.vllm_generation import VLLMGeneration

from .base import Rollout, RolloutRequest

logger = logging.get_logger(__name__)


def sampling_arguments(generation: VLLMGeneration) -> dict[str, Any]:
    """What TRL samples with, as arguments of vLLM's `SamplingParams`; budget and seed come with each request."""
    return {
        "repetition_penalty": generation.repetition_penalty,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "min_p": generation.min_p or 0.0,
        **generation.generation_kwargs,
        "n": 1,
        "logprobs": 0,  # the sampled token's
    }


class VLLMEngine:
    """The colocated engine.

    Use `awake` around a generation batch.

    Args:
        generation: TRL's, in colocate mode, its weights in sync.
        request_seeds: sample each request from its own seed, so that a rollout depends on its prefix and seed alone,
            not on what else is in the batch.
    """

    clock = "tokens"
    _numbers = itertools.count()  # makes request ids unique in an engine that outlives this object

    def __init__(self, generation: VLLMGeneration, request_seeds: bool = True):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._generation = generation
        self._request_seeds = request_seeds
        self._llm_engine = generation.llm.llm_engine
        self.max_length = _longest_request(self._llm_engine.vllm_config)
        self._sampling = {
            **sampling_arguments(generation),
            "output_kind": RequestOutputKind.FINAL_ONLY,
            "detokenize": bool(generation.generation_kwargs.get("stop")),
        }
        self._sampling_params = SamplingParams
        self._in_flight: dict[str, Hashable] = {}  # what vLLM was given as the id of a request, to ours
        self._internal: dict[Hashable, str] = {}  # ours to the id that vLLM makes of what it is given
        self.cached_tokens = 0  # prefix tokens that were not computed again
        self.prefix_tokens = 0

    @contextmanager
    def awake(self) -> Iterator["VLLMEngine"]:
        """Keep the engine awake from the first to the last rollout; it sleeps once, after them."""
        generation = self._generation
        if generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["kv_cache"])
        try:
            yield self
        finally:
            if generation.enable_sleep_mode:
                # Level 2 drops weights and prefix cache; TRL pushes the weights again before the next batch.
                generation.llm.sleep(level=2)
                generation._llm_weights_sleeping = True

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            seed = request.seed if self._request_seeds else None
            parameters = self._sampling_params(**self._sampling, max_tokens=request.max_tokens, seed=seed)
            number = f"tree-{next(self._numbers)}"
            internal = self._llm_engine.add_request(number, {"prompt_token_ids": request.prefix_ids}, parameters)
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
            rollouts.append(Rollout(request_id, *_with_logprobs(completion.token_ids, completion.logprobs)))
        return rollouts

    def generated(self, request_id: Hashable) -> int:
        internal = self._internal.get(request_id)
        return 0 if internal is None else self._state(internal).detokenizer.num_output_tokens()

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float]]:
        state = self._state(self._internal[request_id])
        return _with_logprobs(
            state.detokenizer.output_token_ids[start:stop], state.logprobs_processor.logprobs[start:stop]
        )

    def _state(self, internal: str) -> Any:
        """What vLLM keeps of a request in flight."""
        return self._llm_engine.output_processor.request_states[internal]

    def abort(self) -> None:
        if self._in_flight:
            self._llm_engine.abort_request(list(self._in_flight))
            self._in_flight.clear()
            self._internal.clear()


def _with_logprobs(token_ids: Sequence[int], entries: Sequence[dict]) -> tuple[list[int], list[float]]:
    """Sampled tokens and their log-probabilities, out of vLLM's entries for each position."""
    return list(token_ids), [entry[token_id].logprob for entry, token_id in zip(entries, token_ids, strict=True)]


def _longest_request(vllm_config: Any) -> int:
    """Tokens of prefix and continuation together that the engine can take."""
    scheduler = vllm_config.scheduler_config
    longest = vllm_config.model_config.max_model_len
    return longest if scheduler.enable_chunked_prefill else min(longest, scheduler.max_num_batched_tokens)


def check_room(prompt_length: int, max_completion_length: int, max_length: int) -> int:
    """Completion tokens that fit behind a question.

    vLLM shortens a completion that does not fit without a word; here it is said once. A question that leaves no room
    at all is an error.
    """
    room = max_length - prompt_length
    if room < 1:
        raise ValueError(
            f"A prompt has {prompt_length} tokens, but vLLM's context holds {max_length} for prompt and completion "
            f"together. Set `vllm_max_model_length` to at least {prompt_length + max_completion_length} (prompt plus "
            "`max_completion_length`), or drop long prompts from the dataset."
        )
    if room < max_completion_length:
        logger.warning_once(
            f"A prompt of {prompt_length} tokens leaves {room} of the {max_completion_length} tokens of "
            f"`max_completion_length`, since vLLM's context holds {max_length}. Raise `vllm_max_model_length` to use "
            "all of them. Said once."
        )
    return min(room, max_completion_length)
