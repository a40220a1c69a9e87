"""The softmax arm inside vLLM: one logits processor of the engine, told of latents by the requests' own parameters.

vLLM takes classes of processors when an engine is made, which TRL does; so this one joins the processors of an engine
that runs. It works where vLLM runs inside this process and without speculative decoding.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from .strength import Strength

ARGUMENT = "ibtpo_latent"  # in `SamplingParams.extra_args`: z and the number of prompt tokens since the fork


class LatentLogitsProcessor(LogitsProcessor):
    """Adds `gamma(n) W_o z` to the logits of requests that say their `z`; all others stay bitwise as they are."""

    def __init__(self, weight: torch.Tensor, strength: Strength, device: torch.device):
        self.made_of = (weight, strength)
        self._weight = weight.to(device)  # W_o, (V, Z)
        self._strength = strength
        self._requests: dict[int, tuple[torch.Tensor, int, list[int]]] = {}  # by row of the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, self._new)

    def _new(self, parameters: SamplingParams, prompt_ids: Any, output_ids: list[int]):
        given = (parameters.extra_args or {}).get(ARGUMENT)
        if given is None:
            return None
        latent = torch.tensor(given["z"], dtype=self._weight.dtype, device=self._weight.device)
        return latent, given["since_fork"], output_ids

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._requests:
            return logits
        rows = list(self._requests)
        latents = torch.stack([latent for latent, _, _ in self._requests.values()])
        since = torch.tensor([start + len(ids) for _, start, ids in self._requests.values()], device=logits.device)
        shifts = self._strength.gates(since)[:, None] * (latents @ self._weight.T).float()
        logits[rows] += shifts.to(logits.dtype)
        return logits


def install(llm: Any, weight: torch.Tensor, strength: Strength) -> None:
    """Let the engine of `llm` steer by latents; a second call replaces what the first one has installed.

    Raises:
        ValueError: where this vLLM keeps its processors elsewhere, or its engine cannot have any.
    """
    config = llm.llm_engine.vllm_config
    if config.speculative_config is not None:
        raise ValueError(
            "`latent_mode` is 'softmax', but vLLM decodes speculatively, where it takes no logits processors. Leave "
            "speculative decoding off."
        )
    try:
        llm.collective_rpc(_join, args=(weight, strength))
    except Exception as error:  # whatever it is, nothing would be steered
        raise ValueError(
            f"`latent_mode` is 'softmax', but vLLM's logits processors cannot be reached here ({error}). Use a "
            "colocated vLLM that TRL supports, or `use_vllm=False`."
        ) from error


def _join(worker: Any, weight: torch.Tensor, strength: Strength) -> None:
    runner = getattr(worker, "worker", worker).model_runner
    processors = runner.input_batch.logitsprocs.non_argmax_invariant
    for each in processors:
        if isinstance(each, LatentLogitsProcessor):
            if each.made_of[0].data_ptr() == weight.data_ptr() and each.made_of[1] == strength:
                return
            processors.remove(each)
            break
    processors.append(LatentLogitsProcessor(weight, strength, runner.device))
