"""Rollouts with `model.generate`: every poll runs all submitted requests as one left-padded batch."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl.trainer.utils import entropy_from_logits

from .base import LatentSteering, Rollout, RolloutRequest, refuse_latents


class TransformersEngine:
    """Generation with transformers, for machines without vLLM.

    Samples from torch's global generator, as TRL does: runs repeat with the trainer's seed and the same batches.

    Args:
        model: unwrapped model, ready to generate (also a PEFT model).
        generation_config: TRL's; its stop tokens all end a rollout.
        pad_token_id: any token; padding is masked.
        request_seeds: sample each request from its own seed instead, so that a rollout depends on its prefix and seed
            alone, not on what else is in the batch or on how many processes share the work.
        latents: what the latents of requests do to `model`; without it, requests with latents are refused.
    """

    clock = "polls"
    max_length = None  # transformers generates past the model's positions, as in TRL

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig,
        pad_token_id: int,
        request_seeds: bool = False,
        latents: LatentSteering | None = None,
    ):
        self._model = model
        self._latents = latents
        self._request_seeds = request_seeds
        self._pad_token_id = pad_token_id
        self._warpers = _warpers(generation_config)
        self._temperature = generation_config.temperature or 1.0
        # The warpers run as custom processors, so that the recorder can come after them.
        self._config = deepcopy(generation_config)
        # `generate` fills a None from the checkpoint's generation config, so its min_p needs a neutral number.
        min_p = None if model.generation_config.min_p is None else 0.0
        self._config.update(temperature=1.0, top_k=0, top_p=1.0, min_p=min_p)
        stop_ids = generation_config.eos_token_id
        self._stop_ids = frozenset([stop_ids] if isinstance(stop_ids, int) else stop_ids or [])
        self._queue: list[RolloutRequest] = []

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        if self._latents is None:
            refuse_latents(requests, "this engine was made without `latents`, which say what to do with one")
        self._queue.extend(requests)

    def generated(self, request_id: Hashable) -> int:
        return 0  # all or nothing

    def partial(self, request_id: Hashable, start: int, stop: int) -> tuple[list[int], list[float]]:
        return [], []

    def abort(self) -> None:
        self._queue.clear()

    def poll(self) -> list[Rollout]:
        if not self._queue:
            return []
        requests, self._queue = self._queue, []
        device = self._model.device
        width = max(len(request.prefix_ids) for request in requests)
        padding = [width - len(request.prefix_ids) for request in requests]
        input_ids = torch.tensor(
            [[self._pad_token_id] * pad + request.prefix_ids for pad, request in zip(padding, requests, strict=True)],
            device=device,
        )
        attention_mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
        budgets = torch.tensor([request.max_tokens for request in requests], device=device)
        self._config.max_new_tokens = int(budgets.max())
        recorder, entropies = _SampledLogprobs(), _Entropies(self._temperature)
        processors = [*self._warpers, recorder]
        if any(request.entropies for request in requests):
            processors.insert(0, entropies)
        if self._request_seeds:
            processors.append(_SeededSampler([request.seed for request in requests], device))
        with torch.no_grad(), self._steering(requests, padding) as steering:
            sequences = self._model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=self._config,
                logits_processor=LogitsProcessorList([*steering, *processors]),
                stopping_criteria=StoppingCriteriaList([_TokenBudgets(width, budgets)]),
                synced_gpus=False,  # growth makes no collective call
            )
        token_ids = sequences[:, width:].tolist()
        logprobs = recorder.finish(sequences).tolist()
        rollouts = []
        for row, (request, ids, values) in enumerate(zip(requests, token_ids, logprobs, strict=True)):
            stop = next((position + 1 for position, token in enumerate(ids) if token in self._stop_ids), len(ids))
            length = min(stop, request.max_tokens)
            found = entropies.of(row, length) if request.entropies else None
            rollouts.append(Rollout(request.request_id, ids[:length], values[:length], entropies=found))
        return rollouts

    def _steering(self, requests: Sequence[RolloutRequest], padding: Sequence[int]) -> AbstractContextManager[list]:
        if all(request.latent is None for request in requests):
            return nullcontext([])
        return self._latents.steer(requests, padding)


@contextmanager
def unsharded(model: torch.nn.Module, reshard_after_forward: bool = True) -> Iterator[None]:
    """Hold the whole weights of an FSDP2 model in every process; other models are left alone.

    Processes run different numbers of forward passes while their trees grow. A forward pass of a sharded model gathers
    weights from the other processes, which would wait for it for ever.

    Args:
        model: as `accelerator.prepare` returns it.
        reshard_after_forward: what forward passes do afterwards.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)
            module.reshard()


# Options that return something else than one sample, or change its distribution after the log-probs are recorded.
_UNSUPPORTED_OPTIONS = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "do_sample": True,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}


def _warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """Temperature, top-k, top-p and min-p in the order in which transformers applies them."""
    for name, neutral in _UNSUPPORTED_OPTIONS.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"`generation_kwargs` sets `{name}` to {value!r}, which is not supported: a tree needs one sample per "
                "request and its log-probabilities. Sample with temperature, top_k, top_p and min_p."
            )
    warpers: list[LogitsProcessor] = []
    if config.temperature is not None and config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(top_k=config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p=config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(min_p=config.min_p))
    return warpers


class _SampledLogprobs(LogitsProcessor):
    """Records the log-probability of each sampled token, holding one step's distribution at a time."""

    def __init__(self):
        self._last: torch.Tensor | None = None  # (B, V)
        self._sampled: list[torch.Tensor] = []  # (B,) each

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._last is not None:
            self._gather(input_ids[:, -1])
        self._last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def finish(self, sequences: torch.LongTensor) -> torch.Tensor:
        """Log-probabilities of all sampled tokens, `(B, T)`."""
        self._gather(sequences[:, -1])
        return torch.stack(self._sampled, dim=1)

    def _gather(self, token_ids: torch.LongTensor) -> None:
        self._sampled.append(self._last.gather(1, token_ids[:, None])[:, 0])


class _Entropies(LogitsProcessor):
    """Records the entropy of the whole vocabulary at the sampling temperature, before anything is cut off."""

    def __init__(self, temperature: float):
        self._temperature = temperature
        self._found: list[torch.Tensor] = []  # (B,) each

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._found.append(entropy_from_logits(scores.float() / self._temperature))
        return scores

    def of(self, row: int, length: int) -> list[float]:
        """Of the first tokens of a row."""
        return torch.stack(self._found[:length])[:, row].tolist()


class _SeededSampler(LogitsProcessor):
    """Draws each row's token from the row's own generator, and leaves `generate` that token alone to choose."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = torch.softmax(scores.float(), dim=-1)
        drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(rows, self._generators, strict=True)]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn), 0.0)


class _TokenBudgets(StoppingCriteria):
    """Ends each row at its own number of new tokens."""

    def __init__(self, prefix_width: int, budgets: torch.Tensor):
        self._limits = prefix_width + budgets

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return input_ids.shape[1] >= self._limits
