"""The current policy as an engine that samples rollouts: vLLM with the weights of this step, or the model itself."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
from trl.extras.profiling import profiling_context
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation

from ..branching import uses_entropies
from ..engines.base import RolloutEngine
from ..engines.entropies import TeacherForcedEntropies
from ..engines.transformers import unsharded
from ..engines.vllm import VLLMEngine
from ..engines.vllm_server import VLLMServerEngine
from .latent_branches import LatentBranches
from .teacher_forcing import teacher_forced


class PolicyEngine(LatentBranches):
    """For a `GRPOTrainer` with an `IBTPOConfig`."""

    @contextmanager
    def _engine(self) -> Iterator[RolloutEngine]:
        """The rollout engine, holding what generation needs (weights in sync or gathered) until the batch is grown."""
        if self.args.use_vllm:
            self._sync_vllm()
            engine = self._vllm_engine()
            with ExitStack() as stack:
                colocated = self.vllm_mode == "colocate"
                stack.enter_context(_awake(self.vllm_generation) if colocated else closing(engine))
                measures = uses_entropies(self._strategy) and self.args.fork_entropy == "exact"
                steers = self.args.latent_mode == "psa"
                asks = measures or steers or self.args.latent_prior is not None  # a prior reads hidden states
                model = stack.enter_context(self._policy()) if asks else None
                if measures:
                    measure = partial(self._token_entropies, model)
                    engine = TeacherForcedEntropies(engine, measure, self.args.per_device_train_batch_size)
                yield self._with_steered_branches(engine, model) if steers else engine
            return
        with self._policy() as model:
            yield self._transformers_engine(model)

    @contextmanager
    def _policy(self) -> Iterator[torch.nn.Module]:
        """The policy as a model whose forward pass waits for no other process."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=getattr(self, "generation_kwargs", None),  # TRL has none with vLLM
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            unsharded(self.model_wrapped, reshard_after_forward=self._reshards_after_forward),
        ):
            yield model

    def _token_entropies(self, model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list]:
        """Entropy where each token of the second sequences was sampled, after the first ones."""
        return [entropies.tolist() for _, entropies in teacher_forced(self, model, pairs, entropies=True)]

    @property
    def _reshards_after_forward(self) -> bool:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is None or bool(plugin.reshard_after_forward)

    def _sync_vllm(self) -> None:
        """Push the weights once per optimizer step, as TRL does; sleeping weights are always pushed."""
        generation = self.vllm_generation
        asleep = self.vllm_mode == "colocate" and generation._llm_weights_sleeping
        if self.state.global_step != self._last_loaded_step or asleep:
            with profiling_context(self, "sync_weights"):
                generation.sync_weights()
            self._last_loaded_step = self.state.global_step
            if self.vllm_mode == "server":  # only the main process pushes; nobody may sample before it is done
                self.accelerator.wait_for_everyone()

    def _vllm_engine(self) -> VLLMEngine | VLLMServerEngine:
        generation = self.vllm_generation
        if self.vllm_mode == "colocate":
            return VLLMEngine(
                generation.llm,
                sampling_arguments(generation),
                self.args.reproducible_rollouts,
                latents=self._steering if self.args.latent_mode == "softmax" else None,
            )
        if not hasattr(generation, "vllm_client"):  # TRL connects the main process alone
            generation.vllm_client = VLLMClient(
                base_url=generation.server_base_url or f"http://{generation.server_host}:{generation.server_port}",
                connection_timeout=generation.server_timeout,
            )
        client = generation.vllm_client
        max_length = client.get_server_info()["model_config"]["max_model_len"]
        return VLLMServerEngine(
            client, sampling_arguments(generation), max_length, request_seeds=self.args.reproducible_rollouts
        )


@contextmanager
def _awake(generation: VLLMGeneration) -> Iterator[None]:
    """Keep the colocated engine awake from the first to the last rollout; it sleeps once, after them."""
    if generation.enable_sleep_mode:
        generation.llm.wake_up(tags=["kv_cache"])
    try:
        yield
    finally:
        if generation.enable_sleep_mode:
            # Level 2 drops weights and prefix cache; TRL pushes the weights again before the next batch.
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True


def sampling_arguments(generation: VLLMGeneration) -> dict[str, Any]:
    """What TRL samples with, as arguments of vLLM's `SamplingParams`; budget and seed come with each request."""
    return {
        "repetition_penalty": generation.repetition_penalty,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "min_p": generation.min_p or 0.0,
        **generation.generation_kwargs,
    }
