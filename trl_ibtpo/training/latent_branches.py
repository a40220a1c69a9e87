"""Branches steered by latents (I2B-LPO): which engine samples them, and what the loss makes of how they were sampled.

Latents explore; they are no part of the policy. So the distribution that a branch is sampled from differs from the
policy's, as that of vLLM does by rounding, and is treated alike: its log-probabilities go to TRL's truncated
importance sampling (`vllm_importance_sampling_*`), whichever engine generates. Neither training nor evaluation knows
latents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from ..engines.base import RolloutEngine
from ..engines.routed import RoutedEngine
from ..engines.transformers import TransformersEngine
from ..latents.source import LatentSource, Steering


class LatentBranches:
    """For a `GRPOTrainer` with an `IBTPOConfig`: `latent_mode` and its fields."""

    _latent_source: LatentSource | None = None
    _steering: Steering | None = None

    def _attach_latents(self) -> None:
        """Prove that latents reach the model; before a checkpoint is loaded, on whose weights nothing may depend."""
        self._latent_source = LatentSource.from_config(self.args)
        if self._latent_source is not None:
            model = self.accelerator.unwrap_model(self.model)
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            if self.args.latent_mode == "psa" and type(base).generate is not GenerationMixin.generate:
                raise ValueError(
                    f"`latent_mode` is 'psa', but {type(base).__name__} has a `generate` of its own, which may bypass "
                    "the layers that latents act on. Use `latent_mode='softmax'`, or a model that generates as "
                    "transformers does."
                )
            self._steering = self._latent_source.attach(model, self.args.latent_mode)

    def _transformers_engine(self, model: torch.nn.Module) -> TransformersEngine:
        return TransformersEngine(
            model,
            self._generation_config,
            self._tokenizer.pad_token_id,
            request_seeds=self.args.reproducible_rollouts,
            latents=self._steering,
        )

    def _with_steered_branches(self, engine: RolloutEngine, model: torch.nn.Module) -> RolloutEngine:
        """vLLM for the initial rollouts, transformers for the branches that vLLM cannot steer."""
        return RoutedEngine(engine, self._transformers_engine(model))

    @property
    def _generation_config(self) -> GenerationConfig:
        """TRL's, which it makes only where transformers generates all rollouts."""
        if not self.args.use_vllm:
            return self.generation_config
        return GenerationConfig(
            do_sample=True,
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=self._tokenizer.bos_token_id,
            eos_token_id=self.eos_token_ids,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            cache_implementation=self.args.cache_implementation,
            disable_compile=True,
        )

    # ----- importance sampling ---------------------------------------------------------------------------------------

    @contextmanager
    def _corrected(self) -> Iterator[None]:
        """TRL corrects how completions were sampled where `use_vllm` says so. Which engine samples, `args` says."""
        before = self.use_vllm
        self.use_vllm = before or (self._steering is not None and self.model.training)
        try:
            yield
        finally:
            self.use_vllm = before

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._corrected():
            return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        with self._corrected():
            return super()._compute_loss(model, inputs)
